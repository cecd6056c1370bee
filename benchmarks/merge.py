"""DARE merge of two variants of a 1.1B bfloat16 Llama from disk: launch.merge against mergekit's
dare_linear.

  python -m benchmarks.merge --mergekit=PATH/mergekit-yaml       # four minutes, 11 GB of disk
  python -m benchmarks.merge                                     # ours alone

mergekit lives best in an environment of its own (pip install mergekit). Both sides take the same
three folders, density 0.3, weight 1, all tensors, and write bfloat16; each run is a whole process,
from its start to its end, and the sides take turns. Their random masks differ, so the share of
changed entries is compared, not the bits. The floor is the time of copying the bytes that must be
read and written (three models in, one out) plus nothing else.
"""

from __future__ import annotations

import functools
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import app, flags

from benchmarks.common import spread
from benchmarks.models import write_model
from safepatch_jax.io.folder import Checkpoint
from safepatch_jax.io.stored import DTYPES

_MERGEKIT = flags.DEFINE_string("mergekit", None, "Path of the mergekit-yaml command.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Times each figure is taken.", lower_bound=1)
_LAYERS = flags.DEFINE_integer(
    "layers", 22, "Blocks of the model; 22 is the 1.1B shape.", lower_bound=1
)
_FOLDER = flags.DEFINE_string(
    "folder", None, "Where the files lie for the time of the run; default: a temporary folder."
)

DENSITY = 0.3
ROLES = ("se", "osm")
YAML = """merge_method: dare_linear
base_model: {base}
models:
  - {{model: {se}, parameters: {{weight: 1.0, density: {density}}}}}
  - {{model: {osm}, parameters: {{weight: 1.0, density: {density}}}}}
parameters: {{normalize: false}}
dtype: bfloat16
"""


def write_variant(base: pathlib.Path, out: pathlib.Path, seed: int) -> None:
    """Copy a model and change every weight by about 2 %."""
    shutil.copytree(base, out)
    rng = np.random.default_rng(seed)
    for tensor in Checkpoint(out).tensors.values():
        x = tensor.read().astype(np.float32)
        x *= 1 + np.float32(0.02) * rng.standard_normal(x.shape, np.float32)
        with open(tensor.path, "rb+") as file:
            file.seek(tensor.offset)
            file.write(x.astype(DTYPES[tensor.dtype]).tobytes())


def changed_share(base: pathlib.Path, merged: pathlib.Path) -> float:
    """Return the share of entries whose bits differ in a few of the tensors."""
    before, after = Checkpoint(base).tensors, Checkpoint(merged).tensors
    names = sorted(after)[:12]
    differ = [
        np.count_nonzero(before[n].read().view(np.uint16) != after[n].read().view(np.uint16))
        for n in names
    ]
    return sum(differ) / sum(before[n].size // 2 for n in names)


def timed(command: list[str]) -> tuple[float, float, float]:
    """Run a command; return its seconds, CPU seconds and peak of resident memory in bytes."""
    begun, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"},
        )
        while True:
            # Not the peak of wait4: it begins with the memory of this process when it forked.
            status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
            if match := re.search(r"VmHWM:\s+(\d+)", status):
                peak = max(peak, 1024 * int(match.group(1)))
            ended, code, usage = os.wait4(process.pid, os.WNOHANG)
            if ended:
                break
            time.sleep(0.02)
        if code:
            errors.seek(0)
            sys.exit(f"{command[0]} failed:\n{errors.read().decode(errors='replace')[-3000:]}")
    return time.perf_counter() - begun, usage.ru_utime + usage.ru_stime, float(peak)


def copied(models: list[pathlib.Path], out: pathlib.Path) -> tuple[float, float, float]:
    """Read all models and write one of them: the floor."""
    begun, cpu = time.perf_counter(), time.process_time()
    out.mkdir()
    buffer = bytearray(1 << 20)
    for model in models:
        for path in sorted(model.glob("*.safetensors")):
            with (
                open(path, "rb", buffering=0) as source,
                open(out / path.name, "wb", buffering=0) as target,
            ):
                while count := source.readinto(buffer):
                    if model is models[0]:
                        target.write(memoryview(buffer)[:count])
    for path in out.iterdir():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - begun, time.process_time() - cpu, 0.0


def main(argv) -> None:
    del argv
    folder = pathlib.Path(_FOLDER.value or tempfile.mkdtemp(prefix="benchmark_"))
    paths = {name: folder / name for name in ("base", *ROLES)}
    out, recipe = folder / "out", folder / "recipe.yaml"
    try:
        write_model(paths["base"], _LAYERS.value)
        for seed, role in enumerate(ROLES):
            write_variant(paths["base"], paths[role], seed)
        recipe.write_text(YAML.format(density=DENSITY, **paths))
        ours = [
            *(sys.executable, "-m", "launch.merge", f"--base={paths['base']}", f"--out={out}"),
            *(f"--patch_{role}={paths[role]}" for role in ROLES),
            *("--merge=dare", f"--patch.retention={DENSITY}", "--patch.scope=all"),
        ]
        theirs = [_MERGEKIT.value, str(recipe), str(out), "--lazy-unpickle", "--no-copy-tokenizer"]
        sides = {"ours": functools.partial(timed, ours)}
        if _MERGEKIT.value:
            sides["mergekit"] = functools.partial(timed, theirs)
        sides["read and write"] = functools.partial(copied, list(paths.values()), out)
        runs, changed = {name: [] for name in sides}, {}
        for _ in range(_REPEATS.value):
            for name, side in sides.items():
                os.sync()  # no side waits for the writes of another
                runs[name].append(side())
                if name not in changed and name != "read and write":
                    changed[name] = changed_share(paths["base"], out)
                shutil.rmtree(out)
        size = sum(p.stat().st_size for p in paths["base"].glob("*.safetensors"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    median = {name: list(map(statistics.median, zip(*rows))) for name, rows in runs.items()}
    print(
        f"{size / 1e9:.2f} GB, base and two variants, density {DENSITY}; median of "
        f"{_REPEATS.value} (least - most)\n"
    )
    print(
        "| | seconds | CPU seconds | peak resident, GiB | changed entries |\n|---|---|---|---|---|"
    )
    for name, rows in runs.items():
        _, cpu, peak = median[name]
        seconds = spread([row[0] for row in rows], ".1f")
        memory = f"{peak / 2**30:.2f}" if peak else ""
        share = f"{changed[name]:.2%}" if peak else ""
        print(f"| {name} | {seconds} | {cpu:.1f} | {memory} | {share} |")
    if _MERGEKIT.value:
        ratios = [b[0] / a[0] for a, b in zip(runs["ours"], runs["mergekit"])]
        print(
            f"\nmergekit takes {median['mergekit'][0] / median['ours'][0]:.2f} times as long "
            f"({min(ratios):.2f} - "
            f"{max(ratios):.2f}), with {median['mergekit'][2] / median['ours'][2]:.1f} times the "
            "memory."
        )


if __name__ == "__main__":
    app.run(main)
