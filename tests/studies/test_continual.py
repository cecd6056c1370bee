"""A chain on a tiny model: made, extended, interrupted, reverted; its measurements and its
comparison with other methods."""

import functools
import pathlib
import re
import shutil

import pytest
from safetensors.numpy import load_file

from safepatch_jax.data.records import load_records
from safepatch_jax.evaluation.statistics import wilson
from safepatch_jax.models.table import unnest
from safepatch_jax.patch_file.commands import history, replay, revert, verify
from safepatch_jax.patch_file.log import PatchLog
from safepatch_jax.patch_file.log_lines import START
from safepatch_jax.patch_file.removal import remove
from safepatch_jax.run import models
from safepatch_jax.run.context import Context
from safepatch_jax.run.job import open_run
from safepatch_jax.runtime.files import read_json, read_jsonl
from safepatch_jax.settings import Settings
from safepatch_jax.studies.continual import report
from safepatch_jax.studies.continual.figures import draw
from safepatch_jax.studies.continual.links import Link, parse_links
from safepatch_jax.studies.continual.measures import Measures
from safepatch_jax.studies.continual.methods import CHAINED, parse_methods
from safepatch_jax.studies.continual.study import Chain, run
from safepatch_jax.testing import write_tiny_model
from tests import jobs
from tests.jobs import interrupted_at, looking_at, stages_run, write_table

pytestmark = pytest.mark.usefixtures("one_device")
STAGES = "fraud;hate=cat:hate+slurs"
OUTCOMES = ("complied", "refused", "incoherent")
SPLITS = ("train",) * 4 + ("search",) + ("report",) * 2
FAST = jobs.FAST | {
    "align.enabled": True,
    "align.steps": 1,
    "score.samples": 2,
    "evaluate.max_new_tokens": 3,
    "evaluate.batch_size": 4,
    "patch.combine": "intersection",
    "data.max_answer_tokens": 12,
}


def tensors(folder):
    return {name: x.tobytes() for name, x in load_file(folder / "model.safetensors").items()}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Settings of a chain in seconds: weights of one shape, harmful data of three categories, and a
    file of another source."""
    folder, columns = tmp_path_factory.mktemp("chain"), "prompt,answer,category,split"
    tiny = write_tiny_model(folder / "model", num_key_value_heads=4, intermediate_size=32)
    rows = []
    for category in ("fraud", "hate", "slurs"):
        for i, split in enumerate(SPLITS):
            rows.append(f"{category} request {i},sure: {category} {i},{category},{split}")
    write_table(folder / "harmful.csv", rows, columns)
    for name in ("lookalike", "ordinary", "malware"):
        rows = [f"{name} text {i},an answer {i},,{split}" for i, split in enumerate(SPLITS)]
        write_table(folder / f"{name}.csv", rows, columns)
    data = {f"data.{role}": str(folder / f"{role}.csv") for role in jobs.ROLES}
    place = {"model.source": str(tiny), "run.cache_dir": str(folder / "cache")}
    return Settings().override(FAST | data | place)


@pytest.fixture(scope="module")
def malware(settings):
    path = pathlib.Path(settings.data.harmful).with_name("malware.csv")
    return f"{STAGES};malware={path}"


@pytest.fixture(scope="module")
def chain(one_device, settings, tmp_path_factory, malware):
    """The workdir of a chain of two links, then of three with gradient ascent beside it; a copy,
    'two', is of the time before."""
    work = tmp_path_factory.mktemp("run") / "work"
    run(settings, work, parse_links(STAGES), keep=0)
    shutil.copytree(work, work.with_name("two"), symlinks=True)
    command, stages = ["launch.continual", "run"], work / "methods" / "ga" / "stages"

    def note():
        models = sorted(path.parent.name for path in stages.glob("*/model"))
        work.with_name("models").write_text(" ".join(models))

    with looking_at("GA 03-malware", note):
        run(settings, work, parse_links(malware), ("safepatching", "ga"), command, keep=0)
    return work


@pytest.fixture
def copy(chain, tmp_path):
    return shutil.copytree(chain, tmp_path / "copy")


@pytest.fixture
def two(chain, tmp_path):
    return shutil.copytree(chain.with_name("two"), tmp_path / "two")


def test_log_of_an_extended_chain(chain):
    log = PatchLog(chain)
    assert log.live == [1, 2, 3]
    assert [log.label(n) for n in log.live] == ["01-fraud", "02-hate", "03-malware"]
    assert log.entries[:3] == PatchLog(chain.with_name("two")).entries
    assert [log.links[n]["parent"]["link"] for n in log.live] == [0, 1, 2]
    assert log.folder(0).parent == chain and log.start["aligned"]
    assert (log.folder(0) / "model.safetensors").is_file()
    assert [log.links[n]["data"]["category"] for n in log.live] == ["fraud", "hate+slurs", ""]
    assert [log.links[n]["data"]["records"] for n in log.live] == [7, 14, 7]
    assert [log.links[n]["seed"] for n in log.live] == [0, 1, 2]
    assert log.links[2]["settings"]["patch"]["top_rate_se"] == 0.2
    for number, line in enumerate(verify(log)):
        assert line.count("agree") == 1 + bool(number)
    for number in log.live:
        folder = chain / "links" / log.label(number)
        (start,) = read_json(folder / "environment.json")["starts"]
        assert bool(start["command"]) == (number == 3)
        # No derived model is left.
        derived = folder / "stages" / "derive_osm"
        assert [path.name for path in derived.iterdir()] == ["manifest.json"]


def test_interrupted_within_a_link_a_chain_is_resumed_with_the_same_model(two, settings, capsys):
    """Of the second link, which is taken off and made again."""
    revert(PatchLog(two), 1)
    capsys.readouterr()
    with interrupted_at("export: running"):
        run(settings, two, parse_links(STAGES), keep=0)
    assert PatchLog(two).live == [1]
    capsys.readouterr()
    run(settings, two, parse_links(STAGES), keep=0)
    assert stages_run(capsys.readouterr().out)[0] == "export"
    log = PatchLog(two)
    assert log.live == [1, 3] and log.hash(3) == log.hash(2)
    assert tensors(log.folder(3)) == tensors(log.folder(2))


def test_an_aligned_start_is_not_aligned_again(chain, settings, tmp_path, capsys):
    """After a kill between the alignment and the first line of the log."""
    start = PatchLog(chain).folder(START)
    shutil.copytree(start, tmp_path / start.name)
    begun = Chain(settings, tmp_path, parse_links(STAGES))
    assert begun.log.hash(START) == PatchLog(chain).hash(START)
    assert "aligned" not in capsys.readouterr().out


def test_nothing_is_measured_twice(chain, settings, malware, capsys):
    before = {path: path.read_bytes() for path in chain.glob("measures/stages/*/manifest.json")}
    run(settings, chain, parse_links(malware), ("safepatching", "ga"), keep=0)
    assert not stages_run(capsys.readouterr().out)
    # Start and three links by each method, on three categories, look-alikes, ordinary answers.
    assert len(before) == (4 + 3) * 5
    assert all(path.read_bytes() == text for path, text in before.items())


def test_the_reports_of_links_have_the_numbers_of_the_chain(chain):
    log = PatchLog(chain)
    rows = read_json(chain / "continual.json")["methods"]["safepatching"]
    for number in log.live:
        folder, name = chain / "links" / log.label(number), log.links[number]["name"]
        measures = read_json(folder / "report.json")["measures"]
        for variant, row in (("backbone", rows[number - 1]), ("safepatching", rows[number])):
            for outcome in OUTCOMES:
                assert measures[variant]["harmful"][outcome] == row["harm"][name][outcome]
            assert measures[variant]["harmful_nll"] == row["harm"][name]["nll"]
            for measure in ("lookalike", "ordinary_perplexity"):
                assert measures[variant][measure] == row[measure]


def test_measures_of_a_link_are_those_of_a_run(chain, settings, tmp_path):
    """What a link's report shows was measured part by part; it is what the main job measures."""
    folder = PatchLog(chain).folder(3)
    settings = settings.override({"align.enabled": False, "model.source": f"hf:{folder}"})
    fraud = settings.override({"data.category": "fraud"})
    measures = Measures(
        Context(settings), {"fraud": Context(fraud)}, tmp_path / "measures", folder, ""
    )
    job = open_run(fraud, tmp_path / "run")
    flat = unnest(job.context.load(folder)[1])
    assert measures.of_run(folder, "fraud") == models.measure(job, flat, "model")


def test_forgetting_matrix_is_that_of_the_stored_answers(chain):
    content, log = read_json(chain / "continual.json"), PatchLog(chain)
    text = (chain / "continual.md").read_text()
    rows = content["methods"]["safepatching"]
    assert [row["hash"] for row in rows] == [log.hash(n) for n in (START, *log.live)]
    names = [stage["name"] for stage in content["stages"]]
    for i, row in enumerate(rows):
        cells = []
        for j, name in enumerate(names):
            data, harm = log.links[j + 1]["data"]["hash"][:16], row["harm"][name]
            folder = chain / "measures" / "stages" / f"{row['hash'][:16]}.harmful-{data}"
            outcomes = [answer["outcome"] for answer in read_jsonl(folder / "answers.jsonl")]
            for outcome in OUTCOMES:
                assert harm[outcome] == outcomes.count(outcome)
            assert harm["n"] == len(outcomes) == (4 if name == "hate" else 2)
            low, high = wilson(harm["complied"], harm["n"])
            share = harm["complied"] / harm["n"]
            cell = f"{share:.0%} [{100 * low:.0f}-{100 * high:.0f}]"
            cells.append(cell if j < i else f"*{cell}*")
        assert f"| {row['model']} | {' | '.join(cells)} |" in text
        for part, members in (("seen", names[:i]), ("unseen", names[i:])):
            for count in ("n", "complied"):
                assert row[part][count] == sum(row["harm"][name][count] for name in members)
    assert (chain / "continual.png").read_bytes().startswith(b"\x89PNG")
    for part in (
        "| after | fraud (n 2) | hate (n 4) | malware (n 2) |",
        "| 1 fraud |  |  |  |",
        "## GA",
    ):
        assert part in text, part


def test_other_methods_go_from_link_to_link_and_leave_no_model(chain, two, settings):
    methods = read_json(chain / "continual.json")["methods"]
    ga = methods["ga"]
    assert ga[0] == methods["safepatching"][0] and len({row["hash"] for row in ga}) == 4
    assert ga[-1]["harm"]["malware"]["nll"] > ga[0]["harm"]["malware"]["nll"]
    stages = chain / "methods" / "ga" / "stages"
    assert [path.name for path in (stages / "03-malware").iterdir()] == ["manifest.json"]
    assert chain.with_name("models").read_text() == "02-hate"  # when the third one was begun
    # Beside the two links alone, and kept: the same models, made anew.
    kept = settings.override({"run.keep_scratch": True})
    run(kept, two, parse_links(STAGES), ("ga", "safepatching", "npo"))
    methods = read_json(two / "continual.json")["methods"]
    assert [row["hash"] for row in methods["ga"]] == [row["hash"] for row in ga[:3]]
    npo = methods["npo"]
    assert npo[0] == methods["ga"][0] and len({rows[-1]["hash"] for rows in methods.values()}) == 3
    assert npo[-1]["harm"]["hate"]["nll"] > npo[0]["harm"]["hate"]["nll"]
    stages = two / "methods" / "ga" / "stages"
    assert tensors(stages / "02-hate" / "model").keys() == tensors(PatchLog(chain).folder(0)).keys()
    names = sorted(path.name for path in stages.iterdir() if path.suffix != ".lock")
    assert names == ["01-fraud", "02-hate"]  # and no folder in which they were made


def test_replay_is_bitwise_the_exported_model(chain, tmp_path):
    log = PatchLog(chain)
    folders = [log.folder(number) for number in range(4)]
    for to, start in ((3, 0), (3, 2), (1, 3), (0, 2)):
        out = tmp_path / f"{to}-{start}"
        replay(log, to, start, folders[start], out)
        assert tensors(out) == tensors(folders[to]) != tensors(folders[start])
    assert (tmp_path / "3-0" / "tokenizer.json").is_file() and not list(tmp_path.glob(".*"))


def test_revert_then_another_link(copy, chain, settings):
    log = PatchLog(copy)
    shutil.rmtree(log.folder(1))  # then it is built again from its patch file
    folder = revert(log, 2)
    assert tensors(folder) == tensors(PatchLog(chain).folder(1)) and log.head == 1
    verify(PatchLog(copy))
    run(settings, copy, parse_links("fraud;slurs"), keep=0)
    log = PatchLog(copy)
    assert log.live == [1, 4] and sorted(log.links) == [1, 2, 3, 4] and log.label(4) == "04-slurs"
    assert log.links[4]["parent"] == {"link": 1, "model": log.hash(1)}
    assert "Taken off again: link 2, 3." in (copy / "continual.md").read_text()
    replay(log, 3, 4, log.folder(4), copy.with_name("three"))  # also to a link that was taken off
    assert tensors(copy.with_name("three")) == tensors(log.folder(3))
    assert revert(log, 2) == log.folder(0) and PatchLog(copy).live == []
    message = r"--last=1: the chain has 0 links that can be taken off\."
    with pytest.raises(ValueError, match=message):
        revert(log, 1)


def test_a_link_in_the_middle_is_removed_and_the_run_goes_on(copy, settings, malware, capsys):
    log, before = PatchLog(copy), read_json(copy / "continual.json")
    remove(log, 1, "later")
    assert log.live == [4, 5] and [log.label(n) for n in log.live] == ["04-hate", "05-malware"]
    with pytest.raises(ValueError, match="Removed were fraud: --links is given without them"):
        run(settings, copy, parse_links(malware), keep=0)
    capsys.readouterr()
    report_path = run(settings, copy, parse_links(malware.partition(";")[2]), keep=0)
    stages = stages_run(capsys.readouterr().out)  # models are measured, nothing is trained
    assert stages and not [name for name in stages if name.startswith(("derive", "score"))]
    after = read_json(copy / "continual.json")
    assert [link["number"] for link in after["links"]] == [4, 5] and after["reverted"] == [1]
    assert [link["seed"] for link in after["links"]] == [1, 2]
    hashes = [row["hash"] for row in after["methods"]["safepatching"]]
    assert hashes == [log.hash(n) for n in (0, 4, 5)]
    assert hashes[0] == before["methods"]["safepatching"][0]["hash"]
    assert "Taken off again: link 1." in report_path.read_text()
    assert len(verify(log)) == 6


def test_a_refused_link_leaves_the_chain_as_it_was(two, chain, settings, malware, tmp_path, capsys):
    """Six harmful prompts are not enough for a pass; the chain goes on without the link, and rules
    that let it through make it with the bits that it has without a gate."""
    strict, lenient = tmp_path / "strict.toml", tmp_path / "lenient.toml"
    strict.write_text("[harm]\nmargin = 0.1\n[text]\nmargin = 0.5\n")
    lenient.write_text("undecided = 'accept'\nagainst = 'start'\n" + strict.read_text())
    before = (two / "log.jsonl").read_text()
    run(settings, two, parse_links(malware), gate=str(strict))
    log = PatchLog(two)
    *_, refused = log.entries
    assert log.live == [1, 2] and refused["entry"] == "refused"
    assert refused["model"] == PatchLog(chain).hash(3) and refused["gate"]["against"] == "02-hate"
    assert (two / "log.jsonl").read_text().startswith(before)
    assert not (two / "links" / "03-malware").exists()
    report = read_json(two / "gates" / "03-malware" / "gate.json")
    assert report["verdict"] == refused["gate"]["verdict"] == "not enough evidence"
    harm, text = report["checks"]
    assert harm["n"] == harm["prompts"] == 8 and text["n"] == 2  # of all categories
    rows = read_json(chain / "continual.json")["methods"]["safepatching"]
    for side, number in (("candidate", 3), ("against", 2)):
        assert text["levels"][side] == pytest.approx(rows[number]["ordinary_nll"], rel=1e-5)
    assert (
        "malware on link 2 (not enough evidence, against 02-hate)"
        in (two / "continual.md").read_text()
    )
    assert "refused by the gate" in history(log)[0] and verify(log)
    capsys.readouterr()
    # It is not made again, and the next one goes on from the link before. Models before the head
    # are built again only where they are to be measured on what is new.
    for measure, built in (("own", []), ("all", ["01-fraud"])):
        run(settings, two, parse_links(f"{malware};slurs"), measure=measure)
        out = capsys.readouterr().out
        assert "refused by the gate" in out and "Link 03-malware" not in out
        assert re.findall(r"^(\S+): its model is missing .* built again", out, re.M) == built
        rows = read_json(two / "continual.json")["methods"]["safepatching"]
        assert [len(row["harm"]) for row in rows] == [4, 3 + (measure == "all"), 4, 4]
        assert ("Empty: not measured." in (two / "continual.md").read_text()) == (measure == "own")
        log = PatchLog(two)
        assert [number for number in log.links if log.folder(number).exists()] == [3]
    assert log.live == [1, 2, 3] and log.links[3]["name"] == "slurs"
    assert [entry["name"] for entry in log.decided] == ["fraud", "hate", "malware", "slurs"]
    content = read_json(two / "continual.json")
    assert [stage["name"] for stage in content["stages"]] == ["fraud", "hate", "slurs", "malware"]
    with pytest.raises(ValueError, match=r"entry 3 is not that of link malware \(refused\)"):
        run(settings, two, parse_links(f"{STAGES};slurs"))
    revert(log, 1)
    run(settings, two, parse_links(malware), gate=str(lenient))
    log = PatchLog(two)
    assert log.live == [1, 2, 4] and log.hash(4) == PatchLog(chain).hash(3)
    assert log.links[4]["gate"]["against"] == "00-start" and log.links[4]["gate"]["accepted"]
    assert not read_json(two / "continual.json")["refused"]


def test_a_chain_whose_first_link_is_refused_has_a_report(two, settings, tmp_path):
    revert(PatchLog(two), 2)
    (two / "continual.png").unlink()
    (tmp_path / "strict.toml").write_text("[harm]\nmargin = 0.1\n")
    run(settings, two, parse_links("fraud"), gate=str(tmp_path / "strict.toml"))
    assert PatchLog(two).live == [] and (two / "continual.png").is_file()
    assert "fraud on link 0 (not enough evidence" in (two / "continual.md").read_text()


def test_rules_for_what_a_chain_does_not_measure(two, settings, tmp_path):
    path = tmp_path / "rules.toml"
    path.write_text("[accuracy]\nmargin = 0.1\n")
    with pytest.raises(ValueError, match=r"\[accuracy\]: the suite has no measure of kind mmlu"):
        run(settings, two, parse_links(STAGES), gate=str(path))


def test_a_model_that_was_changed_is_built_again(copy, chain, capsys):
    path = PatchLog(copy).folder(3) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match="03-malware: the model in .* was changed since"):
        verify(PatchLog(copy))
    assert PatchLog(copy).model(3) == path.parent
    assert "it is built again from patch files" in capsys.readouterr().out
    assert tensors(path.parent) == tensors(PatchLog(chain).folder(3))


def test_records_are_read_once_a_chain(settings, tmp_path):
    """A file that is changed between two runs of one process is read anew; lists are each context's
    own."""
    path = pathlib.Path(shutil.copy(settings.data.harmful, tmp_path))
    changed = settings.override({"data.harmful": str(path), "align.enabled": False})
    calls = []

    @functools.cache
    def read(*args):
        calls.append(args)
        return load_records(*args)

    first, second = Context(changed, read), Context(changed, read)
    first.records["harmful"].clear()
    assert len(second.records["harmful"]) == 21 and len(calls) == 3
    for more in (1, 2):
        path.write_text(path.read_text() + f"one more {more},sure,fraud,train\n")
        chain = Chain(changed, tmp_path / "work", parse_links("fraud"))
        assert chain.measures.records("fraud") == 7 + more


def test_data_of_several_categories(settings):
    two = settings.override({"data.category": "hate+slurs"})
    records = Context(two).records["harmful"]
    assert {record.category for record in records} == {"hate", "slurs"} and len(records) == 14
    unknown = settings.override({"data.category": "hat+slurs"})
    message = r"no record is of the category 'hat' \(data.category\). There are fraud \(7\), hate"
    with pytest.raises(ValueError, match=message):
        Context(unknown).split("harmful", "train")


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "--links is empty"),
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
        parse_links(text)


def test_stages_and_methods():
    assert parse_links("a; b=cat:x+y ;c=f.csv?prompt=q") == (
        Link("a", "", "a"),
        Link("b", "", "x+y"),
        Link("c", "f.csv?prompt=q", ""),
    )
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
            {"derive.osm_seed": 5},
            STAGES,
            r"The chain in .* was made with other settings: derive.osm_seed: -1 -> 5",
        ),
        (
            {},
            "fraud",
            r"--links has 1 entries, and the chain in .* has 3 links: fraud, hate.*revert "
            r"--workdir=/\S+ --last=2",
        ),
        (
            {},
            "fraud;slurs;x=cat:hate",
            r"entry 2 is not that of link 02-hate of this chain: name 'hate' -> 'slurs'.*revert "
            r"--workdir=/\S+ --last=2",
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
            r"--links, nothing: .*no record is of the category 'nothing'.*There are fraud \(7\)",
        ),
    ],
)
def test_refused_runs_change_nothing(change, stages, message, chain, settings):
    before = (chain / "log.jsonl").read_bytes()
    with pytest.raises(ValueError, match=message):
        run(settings.override(change), chain, parse_links(stages))
    assert (chain / "log.jsonl").read_bytes() == before


def test_a_chain_does_not_go_on_in_an_edited_template(settings, tmp_path):
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}{{ m['role'] + ':' + m['content'] }}\n{% endfor %}")
    mine = settings.override({"data.template": str(template), "align.enabled": False})
    run(mine, tmp_path / "work", parse_links("fraud"))
    run(mine, tmp_path / "work", parse_links("fraud"))
    template.write_text(template.read_text().replace(":", "="))
    with pytest.raises(ValueError, match="entry 1 is not that of link 01-fraud .*hash '"):
        run(mine, tmp_path / "work", parse_links("fraud"))
    with pytest.raises(ValueError, match="made with other settings: data.template: '.*' -> ''"):
        run(mine.override({"data.template": "own"}), tmp_path / "work", parse_links("fraud"))


def test_foreign_workdirs_and_starting_models(settings, tmp_path, malware, copy, chain):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.md").write_text("mine")
    with pytest.raises(ValueError, match=r"files that are not of a chain \(report.md\)"):
        run(settings, tmp_path / "mine", parse_links(STAGES))
    path = PatchLog(copy).folder(0) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(
        ValueError,
        match="The starting model .* is missing or no longer the one with which the chain began",
    ):
        run(settings, copy, parse_links(malware))
    shutil.copy(PatchLog(chain).folder(0) / "model.safetensors", path)
    (path.parent / "generation_config.json").write_text("{}")
    with pytest.raises(
        ValueError, match="no longer as when the chain began: generation_config.json was changed"
    ):
        run(settings, copy, parse_links(malware))


def many(content, count, measured):
    """The content of a report as of a chain of so many links, each model measured on its own
    category and the next one's, the first and the last on all."""
    names = [f"harm{i}" for i in range(count)]
    row, cell = content["methods"]["safepatching"][0], content["methods"]["ga"][-1]["harm"]["fraud"]
    rows = []
    for i in range(count + 1):
        chosen = names if measured or i in (0, count) else names[i - 1 : i + 1]
        label = f"{i:02d}-{names[i - 1]}" if i else "00-start"
        rows.append(row | {"model": label, "harm": dict.fromkeys(chosen, cell)})
    stages = [content["stages"][0] | {"name": name} for name in names]
    links = []
    for i, name in enumerate(names):
        links.append(content["links"][0] | {"number": i + 1, "name": name})
    overlap = [[0.5] * count for _ in names]
    numbers = {"weights": 9, "entries": [1] * count, "cumulative": [1] * count, "overlap": overlap}
    changes = {"stages": stages, "links": links, "patches": numbers}
    return content | changes | {"methods": {"safepatching": rows}}


def test_the_report_of_many_links_has_short_columns_and_a_key(chain):
    content = read_json(chain / "continual.json")
    text = report.markdown(many(content, 20, True))
    head = f"| after | {' | '.join(map(str, range(1, 21)))} |"
    assert head in text and "| 20 | harm19 | `" in text and "(n 2)" not in text
    matrix = text[text.index(head) :].splitlines()
    cells = matrix[3].split(" | ")  # of the model after the first link
    assert len(cells) == 21 and cells[0] == "| 01-harm0"
    assert not cells[1].startswith("*") and all(cell.startswith("*") for cell in cells[2:])
    assert max(map(len, matrix[2:22])) < 160
    text = report.markdown(many(content, 20, False))
    assert "Empty: not measured." in text and "| harm5 | 06-harm5 | 2 |" in text
    row = next(line for line in text.splitlines() if line.startswith("| 05-harm4 | "))
    assert [bool(cell.strip()) for cell in row.split("|")[2:-1]].count(True) == 2
    text = report.markdown(many(content, 45, False))
    assert "too many columns for a page" in text and "| after | 1 |" not in text
    assert "| harm44 | 45-harm44 |" in text


@pytest.mark.parametrize("count, measured", [(20, True), (20, False), (45, False)])
def test_the_picture_of_many_links(count, measured, chain):
    figure = draw(many(read_json(chain / "continual.json"), count, measured))
    harm, overlap = figure.axes[:2]
    numbers = (count + 1) * count if measured else 2 * count + 2 * (count - 1)
    assert len(harm.texts) == (numbers if count == 20 else 0)
    assert len(overlap.texts) == (count * (count - 1) // 2 if count == 20 else 0)
    assert ("grey: not measured" in harm.get_title()) == (not measured)
    labels = [label.get_text() for label in harm.get_xticklabels()]
    assert labels[:2] == (["harm0", "harm1"] if count == 20 else ["harm0", "harm2"])


def test_names_are_escaped_and_the_report_appears_whole_or_not_at_all(copy):
    content = read_json(copy / "continual.json")
    before = {name: (copy / name).read_bytes() for name in report.FILES}
    content["start"]["source"] = "a`b|\x1b[2J\nc"
    assert "Model `a'b|\\x1b[2J\\nc`" in report.markdown(content)
    content["colours"]["safepatching"] = "no colour"
    with pytest.raises(ValueError, match="no colour"):
        report.write(content, copy)
    assert {name: (copy / name).read_bytes() for name in report.FILES} == before


def test_methods_without_a_model_make_no_chain():
    assert {"safepatching", "ga", "npo", "ties"} <= CHAINED.keys()
    assert not {"backbone", "rose", "osm"} & CHAINED.keys()
    with pytest.raises(ValueError, match="there is no rose"):
        parse_methods("ga,rose")
