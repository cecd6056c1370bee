"""Runs that are killed at any moment, by their launchers: the same command resumes, and ends with
the same bits."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from safepatch_jax.testing import write_tiny_model
from tests.launch.conftest import write_data

ROOT = pathlib.Path(__file__).parents[2]
ENV = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """A whole job of seconds; its derivation takes long enough to be met."""
    folder = tmp_path_factory.mktemp("faults")
    write_tiny_model(folder / "model", num_hidden_layers=1)
    return [
        f"--data={write_data(folder)}",
        f"--model.source={folder / 'model'}",
        "--run.certify=hashes",
        "--derive.se_steps=60",
        "--derive.osm_steps=5",
        "--derive.se_learning_rate=1e-5",
        "--derive.osm_learning_rate=1e-3",
        "--score.samples=4",
        "--evaluate.max_new_tokens=3",
    ]


def test_killed_in_any_stage_a_run_ends_with_the_same_bits(flags, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.faults",
            f"--folder={tmp_path / 'runs'}",
            "--kills=2",
            "--seed=1",
            "--checkpoint_minutes=0.000001",
            "--",
            "launch.safepatch",
            *flags,
        ],
        cwd=ROOT,
        env=ENV,
        text=True,
        capture_output=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(
        r"2 times SIGKILL.* damaged checkpoints: 0\. \d+ files equal, 0 not\.", done.stdout
    ), done.stdout
    killed = [int(code) for code in re.findall(r"exit code (-?\d+)", done.stdout)]
    assert killed.count(-signal.SIGKILL) >= 1, done.stdout


def test_a_full_disk_within_a_checkpoint_is_reported_and_the_run_resumes_when_there_is_room(
    flags, tmp_path
):
    """A limit on file size stands for the full disk."""
    command = [
        f"--workdir={tmp_path / 'work'}",
        f"--run.cache_dir={tmp_path / 'cache'}",
        *flags,
        "--run.checkpoint_minutes=0.0001",
    ]
    limited = (
        "import resource, runpy, signal, sys; sys.argv[0] = 'safepatch'; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); "
        "runpy.run_module('launch.safepatch', run_name='__main__')"
    )
    full = subprocess.run(
        [sys.executable, "-c", limited, *command],
        cwd=ROOT,
        env=ENV | {"JAX_ENABLE_COMPILATION_CACHE": "0"},
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert full.returncode == 2 and re.search(
        "^error: Cannot write a checkpoint to .*free space", full.stderr, re.M
    ), full.stderr
    # Reported once, not as orbax logs it.
    assert not re.search(r"^E\d{4} |never retrieved", full.stderr, re.M), full.stderr
    again = subprocess.run(
        [sys.executable, "-m", "launch.safepatch", *command],
        cwd=ROOT,
        env=ENV,
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert again.returncode == 0 and "damaged" not in again.stdout, again.stdout + again.stderr
    assert not list((tmp_path / "work" / "stages").glob(".*.steps"))


def test_sigterm_in_training_ends_with_a_checkpoint_from_which_the_run_resumes(flags, tmp_path):
    command = [
        sys.executable,
        "-m",
        "launch.safepatch",
        f"--workdir={tmp_path / 'work'}",
        f"--run.cache_dir={tmp_path / 'cache'}",
        *flags,
    ]
    run = subprocess.Popen(
        command, cwd=ROOT, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    metrics = tmp_path / "work" / "metrics.jsonl"
    while run.poll() is None and not (metrics.is_file() and metrics.read_text().count("\n") >= 3):
        time.sleep(0.01)
    run.send_signal(signal.SIGTERM)
    out, err = run.communicate(timeout=120)
    ended = re.search(r"SIGTERM: ends after step (\d+)\. A checkpoint is written; the same", out)
    assert run.returncode == 143 and ended and "Traceback" not in err, out + err
    assert "Derived models or scores lie in" in out  # the checkpoint holds one
    again = subprocess.run(command, cwd=ROOT, env=ENV, text=True, capture_output=True, timeout=300)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"derive SE: resumed after step {ended[1]} of 60" in again.stdout
    steps = [line for line in metrics.read_text().splitlines() if '"derive_se"' in line]
    assert len(steps) == 60
