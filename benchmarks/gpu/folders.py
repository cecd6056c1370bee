"""Export and import of a bfloat16 model, from and to the device, beside plain copies."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.common import raw_config
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.skip import Skip
from benchmarks.models import SHARD_BYTES
from safepatch_jax.io.hf import load_params, save_model
from safepatch_jax.models.table import param_table
from safepatch_jax.runtime import files


def run(bench: Bench) -> None:
    """Write the model, copy its files, read it, in turns; what is read must equal what was
    written. Files come from the page cache."""
    sizes = bench.sizes
    config = bench.config(sizes.file_layers)
    size = 2 * param_table(config).size
    room = shutil.disk_usage(bench.scratch).free
    if room < 3 * size:
        raise Skip(
            f"{3 * size / 1e9:.1f} GB of disk are needed and {room / 1e9:.1f} GB are free under "
            "--out"
        )
    _transfers(bench)
    params = bench.params(config, "bfloat16")
    jax.block_until_ready(params)
    source, made, copied = (bench.scratch / name for name in ("source", "made", "copied"))
    files.write_json(source / "config.json", raw_config(sizes.shape, sizes.file_layers, "bfloat16"))
    seconds: dict[str, list[float]] = {}
    equal = True
    for _ in range(sizes.repeats):
        _timed(
            seconds,
            "export",
            lambda: save_model(made, params, config, source, shard_bytes=SHARD_BYTES),
        )
        _timed(seconds, "copy + fsync", lambda: _copy(made, copied))
        loaded = _timed(
            seconds, "import", lambda: jax.block_until_ready(load_params(made, bench.sharder)[1])
        )
        same = jax.tree.map(lambda a, b: bool((a == b).all()), params, loaded)
        equal = equal and all(jax.tree.leaves(same))
        del loaded
        rates = {name: size / statistics.median(values) for name, values in seconds.items()}
        bench.note(bytes=size, folder_seconds=seconds, rates=rates, equal=equal)
        for folder in (made, copied):
            shutil.rmtree(folder)


def _timed(seconds: dict[str, list[float]], name: str, call: Callable[[], Any]) -> Any:
    os.sync()  # no turn waits for the writes of an earlier one
    begun = time.perf_counter()
    result = call()
    seconds.setdefault(name, []).append(time.perf_counter() - begun)
    return result


def _copy(source, target) -> None:
    target.mkdir()
    for path in sorted(source.glob("*.safetensors")):
        shutil.copyfile(path, target / path.name)
        with open(target / path.name, "rb+") as file:
            os.fsync(file.fileno())


def _transfers(bench: Bench) -> None:
    """Note the speed of plain transfers between host and device."""
    x = np.ones(bench.sizes.copy_bytes // 4, np.float32)
    there, back = [], []
    for _ in range(3):
        begun = time.perf_counter()
        y = jax.block_until_ready(jax.device_put(x, bench.device))
        there.append(time.perf_counter() - begun)
        z = y + 1  # an array that has no copy on the host
        z.block_until_ready()
        begun = time.perf_counter()
        np.asarray(z)
        back.append(time.perf_counter() - begun)
    bench.note(
        to_device_rate=x.nbytes / statistics.median(there),
        to_host_rate=x.nbytes / statistics.median(back),
    )
