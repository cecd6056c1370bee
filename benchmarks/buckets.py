"""The main job in a bucket against the same job on disk: the same bits, also when it is killed, and
what it costs.

  python -m benchmarks.buckets --folder=DIR --kills=10
  python -m benchmarks.buckets --folder=DIR --kills=10 --processes=2
  python -m benchmarks.buckets --folder=DIR --emulator=fake-gcs-server

A job on a tiny model runs on disk, then with workdir and cache in a bucket, then in another folder
of it while all its processes are killed (SIGKILL) at random moments and its local folders deleted,
until it is through. With --processes=2 each process has four simulated devices, its own home, its
own working folder and its own copy of model and data; on disk they share one. The bucket is a
server on loopback: tests/bucket_server.py, or a program that is given (fake-gcs-server).
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator

from absl import app, flags

from benchmarks.common import machine
from safepatch_jax.runtime.files import file_sha256
from safepatch_jax.testing import write_tiny_model

_FOLDER = flags.DEFINE_string("folder", None, "A new folder for all of it.", required=True)
_KILLS = flags.DEFINE_integer("kills", 10, "At so many moments.", lower_bound=0)
_PROCESSES = flags.DEFINE_enum("processes", "1", ["1", "2"], "Of the job.")
_EMULATOR = flags.DEFINE_string("emulator", "", "A server of buckets to start in its place.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments.")

ROOT = pathlib.Path(__file__).parents[1]
ROWS = 10
SETTINGS = [
    "--model.source=model",
    "--data=harmful:data.jsonl,lookalike:data.jsonl,ordinary:data.jsonl",
    "--run.certify=hashes",
    "--derive.batch_size=8",
    "--derive.se_steps=30",
    "--derive.osm_steps=5",
    "--derive.se_learning_rate=1e-5",
    "--derive.osm_learning_rate=1e-3",
    "--score.samples=4",
    "--evaluate.max_new_tokens=3",
]


@contextlib.contextmanager
def bucket(folder: pathlib.Path) -> Iterator[dict[str, str]]:
    """Serve a bucket named 'bucket'; yield the environment of its clients."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, str(ROOT / "tests" / "bucket_server.py"), str(port)]
    if _EMULATOR.value:
        command = [_EMULATOR.value, "-scheme=http", "-host=127.0.0.1", f"-port={port}"]
        command += ["-backend=filesystem", f"-filesystem-root={folder}", f"-external-url={url}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        request = urllib.request.Request(
            f"{url}/storage/v1/b?project=p",
            json.dumps({"name": "bucket"}).encode(),
            {"Content-Type": "application/json"},
        )
        deadline = time.monotonic() + 20
        while True:
            try:
                urllib.request.urlopen(request).read()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        try:
            yield {"STORAGE_EMULATOR_HOST": url, "SAFEPATCH_LEASE_SECONDS": "5"}
        finally:
            server.kill()


def start(folder: pathlib.Path, variables: dict[str, str], *where: str) -> list[subprocess.Popen]:
    """Start all processes of the job, each in a host's folder of its own."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    started = []
    for i in range(int(_PROCESSES.value)):
        host = folder / f"host{i}"
        arguments = [*SETTINGS, *where]
        env = os.environ | variables | {"HOME": str(host), "JAX_PLATFORMS": "cpu"}
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        if int(_PROCESSES.value) > 1:
            env["JAX_NUM_CPU_DEVICES"] = "4"
            arguments += ["--mesh=data:1,fsdp:4,tensor:2", "--num_processes=2"]
            arguments += [f"--coordinator=127.0.0.1:{port}", f"--process_id={i}"]
        with open(folder / f"{i}.log", "ab") as log:
            command = [sys.executable, "-m", "launch.safepatch", *arguments]
            started.append(subprocess.Popen(command, cwd=host, env=env, stdout=log, stderr=log))
    return started


def ended(processes: list[subprocess.Popen], within: float | None = None) -> list[int] | None:
    """Return the exit codes; None if they do not end in time."""
    deadline = None if within is None else time.monotonic() + within
    codes = []
    for process in processes:
        left = None if deadline is None else max(0.01, deadline - time.monotonic())
        try:
            codes.append(process.wait(left))
        except subprocess.TimeoutExpired:
            return None
    return codes


def whole(folder: pathlib.Path, variables: dict[str, str], *where: str) -> float:
    """Run the job to its end; return the seconds it took."""
    begun = time.monotonic()
    codes = ended(start(folder, variables, *where))
    if any(codes):
        sys.exit(f"Ended with {codes}; see {folder}/0.log.")
    return time.monotonic() - begun


def exported(folder: pathlib.Path, variables: dict[str, str], address: str) -> str:
    """Return the SHA-256 of the exported weights in the bucket."""
    os.environ.update(variables)
    from safepatch_jax.runtime.objects import Objects

    name = "model.safetensors"
    return Objects(f"{address}/stages/export/model").hashes([name])[name]["sha256"]


def main(_: list[str]) -> None:
    folder = pathlib.Path(_FOLDER.value).expanduser().absolute()
    folder.mkdir(parents=True)
    rows = []
    for i in range(ROWS):
        prompt, answer = f"Tell me thing {i}, please.", f"Sure, here is thing {i}."
        rows.append(json.dumps({"prompt": prompt, "answer": answer}))
    for i in range(int(_PROCESSES.value)):
        host = folder / f"host{i}"
        write_tiny_model(host / "model", num_hidden_layers=1, hidden_size=64, num_key_value_heads=4)
        (host / "data.jsonl").write_text("\n".join(rows) + "\n")
    print(machine(), flush=True)
    compiled = folder / "compiled"
    with tempfile.TemporaryDirectory() as objects, bucket(pathlib.Path(objects)) as variables:
        variables["JAX_COMPILATION_CACHE_DIR"] = str(compiled)
        disk = [f"--workdir={folder / 'disk'}", f"--run.cache_dir={folder / 'cache'}"]
        if _PROCESSES.value == "2":  # the same command has the same model
            disk.append(f"--model.source={folder / 'host0' / 'model'}")
        whole(folder, variables, f"--workdir={folder / 'warm'}", *disk[1:])  # compiles
        shutil.rmtree(folder / "cache")
        on_disk = whole(folder, variables, *disk)
        expected = file_sha256(folder / "disk" / "stages" / "export" / "model/model.safetensors")
        print(f"On disk: {on_disk:.1f} s, SHA-256 {expected[:16]}", flush=True)
        there = ["--workdir=gs://bucket/run", "--run.cache_dir=gs://bucket/cache"]
        in_bucket = whole(folder, variables, *there)
        found = exported(folder, variables, "gs://bucket/run")
        print(f"In the bucket: {in_bucket:.1f} s, SHA-256 {found[:16]}", flush=True)
        killed = ["--workdir=gs://bucket/killed", "--run.cache_dir=gs://bucket/cache2"]
        rng, hits = random.Random(_SEED.value), 0
        killed.append("--run.checkpoint_minutes=0.000001")
        while hits < _KILLS.value:
            processes = start(folder, variables, *killed)
            if ended(processes, rng.uniform(0.1, 0.45) * in_bucket) is not None:
                break
            for process in processes:
                process.send_signal(signal.SIGKILL)
            ended(processes)
            hits += 1
            for i in range(int(_PROCESSES.value)):  # another machine takes over
                shutil.rmtree(folder / f"host{i}" / ".cache", ignore_errors=True)
            time.sleep(6)  # the lease of the killed expires
        took = whole(folder, variables, *killed)
        last = exported(folder, variables, "gs://bucket/killed")
        print(f"Killed {hits} times, then {took:.1f} s: SHA-256 {last[:16]}", flush=True)
    sys.exit(0 if expected == found == last else 1)


if __name__ == "__main__":
    app.run(main)
