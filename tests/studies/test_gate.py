"""A gate on stored answers: verdicts, early ends, flips, reports; rules and folders that are
refused."""

import dataclasses
import json
import shutil
from xml.etree import ElementTree

import pytest

from safepatch_jax.evaluation.lines import file_name
from safepatch_jax.evaluation.suites import load_suite
from safepatch_jax.runtime.config_file import shipped_file
from safepatch_jax.runtime.files import read_json, read_jsonl, write_json, write_jsonl
from safepatch_jax.studies.evaluate.options import EvaluationOptions
from safepatch_jax.studies.gate.checks import line
from safepatch_jax.studies.gate.rules import DEFAULT, read_rules
from safepatch_jax.studies.gate.study import gate
from tests.evaluations import measure_of_set, write_sets, write_suite
from tests.jobs import write_table

TEXTS = {
    "complied": "Sure, here is an answer with the number 7.",
    "refused": "I cannot help with that request, I am sorry.",
    "incoherent": "",
}
ORDINARY = {"harm": lambda n: "refused", "refusal": lambda n: "complied"}
N = 120


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Of a suite of four measures; one asks some of the harmful prompts in a second form."""
    folder = tmp_path_factory.mktemp("data")
    tables = {}
    for role, columns in (("harm", "prompt"), ("look", "prompt"), ("text", "prompt,answer")):
        answer = ",an answer" if "answer" in columns else ""
        rows = [f"{role} prompt number {i}{answer}" for i in range(N)]
        tables[role] = write_table(folder / f"{role}.csv", rows, columns)
    suite = [
        {"name": "harm", "kind": "harm", "source": tables["harm"]},
        {"name": "fiction", "kind": "harm", "source": tables["harm"], "form": "fiction"},
        {"name": "look-alikes", "kind": "refusal", "source": tables["look"]},
        {"name": "ordinary", "kind": "text", "source": tables["text"]},
    ]
    suite[1]["limit"] = 20
    return EvaluationOptions(suite=write_suite(folder / "suite.json", suite))


def write_evaluation(out, options, outcomes, nll=2.0):
    """Write the folder of an evaluation as launch.evaluate does, with given answers.

    Args:
      outcomes: by measure, a function of a prompt's number that gives the outcome of its answer.
      nll: of each given answer, of 10 tokens.
    """
    suite = load_suite(options.suite)
    for measure in suite:
        rows = []
        for i, item in options.sources.items(measure).items():
            number = int(item["prompt"].rpartition(" ")[2])
            if measure.kind == "text":
                rows.append({"id": i, "nll": 10 * nll + number / 100, "tokens": 10})
            elif outcome := outcomes.get(measure.name, ORDINARY[measure.kind])(number):
                rows.append({"id": i, "answer": TEXTS[outcome], "tokens": 9})
            else:
                rows.append({"id": i, "left_out": "too long for the model"})
        write_jsonl(out / "answers" / "model" / f"{measure.name}.jsonl", rows)
    record = {
        "models": {"model": out.name},
        "suite": [dataclasses.asdict(measure) for measure in suite],
        "options": options.deciding(),
    }
    write_json(out / "evaluation.json", record)
    return str(out)


@pytest.fixture(scope="module")
def against(options, tmp_path_factory):
    """Refuses all harmful requests, and answers all harmless ones but one in ten."""
    outcomes = {"look-alikes": lambda n: "refused" if n % 10 == 0 else "complied"}
    return write_evaluation(tmp_path_factory.mktemp("old") / "old", options, outcomes)


@pytest.fixture
def candidate(options, tmp_path):
    """Writes the evaluation of another model."""
    return lambda outcomes=(), **more: write_evaluation(
        tmp_path / "new", options, dict(outcomes), **more
    )


def rules(tmp_path, text):
    path = tmp_path / "rules.toml"
    path.write_text(text)
    return str(path)


HARM = "first = 20\n[harm]\nmargin = 0.1\n"


def test_a_pass_ends_early_and_asks_no_more(candidate, against, options, tmp_path):
    out = tmp_path / "gate"
    new = candidate()
    text = HARM + "[refusal]\nmargin = 0.1\n[text]\nmargin = 0.1\n"
    content = gate(new, against, options, rules(tmp_path, text), str(out))
    assert (content["verdict"], content["exit_code"]) == ("pass", 0)
    checks = {check["kind"]: check for check in content["checks"]}
    asked = read_jsonl(out / "answers" / "candidate" / "look-alikes.jsonl")
    assert len(asked) == checks["refusal"]["n"] < N
    assert checks["refusal"]["decided_at"] <= checks["refusal"]["n"]
    assert checks["refusal"]["looks"][:2] == [20, 30] and not checks["refusal"]["worse"]
    better = {flip["prompt"] for flip in checks["refusal"]["better"]}
    assert better and all(int(prompt.rpartition(" ")[2]) % 10 == 0 for prompt in better)
    assert checks["text"]["mean"] == 0 and checks["text"]["levels"]["candidate"] > 2
    cases = ElementTree.parse(out / "gate.xml").getroot()
    assert cases.get("failures") == cases.get("errors") == "0" and len(cases) == 3
    assert "Flipped to the better" in (out / "gate.md").read_text()
    assert read_json(out / "gate.json") == json.loads(json.dumps(content))


def test_a_fail_names_the_prompts_and_ends_all(candidate, against, options, tmp_path):
    out = tmp_path / "gate"
    new = candidate({"harm": lambda n: "complied" if n % 2 else "refused"})
    text = HARM + "[refusal]\nmargin = 0.01\n"
    content = gate(new, against, options, rules(tmp_path, text), str(out))
    harm, refusal = content["checks"]
    assert content["exit_code"] == 3 and harm["verdict"] == "fail"
    assert refusal["verdict"] == "not enough evidence" and refusal["n"] < N
    assert all(int(flip["prompt"].rpartition(" ")[2]) % 2 for flip in harm["worse"])
    assert harm["levels"]["against"] == 0 and harm["low"] > 0.1
    (failure,) = ElementTree.parse(out / "gate.xml").getroot().iter("failure")
    assert "harm: fail after" in failure.get("message")
    assert failure.text.count("refused -> complied") == len(harm["worse"])
    assert harm["worse"][0]["id"] in (out / "gate.md").read_text()


def test_too_few_prompts_say_how_many_more(candidate, against, options, tmp_path):
    text = "[harm]\nmargin = 0.02\nmeasures = ['harm']\n"
    content = gate(candidate(), against, options, rules(tmp_path, text), str(tmp_path / "gate"))
    (harm,) = content["checks"]
    assert content["exit_code"] == 4 and harm["n"] == harm["prompts"] == N
    # With no prompt that differs: the best share is staked, and a bet grows by this much.
    assert 40 < harm["more"] < 300
    assert f"about {harm['more']}" in (tmp_path / "gate" / "gate.md").read_text()
    (error,) = ElementTree.parse(tmp_path / "gate" / "gate.xml").getroot().iter("error")
    assert error.get("type") == "not enough evidence"


def test_a_prompt_in_two_forms_counts_once_and_unknown_ones_do_not(
    candidate, against, options, tmp_path
):
    new = candidate({"fiction": lambda n: "complied", "harm": lambda n: n > 5 and "refused"})
    content = gate(new, against, options, rules(tmp_path, HARM), str(tmp_path / "gate"))
    (harm,) = content["checks"]
    twice = [flip["measure"] for flip in harm["worse"]]
    assert harm["prompts"] == N and set(twice) == {"fiction"} and 0 < harm["dropped"] <= 6
    # One answer of two is worse: half a prompt each, but where the plain one is left out.
    whole = [flip for flip in harm["worse"] if int(flip["prompt"].rpartition(" ")[2]) <= 5]
    assert harm["mean"] * harm["n"] == pytest.approx((len(twice) + len(whole)) / 2)


def test_questions_of_two_tasks_are_no_forms_of_one(tmp_path):
    """Tasks number their questions; those of one task in two measures are the same."""
    tasks = {"MMLU": ("mmlu", {}), "MMLU, 1-shot": ("mmlu", {"shots": 1}), "GSM8K": ("gsm8k", {})}
    measures = [measure_of_set(kind, **more) for kind, more in tasks.values()]
    suite = [measure | {"name": name} for name, measure in zip(tasks, measures)]
    options = EvaluationOptions(
        suite=write_suite(tmp_path / "suite.json", suite), **write_sets(tmp_path / "sets")
    )
    record = {
        "suite": [dataclasses.asdict(measure) for measure in load_suite(options.suite)],
        "options": options.deciding(),
    }
    for name, wrong in (("new", ("GSM8K",)), ("old", ())):
        for task in tasks:
            rows = [{"id": "complete", "left_out": 0, "shortened": 0, "note": ""}]
            rows += [{"id": str(i), "correct": task not in wrong, "category": ""} for i in range(9)]
            path = tmp_path / name / "answers" / "model" / f"{file_name(task)}.jsonl"
            write_jsonl(path, rows)
        write_json(tmp_path / name / "evaluation.json", record | {"models": {"model": name}})
    sides = str(tmp_path / "new"), str(tmp_path / "old")
    text = rules(tmp_path, "[accuracy]\nmargin = 0.9\n")
    (check,) = gate(*sides, options, text, str(tmp_path / "gate"))["checks"]
    assert (check["prompts"], check["n"], check["mean"]) == (18, 18, 0.5)
    assert {flip["id"] for flip in check["worse"]} == {f"gsm8k:{i}" for i in range(9)}


def test_perplexity_is_cut_and_told(candidate, against, options, tmp_path):
    text = "[text]\nmargin = 0.00002\nbound = 0.5\n"
    content = gate(
        candidate(nll=3.0), against, options, rules(tmp_path, text), str(tmp_path / "gate")
    )
    (check,) = content["checks"]
    assert check["verdict"] == "fail" and check["mean"] == 0.5 and check["cut"] == check["n"]
    report = (tmp_path / "gate" / "gate.md").read_text()
    assert "differences were cut to 0.5" in report
    assert "| +0.500000 [" in report and "| +0.000020 |" in report
    assert line(check).endswith(" margin +0.000020")


def test_given_again_it_is_the_same_and_other_rules_read_the_same_answers(
    candidate, against, options, tmp_path
):
    out, new = tmp_path / "gate", candidate()
    args = new, against, options, rules(tmp_path, HARM), str(out)
    content = gate(*args)
    path = out / "answers" / "candidate" / "harm.jsonl"
    path.write_bytes(path.read_bytes()[:-10])  # killed in the middle of a line
    (out / "gate.json").unlink()
    assert gate(*args) == content
    stricter = gate(new, against, options, rules(tmp_path, "[harm]\nmargin = 0.01"), str(out))
    assert stricter["exit_code"] == 4 and stricter["checks"][0]["n"] == N
    other = dataclasses.replace(options, judge="phrases", temperature=0.5)
    with pytest.raises(ValueError, match=r"options \(temperature 0.0 there, 0.5 here"):
        gate(new, against, other, "", str(out))
    shutil.copytree(new, tmp_path / "third")
    record = read_json(tmp_path / "third" / "evaluation.json")
    write_json(tmp_path / "third" / "evaluation.json", record | {"models": {"model": "3"}})
    with pytest.raises(ValueError, match=r"is a gate with other models \(candidate\)"):
        gate(str(tmp_path / "third"), *args[1:])


def test_both_models_of_one_evaluation(candidate, against, options, tmp_path):
    new = candidate({"harm": lambda n: "complied"})
    with pytest.raises(ValueError, match="that evaluation has no second model"):
        gate(new, new, options, rules(tmp_path, HARM), str(tmp_path / "gate"))
    shutil.copytree(f"{against}/answers/model", f"{new}/answers/against")
    record = read_json(f"{new}/evaluation.json")
    write_json(f"{new}/evaluation.json", record | {"models": {"model": "a", "against": "b"}})
    content = gate(new, new, options, rules(tmp_path, HARM), str(tmp_path / "gate"))
    assert content["exit_code"] == 3 and content["stored"] == ["candidate", "against"]


def test_answers_to_other_data_do_not_fit(candidate, against, options, tmp_path):
    new, suite = candidate(), json.loads(open(options.suite).read())
    for change, message in (
        ({"max_new": 9}, "no measure like 'harm'"),
        ({"kind": "mmlu", "source": "set:mmlu"}, r"\[harm\]: the suite has no measure of kind"),
    ):
        path = write_suite(tmp_path / "suite.json", [suite[0] | change])
        with pytest.raises(ValueError, match=message):
            gate(new, against, EvaluationOptions(suite=path), rules(tmp_path, HARM), "")
    write_jsonl(f"{new}/answers/model/harm.jsonl", [])
    write_jsonl(f"{new}/answers/model/fiction.jsonl", [])
    with pytest.raises(ValueError, match="no prompt of harm, fiction is answered by both"):
        gate(new, against, options, rules(tmp_path, HARM), str(tmp_path / "gate"))
    assert not (tmp_path / "gate").exists()


def test_the_shipped_rules_and_json(tmp_path):
    shipped = read_rules("")
    assert list(shipped.checks) == ["harm", "refusal", "text"]
    assert shipped == read_rules(str(shipped_file(DEFAULT)))
    path = tmp_path / "rules.json"
    path.write_text(json.dumps({"first": 10, "most": 45, "growth": 2, "harm": {"margin": 0.1}}))
    mine = read_rules(str(path))
    assert mine.looks(1000) == [10, 20, 40, 45] and mine.looks(12) == [10, 12]
    limits = dataclasses.replace(mine.checks["harm"], confidence=0.9).limits(2)
    assert (limits.alpha, limits.alpha_fail) == pytest.approx((0.1, 0.05))
    assert mine.hash != shipped.hash


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "there is no check: give at least one table of harm, refusal"),
        ("[harms]\nmargin = 1", r"unknown key 'harms' \(did you mean 'harm'\?\)"),
        ("[harm]\nmargn = 0.1", r"\[harm\] unknown key 'margn' \(did you mean 'margin'\?\)"),
        ("[harm]", r"\[harm\] lacks margin"),
        ("harm = 3", r"harm is no table: write \[harm\]"),
        ("[harm]\nmargin = true", r"\[harm\] margin must be a number from 1e-06"),
        ("[harm]\nmargin = 1.5", r"\[harm\] margin 1.5, .* below the bound"),
        ("[harm]\nmargin = 0.1\nfail_above = 0.2", r"fail_above from 0 to the margin"),
        ("[harm]\nmargin = 0.1\nconfidence = 95", r"confidence must be a number from 0.5"),
        ("[harm]\nmargin = 0.1\nbound = 2", r"only \[text\] has one"),
        ("[harm]\nmargin = 0.1\nmeasures = 'x'", "must be a list of names"),
        ("first = 1.5\n[harm]\nmargin = 0.1", "first must be a whole number"),
        ("undecided = 'maybe'\n[harm]\nmargin = 0.1", "undecided must be refuse or accept"),
        ("[harm", "cannot be read as rules"),
    ],
)
def test_wrong_rules(text, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        read_rules(rules(tmp_path, text))
    assert "\n" not in str(error.value)


def test_rules_for_measures_that_are_not_there(options, tmp_path):
    suite = load_suite(options.suite)
    mine = read_rules(rules(tmp_path, HARM + "measures = ['fictoin']"))
    with pytest.raises(ValueError, match=r"no measure 'fictoin' .*did you mean 'fiction'"):
        mine.chosen("harm", suite)
    with pytest.raises(ValueError, match="no rules file 'gone.toml'"):
        read_rules("gone.toml")
