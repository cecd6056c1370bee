"""Controllable patching: scores, top sets, combination, retention and merge, one program a weight
shape."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from safepatch_jax.mesh import Sharder
from safepatch_jax.models.table import Param
from safepatch_jax.numerics import cast, tensor_keys
from safepatch_jax.patching.methods import BASELINES
from safepatch_jax.patching.retention import filled
from safepatch_jax.patching.selection import (
    PASSES,
    ROLES,
    combine_sets,
    float_bits,
    share_out,
    top_count,
)
from safepatch_jax.patching.statistics import overlap, refuse_broken, tensor_statistics
from safepatch_jax.patching.tensor import (
    UNSCORED,
    UNTRIMMED,
    Choice,
    Knobs,
    Layer,
    Method,
    importance,
    rounded,
    top_rates,
)
from safepatch_jax.runtime import processes
from safepatch_jax.runtime.console import progress
from safepatch_jax.settings import PatchSettings

KEYED = (*ROLES, "rounding", "fill", "top_se", "top_osm")  # what draws random bits


def safepatching(layer: Layer) -> Choice:
    """Combine the two top sets, retain at random, weigh with alpha and beta."""
    top = layer.top_sets()
    candidates = dict(zip(ROLES, combine_sets(top["se"], top["osm"], layer.method.combine)))
    if layer.method.support == "fill":
        kept = filled(layer, candidates, top)
    else:
        kept = layer.dropped(candidates)
    return Choice(top, kept, layer.weights())


METHODS = {"safepatching": safepatching} | BASELINES


def patch_and_score(
    stored: jax.Array,
    derived: Mapping[str, jax.Array],
    sensitivity: Mapping[str, jax.Array],
    keys: Mapping[str, jax.Array],
    method: Method,
    start: jax.Array | int = 0,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Return the patches and their importance scores, {role: float32}, of one tensor or of its
    entries from `start` on."""
    backbone = stored.astype(jnp.float32)
    derived = {r: derived[r].astype(jnp.float32) for r in ROLES}
    patch = {r: derived[r] - backbone for r in ROLES}
    return patch, {
        r: importance(
            patch[r], derived[r], sensitivity[r], method.importance, keys[f"top_{r}"], start
        )
        for r in ROLES
    }


def merge_layer(
    layer: Layer, stored: jax.Array, dtype: str, rounding: str
) -> tuple[jax.Array, Choice]:
    """Merge what the layer's method keeps into the backbone, and cast what has changed.

    Args:
      layer: patches, scores and method.
      stored: the backbone as it is stored, of the patches' shape.
      dtype, rounding: see `patch_matrices`.

    Returns:
      (merged entries in that dtype, the method's choice).
    """
    choice = METHODS[layer.method.merge](layer)
    merged = stored.astype(jnp.float32)
    for r in ROLES:
        change = rounded(choice.weight[r] * layer.patch[r], layer.knobs["zero"])
        merged = jnp.where(choice.kept[r], merged + change, merged)
    untouched = stored.astype(dtype)
    changed = choice.kept["se"] | choice.kept["osm"]
    merged = jnp.where(
        changed, cast(merged, dtype, rounding, lambda: layer.bits("rounding")), untouched
    )
    return merged, choice


@functools.partial(
    jax.jit, static_argnames=("method", "shape", "dtype", "rounding", "sharding"), donate_argnums=0
)
def patch_matrices(
    theta,
    derived,
    sensitivity,
    keys,
    counts,
    knobs,
    *,
    method: Method,
    shape: tuple[int, ...],
    dtype: str,
    rounding: str = "nearest",
    sharding=None,
):
    """Patch all layers of one weight, in the buffer of the backbone where the dtype stays.

    Args:
      theta: backbone, storage dtype, the row's shape; donated.
      derived: {'se', 'osm'}: derived models, float32, same shape.
      sensitivity: {'se', 'osm'}: sums of |gradient|, float32, same shape; may be None for the
        importances in `UNSCORED`.
      keys: {user in `KEYED`: uint32 [L, 2]}.
      counts: {'se', 'osm'}: int32 [L], see `Layer`.
      knobs: see `Knobs.traced`.
      method: see `Method`.
      shape: [L, out, in] (or [L, n]): the row as HF tensors.
      dtype: storage dtype of the result; the one cast is to it, at the end.
      rounding: of the changed entries in that cast, nearest or stochastic; the others are rounded
        to nearest.
      sharding: of the result; the compiler's choice if None.

    Returns:
      (merged weight in that dtype and the row's shape, statistics {name: [L]}).
    """
    # Layer by layer: on TPU a reshape that joins or parts the last two axes moves every byte, and
    # of a stack all at once.
    matrix = lambda tree: jax.tree.map(lambda x: x.reshape(shape[1:]), tree)
    stacked = lambda tree: jax.tree.map(lambda x: x if x.shape[0] == shape[0] else x[None], tree)
    backbones, in_place = stacked(theta), theta.dtype == jnp.dtype(dtype)

    def one_layer(result, xs):
        index, derived, sensitivity, keys, counts = xs
        derived, sensitivity = matrix(derived), matrix(sensitivity)
        stored = matrix(_read_once(result if in_place else backbones, index, knobs["zero"] == 0))
        patch, score = patch_and_score(stored, derived, sensitivity, keys, method)
        merged, choice = merge_layer(
            Layer(patch, score, keys, counts, knobs, method), stored, dtype, rounding
        )
        return (
            lax.dynamic_update_index_in_dim(result, merged.reshape(result.shape[1:]), index, 0),
            tensor_statistics(patch, score, choice.top, choice.kept, merged, stored),
        )

    start = backbones if in_place else jnp.zeros(backbones.shape, dtype)
    layers = (jnp.arange(shape[0]), stacked(derived), stacked(sensitivity), keys, counts)
    result, statistics = lax.scan(one_layer, start, layers)
    result = result.reshape(theta.shape)
    return (lax.with_sharding_constraint(result, sharding) if sharding else result), statistics


def _read_once(stack: jax.Array, index: jax.Array, true: jax.Array) -> jax.Array:
    """Return one layer of a stack: a branch that the compiler cannot decide keeps it from reading
    the stack again at each
    use, for which it would copy the stack before the result is written there, and from casting the
    whole stack at once."""
    return lax.cond(
        true,
        lambda: lax.dynamic_index_in_dim(stack, index, keepdims=False),
        lambda: jnp.zeros(stack.shape[1:], stack.dtype),
    )


@functools.partial(jax.jit, static_argnames=("kind", "shape"))
def count_at_least(
    theta, derived, sensitivity, keys, threshold, *, kind: str, shape: tuple[int, ...]
):
    """Return the number of scores in each layer whose bits are at least the threshold, int32
    [L]."""

    def one_layer(layer):
        index, derived, sensitivity, key = layer
        backbone = _read_once(stacked(theta), index, threshold > 0)
        score = importance(derived - backbone.astype(jnp.float32), derived, sensitivity, kind, key)
        return jnp.sum(float_bits(score) >= threshold, dtype=jnp.int32)

    stacked = lambda tree: jax.tree.map(lambda x: x if x.shape[0] == shape[0] else x[None], tree)
    return lax.map(one_layer, (jnp.arange(shape[0]), stacked(derived), stacked(sensitivity), keys))


def _counts(
    backbone,
    derived,
    sensitivity,
    rows: Sequence[Param],
    patch: PatchSettings,
    seed: int,
) -> dict[str, dict[str, np.ndarray]]:
    """Return the sizes of the top sets, {role: {path: int32 [L]}}: of each row or matrix, or of a
    matrix's part in the
    top set of the whole scope. The order in which ties are broken there is the table's: rows, then
    layers.
    """
    rates, kind = top_rates(patch), Method.of(patch).importance
    if patch.granularity != "global" or patch.merge in UNTRIMMED:
        size = lambda row: (
            row.hf_shape[-1] if patch.granularity == "row" else math.prod(row.hf_shape)
        )
        return {
            role: {
                row.path: np.full(row.num_layers, top_count(rate, size(row)), np.int32)
                for row in rows
            }
            for role, rate in rates.items()
        }
    result = {}
    with progress(len(ROLES) * PASSES, "global top sets", "count") as bar:
        for role, rate in rates.items():
            keys = {row.path: tensor_keys(seed, f"top_{role}", row.hf_names) for row in rows}

            def count_at(threshold):
                bar.update()
                parts = [
                    count_at_least(
                        backbone[row.path],
                        derived[role][row.path],
                        sensitivity[role][row.path],
                        keys[row.path],
                        np.int32(threshold),
                        kind=kind,
                        shape=_stack(row),
                    )
                    for row in rows
                ]
                return [int(n) for part in parts for n in processes.fetch(part)]

            shares = iter(
                share_out(count_at, top_count(rate, sum(math.prod(row.shape) for row in rows)))
            )
            result[role] = {
                row.path: np.array([next(shares) for _ in row.hf_names], np.int32) for row in rows
            }
    return result


def _stack(row: Param) -> tuple[int, ...]:
    return (row.num_layers, *row.hf_shape)


def apply_patching(
    backbone: Mapping[str, jax.Array],
    derived: Mapping[str, Mapping[str, jax.Array]],
    sensitivity: Mapping[str, Mapping[str, jax.Array]],
    rows: Sequence[Param],
    patch: PatchSettings,
    seed: int,
    sharder: Sharder,
    title: str,
    dtype: str = "keep",
    rounding: str = "nearest",
) -> tuple[dict[str, jax.Array], dict[str, dict[str, Any]]]:
    """Patch the backbone.

    Args:
      backbone: flat ``{path: array}``; the patched entries are donated and must not be used again.
      derived: {'se', 'osm'}: flat parameters of the two derived models, float32. Each is asked for
        once, so a mapping may read them when they are; for global granularity all are held.
      sensitivity: {'se', 'osm'}: see `SensitivityMeter.measure`; likewise, and not asked for by the
        importances in `UNSCORED`.
      rows: the scope.
      patch: settings.
      seed: of all random bits.
      sharder: the mesh.
      title: shown at the progress bar.
      dtype: storage dtype of the result; 'keep' is the backbone's.
      rounding: see `patch_matrices`.

    Returns:
      (flat ``{path: array}`` over the scope, statistics ``{HF name: {name: number}}``; see also
      `refuse_no_op`).

    Raises:
      ValueError: NaN or infinite scores or merged weights (names the tensors).
    """
    merged, statistics = {}, {}
    if Method.of(patch).importance in UNSCORED:
        sensitivity = {role: {row.path: None for row in rows} for role in ROLES}
    if (
        patch.granularity == "global" and patch.merge not in UNTRIMMED
    ):  # every count needs all of them
        held = lambda trees: {
            role: {row.path: tree[row.path] for row in rows} for role, tree in trees.items()
        }
        derived, sensitivity = held(derived), held(sensitivity)
    counts = _counts(backbone, derived, sensitivity, rows, patch, seed)
    with progress(len(rows), title, "weight") as bar:
        for row in rows:
            of_row = lambda tree: {role: tree[role][row.path] for role in ROLES}
            keys = {user: tensor_keys(seed, user, row.hf_names) for user in KEYED}
            merged[row.path], stats = patch_matrices(
                backbone[row.path],
                of_row(derived),
                of_row(sensitivity),
                keys,
                of_row(counts),
                Knobs.of(patch, math.prod(row.hf_shape)).traced(),
                method=Method.of(patch),
                shape=_stack(row),
                dtype=str(backbone[row.path].dtype) if dtype == "keep" else dtype,
                rounding=rounding,
                sharding=sharder.sharding(row.axes, row.shape, row.path),
            )
            stats = {name: processes.fetch(values) for name, values in stats.items()}
            for layer, hf_name in enumerate(row.hf_names):
                own = {"size": math.prod(row.hf_shape)} | {
                    n: v[layer].tolist() for n, v in stats.items()
                }
                statistics[hf_name] = own | {"overlap": overlap(own)}
            bar.update()
    refuse_broken(statistics)
    return merged, statistics
