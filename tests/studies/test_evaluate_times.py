"""The time of a token in an evaluation: two models are compared under the same conditions alone."""

import dataclasses
import json

import pytest

from safepatch_jax.runtime.files import read_jsonl
from safepatch_jax.studies.evaluate.options import EvaluationOptions
from safepatch_jax.studies.evaluate.study import evaluate
from tests.evaluations import write_measures, write_suite

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture
def options(tmp_path):
    measures = write_measures(tmp_path)
    return EvaluationOptions(suite=write_suite(tmp_path / "mine.json", measures[2:3]), batch_size=4)


def test_models_are_timed_alike_after_a_resumption_with_other_options(
    tiny, options, tmp_path, capsys
):
    out = tmp_path / "out"
    paths = {who: out / "answers" / who / "speed.jsonl" for who in ("model", "against")}
    assert evaluate(str(tiny), out, options, str(tiny))["atgr"] > 0
    paths["model"].unlink()  # as if killed before
    smaller = dataclasses.replace(options, batch_size=2)
    content = evaluate(str(tiny), out, smaller, str(tiny))
    last = {who: read_jsonl(path)[-1] for who, path in paths.items()}
    for row in last.values():
        assert row["batch_size"] == 2 and row["device"] and set(row["mesh"].values()) == {1}
    seconds = {who: row["seconds_per_token"] for who, row in last.items()}
    assert content["atgr"] == seconds["model"] / seconds["against"]
    # Where both times are known nothing is loaded for them.
    capsys.readouterr()
    assert evaluate(str(tiny), out, options, str(tiny))["seconds_per_token"] == seconds
    assert "Loading" not in capsys.readouterr().out


def test_times_of_an_earlier_version_are_told_without_a_ratio(tiny, options, tmp_path, capsys):
    out, both = tmp_path / "out", dataclasses.replace(options, templates=("own", "plain"))
    evaluate(str(tiny), out, both, str(tiny))
    for who, seconds in (("model", 1.0), ("against", 2.0)):
        row = {"id": "speed", "seconds_per_token": seconds}
        (out / "answers" / who / "speed.jsonl").write_text(json.dumps(row) + "\n")
    capsys.readouterr()
    content = evaluate(str(tiny), out, both, str(tiny))
    assert content["seconds_per_token"] == {"model": 1.0, "against": 2.0}
    assert "atgr" not in content and "Loading" not in capsys.readouterr().out
    said = "2000.00 ms; no ATGR, as they are not known to have been timed with the same batch size"
    assert said in (out / "report.md").read_text().replace("\n", " ")
    for path in out.glob("answers/*/speed.jsonl"):
        path.unlink()
    assert evaluate(str(tiny), out, both, str(tiny))["atgr"] > 0
    assert "ATGR" in (out / "report.md").read_text()
