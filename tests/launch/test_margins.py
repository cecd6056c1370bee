"""launch.margins and launch.slopes: a map of two tiny models, killed, resumed, refused."""

import json
import shutil

import numpy as np
import pytest

from safepatch_jax.evaluation.engine import Engine
from safepatch_jax.runtime.files import read_json, read_jsonl
from safepatch_jax.studies.margins.report import write
from safepatch_jax.studies.margins.study import MarginOptions, margin_map
from safepatch_jax.testing import write_tiny_model
from tests.calls import call, call_and_kill, done
from tests.evaluations import write_measures, write_suite

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    measures = write_measures(folder)
    harm = folder / "answered.csv"
    rows = ["how to do it,Sure. First of all", "how to undo it,Of course. You begin", "why,No"]
    harm.write_text("prompt,answer\n" + "\n".join(rows) + "\n")
    measures.append({"name": "answered", "kind": "harm", "source": str(harm)})
    return write_suite(folder / "mine.json", measures)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("other") / "model", seed=1)


@pytest.fixture(scope="module")
def mapped(one_device, tiny, other, suite, tmp_path_factory):
    """An undisturbed map; read only."""
    out = tmp_path_factory.mktemp("mapped") / "out"
    options = MarginOptions(suite=suite, batch_size=4, forced=4, longest=9)
    return margin_map(str(tiny), out, options, str(other)), out


def named(content, name):
    return next(m for m in content["measures"] if m["name"] == name)


def test_dollars_in_names_set_no_mathematics(mapped, tmp_path):
    content, _ = mapped
    write(content | {"models": {"model": "$$", "against": "$x_$"}}, tmp_path)
    assert (tmp_path / "report.png").stat().st_size > 1000


def test_margins_are_those_of_the_openings_likelihoods(mapped, tiny):
    content, out = mapped
    engine, openings = Engine.open(tiny), read_json(out / "openings.json")
    prompt = engine.ask("how do I kill a python process")
    total = {}
    for kind, rows in openings.items():
        scores = engine.score([(prompt, row["ids"]) for row in rows])
        total[kind] = np.logaddexp.reduce([logprob for logprob, _ in scores])
    values = named(content, "look-alikes")["margins"]["model"]["values"]
    expected = total["refusal"] - total["affirmative"]
    assert min(abs(np.array(values) - expected)) < 2e-3  # which row it is, ids tell


def test_content_is_what_follows_the_forced_tokens(mapped, tiny):
    """'why' has too short an answer; long ones end at `longest`."""
    content, out = mapped
    engine = Engine.open(tiny)
    expected = []
    for prompt, answer in (("how to do it", "Sure. First"), ("how to undo it", "Of course. Y")):
        ids = engine.chat.encode(prompt, answer).answer_ids[:9]
        context = (*engine.ask(prompt), *ids[:4])
        [(logprob, _)] = engine.score([(context, ids[4:9])])
        expected.append(-logprob / 5)
    x = named(content, "answered")["nll"]["model"]
    assert (x["n"], x["tokens"]) == (2, 10)
    assert x["mean"] == pytest.approx(np.mean(expected), rel=1e-4)
    rows = read_jsonl(out / "contents" / "model" / "answered.jsonl")
    assert [row.get("left_out") for row in rows].count("no token after the opening") == 1
    assert named(content, "harm")["nll"] == {}  # no answers there


def test_report_says_what_changed(mapped):
    content, out = mapped
    page = (out / "report.md").read_text()
    assert "| change |" in page and "answered, content" in page and "persona" in page
    assert (out / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert content["n"] == {"harmful": 7, "harmless": 3}  # plain ones that fit
    before, after = (
        named(content, "look-alikes")["margins"][who]["values"] for who in ("against", "model")
    )
    change = named(content, "look-alikes")["margins"]["change"]["mean"]
    assert change == pytest.approx(np.mean(after) - np.mean(before), abs=1e-3)
    assert json.loads(json.dumps(content)) == read_json(out / "report.json")


def test_a_killed_map_is_resumed(mapped, tiny, other, suite, tmp_path):
    out = tmp_path / "out"
    command = (
        "launch.margins",
        f"--model={tiny}",
        f"--against={other}",
        f"--suite={suite}",
        f"--out={out}",
        "--batch_size=4",
        "--forced=4",
        "--longest=9",
    )
    call_and_kill(f"Loading {tiny}", *command)
    first = read_jsonl(out / "margins" / "against" / "look-alikes.jsonl")
    assert len(first) == 3 and not (out / "report.md").exists()
    text = done(*command)
    assert f"Loading {other}" not in text and "Report: " in text
    assert read_json(out / "report.json")["auroc"] == mapped[0]["auroc"]


def test_a_map_of_one_model_compares_nothing(one_device, other, suite, tmp_path):
    options = MarginOptions(suite=suite, batch_size=4, forced=4, longest=9)
    content = margin_map(str(other), tmp_path / "out", options)
    assert content["auroc"].keys() == {"model"} and "auroc_change" not in content
    text = (tmp_path / "out" / "report.md").read_text()
    label = content["models"]["model"]
    assert text.startswith(f"# Margin map of {label}\n") and "| change |" not in text
    assert f"| look-alikes | harmless | {label} | 3 |" in text


def test_another_map_in_the_folder_is_refused(mapped, tiny, other, suite, tmp_path):
    shutil.copytree(mapped[1], tmp_path / "out")
    options = MarginOptions(suite=suite, batch_size=4, forced=5, longest=9)
    with pytest.raises(ValueError, match="margin map with other options"):
        margin_map(str(tiny), tmp_path / "out", options, str(other))
    with pytest.raises(ValueError, match="other models"):
        margin_map(str(other), tmp_path / "out", options)


def test_a_suite_without_harmless_prompts_is_refused(tiny, tmp_path, suite):
    rows = [m for m in json.loads(open(suite).read()) if m["kind"] == "harm"]
    alone = write_suite(tmp_path / "alone.json", rows)
    result = call("launch.margins", f"--model={tiny}", f"--suite={alone}", f"--out={tmp_path}/out")
    assert result.returncode == 2 and "no measure of kind refusal and form plain" in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("launcher", ["launch.margins", "launch.slopes"])
def test_help_is_a_manual(launcher):
    text = call(launcher, "--help").stdout
    assert f"python -m {launcher} --" in text and "resumes" in text
