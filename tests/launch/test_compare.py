"""launch.compare as a user calls it: help, a kill and the same command again, several processes,
mistakes."""

import json

import pytest

from tests.calls import call, call_and_kill
from tests.launch.test_processes import launch, succeed


@pytest.fixture
def command(flags, tmp_path):
    builtin = {"source": "builtin", "split": "report", "limit": 2, "max_new": 3}
    measures = []
    for name, kind in (("harm", "harm"), ("look", "refusal"), ("text", "text")):
        measures.append({"name": name, "kind": kind} | builtin)
    (tmp_path / "suite.json").write_text(json.dumps(measures))
    return [*flags, f"--suite={tmp_path / 'suite.json'}"]


def rows_of(work):
    return json.loads((work / "compare.json").read_text())["methods"]


def test_help_is_a_manual():
    result = call("launch.compare", "--help_all")
    for part in (
        "python -m launch.compare --config=configs/compare_demo.py",
        "decoding   self_cd, rose, safe_decoding",
        "--methods\n",
        "--patch.beta\n",
    ):
        assert part in result.stdout, part


def test_a_killed_comparison_is_resumed(command, tmp_path):
    args = ("launch.compare", f"--workdir={tmp_path / 'work'}", "--methods=npo", *command)
    call_and_kill("[3/3] NPO", *args)
    assert not (tmp_path / "work" / "compare.md").exists()
    result = call(*args)
    assert result.returncode == 0, result.stderr
    assert "[2/3] SafePatching, seed 0: answered before" in result.stdout
    assert list(rows_of(tmp_path / "work")) == ["backbone", "safepatching", "npo"]
    assert not (tmp_path / "work" / "seeds").exists()


@pytest.mark.parametrize(
    "own, message",
    [
        (["--seeds=1;2"], "--seeds takes whole numbers"),
    ],
)
def test_mistakes_end_with_one_clear_line_before_anything_runs(own, message, command, tmp_path):
    result = call("launch.compare", f"--workdir={tmp_path / 'work'}", *command, *own)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "work").exists()


def test_two_processes_compare_as_one(command, tmp_path):
    work, own = tmp_path / "work", [*command, "--derive.batch_size=8"]
    succeed(
        tmp_path / "both",
        "launch.compare",
        f"--workdir={work}",
        "--methods=ga_mismatch",
        *own,
        devices=2,
    )
    assert [row["measures"]["harm"]["n"] for row in rows_of(work).values()] == [2] * 3
    methods = ("--methods=ga", "--methods=npo")
    run = launch(tmp_path / "differ", "launch.compare", f"--workdir={work}", *own, own=methods)
    assert run.finish() == [2, 2] and "The processes differ: --methods" in run.texts()[0][1]
