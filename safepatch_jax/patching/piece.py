"""The compiled programs of the patch operation on a piece: a run of one tensor's entries that is
held while the rest of the tensor lies on disk."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from safepatch_jax.numerics import bernoulli, random_bits, row_major_index
from safepatch_jax.patching import PATCH_ROLES
from safepatch_jax.patching.agreement import agreement_squares, both_changed
from safepatch_jax.patching.merge import merge_tensor, patch_and_importance
from safepatch_jax.patching.methods import MERGE_METHODS, Choice
from safepatch_jax.patching.selection import (
    float_bits,
    in_memory,
    reduce_together,
    top_of_keys,
)
from safepatch_jax.patching.statistics import tensor_statistics
from safepatch_jax.patching.tensor import ProgramOptions, Tensor

# Pieces are computed by several threads at once, so each by one.
_ONE_THREAD = {"xla_cpu_multi_thread_eigen": False}


class _Selections:
    """The selections that a method makes in a piece, recorded while the program is traced.

    Attributes:
      limits: {name of a selection: int32 [2], a `thresholds.Limit`}.
      offset: of the first entry within the piece, int32 scalar.
      keys: {name: (keys, number of marks that count towards the size)}, filled in.
    """

    def __init__(self, limits: Mapping[str, jax.Array], offset: jax.Array):
        self.limits, self.offset = limits, offset
        self.keys: dict[str, tuple[jax.Array, jax.Array]] = {}

    def select(self, name: str, key: jax.Array, included: jax.Array | None) -> jax.Array:
        """Mark the piece's part of a selection."""
        marks = jnp.int32(0) if included is None else jnp.sum(included, dtype=jnp.int32)
        self.keys[name] = key, marks
        if name not in self.limits:  # the program is to find it, and does not use what follows
            return jnp.zeros(key.shape, bool)
        threshold, bound = self.limits[name]
        index = row_major_index(key.shape, range(key.ndim), self.offset)
        return (key > threshold) | (key == threshold) & (index < bound)


@dataclasses.dataclass(frozen=True)
class _Piece(Tensor):
    """A run of a tensor's entries within the compiled program.

    Attributes:
      start: row-major index of the first one, uint32 scalar.
      selections: records what the method selects.
    """

    start: jax.Array
    selections: _Selections

    def select(self, name, key, number, included=None, axes=None):
        if axes == (-1,):
            return top_of_keys(key, number, axes)  # a piece has whole rows
        return self.selections.select(name, key, included)

    def drawn(self, user: str, function: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """Return what a function makes of a user's random bits, drawn once for all its uses."""

        def draw(key, start):
            return function(random_bits(key, self.patch["se"].shape, start))

        return in_memory(self.knobs["zero"] == 0, draw, self.keys[user], self.start)

    def bits(self, user):
        return self.drawn(user, lambda bits: bits)

    def coin(self, role):
        return self.drawn(role, lambda bits: bernoulli(bits, self.knobs["retention"]))


def _piece(arrays, limits, start, offset, keys, counts, knobs, options) -> _Piece:
    sensitivity = arrays["sensitivity"] or dict.fromkeys(PATCH_ROLES)
    patch, importance = patch_and_importance(
        arrays["backbone"], arrays["derived"], sensitivity, keys, options, start
    )
    if options.importance == "random":  # drawn once
        importance = lax.optimization_barrier(importance)
    selections = _Selections(limits, offset)
    return _Piece(patch, importance, keys, counts, knobs, options, start, selections)


def _words(x: jax.Array) -> jax.Array:
    """Return what has 16 bits as whole numbers: XLA on CPU computes with bfloat16 as float32, and
    would cast a whole piece for each block that is written into it."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def _block_by_block(function, arrays, start: jax.Array, blocks: jax.Array, entries: int):
    """Call a function with each of the first so many blocks of a piece, its row-major index in the
    tensor, and in the piece; return its arrays joined, with zeros for the other blocks."""
    shape = arrays["backbone"].shape
    rows = entries // math.prod(shape[1:])

    stored = jax.tree.map(_words, arrays)

    def at(i):
        """Return the arguments of one block."""

        def cut(words, x):
            part = lax.dynamic_slice_in_dim(words, i * rows, rows)
            return part if part.dtype == x.dtype else lax.bitcast_convert_type(part, x.dtype)

        part = jax.tree.map(cut, stored, arrays)
        return part, start + (i * entries).astype(jnp.uint32), i * entries

    def step(i, results):
        def put(whole, part):
            return lax.dynamic_update_index_in_dim(whole, _words(part), i, 0)

        return jax.tree.map(put, results, function(*at(i)))

    number = shape[0] // rows
    made = jax.eval_shape(lambda: function(*at(jnp.int32(0))))
    results = jax.tree.map(
        lambda x: jnp.zeros((number, *x.shape), jnp.uint16 if x.dtype.itemsize == 2 else x.dtype),
        made,
    )
    results = lax.fori_loop(0, blocks, step, results)

    def back(x, words):
        return words if words.dtype == x.dtype else lax.bitcast_convert_type(words, x.dtype)

    return jax.tree.map(back, made, results)


@functools.partial(
    jax.jit,
    static_argnames=("block", "options", "dtype", "rounding"),
    compiler_options=_ONE_THREAD,
)
def merge(
    arrays,
    limits,
    start,
    blocks,
    keys,
    counts,
    knobs,
    *,
    block: int,
    options: ProgramOptions,
    dtype: str,
    rounding: str,
):
    """Return (merged entries of the first so many blocks of a piece, flat, their statistics as
    int32 [blocks of the piece, n], which `Counted` reads)."""

    def one_block(arrays, start, offset):
        piece = _piece(arrays, limits, start, offset, keys, counts, knobs, options)
        merged, choice = merge_tensor(piece, arrays["backbone"], dtype, rounding)
        if limits or options.by_row:  # to select again for each statistic takes longer
            top, kept = lax.optimization_barrier((choice.top, choice.kept))
            choice = choice._replace(top=top, kept=kept)
        flat = []
        for x in jax.tree.leaves(_statistics(piece, choice, merged, arrays["backbone"])):
            x = lax.bitcast_convert_type(x, jnp.int32) if x.dtype == jnp.float32 else x
            flat.append(jnp.ravel(x).astype(jnp.int32))
        return merged.reshape(-1), jnp.concatenate(flat)

    merged, vectors = _block_by_block(one_block, arrays, start, blocks, block)
    return merged.reshape(-1), vectors


def _statistics(piece: Tensor, choice: Choice, merged: jax.Array, stored: jax.Array):
    """Return (statistics of a piece, its sums of both patches)."""
    patch, masks = piece.patch, both_changed(piece.patch)
    counts = tensor_statistics(
        patch, piece.importance, choice.top, choice.kept, merged, stored, masks, whole=True
    )
    sums = {name: counts.pop(name) for name in masks}
    largest = {role: float_bits(counts[f"largest_{role}"]) for role in PATCH_ROLES}
    return counts, sums | agreement_squares(patch, largest)


class Counted:
    """Reads the vectors of `merge`."""

    def __init__(self):
        x, mask = (jax.ShapeDtypeStruct((1,), dtype) for dtype in (jnp.float32, bool))
        pair, masks = dict.fromkeys(PATCH_ROLES, x), dict.fromkeys(PATCH_ROLES, mask)

        def statistics(patch, masks, x):
            tensor = Tensor(patch, patch, {}, {}, {}, None)
            return _statistics(tensor, Choice(masks, masks, {}), x, x)

        shapes = jax.eval_shape(statistics, pair, masks, x)
        leaves, self._tree = jax.tree.flatten(shapes)
        self._fields, offset = [], 0
        for leaf in leaves:
            size = math.prod(leaf.shape)
            self._fields.append((slice(offset, offset + size), leaf.shape, leaf.dtype))
            offset += size

    def parts(self, vectors: np.ndarray) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Return the statistics and the sums of each piece as Python's numbers.

        Args:
          vectors: int32 [pieces, n].
        """
        columns = []
        for place, shape, dtype in self._fields:
            x = np.ascontiguousarray(vectors[:, place])
            x = x.view(dtype) if dtype == np.float32 else x.astype(dtype)
            columns.append(x.reshape(-1, *shape).tolist())
        return [jax.tree.unflatten(self._tree, leaves) for leaves in zip(*columns)]


@functools.partial(
    jax.jit, static_argnames=("block", "options", "wanted"), compiler_options=_ONE_THREAD
)
def survey(
    arrays,
    limits,
    start,
    blocks,
    keys,
    counts,
    knobs,
    bounds,
    *,
    block: int,
    options: ProgramOptions,
    wanted: tuple[str, ...],
):
    """Look at the keys of some of the method's selections in the first so many blocks of a piece.

    Args:
      bounds: {name of a selection: int32 [n + 2]: thresholds, and a window's first and last key}.

    Returns:
      {name: (keys, which of them are in the window, both flat, int32 [n + 1]: how many are at
      least each threshold, and the number of marks that count towards the selection)}.
    """

    def one_block(arrays, start, offset):
        piece = _piece(arrays, limits, start, offset, keys, counts, knobs, options)
        MERGE_METHODS[options.merge].function(piece)
        result = {}
        for name in wanted:
            key, marks = piece.selections.keys[name]
            *thresholds, first, last = bounds[name]
            reached = {f"{i:02}": key >= x for i, x in enumerate(thresholds)}
            reached = reduce_together(reached, {}, {})[0]
            numbers = jnp.stack([*(reached[i] for i in sorted(reached)), marks])
            result[name] = key.reshape(-1), ((key >= first) & (key <= last)).reshape(-1), numbers
        return result

    found = _block_by_block(one_block, arrays, start, blocks, block)
    return {
        name: (key.reshape(-1), inside.reshape(-1), jnp.sum(numbers, axis=0, dtype=jnp.int32))
        for name, (key, inside, numbers) in found.items()
    }
