"""What starts a run on a cluster, beside tpu_pod.sh: images, a JobSet of GKE, the SLURM script."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

from tests.calls import ROOT

LAUNCH = ROOT / "launch"
DOCKERFILES = ("Dockerfile.cuda", "Dockerfile.tpu")
# https://docs.docker.com/reference/dockerfile
INSTRUCTIONS = set(
    "ADD ARG CMD COPY ENTRYPOINT ENV EXPOSE FROM HEALTHCHECK LABEL ONBUILD RUN SHELL STOPSIGNAL "
    "USER VOLUME WORKDIR".split()
)
PARSE = """
import json, sys
from absl import flags
import launch.safepatch
from safepatch_jax.runtime import config_file
flags.FLAGS(json.loads(sys.argv[1]))
config_file.read(flags.FLAGS.config)
"""


def assert_read(words):
    """Have launch.safepatch read the words of `safepatch run ...`."""
    assert words[0] == "run"
    result = subprocess.run(
        [sys.executable, "-c", PARSE, json.dumps(words)], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def instructions(name):
    """Return the instructions of a Dockerfile: [(word, rest), ...]."""
    lines = [line for line in (LAUNCH / name).read_text().splitlines() if line[:1] != "#"]
    text = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("script", ["tpu_pod.sh", "slurm.sh"])
def test_scripts_are_sound(script):
    assert os.access(LAUNCH / script, os.X_OK)
    assert subprocess.run(["bash", "-n", LAUNCH / script]).returncode == 0
    if shellcheck := shutil.which("shellcheck"):
        result = subprocess.run([shellcheck, LAUNCH / script], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_are_made_of_what_there_is(name):
    given = instructions(name)
    assert {word for word, _ in given} <= INSTRUCTIONS and given[0][0] == "FROM"
    assert given[0][1].startswith("python:3.1")
    copied = set()
    for _, rest in (pair for pair in given if pair[0] == "COPY"):
        *sources, _ = rest.split()
        copied |= set(sources)
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert all((ROOT / source).exists() for source in copied) and not copied & set(ignored)
    assert {"safepatch_jax", "launch", "configs", "pyproject.toml", "requirements.txt"} <= copied
    runs = [shlex.split(rest) for word, rest in given if word == "RUN"]
    assert all(words[:2] == ["pip", "install"] for words in runs)
    extras = {
        "Dockerfile.cuda": ["jax[cuda13,k8s]", "gcsfs", "s3fs"],
        "Dockerfile.tpu": ["jax[tpu]", "gcsfs"],
    }
    assert runs[0][2:] == ["-r", "requirements.txt", *extras[name]]
    last = dict(given)
    assert json.loads(last["ENTRYPOINT"]) == ["safepatch"]
    assert 'safepatch = "launch.command:main"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_command_that_an_image_names_is_read(name):
    text = re.sub(r" \\\n#\s+", " ", (LAUNCH / name).read_text())
    (line,) = re.findall(r"^#   docker run .*?(run --.*)$", text, re.MULTILINE)
    assert_read(shlex.split(line))


def test_the_jobset_is_whole_and_its_command_is_read():
    job = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert job["metadata"]["name"] and job["spec"]["failurePolicy"]["maxRestarts"] > 0
    (workers,) = job["spec"]["replicatedJobs"]
    spec = workers["template"]["spec"]
    assert spec["completions"] == spec["parallelism"] and spec["completionMode"] == "Indexed"
    assert spec["backoffLimit"] == 0  # one pod's failure is the set's, which starts anew
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 300
    (container,) = pod["containers"]
    (rule,) = spec["podFailurePolicy"]["rules"]
    exits = rule["onExitCodes"]
    assert (exits["containerName"], exits["values"]) == (container["name"], [2])
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"]["google.com/tpu"] == chips
    sides = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    assert int(sides[0]) * int(sides[1]) == chips * spec["completions"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    shared = container["volumeMounts"][0]["mountPath"]
    for word in container["args"]:
        assert not word.startswith(("--workdir", "--run.cache_dir")) or f"={shared}/" in word
    assert "--distributed" in container["args"]
    assert_read(container["args"])


def slurm(tmp_path, code, *args, **variables):
    """Run the SLURM script where srun ends with a code; return its result and what was called."""
    programs = tmp_path / "bin"
    programs.mkdir(exist_ok=True)
    for name, ends in (("srun", code), ("scontrol", 0)):
        text = f'#!/bin/bash\necho "{name} $*" >> {tmp_path}/calls\nexit {ends}\n'
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    result = subprocess.run(
        [LAUNCH / "slurm.sh", *args],
        env={"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"} | variables,
        capture_output=True,
        text=True,
    )
    calls = tmp_path / "calls"
    return result, calls.read_text().splitlines() if calls.exists() else []


@pytest.mark.parametrize("code, queued", [(0, False), (2, False), (75, True), (143, True)])
def test_the_slurm_script_queues_again_what_can_go_on(tmp_path, code, queued):
    args = ("launch.safepatch", "--workdir=/shared/w", "--patch.beta=1")
    result, calls = slurm(tmp_path, code, *args)
    assert result.returncode == code
    assert (
        calls[0] == f"srun .venv/bin/python -m launch.safepatch --distributed {' '.join(args[1:])}"
    )
    assert calls[1:] == ["scontrol requeue 7"] * queued
    _, calls = slurm(tmp_path, code, *args, SLURM_RESTART_COUNT="20")
    assert len(calls) == 2 + queued  # and not for ever


def test_the_slurm_script_needs_a_launcher(tmp_path):
    result, calls = slurm(tmp_path, 0, "--workdir=/shared/w")
    assert result.returncode == 2 and "name a launcher first" in result.stderr and not calls
