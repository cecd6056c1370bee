"""The compiled programs of the patch operation: of one weight in all blocks, which is how weights
lie in memory."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax

from safepatch_jax.models.table import Param
from safepatch_jax.numerics import cast, flushed
from safepatch_jax.patching import PATCH_ROLES
from safepatch_jax.patching.agreement import agreement_sums
from safepatch_jax.patching.methods import MERGE_METHODS, Choice
from safepatch_jax.patching.selection import float_bits, in_memory
from safepatch_jax.patching.statistics import tensor_statistics
from safepatch_jax.patching.tensor import ProgramOptions, Tensor, importance_of

KEYED = (*PATCH_ROLES, "rounding", "fill", "top_se", "top_osm")  # what draws random bits


def stack(row: Param) -> tuple[int, ...]:
    """Return the shape [L, *HF shape] of a row as HF tensors."""
    return (row.num_layers, *row.hf_shape)


def tall_stack(row: Param) -> tuple[int, ...]:
    """Return `stack` with the longer side of its matrices first: weights with as many entries have
    it in common, and share programs where an array can be looked at in any shape."""
    return (row.num_layers, *sorted(row.hf_shape, reverse=True))


def derived_and_patch(
    stored: jax.Array, derived: Mapping[str, jax.Array]
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Return the derived models and the patches, {role: float32}, of one tensor or of a run of its
    entries."""
    backbone = flushed(stored.astype(jnp.float32))
    models = {role: flushed(derived[role].astype(jnp.float32)) for role in PATCH_ROLES}
    return models, {role: flushed(models[role] - backbone) for role in PATCH_ROLES}


def patch_and_importance(
    stored: jax.Array,
    derived: Mapping[str, jax.Array],
    sensitivity: Mapping[str, jax.Array],
    keys: Mapping[str, jax.Array],
    options: ProgramOptions,
    start: jax.Array | int = 0,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Return the patches and the importance of their entries, {role: float32}, of one tensor or of
    its entries from `start` on."""
    models, patch = derived_and_patch(stored, derived)
    importance = {}
    for role in PATCH_ROLES:
        importance[role] = importance_of(
            patch[role],
            models[role],
            sensitivity[role],
            options.importance,
            keys[f"top_{role}"],
            start,
        )
    return patch, importance


@dataclasses.dataclass(frozen=True)
class _Whole(Tensor):
    """A tensor whose keys are made when they are looked at, so that a CPU holds those of one role
    at a time.

    Attributes:
      keys_of: returns those of a role, given a True that the compiler does not know.
    """

    keys_of: Callable[[str, jax.Array], jax.Array]

    def ranked(self, role: str, before: Mapping[str, jax.Array]) -> jax.Array:
        true = self.knobs["zero"] == 0
        for mask in before.values():  # these keys are made when those have gone
            true &= jnp.sum(mask, dtype=jnp.int32) >= 0
        return self.keys_of(role, true)


def merge_tensor(
    tensor: Tensor, stored: jax.Array, dtype: str, rounding: str
) -> tuple[jax.Array, Choice]:
    """Merge what the method keeps into the backbone, and cast what has changed.

    Args:
      tensor: patches, importance and options.
      stored: the backbone as it is stored, of the patches' shape.
      dtype, rounding: see `patch_matrices`.

    Returns:
      (merged entries in that dtype, the method's choice).
    """
    choice = MERGE_METHODS[tensor.options.merge].function(tensor)
    merged = flushed(stored.astype(jnp.float32))
    for role in PATCH_ROLES:
        change = tensor.weighted(role, choice.weight[role])
        merged = jnp.where(choice.kept[role], flushed(merged + change), merged)
    untouched = stored.astype(dtype)
    changed = choice.kept["se"] | choice.kept["osm"]
    bits = functools.partial(tensor.bits, "rounding")
    return jnp.where(changed, cast(merged, dtype, rounding, bits), untouched), choice


@functools.partial(
    jax.jit, static_argnames=("options", "shape", "dtype", "rounding", "sharding"), donate_argnums=0
)
def patch_matrices(
    theta,
    derived,
    sensitivity,
    keys,
    counts,
    knobs,
    *,
    options: ProgramOptions,
    shape: tuple[int, ...],
    dtype: str,
    rounding: str = "nearest",
    sharding=None,
):
    """Patch one weight in all blocks, in the buffer of the backbone where the dtype stays.

    Args:
      theta: backbone, storage dtype, the row's shape or another of the same entries; donated.
      derived: {'se', 'osm'}: derived models, float32, same shape.
      sensitivity: {'se', 'osm'}: sums of |gradient|, float32, same shape; may be None for an
        importance that needs none.
      keys: {user in `KEYED`: uint32 [L, 2]}.
      counts: {'se', 'osm'}: int32 [L], see `Tensor`.
      knobs: see `Knobs.traced`.
      options: see `ProgramOptions`.
      shape: [L, out, in] (or [L, n]): the row as HF tensors; where nothing is by row, of any
        matrices of as many entries.
      dtype: storage dtype of the result; the one cast is to it, at the end.
      rounding: of the changed entries in that cast, nearest or stochastic; the others are rounded
        to nearest.
      sharding: of the result; the compiler's choice if None.

    Returns:
      (merged weight in that dtype and theta's shape, statistics {name: [L]}).
    """
    backbones, in_place = _stacked(theta, shape), theta.dtype == jnp.dtype(dtype)

    def one_tensor(result, xs):
        # Tensor by tensor: on TPU a reshape that joins or parts the last two axes moves every byte,
        # and of a stack all at once.
        index, keys, counts = xs
        source = result if in_place else backbones
        stored = _matrices(_read_once(source, index, knobs["zero"] == 0), shape)

        def read(stored, stacks, index, keys):
            derived, sensitivity = _matrices(_at(stacks, index), shape)
            return patch_and_importance(stored, derived, sensitivity, keys, options)

        def keys_of(role, true):
            def made(*sources):
                return float_bits(read(*sources)[1][role])

            # The stacks, for what a branch takes lies in memory.
            return in_memory(true, made, stored, stacks, index, keys)

        patch, importance = read(stored, stacks, index, keys)
        tensor = _Whole(patch, importance, keys, counts, knobs, options, keys_of)
        merged, choice = merge_tensor(tensor, stored, dtype, rounding)
        statistics = tensor_statistics(patch, importance, choice.top, choice.kept, merged, stored)
        merged = merged.reshape(result.shape[1:])
        return lax.dynamic_update_index_in_dim(result, merged, index, 0), statistics

    start = backbones if in_place else jnp.zeros(backbones.shape, dtype)
    stacks = _stacked((derived, sensitivity), shape)
    result, statistics = lax.scan(one_tensor, start, (jnp.arange(shape[0]), keys, counts))
    result = result.reshape(theta.shape)
    return (lax.with_sharding_constraint(result, sharding) if sharding else result), statistics


def _stacked(tree, shape: tuple[int, ...]):
    """Give arrays that belong to no block a leading axis, so that all have [L]."""
    return jax.tree.map(lambda x: x if x.shape[0] == shape[0] else x[None], tree)


def _at(stacks, index: jax.Array):
    """Return the arrays of one block."""
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), stacks)


def _matrices(tree, shape: tuple[int, ...]):
    """Reshape arrays of one block to the shape of a tensor."""
    return jax.tree.map(lambda x: x.reshape(shape[1:]), tree)


def _read_once(stack: jax.Array, index: jax.Array, true: jax.Array) -> jax.Array:
    """Return one tensor of a stack.

    A branch that the compiler cannot decide keeps it from reading the stack again at each use, for
    which it would copy the stack before the result is written there, and from casting the whole
    stack at once.
    """
    return lax.cond(
        true,
        lambda: lax.dynamic_index_in_dim(stack, index, keepdims=False),
        lambda: jnp.zeros(stack.shape[1:], stack.dtype),
    )


@functools.partial(jax.jit, static_argnames="shape")
def compare_patches(theta, derived, zero, *, shape: tuple[int, ...]):
    """Return the sums that `agreement` reads, of each tensor, {name: int32 [L, ...]}; see
    `patch_matrices`.

    A program of its own, so that the one that merges stays as it is. `zero` is 0, and the compiler
    does not know it.
    """

    def one_tensor(xs):
        index, derived = xs
        stored = _read_once(_stacked(theta, shape), index, zero == 0)
        return agreement_sums(derived_and_patch(stored, derived)[1])

    return lax.map(one_tensor, (jnp.arange(shape[0]), _stacked(derived, shape)))


@functools.partial(jax.jit, static_argnames=("kind", "shape"))
def count_at_least(
    theta, derived, sensitivity, keys, threshold, *, kind: str, shape: tuple[int, ...]
):
    """Return how many entries of each tensor have an importance whose bits are at least the
    threshold, int32 [L]; see `patch_matrices` and `importance_of`."""

    def one_tensor(xs):
        index, derived, sensitivity, key = xs
        backbone = _read_once(_stacked(theta, shape), index, threshold > 0)
        derived = flushed(derived)
        patch = flushed(derived - flushed(backbone.astype(jnp.float32)))
        importance = importance_of(patch, derived, sensitivity, kind, key)
        return jnp.sum(float_bits(importance) >= threshold, dtype=jnp.int32)

    derived, sensitivity = _stacked(derived, shape), _stacked(sensitivity, shape)
    return lax.map(one_tensor, (jnp.arange(shape[0]), derived, sensitivity, keys))
