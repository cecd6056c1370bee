"""Comparisons on a tiny model: rows, seeds, resumption, what is deleted, what is refused, and a
method of one's own."""

import dataclasses
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
from safepatch_jax.evaluation.suites import Measure
from safepatch_jax.methods import registry
from safepatch_jax.methods.bench import GROUPS, Bench
from safepatch_jax.methods.registry import METHODS, parse_methods
from safepatch_jax.models.table import unnest
from safepatch_jax.run import models
from safepatch_jax.run.job import open_run
from safepatch_jax.runtime import files
from safepatch_jax.runtime.files import read_json
from safepatch_jax.settings import Settings
from safepatch_jax.studies.compare import report as compare_report
from safepatch_jax.studies.compare.options import ComparisonOptions
from safepatch_jax.studies.compare.study import compare
from tests.jobs import interrupted_at, stages_run

pytestmark = pytest.mark.usefixtures("one_device")
DOCS = pathlib.Path(__file__).parents[2] / "docs" / "compare.md"


@pytest.fixture(scope="module")
def options(suite):
    return ComparisonOptions(methods="ga_mismatch,npo,ties,rose,osm", suite=suite, seeds=(0, 1))


@pytest.fixture(scope="module")
def compared(one_device, settings, options, tmp_path_factory):
    """An undisturbed comparison; read only."""
    workdir = tmp_path_factory.mktemp("compared") / "work"
    compare(settings, workdir, options, ["a command"])
    return workdir


@pytest.fixture
def copy(compared, tmp_path):
    return shutil.copytree(compared, tmp_path / "work")


def answers(workdir):
    texts = {}
    for path in sorted((workdir / "answers").rglob("*.jsonl")):
        texts[str(path.relative_to(workdir))] = path.read_bytes()
    return texts


def made(text):
    """Return the methods, with their seeds, that a console says were made."""
    return re.findall(r"^\[\d+/\d+\] (.*): done in", text, re.M)


def test_the_table_has_each_method_with_its_seeds(compared):
    content = read_json(compared / "compare.json")
    rows = content["methods"]
    assert list(rows) == ["backbone", "safepatching", "ga_mismatch", "npo", "ties", "rose", "osm"]
    for name, row in rows.items():
        likelihoods = set() if name == "rose" else {"text"}
        assert set(row["measures"]) == {"harm", "look"} | likelihoods
        harm, runs = row["measures"]["harm"], 1 + METHODS[name].seeded
        assert harm["n"] == 3 and ("by_run" in harm) == METHODS[name].seeded
        outcomes = ("complied", "refused", "incoherent", "unknown")
        assert sum(harm[outcome] for outcome in outcomes) == 3 * runs
        assert ("paired" in harm) == (name != "backbone")
        assert ("paired_ours" in harm) == (name != "safepatching")
        assert (row["atgr"] is not None) == (name in ("safepatching", "rose"))
    divergence = {name: rows[name]["measures"]["text"]["kl"] for name in ("backbone", "osm")}
    assert abs(divergence["backbone"]) < 1e-6 < divergence["osm"]
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
    statements = [ordering["statement"].partition(":")[0] for ordering in content["orderings"]]
    assert statements == ["SafePatching", "SafePatching", "OSM alone"]
    assert (compared / "compare.png").read_bytes().startswith(b"\x89PNG")
    stages = {json.loads(row)["stage"] for row in (compared / "metrics.jsonl").open()}
    assert {"seed-0/derive_se", "seed-1/derive_osm"} <= stages


def test_models_and_the_answers_of_jailbroken_ones_are_deleted(compared):
    assert not (compared / "seeds").exists()
    folder = compared / "answers"
    assert all("answer" in row for row in files.read_jsonl(folder / "ties/seed-0/harm.jsonl"))
    assert not any("answer" in row for row in files.read_jsonl(folder / "osm/seed-0/harm.jsonl"))
    assert all("nll" in row for row in files.read_jsonl(folder / "osm/seed-0/text.jsonl"))


def test_again_nothing_is_done_and_the_report_is_the_same(settings, options, compared, capsys):
    before, report = answers(compared), (compared / "compare.md").read_bytes()
    compare(settings, compared, options)
    out = capsys.readouterr().out
    assert "12 models, 0 with something left to do" in out and not made(out)
    assert answers(compared) == before and (compared / "compare.md").read_bytes() == report


def test_what_is_missing_is_answered_again(settings, options, compared, copy, capsys):
    """A line that a kill cut off, and answers that were deleted after another judge had judged
    them."""
    path = copy / "answers" / "npo" / "seed-1" / "harm.jsonl"
    path.write_bytes(path.read_bytes()[:-10])
    shutil.rmtree(copy / "verdicts")
    compare(settings, copy, options)
    assert made(capsys.readouterr().out) == [
        "NPO, seed 1",
        "OSM alone, seed 0",
        "OSM alone, seed 1",
    ]
    assert answers(copy) == answers(compared)
    rows, theirs = (read_json(work / "compare.json")["methods"] for work in (copy, compared))
    assert rows["osm"]["measures"] == theirs["osm"]["measures"]


def test_a_verdict_is_of_its_answer_alone(settings, options, copy):
    path = copy / "answers" / "ties" / "seed-0" / "harm.jsonl"
    refusal = {"answer": "I cannot help with that request, I am sorry."}
    files.write_jsonl(path, [row | refusal for row in files.read_jsonl(path)])
    harm = compare(settings, copy, options)["methods"]["ties"]["measures"]["harm"]
    assert harm["refused"] >= 3 and harm["by_run"][0] == 0


def test_what_a_kill_left_of_a_method_is_timed_or_begun_anew_with_other_settings(
    settings, options, copy
):
    """ROSE was killed in its timing; NPO within its answers, which are not resumed with another
    learning rate."""
    shutil.rmtree(copy / "notes" / "rose")
    shutil.rmtree(copy / "notes" / "npo")
    (copy / "answers" / "npo" / "seed-1" / "text.jsonl").unlink()
    slow = {"derive.se_learning_rate": 1e-9}
    other = dataclasses.replace(options, settings={"npo": slow})
    rows = compare(settings, copy, other)["methods"]
    assert rows["rose"]["atgr"]["ratio"] > 0
    assert rows["npo"]["settings"] == slow and abs(rows["npo"]["measures"]["text"]["kl"]) < 1e-6
    with pytest.raises(ValueError, match="with other methods .npo"):
        compare(settings, copy, options)


def test_an_interrupted_comparison_is_resumed_and_takes_more_methods_and_seeds(
    settings, suite, compared, tmp_path, capsys
):
    work, npo = tmp_path / "work", ComparisonOptions(methods="npo", suite=suite, seeds=(1,))
    with interrupted_at("score_osm: running"):
        compare(settings, work, npo)
    assert "The comparison did not finish. Derived models or scores" in capsys.readouterr().out
    assert (work / "seeds").is_dir() and not (work / "compare.md").exists()
    assert list(compare(settings, work, npo)["methods"]) == ["backbone", "safepatching", "npo"]
    assert "derive_se" not in stages_run(capsys.readouterr().out)
    ties = dataclasses.replace(npo, methods="ties", settings={"ties": {"patch.density": 0.5}})
    rows = compare(settings, work, ties)["methods"]
    assert list(rows) == ["backbone", "safepatching", "npo", "ties"]
    assert rows["ties"]["settings"]["patch.density"] == 0.5
    both = dataclasses.replace(ties, methods="", seeds=(0, 1))
    capsys.readouterr()
    assert list(compare(settings, work, both)["methods"]) == ["backbone", "safepatching"]
    out = capsys.readouterr().out
    assert made(out) == ["SafePatching, seed 0"]
    assert "not there with all of seeds 0, 1: NPO, TIES" in out
    theirs = answers(compared)
    for name, text in answers(work).items():
        assert "ties" in name or theirs[name] == text, name
    alone = compare(settings, work, dataclasses.replace(both, seeds=(0,)))["methods"]
    assert "by_run" not in alone["safepatching"]["measures"]["harm"]
    assert alone["safepatching"]["atgr"] is not None  # the time was taken with the other seed
    for other, own, message in (
        (
            settings,
            dataclasses.replace(ties, settings={}),
            "with other methods .ties: .*'patch.density': 0.5} there, .*'global'} here",
        ),
        (
            settings.override({"derive.se_steps": 1}),
            ties,
            r"other settings .derive.se_steps: 2 there, 1 here",
        ),
        (settings, dataclasses.replace(ties, suite="quick"), "with other suite; items"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(other, work, own)


def test_answers_of_jailbroken_models_go_whatever_the_seed(settings, suite, tmp_path):
    osm = ComparisonOptions(methods="osm", suite=suite, seeds=(0, 1))
    compare(settings.override({"run.keep_scratch": True}), tmp_path / "work", osm)
    paths = sorted((tmp_path / "work" / "answers" / "osm").rglob("harm.jsonl"))
    assert len(paths) == 2 and (tmp_path / "work" / "seeds").exists()
    for path in paths:
        assert all("answer" in row for row in files.read_jsonl(path))
    compare(settings, tmp_path / "work", dataclasses.replace(osm, seeds=(0,)))
    for path in paths:
        assert not any("answer" in row for row in files.read_jsonl(path))
    assert not (tmp_path / "work" / "seeds").exists()


def test_methods_that_cannot_be_made_do_not_end_the_others(settings, suite, tmp_path, capsys):
    """One that diverges, and one that this backbone gives nothing to learn from."""
    diverging = {"npo": {"derive.se_learning_rate": 1e30}}
    options = ComparisonOptions("npo,safe_decoding,rose", suite, settings=diverging)
    with pytest.raises(
        ValueError, match="2 of 5 methods are not in the table .*: NPO; SafeDecoding"
    ):
        compare(settings, tmp_path / "work", options)
    assert capsys.readouterr().out.count(": NOT MADE: ") == 2
    rows = read_json(tmp_path / "work" / "compare.json")["methods"]
    assert list(rows) == ["backbone", "safepatching", "rose"]


def test_prompts_that_are_trained_on_are_refused(settings, suite, tmp_path):
    measures = json.loads(pathlib.Path(suite).read_text())
    (tmp_path / "suite.json").write_text(json.dumps([m | {"split": "all"} for m in measures]))
    options = ComparisonOptions("ties", str(tmp_path / "suite.json"))
    message = "5 of the 10 prompts of 'harm' are trained on. Give the measure .split.: .report."
    with pytest.raises(ValueError, match=message):
        compare(settings, tmp_path / "work", options)


def bits(params):
    return {path: np.asarray(jax.device_get(x)).tobytes() for path, x in params.items()}


def test_a_method_with_scores_of_its_own_gives_the_patch_of_the_job(settings, tmp_path):
    run = open_run(settings, tmp_path / "run")
    batched = settings.override({"score.mode": "batched"})
    bench = Bench(run, batched, tmp_path / "steps", tmp_path / "notes")
    patched = bits(unnest(bench.patched()))
    theirs = open_run(batched, tmp_path / "run")
    for stage in ("score_se", "score_osm"):
        theirs.runner.need(stage)
    assert patched == bits(models.patched(theirs, theirs.settings.patch))


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
    begin, names = "for method in (\n", types.ModuleType("registry")
    source = pathlib.Path(registry.__file__).read_text().replace(begin, f"{begin}{row}\n")
    source = source.replace("\nimport difflib", f"\nimport difflib\n{imported}")
    exec(compile(source, "registry.py", "exec"), names.__dict__)
    assert names.METHODS.keys() - METHODS.keys() == {"grad_diff"}
    monkeypatch.setitem(METHODS, "grad_diff", names.METHODS["grad_diff"])
    options = ComparisonOptions("grad_diff", suite)
    row = compare(settings, tmp_path / "work", options)["methods"]["grad_diff"]
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
def test_mistakes_end_before_anything_is_made(settings, options, tmp_path, change, message):
    base = {"methods": "ties", "suite": options.suite}
    with pytest.raises(ValueError, match=message):
        compare(settings, tmp_path / "work", ComparisonOptions(**base | change))
    assert not (tmp_path / "work").exists()


def test_a_batch_that_does_not_fit_names_its_method(settings, suite, tmp_path):
    halves = settings.override({"derive.accumulate": 2})
    own = {"npo": {"derive.batch_size": 3}}
    message = "NPO: derive.batch_size of 3 sequences cannot be cut into 2 micro-batches"
    with pytest.raises(ValueError, match=message):
        compare(halves, tmp_path / "work", ComparisonOptions("npo", suite, settings=own))


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
    options = ComparisonOptions.load(path)
    assert options.seeds == (0, 2)
    replaced = options.replaced({"methods": "ga", "seeds": "3,4"})
    assert replaced == ComparisonOptions(methods="ga", seeds=(3, 4))
    with pytest.raises(ValueError, match="--seeds takes whole numbers"):
        ComparisonOptions().replaced({"seeds": "1;2"})
    for text, message in (
        ("3", "must be a dictionary"),
        ("{'seeds': 3}", "seeds must be whole numbers"),
        ("{'seeds': ('0',)}", "seeds must be whole numbers"),
        ("{'methods': ['ga']}", "methods must be a text"),
        ("{'settings': {'ties': 3}}", "settings must be {method:"),
    ):
        path.write_text(f"COMPARE = {text}")
        with pytest.raises(ValueError, match=message):
            ComparisonOptions.load(path)
    path.write_text("COMPARE = {'seed': 1}")
    with pytest.raises(ValueError, match="COMPARE has no 'seed'; there are .*seeds"):
        ComparisonOptions.load(path)


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
