"""launch.sweep as a user calls it: help, the plan, a line a point, several processes, a kill,
mistakes."""

import json

import pytest

from tests.calls import call, call_and_kill
from tests.launch.test_launchers import flags  # noqa: F401 (a fixture)
from tests.launch.test_processes import launch, succeed


def rows_of(work):
    return [json.loads(line) for line in (work / "sweep.jsonl").read_text().splitlines()]


def points_of(text):
    return [line.partition(" | ")[0] for line in text.splitlines() if line.startswith("[")]


def test_help_is_a_manual():
    result = call("launch.sweep", "--help")
    for part in (
        "python -m launch.sweep --config=configs/demo.py",
        "sweep_sensitivity.png",
        "--around",
        "--[no]dry_run",
        "it is the seed of random retention (and of stochastic rounding) alone",
    ):
        assert part in result.stdout, part


def test_a_line_a_point_and_again(flags, tmp_path):
    work = f"--workdir={tmp_path / 'work'}"
    asked = [
        "--grid=patch.beta=1,2;patch.merge=safepatching,ties",
        "--grid=run.seed=0,1",
        "--around=patch.alpha=0;patch.beta=2",
    ]
    flags = [*flags, "--score.mode=batched", "--score.batch_size=2"]
    planned = call("launch.sweep", work, *asked, *flags, "--dry_run")
    assert (
        planned.returncode == 0
        and "6 points, 6 without a row" in planned.stdout
        and not (tmp_path / "work").exists()
    )
    assert "6 merge safepatching, alpha 0, beta 1, seed 0" in planned.stdout.splitlines()
    first = call("launch.sweep", work, *asked, *flags)
    assert first.returncode == 0, first.stderr
    rows = rows_of(tmp_path / "work")
    assert (
        len(rows) == 6
        and len(
            {
                (r["patch"]["beta"], r["patch"]["merge"], r["patch"]["alpha"], r["seed"])
                for r in rows
            }
        )
        == 6
    )
    assert f"Report: {tmp_path / 'work' / 'sweep.md'}" in first.stdout
    again = call("launch.sweep", work, *asked, *flags)
    assert len(points_of(first.stdout)) == 6 and points_of(first.stdout) == points_of(again.stdout)
    assert "answers: 100%" not in again.stderr and again.stdout.count("has a row") == 6


def test_a_killed_sweep_goes_on(flags, tmp_path):
    args = ("launch.sweep", f"--workdir={tmp_path / 'work'}", "--grid=patch.beta=1,2,3", *flags)
    call_and_kill("[1/3]", *args)
    assert len(rows_of(tmp_path / "work")) in (1, 2)
    result = call(*args)
    assert (
        result.returncode == 0
        and "[1/3] beta 1" in result.stdout
        and "| has a row" in result.stdout
    ), result.stderr
    assert len(rows_of(tmp_path / "work")) == 3 and "derive_se: running" not in result.stdout


@pytest.mark.parametrize(
    "asked, message",
    [
        ([], "Nothing to try: give --grid="),
        (["--grid=derive.se_steps=1,2"], "patch.OPTION"),
        (["--grid=patch.scope=all"], "give it as a flag"),
        (["--grid=patch.beta="], "empty value"),
        (
            ["--around=patch.retention=2"],
            "point patch.retention=2: 'patch.retention' must be at most 1",
        ),
        (["--grid=patch.beta=1", "--around=patch.bta=1"], "did you mean 'patch.beta'?"),
    ],
)
def test_mistakes_end_with_one_clear_line_before_anything_runs(asked, message, flags, tmp_path):
    result = call("launch.sweep", f"--workdir={tmp_path / 'work'}", *asked, *flags)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "work").exists()


def test_two_processes_sweep_as_one(flags, tmp_path):
    work, own = tmp_path / "work", [*flags, "--evaluate.max_new_tokens=2", "--derive.batch_size=8"]
    out = succeed(
        tmp_path / "both",
        "launch.sweep",
        f"--workdir={work}",
        "--grid=patch.beta=1,2",
        *own,
        devices=2,
    )
    assert [row["patch"]["beta"] for row in rows_of(work)] == [1, 2] and len(points_of(out)) == 2
    assert {"sweep.md", "sweep.json", "sweep.png", "sweep_sensitivity.png"} < {
        p.name for p in work.iterdir()
    }
    run = launch(
        tmp_path / "differ",
        "launch.sweep",
        f"--workdir={work}",
        *own,
        own=("--grid=run.seed=1", "--grid=run.seed=2"),
    )
    assert (
        run.finish() == [2, 2] and "The processes differ: hash of the points" in run.texts()[0][1]
    )
