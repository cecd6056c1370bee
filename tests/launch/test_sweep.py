"""launch.sweep as a user calls it: help, the plan, a kill, a line a point, several processes,
mistakes."""

import json
import shlex

import pytest

from benchmarks.readme_commands import stray
from tests.calls import call, call_and_kill
from tests.jobs import stages_run
from tests.launch.test_processes import launch


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
        "random retention (and of stochastic rounding) only",
    ):
        assert part in result.stdout, part


def test_a_killed_sweep_is_resumed_with_a_line_a_point(flags, tmp_path):
    work = tmp_path / "work"
    command = (
        "launch.sweep",
        f"--workdir={work}",
        "--grid=patch.beta=1,2;patch.merge=safepatching,ties",
        "--grid=run.seed=0,1",
        "--around=patch.alpha=0;patch.beta=2",
        *flags,
        "--score.mode=batched",
        "--score.batch_size=2",
    )
    planned = call(*command, "--dry_run")
    assert planned.returncode == 0 and "6 points, 6 without a row" in planned.stdout
    assert "6 merge safepatching, alpha 0, beta 1, seed 0" in planned.stdout.splitlines()
    assert not work.exists()
    call_and_kill("[1/6]", *command)
    assert len(rows_of(work)) in (1, 2)
    result = call(*command)
    assert result.returncode == 0, result.stderr
    assert stray(result.stderr) == []
    assert "derive_se: running" not in result.stdout and "| has a row" in result.stdout
    assert len(points_of(result.stdout)) == 6
    points = set()
    for row in rows_of(work):
        patch = row["patch"]
        points.add((patch["beta"], patch["merge"], patch["alpha"], row["seed"]))
    assert len(points) == len(rows_of(work)) == 6
    assert f"Report: {work / 'sweep.md'}" in result.stdout
    assert f"kept in {work / 'stages'}: jailbroken and broken models" in result.stdout
    assert f"when you are done: rm -r {work / 'stages'}\n" in result.stdout
    the_run_that_is_shown_trains_nothing(result.stdout, work)


def the_run_that_is_shown_trains_nothing(text, work):
    """The sweep's last lines have the whole command of a run in its workdir."""
    [line] = [line for line in text.splitlines() if line.startswith("  python -m launch.")]
    words = shlex.split(line)[2:]
    assert words[0] == "launch.safepatch" and f"--workdir={work}" in words
    flags = json.loads((work / "sweep.json").read_text())["recommended"]["flags"]
    assert flags and words[-len(flags) :] == flags
    result = call(*words)
    assert result.returncode == 0, result.stderr
    ran = stages_run(result.stdout)
    assert "evaluate_safepatching" in ran
    assert not {"import", "derive_se", "derive_osm", "score_se", "score_osm"} & set(ran)
    assert [path.name for path in (work / "stages" / "derive_osm").iterdir()] == ["manifest.json"]
    assert (work / "report.md").is_file() and (work / "sweep.md").is_file()


@pytest.mark.parametrize(
    "own, message",
    [
        ([], "Nothing to try: give --grid="),
        (["--grid=patch.beta=1", "--around=patch.bta=1"], "did you mean 'patch.beta'?"),
    ],
)
def test_mistakes_end_with_one_clear_line_before_anything_runs(
    own,
    message,
    flags,
    tmp_path,
):
    result = call("launch.sweep", f"--workdir={tmp_path / 'work'}", *own, *flags)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "work").exists()


def test_two_processes_sweep_as_one(flags, tmp_path):
    """Both leave out a point that gives no row."""
    work = f"--workdir={tmp_path / 'work'}"
    own = [*flags, "--evaluate.max_new_tokens=2", "--derive.batch_size=8"]
    run = launch(
        tmp_path / "both",
        "launch.sweep",
        work,
        "--grid=patch.beta=1e38;patch.alpha=1e38;patch.retention=1",
        "--grid=patch.beta=1,2",
        *own,
        devices=2,
    )
    assert run.finish() == [2, 2], run.texts()
    (out, err), (quiet, other) = run.texts()
    assert "error: 1 of 3 points gave no row" in err and quiet == "" and "error" not in other
    assert [row["patch"]["beta"] for row in rows_of(tmp_path / "work")] == [1, 2]
    assert len(points_of(out)) == 3
    names = {path.name for path in (tmp_path / "work").iterdir()}
    assert {"sweep.md", "sweep.json", "sweep.png", "sweep_sensitivity.png"} < names
    seeds = ("--grid=run.seed=1", "--grid=run.seed=2")
    run = launch(tmp_path / "differ", "launch.sweep", work, *own, own=seeds)
    assert run.finish() == [2, 2]
    assert "The processes differ: hash of the points" in run.texts()[0][1]
