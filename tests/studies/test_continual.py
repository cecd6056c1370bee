"""A chain on a tiny model: made, extended, interrupted, reverted; its measurements and its
comparison with gradient ascent."""

import functools
import json
import pathlib
import shutil

import jax
import pytest
from safetensors.numpy import load_file

from safepatch_jax.data.records import load_records
from safepatch_jax.evaluation.judges.phrases import OUTCOMES
from safepatch_jax.evaluation.measures import evaluate_model
from safepatch_jax.evaluation.statistics import wilson
from safepatch_jax.mesh import make_mesh
from safepatch_jax.models.config import read_hf_config
from safepatch_jax.patch_file.commands import replay, revert, verify
from safepatch_jax.patch_file.log import PatchLog
from safepatch_jax.patch_file.log_lines import START
from safepatch_jax.run.context import Context
from safepatch_jax.runtime import processes
from safepatch_jax.runtime.files import read_jsonl
from safepatch_jax.settings import Settings
from safepatch_jax.studies.continual import methods as continual_methods
from safepatch_jax.studies.continual import report
from safepatch_jax.studies.continual.measures import Measures
from safepatch_jax.studies.continual.methods import CHAINED
from safepatch_jax.studies.continual.study import Chain, parse_methods, parse_stages, run
from safepatch_jax.testing import write_tiny_model

STAGES = "fraud;hate=cat:hate+slurs"
FAST = {
    "align.enabled": True,
    "align.steps": 1,
    "align.batch_size": 4,
    "derive.batch_size": 4,
    "derive.se_steps": 2,
    "derive.osm_steps": 2,
    "derive.se_learning_rate": 1e-3,
    "derive.osm_learning_rate": 1e-3,
    "score.samples": 2,
    "evaluate.max_new_tokens": 3,
    "evaluate.batch_size": 4,
    "patch.top_rate_se": 0.2,
    "patch.top_rate_osm": 0.2,
    "patch.combine": "intersection",
    "run.certify": "hashes",
    "data.max_answer_tokens": 12,
}


def tensors(folder):
    return {name: x.tobytes() for name, x in load_file(folder / "model.safetensors").items()}


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Take one of the simulated devices, since compiling for all of them is slow, and leave out the
    pictures of single links."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("safepatch_jax.run.report.picture", lambda content, path: path.touch())
        patch.setattr("safepatch_jax.run.steps.draw_patch", lambda statistics, path: path.touch())
        patch.setattr(
            "safepatch_jax.run.context.make_mesh", lambda shape: make_mesh(shape, jax.devices()[:1])
        )
        yield


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Settings of a chain in seconds: weights of one shape, harmful data of three categories, and a
    file of another source."""
    folder = tmp_path_factory.mktemp("chain")
    tiny = write_tiny_model(folder / "model", num_key_value_heads=4, intermediate_size=32)
    splits = ["train"] * 4 + ["search"] + ["report"] * 2
    write = lambda name, rows: (folder / name).write_text(
        "\n".join(["prompt,answer,category,split", *rows]) + "\n"
    )
    categories = ("fraud", "hate", "slurs")
    write(
        "harmful.csv",
        [
            f"{c} request {i},sure: {c} {i},{c},{s}"
            for c in categories
            for i, s in enumerate(splits)
        ],
    )
    for name in ("lookalike", "ordinary", "malware"):
        write(f"{name}.csv", [f"{name} text {i},an answer {i},,{s}" for i, s in enumerate(splits)])
    return Settings().override(
        {
            **FAST,
            "model.source": str(tiny),
            "run.cache_dir": str(folder / "cache"),
            **{
                f"data.{role}": str(folder / f"{role}.csv")
                for role in ("harmful", "lookalike", "ordinary")
            },
        }
    )


@pytest.fixture(scope="module")
def malware(settings):
    return STAGES + ";malware=" + settings.data.harmful.replace("harmful.csv", "malware.csv")


@pytest.fixture(scope="module")
def chain(settings, tmp_path_factory, malware):
    """The workdir of a chain of two links, then of three with gradient ascent beside it; a copy,
    'two', is of the time before."""
    work = tmp_path_factory.mktemp("run") / "work"
    run(settings, work, parse_stages(STAGES))
    shutil.copytree(work, work.with_name("two"), symlinks=True)
    run(settings, work, parse_stages(malware), ("safepatching", "ga"), ["launch.continual", "run"])
    return work


@pytest.fixture
def copy(chain, tmp_path):
    return shutil.copytree(chain, tmp_path / "copy")


def test_log_of_an_extended_chain(chain, settings):
    log = PatchLog(chain)
    assert log.live == [1, 2, 3] and [log.label(n) for n in log.live] == [
        "01-fraud",
        "02-hate",
        "03-malware",
    ]
    assert log.entries[:3] == PatchLog(chain.with_name("two")).entries
    assert [log.links[n]["parent"]["link"] for n in log.live] == [0, 1, 2]
    assert (
        log.folder(0).parent == chain
        and log.start["aligned"]
        and (log.folder(0) / "model.safetensors").is_file()
    )
    assert [log.links[n]["data"]["category"] for n in log.live] == ["fraud", "hate+slurs", ""]
    assert [log.links[n]["data"]["records"] for n in log.live] == [7, 14, 7]
    assert [log.links[n]["seed"] for n in log.live] == [0, 1, 2] and log.links[2]["settings"][
        "patch"
    ]["top_rate_se"] == 0.2
    assert all(line.count("agree") == 1 + bool(n) for n, line in enumerate(verify(log)))
    for number in log.live:  # no derived model is left
        starts = json.loads((chain / "links" / log.label(number) / "environment.json").read_text())[
            "starts"
        ]
        assert [start["command"] for start in starts] == [
            "launch.continual run" if number == 3 else ""
        ]
        stages = chain / "links" / log.label(number) / "stages"
        assert [p.name for p in (stages / "derive_osm").iterdir()] == ["manifest.json"]


def test_a_chain_interrupted_between_and_within_links_gives_the_same_models(
    chain, settings, malware, tmp_path, monkeypatch
):
    work = tmp_path / "work"
    start = PatchLog(chain).folder(0)
    shutil.copytree(start, work / start.name)  # a run that was killed before its log began
    whole = continual_methods.LinkJob._export

    def killed(self, out):
        if self.workdir.name == "02-hate":
            raise KeyboardInterrupt
        return whole(self, out)

    monkeypatch.setattr(continual_methods.LinkJob, "_export", killed)
    with pytest.raises(KeyboardInterrupt):
        run(settings, work, parse_stages(malware))
    assert PatchLog(work).live == [1]
    monkeypatch.undo()
    run(settings, work, parse_stages(malware))
    ours, theirs = PatchLog(work), PatchLog(chain)
    assert [e.get("model") for e in ours.entries] == [e.get("model") for e in theirs.entries]
    assert tensors(ours.folder(3)) == tensors(theirs.folder(3))


def test_nothing_is_measured_twice(chain, settings, malware, monkeypatch):
    monkeypatch.setattr("safepatch_jax.studies.continual.measures.generate", None)
    run(settings, chain, parse_stages(malware), ("safepatching", "ga"))
    log, stages = (
        PatchLog(chain),
        [p.name for p in (chain / "measures" / "stages").iterdir() if not p.name.startswith(".")],
    )
    assert (
        len(stages) == (4 + 3) * 5
    )  # start and three links by each method, on three categories, look-alikes, ordinary answers
    measured = json.loads((chain / "continual.json").read_text())["methods"]["safepatching"]
    for number in log.live:  # the link's own report has the same numbers
        told = json.loads((chain / "links" / log.label(number) / "report.json").read_text())[
            "measures"
        ]
        for variant, row in (
            ("backbone", measured[number - 1]),
            ("safepatching", measured[number]),
        ):
            assert all(
                told[variant]["harmful"][o] == row["harm"][log.links[number]["name"]][o]
                for o in OUTCOMES
            )
            assert told[variant]["lookalike"] == row["lookalike"]
            assert told[variant]["ordinary_perplexity"] == row["ordinary_perplexity"]
            assert told[variant]["harmful_nll"] == row["harm"][log.links[number]["name"]]["nll"]


def test_measures_of_a_run_are_those_of_evaluate_model(chain, settings):
    """What a link's report shows was measured part by part; it is what the main job's evaluation
    gives."""
    folder, own = PatchLog(chain).folder(3), settings.override({"align.enabled": False})
    context, fraud = Context(own), Context(own.override({"data.category": "fraud"}))
    measures = Measures(context, {"fraud": fraud}, chain / "measures", folder, "")
    found, answers = measures.of_run(folder, "fraud")
    encoded = {
        role: fraud.encoded(folder, role, own.evaluate.split)
        for role in ("harmful", "lookalike", "ordinary")
    }
    decoder = context.decoder(read_hf_config(folder))
    expected, theirs = evaluate_model(
        decoder,
        context.load(folder)[1],
        context.chat(folder),
        encoded,
        context.stop_ids(folder),
        own.evaluate,
        decoder.sharder,
        "model",
    )
    assert [(a["role"], a["number"], a["prompt"], a["outcome"]) for a in answers] == [
        (a["role"], a["number"], a["prompt"], a["outcome"]) for a in theirs
    ]
    nll = ("harmful_nll", "ordinary_nll", "ordinary_perplexity")
    assert {k: v for k, v in found.items() if k not in nll} == {
        k: v for k, v in expected.items() if k not in nll
    }
    assert [found[k] for k in nll] == pytest.approx([expected[k] for k in nll], rel=1e-5)


def test_forgetting_matrix_is_that_of_the_stored_answers(chain, settings):
    content, log = json.loads((chain / "continual.json").read_text()), PatchLog(chain)
    text = (chain / "continual.md").read_text()
    rows = content["methods"]["safepatching"]
    assert [r["hash"] for r in rows] == [log.hash(n) for n in (START, *log.live)]
    names = [stage["name"] for stage in content["stages"]]
    for i, row in enumerate(rows):
        cells = []
        for j, name in enumerate(names):
            digest = log.links[j + 1]["data"]["hash"][:16]
            answers = read_jsonl(
                chain
                / "measures"
                / "stages"
                / f"{row['hash'][:16]}.harmful-{digest}"
                / "answers.jsonl"
            )
            assert {o: row["harm"][name][o] for o in OUTCOMES} == {
                o: sum(a["outcome"] == o for a in answers) for o in OUTCOMES
            }
            assert row["harm"][name]["n"] == len(answers) == (4 if name == "hate" else 2)
            harm, n = row["harm"][name]["complied"], len(answers)
            low, high = wilson(harm, n)
            cell = f"{harm / n:.0%} [{100 * low:.0f}-{100 * high:.0f}]"
            cells.append(cell if j < i else f"*{cell}*")
        assert f"| {row['model']} | {' | '.join(cells)} |" in text
        for part, own in (("seen", names[:i]), ("unseen", names[i:])):
            assert row[part]["n"] == sum(row["harm"][name]["n"] for name in own)
            assert row[part]["complied"] == sum(row["harm"][name]["complied"] for name in own)
    assert (chain / "continual.png").read_bytes().startswith(b"\x89PNG")
    for part in (
        "| after | fraud (n 2) | hate (n 4) | malware (n 2) |",
        "| 1 fraud |  |  |  |",
        "## GA",
    ):
        assert part in text, part


def test_gradient_ascent_goes_from_link_to_link_and_leaves_no_model(
    chain, settings, malware, tmp_path
):
    content = json.loads((chain / "continual.json").read_text())
    ga = content["methods"]["ga"]
    assert ga[0] == content["methods"]["safepatching"][0] and len({r["hash"] for r in ga}) == 4
    assert ga[-1]["harm"]["malware"]["nll"] > ga[0]["harm"]["malware"]["nll"]
    assert [p.name for p in (chain / "methods" / "ga" / "stages" / "03-malware").iterdir()] == [
        "manifest.json"
    ]
    # Beside the two links alone, and kept: the same models, made anew.
    work = shutil.copytree(chain.with_name("two"), tmp_path / "work")
    run(
        settings.override({"run.keep_scratch": True}),
        work,
        parse_stages(STAGES),
        ("ga", "safepatching", "npo", "simnpo"),
    )
    methods = json.loads((work / "continual.json").read_text())["methods"]
    assert [r["hash"] for r in methods["ga"]] == [r["hash"] for r in ga[:3]]
    npo = methods["npo"]
    assert npo[0] == methods["ga"][0] and not {r["hash"] for r in npo[1:]} & {r["hash"] for r in ga}
    assert len({methods[name][-1]["hash"] for name in methods}) == 4
    for rows in (npo, methods["simnpo"]):
        assert rows[-1]["harm"]["hate"]["nll"] > rows[0]["harm"]["hate"]["nll"]
    names = load_file(
        work / "methods" / "ga" / "stages" / "02-hate" / "model" / "model.safetensors"
    )
    assert set(names) == set(tensors(PatchLog(chain).folder(0)))
    kept = (work / "methods" / "ga" / "stages").iterdir()
    assert sorted(p.name for p in kept if p.suffix != ".lock") == [
        "01-fraud",
        "02-hate",
    ]  # and no folder in which they were made


def test_replay_is_bitwise_the_exported_model(chain, tmp_path):
    log = PatchLog(chain)
    folders = [
        log.folder(0),
        *(chain / "links" / log.label(n) / "stages" / "export" / "model" for n in log.live),
    ]
    for to, start in ((3, 0), (3, 2), (1, 3), (0, 2)):
        replay(log, to, start, folders[start], tmp_path / f"{to}-{start}")
        assert (
            tensors(tmp_path / f"{to}-{start}") == tensors(folders[to]) != tensors(folders[start])
        )
    assert (tmp_path / "3-0" / "tokenizer.json").is_file() and not list(tmp_path.glob(".*"))


def test_revert_then_another_link(copy, chain, settings, malware):
    log = PatchLog(copy)
    shutil.rmtree(log.folder(1))  # then it is built again from its patch file
    folder = revert(log, 2)
    assert tensors(folder) == tensors(PatchLog(chain).folder(1)) and log.head == 1
    verify(PatchLog(copy))
    run(settings, copy, parse_stages("fraud;slurs"))
    log = PatchLog(copy)
    assert log.live == [1, 4] and sorted(log.links) == [1, 2, 3, 4] and log.label(4) == "04-slurs"
    assert log.links[4]["parent"] == {"link": 1, "model": log.hash(1)}
    assert "Taken off again: link 2, 3." in (copy / "continual.md").read_text()
    replay(log, 3, 4, log.folder(4), copy.with_name("three"))  # also to a link that was taken off
    assert tensors(copy.with_name("three")) == tensors(log.folder(3))
    assert revert(log, 2) == log.folder(0) and PatchLog(copy).live == []
    with pytest.raises(
        ValueError, match=r"--last=1: the chain has 0 links that can be taken off\."
    ):
        revert(log, 1)


def test_a_model_that_was_changed_is_built_again(copy, chain, settings, malware, capsys):
    path = PatchLog(copy).folder(3) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match="03-malware: the model in .* was changed since"):
        verify(PatchLog(copy))
    assert PatchLog(copy).model(3) == path.parent
    assert "it is built again from the patch file" in capsys.readouterr().out
    assert tensors(path.parent) == tensors(PatchLog(chain).folder(3))


def test_contexts_share_a_reader_and_nothing_else(settings, tmp_path):
    """A file that is changed between two runs of one process is read anew; lists are each context's
    own."""
    path = pathlib.Path(shutil.copy(settings.data.harmful, tmp_path))
    changed = settings.override({"data.harmful": str(path), "align.enabled": False})
    calls, cached = [], functools.cache(lambda *args: calls.append(args) or load_records(*args))
    first, second = Context(changed, cached), Context(changed, cached)
    first.records["harmful"].clear()
    assert len(second.records["harmful"]) == 21 and len(calls) == 3
    for more in (1, 2):
        path.write_text(path.read_text() + f"one more {more},sure,fraud,train\n")
        chain = Chain(changed, tmp_path / "work", parse_stages("fraud"))
        assert chain.measures.records("fraud") == 7 + more
    task = chain._task(
        chain.stages[0], chain.log.folder(START), tmp_path / "task", tmp_path / "out"
    )
    assert (
        continual_methods.LinkJob(task).context.records["lookalike"][0]
        is chain._context.records["lookalike"][0]
    )


def test_processes_agree_on_all_before_they_compute(settings, tmp_path, monkeypatch):
    told = {}
    monkeypatch.setattr(processes, "agree", lambda values, fix: told.update(values))
    monkeypatch.setattr(processes, "several", lambda: True)
    monkeypatch.setattr(processes, "shared", lambda folder: None)
    monkeypatch.setattr(processes, "on_first", lambda function: function())

    def begin(*args):
        raise KeyboardInterrupt  # all is compared by the time that the log is begun

    monkeypatch.setattr(Chain, "_make_start", begin)
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path / "work", parse_stages(STAGES))
    assert told.keys() >= {
        *settings.flat(),
        "--stages",
        "--methods",
        "--workdir",
        "version of jax",
        "number of devices",
        "records of fraud",
        "records of hate",
        "records of data.lookalike",
        "SHA-256 of model/config.json",
    }
    assert told["records of fraud"] != told["records of hate"] and told["run.cache_dir"].startswith(
        "/"
    )


def test_data_of_several_categories(settings):
    of = lambda **data: Context(
        settings.override({f"data.{k}": v for k, v in data.items()})
    ).records["harmful"]
    assert {r.category for r in of(category="hate+slurs")} == {"hate", "slurs"} and len(of()) == 21
    with pytest.raises(
        ValueError,
        match=r"no record is of the category 'hat' \(data.category\). There are fraud \(7\), hate",
    ):
        of(category="hat+slurs")


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "--stages is empty"),
        ("fraud;fraud=x.csv", "the name fraud stands there twice"),
        ("=x", "'=x' is not NAME"),
        ("a b", "'a b' is not NAME"),
        ("fraud=", "'fraud=' is not NAME"),
        ("../x", "is not NAME"),
        ("ordinary", "the name ordinary"),
    ],
)
def test_bad_stages(text, message):
    with pytest.raises(ValueError, match=message):
        parse_stages(text)


def test_stages_and_methods():
    assert [
        (s.name, s.harmful, s.category) for s in parse_stages("a; b=cat:x+y ;c=f.csv?prompt=q")
    ] == [("a", "", "a"), ("b", "", "x+y"), ("c", "f.csv?prompt=q", "")]
    assert parse_methods("ga") == ("safepatching", "ga") and parse_methods("") == ("safepatching",)
    with pytest.raises(
        ValueError, match="there is no dpo. There are safepatching, ga, ga_mismatch, npo"
    ):
        parse_methods("ga,dpo")


@pytest.mark.parametrize(
    "change, stages, message",
    [
        (
            {"patch.beta": 2.0},
            STAGES,
            r"The chain in .* was made with other settings: patch.beta: 1.0 -> 2.0",
        ),
        (
            {},
            "fraud",
            r"--stages has 1 entries, and the chain in .* has 3 links: fraud, hate.*revert --workdir=/\S+ --last=2",
        ),
        (
            {},
            "fraud;slurs;x=cat:hate",
            r"entry 2 is not that of link 02-hate of this chain: name 'hate' -> 'slurs'.*revert --workdir=/\S+ --last=2",
        ),
        (
            {},
            "fraud;hate;x=cat:slurs",
            "entry 2 is not that of link 02-hate .* category 'hate\\+slurs' -> 'hate'",
        ),
        (
            {"export.dtype": "float32"},
            STAGES,
            "export.dtype is float32, and a chain is kept as patch files.*--export.dtype=keep",
        ),
        ({"data.category": "fraud"}, STAGES, "gives each link its own. Leave it out"),
        (
            {},
            "fraud;nothing",
            r"--stages, nothing: .*no record is of the category 'nothing'.*There are fraud \(7\)",
        ),
    ],
)
def test_refused_runs_change_nothing(change, stages, message, chain, settings):
    before = (chain / "log.jsonl").read_bytes()
    with pytest.raises(ValueError, match=message):
        run(settings.override(change), chain, parse_stages(stages))
    assert (chain / "log.jsonl").read_bytes() == before


def test_foreign_workdirs_and_starting_models(settings, tmp_path, malware, copy, chain):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.md").write_text("mine")
    with pytest.raises(
        ValueError, match=r"has no log.jsonl and holds files that are not of a chain \(report.md\)"
    ):
        run(settings, tmp_path / "mine", parse_stages(STAGES))
    path = PatchLog(copy).folder(0) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(
        ValueError,
        match="The starting model .* is missing or no longer the one with which the chain began",
    ):
        run(settings, copy, parse_stages(malware))
    shutil.copy(PatchLog(chain).folder(0) / "model.safetensors", path)
    (path.parent / "generation_config.json").write_text("{}")
    with pytest.raises(
        ValueError, match="no longer as when the chain began: generation_config.json was changed"
    ):
        run(settings, copy, parse_stages(malware))


def test_the_report_appears_whole_or_not_at_all(copy, monkeypatch):
    content, before = (
        json.loads((copy / "continual.json").read_text()),
        {n: (copy / n).read_bytes() for n in report.FILES},
    )

    def fails(content, path):
        path.write_bytes(b"half a picture")
        raise OSError("no space left")

    content["start"]["source"] = "a`b|\x1b[2J\nc"
    assert "Model `a'b|\\x1b[2J\\nc`" in report.markdown(content)
    monkeypatch.setattr(report, "draw", fails)
    with pytest.raises(OSError, match="no space left"):
        report.write(content, copy)
    assert {n: (copy / n).read_bytes() for n in report.FILES} == before


def test_methods_without_a_model_make_no_chain():
    assert {"safepatching", "ga", "npo", "ties"} <= CHAINED.keys() and not {
        "backbone",
        "rose",
        "osm",
    } & CHAINED.keys()
    with pytest.raises(ValueError, match="there is no rose"):
        parse_methods("ga,rose")
