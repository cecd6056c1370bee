"""Merges of two variants of a 1.1B bfloat16 Llama from disk: launch.merge, DARE and SafePatching,
against mergekit's dare_linear.

  python -m benchmarks.merge --mergekit=PATH/mergekit-yaml       # ten minutes, 19 GB of disk
  python -m benchmarks.merge --noscores                          # DARE alone, 9 GB

mergekit lives best in an environment of its own (pip install mergekit). Both sides of DARE take the
same three folders, density 0.3, weight 1, all tensors, and write bfloat16; their random masks
differ, so the share of changed entries is compared, not the bits. SafePatching ranks the linear
layers by SNIP with float32 scores, random ones, which is what costs it most: 3 % of each matrix is
its top set. Each run is a whole process, from its start to its end, and the sides take turns; ours
compiles its programs, or has those of the run before ("kept"), and ends when the disk has the
result; mergekit does not wait for it. A floor is the time of reading the
bytes that a side must read once, and writing the result, to the disk.
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

from benchmarks.common import machine, spread
from benchmarks.models import SHARD_BYTES, write_model
from safepatch_jax.io.folder import Checkpoint
from safepatch_jax.io.safetensors_file import Planned, write_shards
from safepatch_jax.io.stored import DTYPES

_MERGEKIT = flags.DEFINE_string("mergekit", None, "Path of the mergekit-yaml command.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Times each figure is taken.", lower_bound=1)
_LAYERS = flags.DEFINE_integer(
    "layers", 22, "Blocks of the model; 22 is the 1.1B shape.", lower_bound=1
)
_SCORES = flags.DEFINE_bool("scores", True, "Merge by SafePatching too.")
_FOLDER = flags.DEFINE_string(
    "folder", None, "Where the files lie for the time of the run; default: a temporary folder."
)

DENSITY = 0.3
TOP_RATE = 0.03
BEST = "--lazy-unpickle --async-write --write-threads=2 -j 2 --no-copy-tokenizer"  # mergekit's
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


def write_scores(base: pathlib.Path, out: pathlib.Path, seed: int) -> None:
    """Write random sums of gradients for the weights of the linear layers in the blocks."""
    out.mkdir()
    rng, plan = np.random.default_rng(seed), {}
    for name, tensor in Checkpoint(base).tensors.items():
        if "_proj." in name:
            plan[name] = Planned(tensor.shape, "float32")

    def scores(name: str) -> np.ndarray:
        return np.abs(rng.standard_normal(plan[name].shape, np.float32))

    write_shards(out, plan, scores, SHARD_BYTES)


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
    env = {name: x for name, x in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    begun, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=env | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"},
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


def cold(cache: pathlib.Path, command: list[str]) -> tuple[float, float, float]:
    """As `timed`, with no compiled programs at hand."""
    shutil.rmtree(cache, ignore_errors=True)
    return timed(command)


def copied(folders: list[pathlib.Path], out: pathlib.Path) -> tuple[float, float, float]:
    """Read all folders and write the first of them: the floor."""
    begun, cpu = time.perf_counter(), time.process_time()
    out.mkdir()
    buffer = bytearray(1 << 20)
    for folder in folders:
        for path in sorted(folder.glob("*.safetensors")):
            with (
                open(path, "rb", buffering=0) as source,
                open(out / path.name, "wb", buffering=0) as target,
            ):
                while count := source.readinto(buffer):
                    if folder is folders[0]:
                        target.write(memoryview(buffer)[:count])
    for path in out.iterdir():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - begun, time.process_time() - cpu, 0.0


def sides_of(folder: pathlib.Path, out: pathlib.Path) -> dict[str, functools.partial]:
    """Write what is merged; return {name: a call that merges it once to `out`}."""
    paths = {name: folder / name for name in ("base", *ROLES)}
    write_model(paths["base"], _LAYERS.value)
    for seed, role in enumerate(ROLES):
        write_variant(paths["base"], paths[role], seed)
    models = list(paths.values())
    ours = [sys.executable, "-m", "launch.merge", f"--base={paths['base']}", f"--out={out}"]
    ours += [f"--patch_{role}={paths[role]}" for role in ROLES]
    cache = folder / "cache"
    ours.append(f"--run.cache_dir={cache}")
    dare = ["--merge=dare", f"--patch.retention={DENSITY}", "--patch.scope=all"]
    sides = {
        "DARE, ours": functools.partial(cold, cache, ours + dare),
        "DARE, ours, programs kept": functools.partial(timed, ours + dare),
    }
    if _MERGEKIT.value:
        recipe = folder / "recipe.yaml"
        recipe.write_text(YAML.format(density=DENSITY, **paths))
        theirs = [_MERGEKIT.value, str(recipe), str(out), *BEST.split()]
        sides["DARE, mergekit"] = functools.partial(timed, theirs)
    sides["floor of DARE"] = functools.partial(copied, models, out)
    if _SCORES.value:
        scores = [folder / f"scores_{role}" for role in ROLES]
        for seed, path in enumerate(scores):
            write_scores(paths["base"], path, seed)
        snip = [f"--patch.top_rate_{role}={TOP_RATE}" for role in ROLES]
        snip += [f"--scores_{role}={path}" for role, path in zip(ROLES, scores)]
        sides["SafePatching, ours"] = functools.partial(cold, cache, ours + snip)
        sides["floor of SafePatching"] = functools.partial(copied, models + scores, out)
    return sides


def main(argv) -> None:
    del argv
    folder = pathlib.Path(_FOLDER.value or tempfile.mkdtemp(prefix="benchmark_"))
    base, out, changed = folder / "base", folder / "out", {}
    try:
        sides = sides_of(folder, out)
        runs = {name: [] for name in sides}
        for _ in range(_REPEATS.value):
            for name, side in sides.items():
                os.sync()  # no side waits for the writes of another
                runs[name].append(side())
                if name not in changed and "floor" not in name:
                    changed[name] = changed_share(base, out)
                shutil.rmtree(out)
        size = sum(p.stat().st_size for p in base.glob("*.safetensors"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{machine()}; {size / 1e9:.2f} GB, base and two variants, DARE at density {DENSITY},")
    print(f"SafePatching at top rates {TOP_RATE}; median of {_REPEATS.value} (least - most)\n")
    report(runs, changed)


def report(runs: dict[str, list[tuple[float, float, float]]], changed: dict[str, float]) -> None:
    """Print the table, and how the sides compare."""
    print(
        "| | seconds | CPU seconds | peak resident, GiB | changed entries |\n|---|---|---|---|---|"
    )
    median = {name: list(map(statistics.median, zip(*rows))) for name, rows in runs.items()}
    for name, rows in runs.items():
        _, cpu, peak = median[name]
        seconds = spread([row[0] for row in rows], ".1f")
        memory = f"{peak / 2**30:.2f}" if peak else ""
        share = f"{changed[name]:.2%}" if name in changed else ""
        print(f"| {name} | {seconds} | {cpu:.1f} | {memory} | {share} |")
    for name in [name for name in runs if "ours" in name]:
        method = name.partition(",")[0]
        floor = median[name][0] / median[f"floor of {method}"][0]
        print(f"\n{name}: {floor:.1f} times its floor.")
        theirs = f"{method}, mergekit"
        if theirs in runs:
            ratios = [b[0] / a[0] for a, b in zip(runs[name], runs[theirs])]
            memory = median[theirs][2] / median[name][2]
            print(f"mergekit takes {spread(ratios, '.2f')} times as long, with {memory:.1f} times")
            print("the memory.")


if __name__ == "__main__":
    app.run(main)
