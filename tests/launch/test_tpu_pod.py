"""launch/tpu_pod.sh: the command that it gives to all hosts, and what it refuses."""

import subprocess

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
        "--grid=patch.beta=1,2;patch.merge=ties",
    ]
    assert "launch/tpu_pod.sh [OPTIONS] POD ZONE LAUNCHER" in pod("--help").stdout


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "POD, ZONE and LAUNCHER are needed"),
        (["--wait"], "unknown option '--wait'"),
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
