"""launch/tpu_pod.sh: the command that it gives to all hosts, and what it refuses."""

import os
import subprocess
import time

import pytest

from tests.calls import ROOT


def pod(*args):
    return subprocess.run(
        [ROOT / "launch" / "tpu_pod.sh", *args], capture_output=True, text=True, timeout=30
    )


def bash(text):
    return subprocess.run(["bash", "-c", text], capture_output=True, text=True).stdout.splitlines()


def test_the_pod_script_composes_the_command():
    result = pod(
        "--print",
        "--project=p",
        "--dir=a b",
        "my-pod",
        "us-central2-b",
        "launch.sweep",
        "--workdir=/mnt/s/w",
        "--run.cache_dir=/mnt/s/c",
        "--grid=patch.beta=1,2;patch.merge=ties",
    )
    assert result.returncode == 0, result.stderr
    words = bash(f"printf '%s\\n' {result.stdout}")
    assert words[:-1] == [
        "gcloud",
        "compute",
        "tpus",
        "tpu-vm",
        "ssh",
        "my-pod",
        "--zone=us-central2-b",
        "--project=p",
        "--worker=all",
    ]
    command = words[-1].removeprefix("--command=")
    ran = bash('cd() { echo "$1"; }; .venv/bin/python() { printf \'%s\\n\' "$@"; }; ' + command)
    assert ran == [
        "a b",
        "-m",
        "launch.sweep",
        "--distributed",
        "--workdir=/mnt/s/w",
        "--run.cache_dir=/mnt/s/c",
        "--grid=patch.beta=1,2;patch.merge=ties",
    ]
    manual = pod("--help").stdout
    assert "launch/tpu_pod.sh [OPTIONS] POD ZONE LAUNCHER" in manual
    assert '-r requirements.txt "jax[tpu]" gcsfs' in manual  # workdirs lie in a bucket
    assert "Of launch.compare the workdir" in manual  # all but these


EVALUATE = ("launch.evaluate", "--model=/mnt/m", "--out=/mnt/o")


def test_addresses_variables_and_several_slices():
    options = ("--internal-ip", "--tunnel", "--env=HF_TOKEN=a b", "--env=JAX_X=1")
    result = pod("--print", *options, "pod-0,pod-1", "us-central2-b", *EVALUATE)
    assert result.returncode == 0, result.stderr
    lines = [bash(f"printf '%s\\n' {line}") for line in result.stdout.splitlines()]
    assert [line[5] for line in lines] == ["pod-0", "pod-1"]
    assert all({"--internal-ip", "--tunnel-through-iap"} <= set(line) for line in lines)
    (command,) = {line[-1].removeprefix("--command=") for line in lines}
    ran = bash("cd() { :; }; env() { printf '%s\\n' \"$@\"; }; " + command)
    assert ran[:4] == ["HF_TOKEN=a b", "JAX_X=1", ".venv/bin/python", "-m"]


def test_a_detached_run_outlives_the_command(tmp_path):
    """And several slices are started together; a fake gcloud runs what it is given here."""
    (tmp_path / "safepatch_jax" / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    programs = {
        "safepatch_jax/.venv/bin/python": 'echo "$A $PWD $*"; echo error >&2; sleep 0.5; echo end',
        "bin/gcloud": 'cd ~; for last; do :; done; [[ $5 != bad ]] && bash -c "${last#--command=}"',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOME": str(tmp_path)}

    def start(*args):
        script = ROOT / "launch" / "tpu_pod.sh"
        return subprocess.run(
            [script, *args], env=env, capture_output=True, text=True, timeout=30
        ).returncode

    detached = ("--detach=a run.log", "--env=A=b c")
    assert start(*detached, "pod", "us-central2-b", *EVALUATE) == 0
    log = tmp_path / "a run.log"
    number = int((tmp_path / "a run.log.pid").read_text())
    os.kill(number, 0)  # it runs
    deadline = time.monotonic() + 20
    while "end" not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    args = " ".join(["-m", EVALUATE[0], "--distributed", *EVALUATE[1:]])
    assert log.read_text() == f"b c {tmp_path / 'safepatch_jax'} {args}\nerror\nend\n"
    assert start("pod,other", "us-central2-b", *EVALUATE) == 0
    assert start("pod,bad", "us-central2-b", *EVALUATE) == 1


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "POD, ZONE and LAUNCHER are needed"),
        (["--wait"], "unknown option '--wait'"),
        (["--env=1A=b", "pod"], "'--env=1A=b' is not --env=NAME=VALUE"),
        (["pod,,other", "us-central2-b", "launch.sweep"], "'pod,,other' is no name of a slice"),
        (
            ["pod", "us-central2-b", "launch.safepatch", "--workdir=/mnt/w"],
            "--run.cache_dir=/PATH is needed",
        ),
        (["pod", "central", "launch.safepatch"], "'central' is no zone"),
        (["pod", "us-central2-b", "launch.patch"], "'launch.patch' is not one of"),
        (
            ["pod", "us-central2-b", "launch.safepatch", "--workdir=runs/a"],
            "absolute path on a shared file system",
        ),
        (
            ["pod", "us-central2-b", "launch.safepatch", "--process_id=0"],
            "the workers find one another",
        ),
    ],
)
def test_the_pod_script_refuses(args, message):
    result = pod("--print", *args)
    assert result.returncode == 2 and message in result.stderr and result.stdout == ""
