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
from safepatch_jax.models.layerwise import Part
from safepatch_jax.models.table import Param, param_table
from safepatch_jax.patching import PATCH_ROLES
from safepatch_jax.patching.merge import apply_patching
from safepatch_jax.planning.programs import programs

# Of an entry: the backbone and the result, bfloat16; two derived models and two sums, float32.
ENTRY_BYTES = 2 + 2 + 4 * 4
ARGUMENT_BYTES = 4 * 4
HELD_BYTES = ARGUMENT_BYTES + 2  # with a backbone of which each repeat gets a copy


def run(bench: Bench) -> None:
    """Time `apply_patching` with the settings of a run, on random weights and sums."""
    bench.rates()
    settings = bench.settings({})

    def predicted(layers: int, all_weights: bool = False) -> int:
        """The plan's bytes of the largest weights' programs, and what this part holds and a run
        reads weight by weight."""
        config = bench.config(layers)
        scope = scope_size(config)
        traced = [(p, p.trace()) for p in programs(settings, config, bench.sharder, ("patch",))]
        largest = max(stored_size(trace) for _, trace in traced)
        parts = []
        for program, trace in traced:
            if all_weights or stored_size(trace) == largest:
                others = HELD_BYTES * scope - ARGUMENT_BYTES * stored_size(trace)
                parts.append(Part(program.name, program.trace, program.resident + others))
        bench.compiled(parts)
        return bench.predicted

    def attempt(layers: int) -> None:
        config = bench.config(layers)
        rows, scope = param_table(config).scope(settings.patch.scope), scope_size(config)
        predicted(layers, all_weights=True)
        bench.note(scope=scope, needed_bytes=ENTRY_BYTES * scope)
        backbone, derived, sums = made(bench, rows)
        seconds = []
        for repeat in range(bench.sizes.repeats + 1):  # the first compiles
            given = jax.tree.map(jnp.copy, backbone)  # it is donated
            jax.block_until_ready((given, derived, sums))
            begun = time.perf_counter()
            merged, numbers = apply_patching(
                given, derived, sums, rows, settings.patch, 0, bench.sharder, "patch"
            )
            jax.block_until_ready(merged)
            took = time.perf_counter() - begun
            if repeat:
                seconds.append(took)
                bench.note(patch_seconds=seconds, median=statistics.median(seconds))
            kept = sum(of_tensor["kept_se"] for of_tensor in numbers.values())
            bench.note(kept_share=kept / scope)
            del given, merged

    bench.as_many_layers(predicted, attempt)


def stored_size(traced: jax.stages.Traced) -> int:
    """Return the number of entries of the weight that a program patches, its first argument."""
    return traced.jaxpr.in_avals[0].size


def scope_size(config: DecoderConfig) -> int:
    """Return the number of entries that are patched."""
    return sum(math.prod(row.shape) for row in param_table(config).scope("block_linear"))


def made(bench: Bench, rows: tuple[Param, ...]) -> tuple[dict[str, Any], ...]:
    """Return random backbone {path: array}, derived models and sums {role: {path: array}}, made on
    the device, the same each time."""
    backbone: dict[str, Any] = {}
    derived: dict[str, Any] = {role: {} for role in PATCH_ROLES}
    sums: dict[str, Any] = {role: {} for role in PATCH_ROLES}
    for number, row in enumerate(rows):
        place = bench.sharder.sharding(row.axes, row.shape, row.path)
        key = jax.random.key(number, impl=GENERATOR)
        arrays = _made(key, shape=row.shape, place=place)
        backbone[row.path] = arrays["backbone"]
        for role in PATCH_ROLES:
            derived[role][row.path] = arrays["derived"][role]
            sums[role][row.path] = arrays["sums"][role]
    return backbone, derived, sums


@functools.partial(jax.jit, static_argnames=("shape", "place"))
def _made(key: jax.Array, *, shape: tuple[int, ...], place: Any) -> dict[str, Any]:
    keys = iter(jax.random.split(key, 1 + 2 * len(PATCH_ROLES)))

    def normal(scale: float) -> jax.Array:
        return jax.lax.with_sharding_constraint(scale * jax.random.normal(next(keys), shape), place)

    backbone = normal(0.02).astype(jnp.bfloat16)
    return {
        "backbone": backbone,
        "derived": {role: backbone.astype(jnp.float32) + normal(1e-4) for role in PATCH_ROLES},
        "sums": {role: jnp.abs(normal(1.0)) for role in PATCH_ROLES},
    }
