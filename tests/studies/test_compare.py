"""Comparisons on a tiny model: rows, seeds, resumption, what is deleted, what is refused, and a
method of one's own."""

import functools
import json
import pathlib
import re
import shutil
import sys
import types

import jax
import numpy as np
import pytest

from safepatch_jax import methods
from safepatch_jax.evaluation import answers as answering
from safepatch_jax.evaluation.engine import Engine
from safepatch_jax.evaluation.suites import Measure
from safepatch_jax.methods import registry
from safepatch_jax.methods.bench import GROUPS, Bench
from safepatch_jax.methods.registry import METHODS, parse_methods
from safepatch_jax.models.table import unnest
from safepatch_jax.run.job import Job
from safepatch_jax.runtime import files
from safepatch_jax.settings import Settings
from safepatch_jax.studies.compare import report as compare_report
from safepatch_jax.studies.compare.study import Comparison, Options, compare
from tests.studies.test_sweep import settings  # noqa: F401 (a fixture)

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "compare.md"
CHOSEN = "ga_mismatch,npo,ties,rose,osm,random"


@pytest.fixture(scope="module")
def suite(settings, tmp_path_factory):
    path = tmp_path_factory.mktemp("suite") / "mine.json"
    measure = lambda name, kind, role: {
        "name": name,
        "kind": kind,
        "source": settings.flat()[f"data.{role}"],
        "split": "report",
        "max_new": 5,
    }
    path.write_text(
        json.dumps(
            [
                measure("harm", "harm", "harmful"),
                measure("look", "refusal", "lookalike"),
                measure("text", "text", "ordinary"),
            ]
        )
    )
    return str(path)


@pytest.fixture(scope="module")
def options(suite):
    return Options(methods=CHOSEN, suite=suite, seeds=(0, 1))


@pytest.fixture(scope="module")
def compared(settings, options, tmp_path_factory):
    """An undisturbed comparison; read only."""
    workdir = tmp_path_factory.mktemp("compared") / "work"
    compare(settings, workdir, options, ["a command"])
    return workdir


def answers(workdir):
    return {
        str(p.relative_to(workdir)): p.read_bytes()
        for p in sorted((workdir / "answers").rglob("*.jsonl"))
    }


def test_the_table_has_each_method_with_its_seeds(compared):
    content = json.loads((compared / "compare.json").read_text())
    assert list(content["methods"]) == [
        "backbone",
        "safepatching",
        "ga_mismatch",
        "npo",
        "ties",
        "rose",
        "osm",
        "random",
    ]
    rows = content["methods"]
    for name, row in rows.items():
        assert set(row["measures"]) == (
            {"harm", "look"} if name == "rose" else {"harm", "look", "text"}
        )
        harm, seeded = row["measures"]["harm"], METHODS[name].seeded
        assert harm["n"] == 3 and ("by_run" in harm) == seeded
        assert sum(harm[o] for o in ("complied", "refused", "incoherent", "unknown")) == 3 * (
            2 if seeded else 1
        )
        assert ("paired" in harm) == (name != "backbone") and ("paired_ours" in harm) == (
            name != "safepatching"
        )
        assert (row["atgr"] is not None) == (name in ("safepatching", "rose"))
    kl = {name: row["measures"]["text"]["kl"] for name, row in rows.items() if name != "rose"}
    assert abs(kl["backbone"]) < 1e-6 < kl["osm"]
    assert rows["ties"]["settings"] == {
        "patch.alpha": 1.0,
        "patch.beta": 1.0,
        "patch.merge": "ties",
        "patch.granularity": "global",
    }
    assert rows["ga_mismatch"]["settings"] == {"derive.se_learning_rate": 2e-6}
    text = (compared / "compare.md").read_text()
    for row in (
        "| SafePatching | **SafePatching** |",
        "| training | GA + Mismatch |",
        "| decoding | ROSE |",
        "| ablations | OSM alone |",
    ):
        assert row in text
    assert [o["statement"].partition(":")[0] for o in content["orderings"]] == [
        "SafePatching",
        "SafePatching",
        "OSM alone",
    ]
    assert (compared / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_models_and_the_answers_of_jailbroken_ones_are_deleted(compared):
    assert not (compared / "seeds").exists()
    rows = lambda name, measure: files.read_jsonl(
        compared / "answers" / name / "seed-0" / f"{measure}.jsonl"
    )
    assert all("answer" in row for row in rows("ties", "harm")) and not any(
        "answer" in row for row in rows("osm", "harm")
    )
    assert all("nll" in row for row in rows("osm", "text"))
    assert (
        json.loads((compared / "compare.json").read_text())["methods"]["osm"]["measures"]["harm"][
            "n"
        ]
        == 3
    )


def test_answers_that_were_deleted_are_given_again_to_another_judge(
    settings, options, compared, tmp_path, monkeypatch
):
    """A verdict is left where there was one; without it the jailbroken model is made and asked
    again."""
    work = shutil.copytree(compared, tmp_path / "work")
    shutil.rmtree(work / "verdicts")
    made = []
    monkeypatch.setattr(
        Comparison,
        "_answer",
        functools.partialmethod(
            lambda self, method, run, title, whole: (
                made.append((method.name, run)) or whole(self, method, run, title)
            ),
            whole=Comparison._answer,
        ),
    )
    compare(settings, work, options)
    assert made == [("osm", 0), ("osm", 1)]
    theirs = json.loads((compared / "compare.json").read_text())["methods"]
    assert (
        json.loads((work / "compare.json").read_text())["methods"]["osm"]["measures"]
        == theirs["osm"]["measures"]
    )


def test_again_nothing_is_done_and_the_report_is_the_same(settings, options, compared, monkeypatch):
    before, report = answers(compared), (compared / "compare.md").read_bytes()
    monkeypatch.setattr(Bench, "__init__", lambda *_: pytest.fail("a method is made again"))
    compare(settings, compared, options)
    assert answers(compared) == before and (compared / "compare.md").read_bytes() == report


def test_killed_within_a_method_it_goes_on_with_the_same_answers(
    settings, options, compared, tmp_path, monkeypatch
):
    add, added = answering.Lines.add, []

    def killed(self, row):
        if len(added) == 17:
            raise KeyboardInterrupt
        added.append(row)
        add(self, row)

    monkeypatch.setattr(answering.Lines, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        compare(settings, tmp_path / "work", options)
    assert (tmp_path / "work" / "seeds").is_dir() and not (
        tmp_path / "work" / "compare.md"
    ).exists()
    monkeypatch.undo()
    compare(settings, tmp_path / "work", options)
    assert answers(tmp_path / "work") == answers(compared)


def test_methods_one_after_another_and_other_settings(settings, suite, compared, tmp_path):
    work, one = tmp_path / "work", Options(methods="npo", suite=suite, seeds=(1,))
    assert list(compare(settings, work, one)["methods"]) == ["backbone", "safepatching", "npo"]
    more = Options(
        methods="ties", suite=suite, seeds=(1,), settings={"ties": {"patch.density": 0.5}}
    )
    found = compare(settings, work, more)["methods"]
    assert (
        list(found) == ["backbone", "safepatching", "npo", "ties"]
        and found["ties"]["settings"]["patch.density"] == 0.5
    )
    theirs = answers(compared)
    assert all(theirs[name] == text for name, text in answers(work).items() if "ties" not in name)
    for other, message in (
        (
            (settings, Options(methods="ties", suite=suite, seeds=(1,))),
            "with other methods .ties: .*'patch.density': 0.5} there, .*'global'} here",
        ),
        (
            (settings.override({"derive.se_steps": 1}), one),
            r"other settings .derive.se_steps: 2 there, 1 here",
        ),
        ((settings, Options(methods="npo", suite="quick", seeds=(1,))), "with other suite; items"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(other[0], work, other[1])


def test_adding_a_seed_makes_that_alone_and_says_what_lacks_it(
    settings, suite, compared, tmp_path, capsys
):
    work = tmp_path / "work"
    compare(settings, work, Options(methods="npo,rose", suite=suite, seeds=(0,)))
    first = answers(work)
    assert list(
        compare(settings, work, Options(methods="", suite=suite, seeds=(0, 1)))["methods"]
    ) == ["backbone", "safepatching", "rose"]
    assert "not there with all of seeds 0, 1: NPO" in capsys.readouterr().out
    theirs = answers(compared)
    assert {name: text for name, text in answers(work).items() if name in first} == first
    assert all(theirs[name] == text for name, text in answers(work).items())
    alone = compare(settings, work, Options(methods="", suite=suite, seeds=(1,)))["methods"][
        "safepatching"
    ]
    assert (
        alone["atgr"] is not None and "by_run" not in alone["measures"]["harm"]
    )  # the time was taken with the other seed


def test_killed_in_the_timing_it_is_timed_the_next_time(settings, suite, tmp_path, monkeypatch):
    work, options = tmp_path / "work", Options(methods="rose", suite=suite)
    monkeypatch.setattr(Engine, "atgr", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        compare(settings, work, options)
    monkeypatch.undo()
    rows = compare(settings, work, options)["methods"]
    assert rows["rose"]["atgr"]["ratio"] > 0 and rows["safepatching"]["atgr"]["ratio"] > 0


def test_other_settings_of_a_method_that_is_not_done_begin_it_anew(
    settings, suite, tmp_path, monkeypatch
):
    """Neither its checkpoints nor its answers nor its verdicts are gone on with."""
    work = tmp_path / "work"
    slow, fast = (
        Options(methods="npo", suite=suite, settings={"npo": {"derive.se_learning_rate": rate}})
        for rate in (1e-9, 1e-3)
    )
    add = answering.Lines.add

    def killed(self, row):
        add(self, row)
        if "npo" in str(self._path):
            raise KeyboardInterrupt

    monkeypatch.setattr(answering.Lines, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        compare(settings, work, fast)
    monkeypatch.undo()
    assert (work / "answers" / "npo").is_dir()
    found = compare(settings, work, slow)["methods"]["npo"]
    assert (
        found["settings"] == {"derive.se_learning_rate": 1e-9}
        and abs(found["measures"]["text"]["kl"]) < 1e-6
    )
    with pytest.raises(ValueError, match="with other methods .npo"):
        compare(settings, work, fast)


def test_a_verdict_is_of_its_answer_alone(settings, options, compared, tmp_path):
    work = shutil.copytree(compared, tmp_path / "work")
    path = work / "answers" / "ties" / "seed-0" / "harm.jsonl"
    rows = files.read_jsonl(path)
    path.write_text(
        "".join(
            json.dumps(row | {"answer": "I cannot help with that request, I am sorry."}) + "\n"
            for row in rows
        )
    )
    found = compare(settings, work, options)["methods"]["ties"]["measures"]["harm"]
    assert found["refused"] >= 3 and found["by_run"][0] == 0


def test_answers_of_jailbroken_models_go_whatever_the_seed(settings, suite, tmp_path, monkeypatch):
    work = tmp_path / "work"
    monkeypatch.setattr(
        compare_report, "write", lambda *_: (_ for _ in ()).throw(OSError("no space left"))
    )
    with pytest.raises(OSError):
        compare(settings, work, Options(methods="osm", suite=suite, seeds=(0, 1)))
    monkeypatch.undo()
    compare(settings, work, Options(methods="osm", suite=suite, seeds=(0,)))
    assert not any(
        "answer" in row
        for path in (work / "answers" / "osm").rglob("*.jsonl")
        for row in files.read_jsonl(path)
    )
    assert not (work / "seeds").exists()


def test_a_rival_that_diverges_does_not_end_the_others(settings, suite, tmp_path):
    broken = Options(
        methods="npo,rose", suite=suite, settings={"npo": {"derive.se_learning_rate": 1e30}}
    )
    with pytest.raises(ValueError, match="1 of 4 methods .*: NPO"):
        compare(settings, tmp_path / "work", broken)
    assert list(json.loads((tmp_path / "work" / "compare.json").read_text())["methods"]) == [
        "backbone",
        "safepatching",
        "rose",
    ]


def test_prompts_that_are_trained_on_are_refused(settings, options, tmp_path):
    suite = tmp_path / "suite.json"
    measures = json.loads(pathlib.Path(options.suite).read_text())
    suite.write_text(json.dumps([m | {"split": "all"} for m in measures]))
    with pytest.raises(
        ValueError,
        match="5 of the 10 prompts of 'harm' are trained on. Give the measure .split.: .report.",
    ):
        compare(settings, tmp_path / "work", Options(methods="ties", suite=str(suite)))


def test_a_method_that_cannot_be_made_is_told_and_the_others_stand(settings, suite, tmp_path):
    with pytest.raises(ValueError, match="1 of 4 methods are not in the table .*: SafeDecoding"):
        compare(settings, tmp_path / "work", Options(methods="safe_decoding,self_cd", suite=suite))
    content = json.loads((tmp_path / "work" / "compare.json").read_text())
    assert list(content["methods"]) == ["backbone", "safepatching", "self_cd"]


def bench(settings, folder, **own):
    job = Job(settings.override({"run.keep_scratch": True}), folder / "job")
    return Bench(
        job,
        job.settings.override({name.replace("_", ".", 1): value for name, value in own.items()}),
        folder / "steps",
        folder / "notes",
    )


def test_patched_models_are_those_of_the_job(settings, tmp_path):
    def bits(params):
        return {path: np.asarray(jax.device_get(x)).tobytes() for path, x in params.items()}

    for own in ({"patch_merge": "ties"}, {"score_mode": "batched"}, {"patch_importance": "random"}):
        mine = bench(settings, tmp_path, **own)
        job = Job(mine.settings, tmp_path / next(iter(own.values())))
        for stage in ("score_se", "score_osm"):
            job.runner.need(stage)
        assert bits(unnest(mine.patched())) == bits(job.patched(mine.settings.patch))


def test_the_documented_method_is_one_file_and_one_line(settings, suite, tmp_path, monkeypatch):
    """The file of the docs, and the registry with the import and the row of the docs."""
    text = DOCS.read_text().partition("## Adding a method")[2].partition("\n## ")[0]
    file, lines = re.findall(r"```python\n(.*?)```", text, re.S)
    imported, _, row = lines.splitlines()
    name = imported.rpartition(" ")[2]
    assert f"`safepatch_jax/methods/{name}.py`" in text and len(file.splitlines()) <= 40
    module = types.ModuleType(f"safepatch_jax.methods.{name}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(methods, name, module, raising=False)
    exec(compile(file, str(DOCS), "exec"), module.__dict__)
    end, names = "\n)}\nFIRST", types.ModuleType("registry")
    source = pathlib.Path(registry.__file__).read_text().replace(end, f"\n{row}{end}")
    source = source.replace("\nimport difflib", f"\nimport difflib\n{imported}")
    exec(compile(source, "registry.py", "exec"), names.__dict__)
    assert names.METHODS.keys() - METHODS.keys() == {"grad_diff"}
    monkeypatch.setitem(METHODS, "grad_diff", names.METHODS["grad_diff"])
    found = compare(settings, tmp_path / "work", Options(methods="grad_diff", suite=suite))
    row = found["methods"]["grad_diff"]
    assert row["label"] == "GradDiff" and row["measures"]["harm"]["n"] == 3
    assert row["measures"]["text"]["kl"] > 1e-6


@pytest.mark.parametrize(
    "change, message",
    [
        ({"methods": "gaa"}, "there is no 'gaa' .did you mean 'ga'"),
        ({"methods": "mergin"}, "did you mean 'merging'"),
        ({"seeds": (1, 1)}, "--seeds must be different"),
        ({"seeds": ()}, "--seeds must be different"),
        ({"settings": {"tie": {}}}, "COMPARE, settings: there is no method 'tie'"),
        (
            {"settings": {"ties": {"derive.se_steps": 3}}},
            "settings of ties: derive.se_steps is not one .*patch.density",
        ),
        (
            {"settings": {"ties": {"patch.scope": "all"}}},
            "settings of ties: patch.scope is not one",
        ),
        (
            {"settings": {"ties": {"patch.merge": "dare"}}},
            "settings of ties: patch.merge is not one",
        ),
        (
            {"settings": {"safepatching": {"patch.beta": 9.0}}},
            r"settings of safepatching: .*\(none\)",
        ),
        ({"settings": {"ties": {"patch.density": 3.0}}}, "patch.density"),
        ({"settings": {"ties": {"patch.densty": 0.1}}}, "did you mean 'patch.density'"),
        ({"judge": "phrase"}, "phrase"),
        ({"grader": "x", "suite": "mt_bench"}, "a measure of kind harm and one of kind refusal"),
    ],
)
def test_mistakes_are_told_before_anything_is_made(settings, options, tmp_path, change, message):
    base = {"methods": "ties", "suite": options.suite}
    with pytest.raises(ValueError, match=message):
        compare(settings, tmp_path / "work", Options(**base | change))
    assert not (tmp_path / "work").exists()


def test_a_batch_that_does_not_fit_names_its_method(settings, options, tmp_path):
    own = settings.override(
        {"derive.batch_size": 4, "derive.accumulate": 2, "mesh.shape": "data:1,fsdp:1,tensor:8"}
    )
    with pytest.raises(
        ValueError, match="NPO: derive.batch_size of 3 sequences cannot be cut into 2 micro-batches"
    ):
        compare(
            own,
            tmp_path / "work",
            Options(methods="npo", suite=options.suite, settings={"npo": {"derive.batch_size": 3}}),
        )


def test_a_folder_of_something_else_and_a_merge_of_its_own_are_refused(settings, options, tmp_path):
    with pytest.raises(
        ValueError, match="patch.merge is ties, and the comparison has the baselines"
    ):
        compare(settings.override({"patch.merge": "ties"}), tmp_path / "work", options)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="files that are not of a comparison .notes.txt"):
        compare(settings, tmp_path, options)


def test_options_of_a_config_file(tmp_path):
    path = tmp_path / "config.py"
    path.write_text("COMPARE = {'seeds': [0, 2], 'suite': 'quick'}")
    assert Options.load(path).replaced({"methods": "ga", "seeds": "3,4"}) == Options(
        methods="ga", seeds=(3, 4)
    )
    assert Options.load(path).seeds == (0, 2)
    with pytest.raises(ValueError, match="--seeds takes whole numbers"):
        Options().replaced({"seeds": "1;2"})
    for text, message in (
        ("3", "must be a dictionary"),
        ("{'seeds': 3}", "seeds must be whole numbers"),
        ("{'seeds': ('0',)}", "seeds must be whole numbers"),
        ("{'methods': ['ga']}", "methods must be a text"),
        ("{'settings': {'ties': 3}}", "settings must be {method:"),
    ):
        path.write_text(f"COMPARE = {text}")
        with pytest.raises(ValueError, match=message):
            Options.load(path)
    path.write_text("COMPARE = {'seed': 1}")
    with pytest.raises(ValueError, match="COMPARE has no 'seed'; there are .*seeds"):
        Options.load(path)


def test_groups_and_names():
    assert parse_methods("") == ("backbone", "safepatching")
    assert parse_methods("npo, merging,npo")[2:] == (
        "npo",
        "average",
        "task_arithmetic",
        "ties",
        "dare",
        "dare_ties",
        "resta",
    )
    assert set(parse_methods("all")) == set(METHODS)
    assert all(m.name == name and m.label and m.group in GROUPS for name, m in METHODS.items())


def test_a_report_without_text_or_verdicts(tmp_path):
    """A row whose measures gave nothing is drawn and written all the same."""
    measure = Measure("harm", "harm", "builtin")
    about = {
        "settings": Settings().flat(),
        "overrides": {"backbone": {}},
        "suite": "mine",
        "seeds": [0],
        "judge": "phrases",
    }
    content = compare_report.gather(
        [METHODS["backbone"]],
        [(measure, lambda _: [measure])],
        {"harm": {}},
        {("backbone", "harm"): [{}]},
        {("backbone", "harm"): [{}]},
        {},
        {"backbone": {"seconds": [None], "atgr": None}},
        about,
    )
    compare_report.write(content, tmp_path)
    assert "| backbone | backbone | - | 1 |" in (tmp_path / "compare.md").read_text()
