"""Import and export of a 1.1B bfloat16 Llama against a plain copy of its files: GB/s, and the peak
of host memory.

  python -m benchmarks.convert                      # prints a table; about a minute, 7 GB of disk
  python -m benchmarks.convert --mesh=fsdp:8 --devices=8

The model has random weights in several files (the shape of TinyLlama-1.1B). Each figure comes from
a process of its own, so that its peak resident memory is its own; copy, import and export take
turns, and the medians are compared. Files are in the page cache for all three, and the disk is idle
when each begins. The floor of an import is reading the bytes once, of an export writing them once;
the copy does both. `copy` is `shutil.copyfile` (the kernel copies, and returns before anything is
on the disk); `copy + fsync` waits for the disk, as the export does, which also computes the SHA-256
of every tensor.
"""

from __future__ import annotations

import json
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

from absl import app, flags

from benchmarks.models import SHARD_BYTES, write_model

_MESH = flags.DEFINE_string("mesh", "data:1", "Mesh of import and export.")
_DEVICES = flags.DEFINE_integer("devices", 1, "Simulated CPU devices.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Times each figure is taken.", lower_bound=1)
_LAYERS = flags.DEFINE_integer(
    "layers", 22, "Blocks of the model; 22 is the 1.1B shape.", lower_bound=1
)
_FOLDER = flags.DEFINE_string(
    "folder", None, "Where the files lie for the time of the run; default: a temporary folder."
)
_PART = flags.DEFINE_enum(
    "part",
    None,
    ["copy", "copy + fsync", "import", "import + export"],
    "Used by the benchmark itself.",
)


def run_part(part: str, source: pathlib.Path, target: pathlib.Path) -> dict[str, float]:
    """Do one thing in this process; return seconds of each phase, bytes of arrays and the peak of
    resident memory."""
    os.sync()  # no part waits for the writes of an earlier one
    if part.startswith("copy"):
        begun = time.perf_counter()
        target.mkdir()
        for path in sorted(source.glob("*.safetensors")):
            shutil.copyfile(path, target / path.name)
            if "fsync" in part:
                with open(target / path.name, "rb+") as file:
                    os.fsync(file.fileno())
        return {part: time.perf_counter() - begun}
    import jax

    jax.config.update("jax_num_cpu_devices", _DEVICES.value)
    from safepatch_jax.io.hf import load_params, save_model
    from safepatch_jax.mesh import Sharder, make_mesh

    sharder = Sharder(make_mesh(_MESH.value))
    begun = time.perf_counter()
    architecture, params = load_params(source, sharder)
    jax.block_until_ready(params)
    seconds = {"import": time.perf_counter() - begun}
    if part == "import + export":
        begun = time.perf_counter()
        save_model(target, params, architecture, source, shard_bytes=SHARD_BYTES)
        seconds["export"] = time.perf_counter() - begun
    arrays = sum(x.nbytes for x in jax.tree.leaves(params))
    return seconds | {
        "arrays": arrays,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main(argv) -> None:
    del argv
    folder = pathlib.Path(_FOLDER.value or tempfile.mkdtemp(prefix="benchmark_"))
    source, target = folder / "source", folder / "target"
    if _PART.value:
        print(json.dumps(run_part(_PART.value, source, target)))
        return
    try:
        write_model(source, _LAYERS.value)
        size = sum(p.stat().st_size for p in source.glob("*.safetensors"))
        figures: dict[str, list[float]] = {}
        for _ in range(_REPEATS.value):
            for part in ("copy", "copy + fsync", "import", "import + export"):
                command = [sys.executable, "-m", "benchmarks.convert", *sys.argv[1:]]
                out = subprocess.run(
                    [*command, f"--folder={folder}", f"--part={part}"],
                    capture_output=True,
                    text=True,
                    env={**os.environ, "JAX_PLATFORMS": "cpu"},
                )
                if out.returncode:
                    sys.exit(f"{part} failed:\n{out.stderr[-3000:]}")
                shutil.rmtree(target, ignore_errors=True)
                for name, value in json.loads(out.stdout).items():
                    if name in ("arrays", "peak"):
                        name = f"{part}: {name}"
                    figures.setdefault(name, []).append(value)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    median = {name: statistics.median(values) for name, values in figures.items()}
    print(
        f"{size / 1e9:.2f} GB in {-(-size // SHARD_BYTES)} files, mesh {_MESH.value}, "
        f"{_DEVICES.value} device(s), "
        f"median of {_REPEATS.value}\n"
    )
    print(
        "| | seconds | least - most | GB/s | of the copy | of copy + fsync "
        "|\n|---|---|---|---|---|---|"
    )
    for name in ("copy", "copy + fsync", "import", "export"):
        print(
            f"| {name} | {median[name]:.2f} | {min(figures[name]):.2f} - {max(figures[name]):.2f} \
| "
            f"{size / median[name] / 1e9:.2f} | {median['copy'] / median[name]:.0%} | "
            f"{median['copy + fsync'] / median[name]:.0%} |"
        )
    print("\n| | arrays, GiB | peak resident, GiB | above the arrays, GiB |\n|---|---|---|---|")
    for part in ("import", "import + export"):
        arrays, peak = (median[f"{part}: {name}"] / 2**30 for name in ("arrays", "peak"))
        print(f"| {part} | {arrays:.2f} | {peak:.2f} | {peak - arrays:.2f} |")


if __name__ == "__main__":
    app.run(main)
