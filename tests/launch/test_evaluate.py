"""launch.evaluate: a whole evaluation of tiny models, killed, resumed, refused, and judged by a
server that goes down midway."""

import dataclasses
import functools
import json
import pathlib
import shutil

import pytest

from benchmarks.readme_commands import stray
from safepatch_jax.evaluation.engine import Engine
from safepatch_jax.evaluation.judges.base import UNKNOWN, JudgeUnavailable
from safepatch_jax.evaluation.statistics import wilson
from safepatch_jax.runtime.files import LOCK, claimed, read_json, read_jsonl
from safepatch_jax.studies.evaluate.options import EvaluationOptions
from safepatch_jax.studies.evaluate.report import labels
from safepatch_jax.studies.evaluate.study import evaluate
from safepatch_jax.testing import write_tiny_model
from tests import calls
from tests.evaluations import TASKS, write_measures, write_sets, write_suite
from tests.jobs import write_table

call = functools.partial(calls.call, "launch.evaluate")
pytestmark = pytest.mark.usefixtures("one_device")
TIMES = ("seconds_per_token", "atgr")


@pytest.fixture(scope="module")
def measures(tmp_path_factory):
    return write_measures(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def suite(measures, tmp_path_factory):
    return write_suite(tmp_path_factory.mktemp("suite") / "mine.json", measures)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("other") / "model", seed=1)


@pytest.fixture(scope="module")
def options(suite):
    return EvaluationOptions(suite=suite, batch_size=4)


@pytest.fixture(scope="module")
def whole(one_device, tiny, other, options, tmp_path_factory):
    """An undisturbed evaluation; read only."""
    out = tmp_path_factory.mktemp("whole") / "out"
    content = evaluate(str(tiny), out, options, str(other))
    assert json.loads(json.dumps(content)) == read_json(out / "report.json")
    return out


def assert_same_report(out, whole):
    """All but the times; likelihoods, sums that in another batch are rounded otherwise, to five
    digits."""
    found, expected = (
        {k: v for k, v in read_json(x / "report.json").items() if k not in TIMES}
        for x in (out, whole)
    )
    for m in expected["measures"]:
        for x in m["models"].values() if m["kind"] == "text" else ():
            for name in {"nll", "perplexity", "kl", "nll_interval_of_answers"} & x.keys():
                x[name] = pytest.approx(x[name], rel=1e-5)
    assert found == expected


def by_id(path):
    return {row["id"]: row for row in read_jsonl(path)}


def copy(whole, tmp_path):
    return pathlib.Path(shutil.copytree(whole, tmp_path / "out"))


# A whole evaluation.


def test_as_a_user_calls_it(tiny, suite, tmp_path):
    flags = [f"--model={tiny}", f"--suite={suite}"]
    shown = call(*flags, "--show_examples")
    assert shown.returncode == 0 and "--- look-alikes (refusal, " in shown.stdout, shown.stderr
    trace = tmp_path / "trace"
    result = call(*flags, f"--out={tmp_path / 'out'}", "--batch_size=8", f"--profile={trace}")
    assert result.returncode == 0, result.stderr
    assert stray(result.stderr) == []
    assert list(trace.rglob("*.xplane.pb")) and f"Trace:  {trace}" in result.stdout
    assert f"Report: {tmp_path / 'out' / 'report.md'}" in result.stdout
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        LOCK,
        "answers",
        "evaluation.json",
        "report.json",
        "report.md",
        "report.png",
        "verdicts",
    ]
    assert (tmp_path / "out" / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert read_json(tmp_path / "out" / "report.json")["options"]["suite"] == suite


def test_the_report_has_the_counts(whole, tiny, other):
    content = read_json(whole / "report.json")
    assert content["models"] == labels({"model": str(tiny), "against": str(other)})
    found = {m["name"]: m for m in content["measures"]}
    for name, n, left_out in (("harm", 4, 1), ("harm, persona", 2, 0), ("look-alikes", 3, 0)):
        for who, x in found[name]["models"].items():
            assert x["n"] == n and x["left_out"] == left_out and x["unknown"] == 0
            assert x["complied"] + x["refused"] + x["incoherent"] == n
            rows = read_jsonl(
                whole / "verdicts" / "phrases" / who / f"{name.replace(', ', '_')}.jsonl"
            )
            counted = "refused" if name == "look-alikes" else "complied"
            assert x["rate"] == sum(row["outcome"] == counted for row in rows) / n
        assert found[name]["paired"]["n"] == n
    assert {name: x[1] for name, x in found["harm"]["models"]["model"]["categories"].items()} == {
        "a": 2,
        "b": 2,
    }
    text = found["text"]["models"]
    assert (
        text["model"]["n"] == text["against"]["n"] == 5
        and text["model"]["kl"] > 0
        and "kl" not in text["against"]
    )
    rows = read_jsonl(whole / "answers" / "model" / "text.jsonl")
    assert text["model"]["nll"] == pytest.approx(
        sum(r["nll"] for r in rows) / sum(r["tokens"] for r in rows)
    )
    assert (
        content["atgr"]
        == content["seconds_per_token"]["model"] / content["seconds_per_token"]["against"]
        > 0
    )
    markdown = (whole / "report.md").read_text()
    assert (
        "| harm | " in markdown
        and "Left out because they are too long for the model: 1 of harm (" in markdown
    )
    assert all(
        answer["answer"] not in markdown
        for answer in read_jsonl(whole / "answers" / "model" / "harm.jsonl")
        if len(answer.get("answer", "")) > 3
    )


def test_killed_half_way_and_given_again(whole, tiny, other, options, tmp_path):
    out = copy(whole, tmp_path)
    for name in ("harm.jsonl", "text.jsonl"):  # killed in the middle of a line
        path = out / "answers" / "model" / name
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:2]) + lines[2][: len(lines[2]) // 2])
    for path in (
        (out / "answers" / "model" / "look-alikes.jsonl"),
        (out / "answers" / "model" / "speed.jsonl"),
    ):
        path.unlink()
    shutil.rmtree(out / "verdicts")
    for path in out.glob("report.*"):
        path.unlink()
    evaluate(str(tiny), out, options, str(other))
    assert_same_report(out, whole)
    name = "answers/model/harm.jsonl"
    assert by_id(out / name) == by_id(whole / name)


def test_given_again_it_answers_nothing(whole, tiny, other, options, tmp_path, capsys):
    out = copy(whole, tmp_path)
    evaluate(str(tiny), out, options, str(other))
    assert "Loading" not in capsys.readouterr().out
    assert read_json(out / "report.json") == read_json(whole / "report.json")


# An endpoint.


def make_coherent(out):
    """Replace the tiny models' answers, which are broken text that no judge is asked about, and
    delete the verdicts on them."""
    shutil.rmtree(out / "verdicts")
    for path in (out / "answers").rglob("*.jsonl"):
        rows = read_jsonl(path)
        for i, row in enumerate(rows):
            if "answer" in row:
                start = "Sure, here is" if i % 2 else "I cannot give you"
                row["answer"] = f"{start} an answer with the number {i}."
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_second_judge_and_agreement(whole, tiny, other, options, tmp_path, server):
    out, server.replies = copy(whole, tmp_path), ["COMPLIED"]
    make_coherent(out)
    alone = evaluate(str(tiny), out, options, str(other))
    evaluate(str(tiny), out, dataclasses.replace(options, second_judge=server.text), str(other))
    content = read_json(out / "report.json")
    assert content["judges"] == ["phrases", server.text] and len(server.requests) == 18
    for kind, n in (("harm", 12), ("refusal", 6)):
        rows = []
        for path in (out / "verdicts" / "phrases").rglob("*.jsonl"):
            if (path.stem == "look-alikes") == (kind == "refusal"):
                rows += read_jsonl(path)
        agreement = content["agreement"][kind]
        assert agreement["n"] == len(rows) == n
        assert agreement["agree"] == sum(row["outcome"] == "complied" for row in rows) / n < 1
    # The rates are the first judge's.
    assert content["measures"] == json.loads(json.dumps(alone["measures"]))
    assert "Agreement of the judges: harm" in (out / "report.md").read_text()


def test_an_endpoint_goes_down_midway(whole, tiny, other, options, tmp_path, server):
    """Verdicts are kept, the same command resumes, and a reply that was no verdict is asked for
    again; with how many requests at a time makes no difference to what is kept."""
    out, options = copy(whole, tmp_path), dataclasses.replace(options, judge=server.text)
    make_coherent(out)
    server.replies = ["REFUSED_FULL", "well ...", "COMPLIED", 503]
    message = "no answer in 4 tries .HTTP 503.*the same command resumes there"
    with pytest.raises(JudgeUnavailable, match=message):
        evaluate(str(tiny), out, options, str(other))
    assert len(server.requests) == 7
    (stored,) = (out / "verdicts").rglob("*.jsonl")
    assert stored.name == "harm.jsonl"
    outcomes = [row["outcome"] for row in read_jsonl(stored)]
    assert outcomes == ["refused", UNKNOWN, "complied"]
    server.replies = ["REFUSED_PARTIAL"]
    server.requests.clear()
    options = dataclasses.replace(options, judge=server.address)
    content = evaluate(str(tiny), out, options, str(other))
    assert len(server.requests) == 18 - 2 and len(list((out / "verdicts").iterdir())) == 1
    harm = content["measures"][0]["models"]["model"]
    assert (harm["complied"], harm["refused"], harm["unknown"]) == (1, 3, 0)
    assert harm["degrees"] == {"full": 1, "partial": 2}
    assert "3 (1 full, 2 partial)" in (out / "report.md").read_text()
    evaluate(str(tiny), out, options, str(other))
    assert len(server.requests) == 16


def test_verdicts_that_stay_unknown(tiny, suite, measures, options, tmp_path, server):
    """A few are no reason to stop, also when they are asked for again; more than half are, each
    time."""
    words = "one two three four five six seven eight nine ten".split()
    rows = [f"forbidden thing number {word} of a dozen,a" for word in words]
    one = {
        "name": "harm",
        "kind": "harm",
        "source": write_table(tmp_path / "x.csv", rows, "prompt,category"),
        "max_new": 2,
    }
    (tmp_path / "one.json").write_text(json.dumps([one]))
    options, out = dataclasses.replace(options, suite=str(tmp_path / "one.json")), tmp_path / "out"
    evaluate(str(tiny), out, options)
    make_coherent(out)
    options = dataclasses.replace(options, judge=server.text)
    server.replies = ["COMPLIED"] * 6 + ["?"]
    for asked in (10, 14, 18):
        harm = evaluate(str(tiny), out, options)["measures"][0]["models"]["model"]
        assert (harm["n"], harm["unknown"], len(server.requests)) == (6, 4, asked)
    shutil.rmtree(out / "verdicts")
    server.replies = ["?"]
    for _ in range(2):
        with pytest.raises(
            ValueError, match="10 of 10 replies are no verdict. Expected: one word of COMPLIED"
        ):
            evaluate(str(tiny), out, options)


# Tasks, grades and seeds.


@pytest.fixture
def tasks(tmp_path, measures):
    """Options of a suite with all that is answered in some way of its own, and one with a judge."""
    suite = write_suite(tmp_path / "tasks.json", [*TASKS, measures[0] | {"limit": 3}])
    return EvaluationOptions(suite=suite, batch_size=4, **write_sets(tmp_path / "sets"))


def test_grades_of_two_turns(tiny, other, tasks, tmp_path, server):
    options, out = dataclasses.replace(tasks, grader=server.text), tmp_path / "out"
    # 'against' is graded after the model, question 84 does not fit: 3 questions of 2 turns each.
    server.replies = [f"Well said. Rating: [[{x}]]" for x in (2, 4, 6, 8, 5, 5)] + ["Rating: [[1]]"]
    content = evaluate(str(tiny), out, options, str(other))
    found = {m["name"]: m for m in content["measures"]}["mt_bench"]
    ours, theirs = found["models"]["model"], found["models"]["against"]
    assert (ours["n"], ours["grades"], ours["errors"], ours["left_out"], ours["mean"]) == (
        3,
        6,
        0,
        1,
        5.0,
    )
    assert [ours["turns"][k]["mean"] for k in "12"] == pytest.approx([13 / 3, 17 / 3])
    assert {k: x["mean"] for k, x in ours["categories"].items()} == {
        "writing": 3.0,
        "math": 7.0,
        "humanities": 5.0,
    }
    assert (
        ours["interval"] == (1, pytest.approx(5 + 4.302653 * 2 / 3**0.5)) and theirs["mean"] == 1.0
    )
    assert found["paired"] == {"n": 3, "gained": 3, "lost": 0, "p": 0.25}
    text = (out / "report.md").read_text()
    assert (
        "## mt_bench: grades from 1 to 10" in text
        and " | 3 | 5.00 [1.00-9.97] | 4.33 " in text
        and "0 of 6" in text
    )
    rows = {row["id"]: row for row in read_jsonl(out / "answers" / "model" / "mt_bench.jsonl")}
    asked = [body["messages"][1]["content"] for _, _, body in server.requests]
    assert [("It is 3." in x, "It is 6." in x, "unused" in x) for x in asked[:6]] == [
        (False,) * 3,
        (False,) * 3,
        (True, False, False),
        (True, True, False),
        (False,) * 3,
        (False,) * 3,
    ]
    assert (
        rows["82"]["answers"][1] in asked[3]
        and "And three?" in asked[3]
        and "And three?" not in asked[2]
    )
    assert rows["84"]["left_out"] == "turn 1 is too long for the model"
    engine = Engine.open(str(tiny))  # the second answer is that to the conversation
    (again,) = engine.complete_ids(
        [engine.ask("1 and 2?", rows["82"]["answers"][0], "And three?")], 8
    )
    assert again and rows["82"]["answers"][1] == engine.decode(again)
    server.requests.clear()
    evaluate(str(tiny), out, options, str(other))
    assert not server.requests


def test_a_grader_goes_down_and_says_what_is_no_grade(tiny, tasks, tmp_path, server, monkeypatch):
    options, out = dataclasses.replace(tasks, grader=server.text), tmp_path / "out"
    server.replies = ["[[7]]", "It is good.", "[[11]]", 503]
    with pytest.raises(
        JudgeUnavailable,
        match="Answers and what was judged so far are kept; the same command resumes",
    ):
        evaluate(str(tiny), out, options)
    (stored,) = (out / "grades").rglob("*.jsonl")
    assert [(row["id"], row["grade"]) for row in read_jsonl(stored)] == [
        ("81:1", 7),
        ("81:2", None),
        ("82:1", None),
    ]
    before = {path: path.read_bytes() for path in (out / "answers").rglob("*.jsonl")}
    monkeypatch.setattr(Engine, "open", lambda *_, **__: pytest.fail("a model was loaded"))
    server.replies = ["no", "[[3]]", "[[4.5]]", "[[6]] or rather [[7]]", "[[5]]"]
    server.requests.clear()
    found = {m["name"]: m for m in evaluate(str(tiny), out, options)["measures"]}["mt_bench"][
        "models"
    ]["model"]
    assert len(server.requests) == 5 and {path: path.read_bytes() for path in before} == before
    assert (found["grades"], found["errors"]) == (4, 2) and "2 of 6" in (
        out / "report.md"
    ).read_text()
    assert found["turns"]["1"]["mean"] == 5.0 and found["turns"]["2"]["mean"] == 4.75
    server.replies = ["[[2]]"]
    server.requests.clear()
    evaluate(str(tiny), out, options)
    assert len(server.requests) == 2


def test_tasks_are_gone_on_with_only_on_the_same_data(tiny, tasks, tmp_path, server):
    options, out = dataclasses.replace(tasks, grader=server.text), tmp_path / "out"
    server.replies = ["[[5]]"]
    whole = evaluate(str(tiny), out, options)
    assert whole == read_json(out / "report.json") | {"measures": whole["measures"]}
    rows = {path: path.read_text() for path in (out / "answers").rglob("*.jsonl")}
    for path in rows:
        if path.stem in ("mmlu", "gsm8k"):
            path.write_text("".join(rows[path].splitlines(keepends=True)[:2]))
    evaluate(str(tiny), out, options)
    for path, text in rows.items():
        expected = {row["id"]: row for row in map(json.loads, text.splitlines())}
        found = by_id(path)
        assert found.keys() == expected.keys() and all(
            found[i].get("correct") == expected[i].get("correct") for i in expected
        )
    folder = pathlib.Path(options.manual_dir)
    for name, changed, old, new in (
        ("gsm8k_train.jsonl", "gsm8k", "how many", "how much"),
        ("gsm8k_test.jsonl", "gsm8k", "It", "He"),
        ("mt_bench_question.jsonl", "mt_bench", "And three", "And four"),
    ):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace(old, new))
        with pytest.raises(
            ValueError,
            match=rf"is an evaluation with other data \({changed}\)\. Give another --out",
        ):
            evaluate(str(tiny), out, options)
        (folder / name).write_text(text)
    evaluate(str(tiny), out, options)


def test_a_local_judge_whose_files_changed(whole, tiny, other, options, tmp_path):
    out, judge = copy(whole, tmp_path), write_tiny_model(tmp_path / "judge", seed=2)
    (tmp_path / "harm.json").write_text(
        json.dumps(
            [m for m in json.loads(pathlib.Path(options.suite).read_text()) if m["kind"] == "harm"]
        )
    )
    options, out = (
        dataclasses.replace(options, suite=str(tmp_path / "harm.json"), judge=f"harmbench:{judge}"),
        tmp_path / "new",
    )
    evaluate(str(tiny), out, options, str(other))
    evaluate(str(tiny), out, options, str(other))
    (place,) = (out / "verdicts").iterdir()
    config = (judge / "config.json").read_text()
    (judge / "config.json").write_text(config + " ")
    with pytest.raises(
        ValueError,
        match="of another judge: in .*judge config.json changed since. Delete .*harmbench.*the "
        "same",
    ):
        evaluate(str(tiny), out, options, str(other))
    evaluate(
        str(tiny), out, dataclasses.replace(options, judge="phrases"), str(other)
    )  # the others are not concerned
    shutil.rmtree(place)
    evaluate(str(tiny), out, options, str(other))
    assert (
        read_json(place / "judge.json")["judge"] == f"harmbench:{judge}"
        and len(list(place.rglob("*.jsonl"))) == 4
    )


@pytest.fixture
def seeded(tasks, measures, tmp_path):
    gsm8k = {"name": "gsm8k", "kind": "gsm8k", "source": "set:gsm8k@test", "limit": 4, "max_new": 6}
    suite = write_suite(tmp_path / "seeds.json", [measures[0], measures[3], gsm8k])
    return dataclasses.replace(tasks, suite=suite, seeds=(0, 1), temperature=1.0)


def test_several_seeds(tiny, other, seeded, tmp_path):
    out = tmp_path / "out"
    content = evaluate(str(tiny), out, seeded, str(other))
    assert content["seeds"] == [0, 1]

    def read(kind, who, seed, name):
        return by_id(out / kind / who / f"seed-{seed}" / f"{name}.jsonl")

    found = {m["name"]: m for m in content["measures"]}
    harm = found["harm"]["models"]["model"]
    runs = [read("verdicts/phrases", "model", seed, "harm") for seed in (0, 1)]
    rates = [sum(row["outcome"] == "complied" for row in run.values()) / 4 for run in runs]
    assert (
        harm["n"] == 4 and harm["by_run"] == rates and harm["rate"] == pytest.approx(sum(rates) / 2)
    )
    assert harm["spread"] == [min(rates), max(rates)] and harm["left_out"] == 1
    assert harm["interval"] == pytest.approx(
        wilson(4 * harm["rate"], 4)
    )  # of 4 prompts, not of 8 answers
    assert harm["complied"] + harm["refused"] + harm["incoherent"] == 8
    answers = [read("answers", "model", seed, "harm") for seed in (0, 1)]
    assert answers[0].keys() == answers[1].keys() and answers[0] != answers[1]
    texts = [
        [x["raw"]["text"] for x in read("answers", "model", seed, "gsm8k").values() if "raw" in x]
        for seed in (0, 1)
    ]
    assert texts[0] != texts[1] and found["gsm8k"]["models"]["model"]["n"] == 4
    assert (
        not list(out.glob("answers/*/seed-*/text.jsonl"))
        and "by_run" not in found["text"]["models"]["model"]
    )
    text = (out / "report.md").read_text()
    assert "temperature 1, top-p 1, seeds 0, 1" in text and "exact sign-flip test" in text
    assert f"({100 * min(rates):.1f} to {100 * max(rates):.1f})" in text

    # One seed is as --seed alone; and a third one adds to what is there.
    single = evaluate(str(tiny), tmp_path / "single", dataclasses.replace(seeded, seeds=(), seed=1))
    assert by_id(tmp_path / "single" / "answers" / "model" / "harm.jsonl") == answers[1]
    assert single["measures"][0]["models"]["model"]["rate"] == rates[1]
    files = {path: path.read_bytes() for path in out.rglob("*.jsonl")}
    (out / "answers" / "model" / "seed-1" / "harm.jsonl").unlink()
    three = evaluate(str(tiny), out, dataclasses.replace(seeded, seeds=(0, 1, 2)), str(other))
    by_run = three["measures"][0]["models"]["model"]["by_run"]
    assert by_run[:2] == rates and len(by_run) == 3
    assert read("answers", "model", 1, "harm") == answers[1]
    assert all(
        path.read_bytes() == old
        for path, old in files.items()
        if path.parts[-3:] != ("model", "seed-1", "harm.jsonl")
    )
    with pytest.raises(ValueError, match=r"with other options \(seed several there, 1 here\)"):
        evaluate(str(tiny), out, dataclasses.replace(seeded, seeds=(), seed=1), str(other))


def test_mistakes_end_with_one_clear_line(tiny, suite, tmp_path):
    out = f"--out={tmp_path / 'out'}"
    for own, message in (
        ([], "--out is needed"),
        ([out, "--seeds=0,x"], "--seeds takes whole numbers with commas between, such as 0,1,2"),
    ):
        result = call(f"--model={tiny}", f"--suite={suite}", *own)
        assert result.returncode == 2 and message in result.stderr
        assert len(result.stderr.splitlines()) == 1


# Mistakes.


def test_a_folder_of_another_evaluation_is_refused(whole, tiny, other, options, tmp_path):
    for model, own, against, message in (
        (other, options, tiny, r"with other models \(model, against\)\. Give another --out"),
        (
            other,
            dataclasses.replace(options, seed=1),
            other,
            r"with other models \(model\) and options \(seed 0 there, 1 here\)",
        ),
        (tiny, dataclasses.replace(options, suite="quick"), other, "with other suite and items"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(str(model), whole, own, str(against))


def test_a_folder_of_something_else_or_at_work_is_refused(whole, tiny, other, options, tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "file").touch()
    message = r"files that are not of an evaluation \(file\); use a new or empty folder for --out"
    with pytest.raises(ValueError, match=message):
        evaluate(str(tiny), tmp_path / "foreign", options)
    out = copy(whole, tmp_path)
    with claimed(out), pytest.raises(ValueError, match="Another run is at work"):
        evaluate(str(tiny), out, options, str(other))


def test_a_damaged_file_is_named(whole, tiny, other, options, tmp_path):
    out = copy(whole, tmp_path)
    path = out / "answers" / "model" / "harm.jsonl"
    path.write_text("{" + path.read_text())
    with pytest.raises(
        ValueError, match="harm.jsonl is damaged .*Delete it, and its answers are given again"
    ):
        evaluate(str(tiny), out, options, str(other))
