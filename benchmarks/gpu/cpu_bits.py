"""Selection and merge on the device and on the CPU, in one process: the same bits?"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from benchmarks.gpu.bench import MESH, Bench
from benchmarks.gpu.skip import Skip
from safepatch_jax.mesh import Sharder, make_mesh
from safepatch_jax.models.table import Param, param_table
from safepatch_jax.patching import PATCH_ROLES
from safepatch_jax.patching.merge import apply_patching
from safepatch_jax.settings import Settings

Inputs = Mapping[str, dict[str, np.ndarray]]

# Ways to merge, by settings that differ from the default.
WAYS: dict[str, dict[str, Any]] = {
    "safepatching": {},
    "top sets of the whole scope": {"patch.granularity": "global"},
    "filled up, rescaled, rounded at random": {
        "patch.support": "fill",
        "patch.rescale": True,
        "export.rounding": "stochastic",
    },
    "TIES": {"patch.merge": "ties"},
    "DARE": {"patch.merge": "dare"},
}


def run(bench: Bench) -> None:
    """Merge the same inputs in every way on both, and compare SHA-256 of results and counts."""
    try:
        cpu = jax.devices("cpu")[0]
    except RuntimeError as error:
        raise Skip("JAX has no CPU backend here; leave JAX_PLATFORMS unset") from error
    config = bench.config(bench.sizes.exact_layers)
    rows = tuple(param_table(config)[path] for path in bench.sizes.exact_weights)
    inputs = random_inputs(rows)
    entries = sum(x.size for x in inputs["backbone"].values())
    bench.note(entries=entries, device=bench.device.device_kind, same_device=cpu == bench.device)
    found: dict[str, Any] = {}
    for way, changes in WAYS.items():
        settings = Settings().override(changes)
        hashes = {}
        for name, device in (("device", bench.device), ("cpu", cpu)):
            sharder = Sharder(make_mesh(MESH, [device]))
            hashes[name] = merged_hash(inputs, rows, settings, sharder)
        found[way] = hashes | {"equal": hashes["device"] == hashes["cpu"]}
        bench.note(ways=found)


def random_inputs(rows: tuple[Param, ...]) -> Inputs:
    """Return backbone (bfloat16), derived models and sums (float32), {path: array}, made on the
    host: with ties, zeros and numbers below the smallest normal one, which backends treat
    differently."""
    rng, result = np.random.default_rng(0), {"backbone": {}}
    for role in PATCH_ROLES:
        result |= {f"derived_{role}": {}, f"sums_{role}": {}}
    for row in rows:
        x = 0.02 * rng.standard_normal(row.shape, np.float32)
        stored = x.astype(jax.numpy.bfloat16)
        result["backbone"][row.path] = stored
        for role in PATCH_ROLES:
            change = 1e-4 * rng.standard_normal(row.shape, np.float32)
            sums = np.abs(rng.standard_normal(row.shape, np.float32))
            flat = sums.reshape(-1)
            flat[::7], flat[::11], flat[::13] = 1.0, 0.0, np.float32(1e-39)
            result[f"derived_{role}"][row.path] = stored.astype(np.float32) + change
            result[f"sums_{role}"][row.path] = sums
    return result


def merged_hash(
    inputs: Inputs, rows: tuple[Param, ...], settings: Settings, sharder: Sharder
) -> str:
    """Return SHA-256 over the merged weights and the counts of kept entries."""

    def placed(name: str) -> dict[str, jax.Array]:
        return {row.path: sharder.place(inputs[name][row.path], *row.axes) for row in rows}

    device = sharder.mesh.devices.flat[0]
    with jax.default_device(device):
        merged, statistics = apply_patching(
            placed("backbone"),
            {role: placed(f"derived_{role}") for role in PATCH_ROLES},
            {role: placed(f"sums_{role}") for role in PATCH_ROLES},
            rows,
            settings.patch,
            settings.run.seed,
            sharder,
            f"patch on {device.platform}",
            settings.export.dtype,
            settings.export.rounding,
        )
    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.asarray(merged[row.path]).tobytes())
    for name, numbers in statistics.items():
        digest.update(f"{name} {numbers['kept_se']} {numbers['kept_osm']}\n".encode())
    return digest.hexdigest()
