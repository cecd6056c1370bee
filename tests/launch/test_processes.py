"""Runs of two processes with four simulated devices each, against one process with eight: the same
bits, and no hanging."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from safepatch_jax.io.checkpoint import load_tree
from safepatch_jax.mesh import Sharder, make_mesh
from safepatch_jax.models.config import read_hf_config
from safepatch_jax.models.table import param_table
from safepatch_jax.run.convert import convert
from safepatch_jax.run.job import Job
from safepatch_jax.runtime import processes
from safepatch_jax.runtime.files import read_json
from safepatch_jax.runtime.joining import LOST
from safepatch_jax.settings import Settings
from safepatch_jax.testing import write_tiny_model
from tests.calls import ROOT
from tests.jobs import write_data

PER_PROCESS, LIMIT = 4, 240
SLURM_PORTS = 61440  # JAX takes this and the job's number modulo 4096
LAST = ("patch", "export", "patch_file", "certify_export", "report")


class Run:
    """The processes of a run; their output goes to files.

    They find one another by flags, as if SLURM had started them, or by the arguments PORT, INDEX
    and FOLDER, which holds that of the run.
    """

    def __init__(self, folder, command, *, own=(), by="flags", devices=PER_PROCESS, count=2):
        folder.mkdir(parents=True, exist_ok=True)
        port = free_port()
        env = os.environ | {
            "JAX_NUM_CPU_DEVICES": str(devices),
            "PYTHONPATH": str(ROOT),
        }
        self.files = [(folder / f"{i}.out", folder / f"{i}.err") for i in range(count)]
        self.processes = []
        for i, (out, err) in enumerate(self.files):
            args = [*command, *(own[i].split() if own else ())]
            variables = env
            if by == "flags":
                args.append(f"--coordinator=127.0.0.1:{port}")
                args += [f"--num_processes={count}", f"--process_id={i}"]
            elif by == "slurm":
                args.append("--distributed")
                variables = env | slurm_variables(port, i)
            else:
                args += [port, i, folder.parent]
            with open(out, "w") as o, open(err, "w") as e:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *map(str, args)],
                        cwd=ROOT,
                        env=variables,
                        stdout=o,
                        stderr=e,
                    )
                )

    def wait_for(self, pattern):
        """Wait until process 0 has written something."""
        deadline = time.monotonic() + LIMIT
        while not any(re.search(pattern, f.read_text()) for f in self.files[0]):
            assert self.processes[0].poll() is None and time.monotonic() < deadline, self.texts()
            time.sleep(0.02)

    def finish(self):
        """Return the exit codes."""
        deadline = time.monotonic() + LIMIT
        try:
            return [p.wait(max(0.1, deadline - time.monotonic())) for p in self.processes]
        finally:
            for p in self.processes:
                p.kill()
                p.wait()

    def texts(self):
        """Return what each process wrote: [(stdout, stderr), ...]."""
        return [tuple(f.read_text() for f in pair) for pair in self.files]


def slurm_variables(port, index):
    return {
        "SLURM_JOB_ID": str(port - SLURM_PORTS),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": str(index),
    }


def free_port():
    """Return a free port among those from which JAX picks one by the number of a SLURM job."""
    for port in range(SLURM_PORTS + os.getpid() % 3000, SLURM_PORTS + 4096):
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no port is free")


def launch(folder, launcher, *flags, **options):
    return Run(folder, ["-m", launcher, *flags], **options)


def succeed(folder, launcher, *flags, **options):
    """Run to the end; return process 0's lines. The other one must not have printed any."""
    run = launch(folder, launcher, *flags, **options)
    assert run.finish() == [0, 0], run.texts()
    (out, _), (quiet, _) = run.texts()
    assert quiet == ""
    return out


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    write_tiny_model(folder / "model", num_hidden_layers=1, hidden_size=64, num_key_value_heads=4)
    return folder


@pytest.fixture(scope="module")
def settings(place):
    return Settings().override(
        write_data(place)
        | {
            "model.source": str(place / "model"),
            "run.cache_dir": str(place / "cache"),
            "run.keep_scratch": True,
            "derive.se_steps": 20,
            "derive.osm_steps": 3,
            "derive.se_learning_rate": 1e-4,
            "derive.osm_learning_rate": 1e-3,
            "derive.batch_size": 8,
            "score.samples": 5,
            "evaluate.max_new_tokens": 3,
            "evaluate.batch_size": 8,
            "mesh.shape": "data:1,fsdp:4,tensor:2",
        }
    )


@pytest.fixture(scope="module")
def flags(settings):
    default, flags = Settings().flat(), []
    for name, value in settings.flat().items():
        if value != default[name]:
            flags.append(f"--{name.removesuffix('.shape')}={value}")
    return flags


@pytest.fixture(scope="module")
def killed(place, flags):
    """A run of which process 1 is killed in the middle of training: exit codes, seconds until the
    other ended, output."""
    run = launch(place / "killed", "launch.safepatch", f"--workdir={place / 'work'}", *flags)
    run.wait_for(r"derive SE: .* [1-9]\d*/20 ")
    run.processes[1].send_signal(signal.SIGKILL)
    begun = time.monotonic()
    codes = run.finish()
    return codes, time.monotonic() - begun, run.texts()


@pytest.fixture(scope="module")
def terminated(place, flags, killed):
    """The same command again on three hosts, ended within training by SIGTERM to one of them: exit
    codes, output, the steps that were saved."""
    run = launch(
        place / "terminated",
        "launch.safepatch",
        f"--workdir={place / 'work'}",
        *flags,
        "--mesh=data:3,fsdp:1",
        devices=1,
        count=3,
    )
    run.wait_for(r"derive SE: .* [2-9]\d*/20 ")
    run.processes[1].send_signal(signal.SIGTERM)
    codes = run.finish()
    saved = [path.name for path in place.glob("work/stages/.derive_se.*.steps/*") if path.is_dir()]
    return codes, run.texts(), saved


@pytest.fixture(scope="module")
def whole(place, flags, terminated):
    """The same command again, to the end: workdir and what it printed."""
    work = place / "work"
    return work, succeed(place / "whole", "launch.safepatch", f"--workdir={work}", *flags)


def test_a_killed_process_ends_the_other(killed, place):
    codes, seconds, ((_, err), (quiet, _)) = killed
    assert codes == [LOST, -signal.SIGKILL] and seconds < 60, err
    failed = "a step that all processes take together failed"
    assert failed in err or "process 1 gave no sign of life for 40 s" in err
    assert "resumes this run" in err and "Traceback" not in err and quiet == ""
    assert not list(place.glob("work/stages/.*.partial"))


def test_sigterm_to_one_of_three_processes_ends_all_with_one_checkpoint(terminated, whole):
    """With which two processes then go on, as three did where two had begun."""
    codes, ((out, err), *others), saved = terminated
    assert codes == [143] * 3, err
    ended = re.findall(r"SIGTERM: ends after step (\d+)\. A checkpoint is written", out)
    assert saved == ended and len(ended) == 1, out
    assert "Traceback" not in err and [quiet for quiet, _ in others] == ["", ""], out + err
    assert "Devices: 3 x cpu in 3 processes" in out
    assert f"derive SE: resumed after step {ended[0]} of 20" in whole[1]


def test_the_same_command_resumes_and_finishes(whole):
    work, out = whole
    assert "Devices: 8 x cpu in 2 processes, mesh data 1, fsdp 4, tensor 2" in out
    assert "import: reused" in out and "derive_se: running" in out
    report = read_json(work / "report.json")
    assert set(report["measures"]) == {"backbone", "se", "osm", "intersection", "safepatching"}
    assert not list(work.glob("**/*.partial"))
    assert read_hf_config(work / "stages" / "export" / "model").num_layers == 1
    torch = read_json(work / "stages" / "export" / "model" / "certificate.json")["logits"]["torch"]
    assert isinstance(torch, str) or torch["max_abs_error"] < 1e-4


def test_one_process_patches_to_the_same_bits(whole, place, settings):
    """From the same derived models and scores."""
    other = place / "one process"
    shutil.copytree(whole[0], other)
    for name in LAST:
        shutil.rmtree(other / "stages" / name)
    job = Job(settings, other)
    statuses = [job.runner.status(name) for name in ("derive_se", "score_osm", "patch")]
    assert statuses == ["done", "done", "to run"]
    job.runner.finish(["export", "patch_file"])
    for file in ("export/model/model.safetensors", "patch_file/patch.safetensors"):
        ours, theirs = (work / "stages" / file for work in (other, whole[0]))
        assert ours.read_bytes() == theirs.read_bytes(), file
    manifest = read_json(whole[0] / "stages" / "patch" / "manifest.json")
    assert job.runner.result("patch") == manifest["result"]


def test_training_is_that_of_one_process_but_for_the_order_of_sums(whole, place, settings):
    job = Job(settings, place / "trained by one")
    ours = job.runner.need("derive_osm")
    theirs = whole[0] / "stages" / "derive_osm"
    nll = [read_json(folder / "manifest.json")["result"]["nll"] for folder in (ours, theirs)]
    assert np.allclose(*nll, rtol=1e-4)
    table = param_table(read_hf_config(place / "model"))
    abstract = table.abstract(Sharder(make_mesh(settings.mesh.shape)))
    trees = [load_tree(folder / "params", abstract) for folder in (ours, theirs)]
    for x, y in zip(*map(jax.tree.leaves, trees)):
        assert np.allclose(x, y, atol=1e-4)


def weights(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_conversions(place, tmp_path):
    """Two processes -> orbax -> one process, and -> two processes, give back the source's bits; so
    does a stochastic cast."""
    source = write_tiny_model(
        tmp_path / "source",
        hidden_size=64,
        num_key_value_heads=4,
        dtype="bfloat16",
        shard_bytes=50_000,
        tie_word_embeddings=False,
    )
    own = {"shard_bytes": 50_000, "certify": "hashes"}
    flags = ["--mesh=fsdp:2,tensor:4", *(f"--{name}={value}" for name, value in own.items())]
    checkpoint = f"orbax:{tmp_path / 'checkpoint'}"
    out = succeed(
        tmp_path / "1", "launch.convert", f"--source=hf:{source}", f"--target={checkpoint}", *flags
    )
    assert f"Certificate: {tmp_path / 'checkpoint' / 'certificate.json'}" in out
    convert(checkpoint, f"hf:{tmp_path / 'one'}", mesh="fsdp:4,tensor:2", **own)
    assert weights(tmp_path / "one") == weights(source)
    cast = {"dtype": "float16", "rounding": "stochastic", "seed": 3}
    succeed(
        tmp_path / "2",
        "launch.convert",
        f"--source={checkpoint}",
        f"--target=hf:{tmp_path / 'two'}",
        *flags,
        *(f"--{name}={value}" for name, value in cast.items()),
        by="slurm",
    )
    convert(checkpoint, f"hf:{tmp_path / 'cast'}", **own, **cast)
    assert weights(tmp_path / "two") == weights(tmp_path / "cast")
    assert len(weights(tmp_path / "two")) > 1


def test_full_disk_on_process_0_ends_both(place, tmp_path):
    """A limit on file size stands for the full disk, as in test_launchers."""
    script = (
        "import resource, runpy, signal, sys; sys.argv[0] = 'convert'; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "'--process_id=0' in sys.argv and resource.setrlimit(resource.RLIMIT_FSIZE, (50000, "
        "50000)); "
        "runpy.run_module('launch.convert', run_name='__main__')"
    )
    run = Run(
        tmp_path / "run",
        [
            "-c",
            script,
            f"--source=hf:{place / 'model'}",
            f"--target=hf:{tmp_path / 'out'}",
            "--certify=hashes",
        ],
    )
    assert run.finish() == [2, 2], run.texts()
    (_, err), (quiet, other) = run.texts()
    assert "File too large" in err and quiet == "" and "error" not in other
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_processes_that_differ_are_refused(place, flags, tmp_path):
    run = launch(
        tmp_path / "run",
        "launch.safepatch",
        f"--workdir={tmp_path / 'work'}",
        *flags,
        own=("", "--patch.retention=0.5 --score.samples=4"),
    )
    assert run.finish() == [2, 2], run.texts()
    (out, err), (quiet, other) = run.texts()
    assert out == quiet == other == ""
    assert (
        "error: The processes differ: score.samples is 5 in process 0, 4 in process 1; "
        "patch.retention is 0.3 in" in err
    )
    assert err.count("error:") == 1 and not (tmp_path / "work").exists()


def test_what_processes_promises(tmp_path):
    """Process 0 decides for all, all share one folder, all raise errors; and a process that fails
    alone ends the other."""
    run = Run(
        tmp_path / "run",
        [ROOT / "tests" / "launch" / "worker.py"],
        by="arguments",
    )
    codes = run.finish()
    (_, err), (_, other) = run.texts()
    assert codes == [3, 3], run.texts()  # the cause's
    assert "process 1: error: only here" in err and "error:" not in other
    a, b = (read_json(tmp_path / f"{i}.json") for i in range(2))
    assert a.pop("first") and not b.pop("first") and a == b
    assert a["broadcast"] == {"a": [0]} and a["on_first"] == 0
    assert a["nested"] == 7 and a["count"] == 2
    assert a["raised"] == ["OSError", "no room on process 0"]
    assert a["asked"] == [3.0, 12.0, 21.0] and a["seen"] == [0, 1, 2]
    assert a["whole"] == np.arange(24.0).reshape(8, 3).tolist()
    assert a["agree"] is None and a["shared"] is None
    assert a["differ"] == [
        "ValueError",
        "The processes differ: b is 0 in process 0, 1 in process 1; c is [0.5] in process 0, "
        "[1.5] in process 1. Give both the same.",
    ]
    assert a["filled"] == 1 and "exists and is not empty" in a["full"][1]
    assert a["failed"] == ["ValueError", "in both"]
    assert a["unshared"][1].startswith(
        f"process 1 cannot see what process 0 writes to {tmp_path}. All processes need one "
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.json", "1.json", "inner", "out", "run"]


def test_a_checkpoint_that_one_process_cannot_read_is_passed_over_by_all(tmp_path):
    run = Run(
        tmp_path / "run",
        [ROOT / "tests" / "launch" / "checkpoint_worker.py"],
        by="arguments",
    )
    assert run.finish() == [0, 0], run.texts()
    (out, _), (quiet, _) = run.texts()
    assert "The checkpoint of step 4 is damaged" in out and "damaged" not in quiet
    assert [read_json(tmp_path / f"{i}.json") for i in range(2)] == [
        {"facts": {"step": 2}, "sum": 7999 * 4000.0}
    ] * 2


@pytest.mark.parametrize(
    "given, message",
    [
        (("10.0.0.1:8476", None, None), "--num_processes and --process_id must be given too"),
        ((None, 2, 1), "--coordinator must be given too"),
        (("10.0.0.1", 2, 1), "--coordinator=10.0.0.1 is not HOST:PORT"),
        (("host:0", 2, 1), "is not HOST:PORT"),
        (("host:8476", 2, 2), "--process_id=2 of --num_processes=2"),
    ],
)
def test_incomplete_or_wrong_addresses(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        processes.initialize(*given)


@pytest.mark.parametrize(
    "args, message",
    [
        ("'127.0.0.1:PORT', 2, 0, ", "Of 2 processes not all came to 127.0.0.1:"),
        ("", "--distributed alone works on TPU pod slices"),
    ],
)
def test_who_does_not_come_is_named(args, message):
    call = f"processes.initialize({args}timeout=2)".replace("PORT", str(free_port()))
    check_failure(call, message)


def check_failure(call, message, before=""):
    """Check that a call to `processes.initialize` ends in an error with this text."""
    script = (
        f"from safepatch_jax.runtime import processes\n{before}"
        f"try: {call}\nexcept ValueError as error: processes.fail(str(error), 2)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 2 and message in result.stderr, result.stderr
    assert "Traceback" not in result.stderr


def test_a_port_at_which_nobody_listens():
    with socket.socket() as nobody:  # has the port, so no other test can open it
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        check_failure(
            f"processes.initialize('127.0.0.1:{port}', 2, 1, timeout=2)",
            f"Process 1 found nobody at 127.0.0.1:{port} within 2 s (Connection refused)",
        )


def test_a_process_does_not_take_itself_for_process_0():
    # TCP connects a socket to itself where the system gives it the port that it asks for.
    port = free_port()
    before = (
        "import functools, socket\n"
        "socket.create_connection = functools.partial(\n"
        f"    socket.create_connection, source_address=('127.0.0.1', {port}))\n"
    )
    call = f"processes.initialize('127.0.0.1:{port}', 2, 1, timeout=2)"
    check_failure(call, f"Process 1 found nobody at 127.0.0.1:{port}", before)


def test_one_process_needs_nothing(tmp_path):
    assert not processes.several() and processes.first() and processes.broadcast((1, 2)) == (1, 2)
    assert processes.on_first(lambda ask: ask(3), together=lambda x: x + 1) == 4
    processes.barrier("nobody")
    processes.agree({"a": object()}, "")
    processes.shared(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
