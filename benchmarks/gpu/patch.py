"""The whole patch operation, at as many blocks as fit with all its inputs held on the device."""

from __future__ import annotations

import functools
import math
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu.bench import GENERATOR, Bench
from safepatch_jax.models.config import DecoderConfig
from safepatch_jax.models.table import Param, param_table
from safepatch_jax.patching import PATCH_ROLES
from safepatch_jax.patching.merge import apply_patching
from safepatch_jax.planning.programs import programs

# Of an entry: the backbone and the result, bfloat16; two derived models and two sums, float32.
ENTRY_BYTES = 2 + 2 + 4 * 4
HELD_BYTES = 4 * 4


def run(bench: Bench) -> None:
    """Time `apply_patching` with the settings of a run, on random weights and sums."""
    bench.rates()
    settings = bench.settings({})

    def predicted(layers: int, all_weights: bool = False) -> int:
        """The plan's bytes of the largest weights' programs, and what this part holds and a run
        reads weight by weight."""
        config, most = bench.config(layers), 0
        traced = [(p, p.trace()) for p in programs(settings, config, bench.sharder, ("patch",))]
        sizes_of = [stored_size(trace) for _, trace in traced]
        for (program, trace), size in zip(traced, sizes_of):
            if all_weights or size == max(sizes_of):
                held = program.resident + HELD_BYTES * (scope_size(config) - size)
                most = max(most, bench.predict(trace, held))
        bench.note(predicted_bytes=most)
        return most

    def attempt(layers: int) -> None:
        config = bench.config(layers)
        rows, scope = param_table(config).scope(settings.patch.scope), scope_size(config)
        predicted(layers, all_weights=True)
        bench.note(scope=scope, needed_bytes=ENTRY_BYTES * scope)
        derived, sums = _roles(bench, rows, "derived"), _roles(bench, rows, "sums")
        seconds = []
        for repeat in range(sizes.repeats + 1):  # the first compiles
            backbone = {row.path: _random(bench, row, "backbone") for row in rows}
            jax.block_until_ready((backbone, derived, sums))
            begun = time.perf_counter()
            merged, statistics_of = apply_patching(
                backbone, derived, sums, rows, settings.patch, 0, bench.sharder, "patch"
            )
            jax.block_until_ready(merged)
            took = time.perf_counter() - begun
            if repeat:
                seconds.append(took)
                bench.note(patch_seconds=seconds, median=statistics.median(seconds))
            kept = sum(numbers["kept_se"] for numbers in statistics_of.values())
            bench.note(kept_share=kept / scope)
            del backbone, merged

    sizes = bench.sizes
    bench.as_many_layers(predicted, attempt)


def stored_size(traced: jax.stages.Traced) -> int:
    """Return the number of entries of the weight that a program patches, its first argument."""
    return traced.jaxpr.in_avals[0].size


def scope_size(config: DecoderConfig) -> int:
    """Return the number of entries that are patched."""
    return sum(math.prod(row.shape) for row in param_table(config).scope("block_linear"))


def _roles(bench: Bench, rows: tuple[Param, ...], what: str) -> dict[str, dict[str, Any]]:
    result = {}
    for role in PATCH_ROLES:
        result[role] = {row.path: _random(bench, row, what, role) for row in rows}
    return result


def _random(bench: Bench, row: Param, what: str, role: str = "se") -> jax.Array:
    """Return a weight's backbone, derived model or sums, made on the device, the same each time."""
    place = bench.sharder.sharding(row.axes, row.shape, row.path)
    key = jax.random.key(sum(row.path.encode()), impl=GENERATOR)
    return _made(key, PATCH_ROLES.index(role), shape=row.shape, what=what, place=place)


@functools.partial(jax.jit, static_argnames=("shape", "what", "place"))
def _made(key: jax.Array, number: jax.Array, *, shape: tuple[int, ...], what: str, place: Any):
    own = jax.random.fold_in(key, 1 + number)
    if what == "sums":
        x = jnp.abs(jax.random.normal(jax.random.fold_in(own, 7), shape))
    else:
        x = (0.02 * jax.random.normal(key, shape)).astype(jnp.bfloat16)
        if what == "derived":
            x = x.astype(jnp.float32) + 1e-4 * jax.random.normal(own, shape)
    return jax.lax.with_sharding_constraint(x, place)
