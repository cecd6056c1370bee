"""launch.gate as a user calls it: on models, given again, and its exit codes."""

import functools
import shutil

import pytest

from safepatch_jax.runtime.files import read_json
from safepatch_jax.studies.evaluate.options import EvaluationOptions
from safepatch_jax.studies.gate.study import gate
from tests import calls
from tests.evaluations import write_measures, write_suite

call = functools.partial(calls.call, "launch.gate")


@pytest.mark.usefixtures("one_device")
def test_models_are_asked_and_stricter_rules_read_their_answers(tiny, tmp_path, capsys):
    harm, *_, text = write_measures(tmp_path)
    suite = write_suite(tmp_path / "suite.json", [harm | {"max_new": 12}, text])
    rules, out = tmp_path / "rules.json", tmp_path / "out"
    rules.write_text('{"first": 3, "harm": {"margin": 0.9}, "text": {"margin": 0.9}}')
    options = EvaluationOptions(suite=suite, batch_size=4)
    content = gate(str(tiny), str(tiny), options, str(rules), str(out))
    assert content["verdict"] == "pass" and "Loading" in capsys.readouterr().out
    assert [check["mean"] for check in content["checks"]] == [0, 0]
    names = {"answers", "verdicts", "inputs.json", "gate.md", "gate.json", "gate.xml"}
    assert {path.name for path in out.iterdir() if path.name[0] != "."} == names
    asked = (out / "answers" / "against" / "text.jsonl").read_text().count("\n")
    assert asked == content["checks"][1]["n"] == 3  # of five: the answer was clear
    rules.write_text('{"harm": {"margin": 0.01}}')
    shutil.rmtree(out / "verdicts")
    with pytest.raises(ValueError, match="is a gate with other suite and items"):
        gate(str(tiny), str(tiny), options, str(rules), str(out))
    flags = [f"--candidate={tiny}", f"--against={tiny}", f"--suite={suite}", f"--out={out}"]
    rules.write_text('{"first": 3, "most": 3, "harm": {"margin": 0.01}, "text": {"margin": 0.01}}')
    strict = call(*flags, f"--rules={rules}", "--batch_size=4")
    assert strict.returncode == 4, strict.stderr
    assert "NOT ENOUGH EVIDENCE" in strict.stdout and "more prompts needed" in strict.stdout
    assert f"Report: {out / 'gate.md'}" in strict.stdout and "Loading" not in strict.stdout
    assert "error" not in strict.stderr and read_json(out / "gate.json")["exit_code"] == 4


@pytest.mark.parametrize(
    "args, message",
    [
        (["--against=x"], "--candidate is needed"),
        (["--candidate=gone", "--against=gone"], "no model folder 'gone'"),
    ],
)
def test_mistakes_end_with_one_clear_line(args, message):
    result = call(*args)
    assert result.returncode == 2 and message in result.stderr
    assert len(result.stderr.splitlines()) == 1
