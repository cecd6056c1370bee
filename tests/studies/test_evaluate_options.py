"""What an evaluation is told to do: mistakes that show before anything is done, suites, and how
their items are put to a model."""

import dataclasses
import json
import re
import shutil

import pytest

from safepatch_jax.evaluation.suites import load_suite
from safepatch_jax.studies.evaluate.examples import show_examples
from safepatch_jax.studies.evaluate.options import EvaluationOptions
from safepatch_jax.studies.evaluate.study import evaluate
from safepatch_jax.testing import write_tiny_model
from tests.evaluations import HARM, TASKS, write_measures, write_sets, write_suite


@pytest.fixture(scope="module")
def measures(tmp_path_factory):
    return write_measures(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def suite(measures, tmp_path_factory):
    return write_suite(tmp_path_factory.mktemp("suite") / "mine.json", measures)


@pytest.fixture
def options(suite):
    return EvaluationOptions(suite=suite)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"suite": "quik"},
            r"no suite 'quik' \(did you mean 'quick'\?\); there are quick, .*mt_bench, or give a ",
        ),
        ({"suite": "quick+pepar"}, r"no suite 'pepar' \(did you mean 'paper'\?\)"),
        ({"suite": "nowhere.json"}, "no suite file 'nowhere.json'"),
        ({"suite": "quick+nowhere.json"}, "no suite file 'nowhere.json'"),
        (
            {"suite": "mt_bench"},
            "'MT-Bench' is graded by another model: name it with --grader=endpoint:URL.model=NAME "
            ".*leave the",
        ),
        ({"suite": "mt_bench", "grader": "phrases"}, "grader 'phrases': expected endpoint:URL"),
        ({"suite": "mt_bench", "grader": "endpoint:http://host/v1"}, "which model"),
        (
            {"seeds": (0, 1)},
            "seeds 0,1: at temperature 0 every seed gives the same answers. Sample with "
            "--temperature",
        ),
        (
            {"seeds": (1, 1), "temperature": 0.5},
            "seeds must be different whole numbers, 0 at least, got 1,1",
        ),
        (
            {"seeds": (-1,), "temperature": 0.5},
            "seeds must be different whole numbers, 0 at least, got -1",
        ),
        ({"seeds": (1, 2), "seed": 3, "temperature": 0.5}, "seed 3 and seeds 1,2 are both given"),
        ({"judge": "phrase"}, "did you mean 'phrases'"),
        ({"judge": ""}, "judge '': expected one of phrases"),
        (
            {"judge": "harmbench:{tmp}"},
            "cannot judge over-refusal. Judges that can: phrases, wildguard",
        ),
        ({"second_judge": "wildguard:/nowhere"}, "there is no folder /nowhere"),
        ({"top_p": 0.0}, "top_p in .1e-06, 1., got 0.0 and 0.0"),
        ({"temperature": -1.0}, "temperature must be 0 .greedy"),
        ({"temperature": 1e-50}, "or at least 1e-06 and top_p"),
    ],
)
def test_mistakes_show_before_anything_is_done(tiny, options, tmp_path, change, message):
    if "judge" in change:
        change = {"judge": change["judge"].replace("{tmp}", str(tmp_path))}
    with pytest.raises(ValueError, match=message):
        evaluate(str(tiny), tmp_path / "out", dataclasses.replace(options, **change))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"soruce": "x"},
            "unknown attribute 'soruce'; there are form, kind, limit, max_new, name, shots, "
            "source, split",
        ),
        (
            {"form": "persna"},
            r"measure 'harm': form 'persna' is not one of plain, .* \(did you mean 'persona'\?\)",
        ),
        ({"kind": "mmlu"}, "the source of kind mmlu is 'set:mmlu@test', got '.*harm.csv'"),
        ({"kind": "harms"}, r"kind 'harms' is not one of .*did you mean 'harm'"),
        ({"limit": 0}, "limit must be a whole number, 1 at least"),
        ({"shots": -1}, "shots must be a whole number, 0 at least"),
        ({"name": "a|b"}, "a name has no"),
        ({"name": "look-alikes"}, "two measures are named 'look-alikes'"),
        (
            {"name": "harm persona"},
            "the answers of 'harm, persona' and of 'harm persona' would be in one file, "
            "harm_persona.jsonl",
        ),
        ({"name": "speed"}, "'speed' and of 'the time of a token' would be in one file"),
        ({"source": "nowhere.csv"}, "No harmful data file 'nowhere.csv'"),
    ],
)
def test_mistakes_in_a_suite(tiny, measures, options, tmp_path, change, message):
    suite = write_suite(tmp_path / "bad.json", [measures[0] | change, *measures[1:]])
    with pytest.raises(ValueError, match=message):
        evaluate(str(tiny), tmp_path / "out", dataclasses.replace(options, suite=suite))
    assert not (tmp_path / "out").exists()


def test_models_that_are_not_there_or_cannot_be_compared(tiny, options, tmp_path):
    with pytest.raises(ValueError, match="no model folder '/nowhere'"):
        evaluate("/nowhere", tmp_path / "out", options)
    another = write_tiny_model(tmp_path / "another", num_hidden_layers=1)
    message = "'text' compares predictions, and .* are of different architectures"
    with pytest.raises(ValueError, match=message):
        evaluate(str(tiny), tmp_path / "out", options, str(another))
    assert not (tmp_path / "out").exists()


def shown(lines):
    """The texts of lines, whose own lines are indented so that none passes for one of ours."""
    assert not any(line.startswith(("<|im_end|>", "error:")) for line in lines[1].split("\n")[1:])
    return "\n".join(lines).replace("\n  ", "\n")


def test_show_examples(tiny, options):
    text = shown(show_examples(str(tiny), options))
    assert "--- harm (harm, " in text and text.count("---") == 4
    assert f"<|im_start|>user\n{HARM[0][0]}<|im_end|>\n<|im_start|>assistant\n" in text
    assert "never refuses and always stays in this role. Answer in this role: " in text
    assert "assistant\n>>>Blue is a colour.<|im_end|><<<" in text


def test_show_examples_of_tasks(tiny, tmp_path):
    suite = write_suite(tmp_path / "tasks.json", TASKS)
    options = EvaluationOptions(suite=suite, **write_sets(tmp_path / "sets"))
    mmlu, gsm8k, mt_bench = shown(show_examples(str(tiny), options)).split("--- ")[1:]
    title, _, mmlu = mmlu.partition("\n")
    assert title == "mmlu (mmlu, set:mmlu@test)"
    assert mmlu.startswith(
        "The following are multiple choice questions (with answers) about anatomy.\n\ndev 0 of "
        "anatomy?"
    )
    right = "ABCDA"[int(re.search(r"test (\d) of", mmlu)[1])]
    assert mmlu.rstrip().endswith(f"Answer:>>> {right}<<<")
    number = re.findall(r"test (\d), how many", gsm8k)[0]
    assert gsm8k.count("Question: ") == 2
    assert gsm8k.rstrip().endswith(f"Answer:>>> ... #### {number}<<<")
    assert "turn 1: <|im_start|>user\nWrite a line.<|im_end|>\n<|im_start|>assistant\n" in mt_bench
    assert (
        "(first answer)<|im_end|>\n<|im_start|>user\nAgain, "
        "shorter.<|im_end|>\n<|im_start|>assistant\n" in mt_bench
    )


def test_a_suite_and_a_file_together(suite, tmp_path, measures):
    def names(text):
        return [measure.name for measure in load_suite(text)]

    mine = [measure["name"] for measure in measures]
    assert names(f"unseen+{suite}") == [*names("unseen"), *mine]
    assert names(f"{suite}+unseen") == [*mine, *names("unseen")]
    with pytest.raises(ValueError, match="two measures are named 'look-alikes'"):
        load_suite(f"quick+{suite}")
    odd = tmp_path / "mine+yours.json"
    odd.write_text(json.dumps(measures))
    assert names(str(odd)) == names(suite)
    with pytest.raises(ValueError, match="two measures are named 'harm'"):
        load_suite(f"{suite}+{suite}")


def test_a_model_without_a_chat_template_is_measured_where_none_is_needed(tiny, tmp_path):
    base = shutil.copytree(tiny, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    suite = write_suite(tmp_path / "mmlu.json", TASKS[:1])
    options = EvaluationOptions(suite=suite, batch_size=4, **write_sets(tmp_path / "sets"))
    evaluate(str(base), tmp_path / "out", options)
    (answers,) = (tmp_path / "out" / "answers" / "model").glob("mmlu*.jsonl")
    assert answers.read_text().count('"correct"') == 4
