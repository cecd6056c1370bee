"""The compiled programs of the patch operation on a piece: a run of one tensor's entries that is
held while the rest of the tensor lies on disk."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from safepatch_jax.numerics import bernoulli, random_bits, row_major_index
from safepatch_jax.patching import PATCH_ROLES
from safepatch_jax.patching.agreement import agreement_squares, both_changed
from safepatch_jax.patching.methods import MERGE_METHODS, Choice
from safepatch_jax.patching.programs import merge_tensor, patch_and_importance
from safepatch_jax.patching.selection import float_bits, reduce_together, top_of_keys
from safepatch_jax.patching.statistics import tensor_statistics
from safepatch_jax.patching.tensor import ProgramOptions, Tensor


class _Selections:
    """The selections that a method makes in a piece, recorded while the program is traced.

    Attributes:
      limits: {name of a selection: int32 [2], a `thresholds.Limit`}.
      keys: {name: (keys, number of marks that count towards the size)}, filled in.
    """

    def __init__(self, limits: Mapping[str, jax.Array]):
        self.limits = limits
        self.keys: dict[str, tuple[jax.Array, jax.Array]] = {}

    def select(self, name: str, key: jax.Array, included: jax.Array | None) -> jax.Array:
        """Mark the piece's part of a selection."""
        marks = jnp.int32(0) if included is None else jnp.sum(included, dtype=jnp.int32)
        self.keys[name] = key, marks
        if name not in self.limits:  # the program is to find it, and does not use what follows
            return jnp.zeros(key.shape, bool)
        threshold, bound = self.limits[name]
        index = row_major_index(key.shape, range(key.ndim), jnp.int32(0))
        return (key > threshold) | (key == threshold) & (index < bound)


@dataclasses.dataclass(frozen=True)
class _Piece(Tensor):
    """A run of a tensor's entries within the compiled program.

    Attributes:
      start: row-major index of the first one, uint32 scalar.
      selections: records what the method selects.
      drawn: what `draw` returns.
    """

    start: jax.Array
    selections: _Selections
    drawn: Mapping[str, jax.Array]

    def select(self, name, key, number, included=None, axes=None):
        if axes == (-1,):
            return top_of_keys(key, number, axes)  # a piece has whole rows
        return self.selections.select(name, key, included)

    def bits(self, user):
        if user in self.drawn:
            return self.drawn[user]
        return random_bits(self.keys[user], self.patch["se"].shape, self.start)

    def coin(self, role):
        return self.drawn[role]


@functools.partial(jax.jit, static_argnames=("users", "shape"))
def draw(start, keys, knobs, *, users: tuple[str, ...], shape: tuple[int, ...]):
    """Return what is drawn at random in a piece: the bits of the users, and by role the coins of
    `Tensor.coin`.

    A program of its own: within the one that merges XLA on CPU would draw anew for each use.
    """
    result = {user: random_bits(keys[user], shape, start) for user in users}
    for role in PATCH_ROLES:
        if role in users:
            result[role] = bernoulli(result[role], knobs["retention"])
    return result


def _piece(arrays, limits, drawn, start, keys, counts, knobs, options) -> _Piece:
    sensitivity = arrays["sensitivity"] or dict.fromkeys(PATCH_ROLES)
    patch, importance = patch_and_importance(
        arrays["backbone"], arrays["derived"], sensitivity, keys, options, start
    )
    if options.importance == "random":  # drawn once, as in `draw`
        importance = lax.optimization_barrier(importance)
    selections = _Selections(limits)
    return _Piece(patch, importance, keys, counts, knobs, options, start, selections, drawn)


@functools.partial(jax.jit, static_argnames=("options", "dtype", "rounding"))
def merge(
    arrays,
    limits,
    drawn,
    start,
    keys,
    counts,
    knobs,
    *,
    options: ProgramOptions,
    dtype: str,
    rounding: str,
):
    """Return (merged entries of a piece, its statistics as an int32 vector, which `Counted`
    reads)."""
    piece = _piece(arrays, limits, drawn, start, keys, counts, knobs, options)
    merged, choice = merge_tensor(piece, arrays["backbone"], dtype, rounding)
    if limits or options.by_row:  # to select again, for each statistic, takes longer than to keep
        top, kept = lax.optimization_barrier((choice.top, choice.kept))
        choice = choice._replace(top=top, kept=kept)
    flat = []
    for x in jax.tree.leaves(_statistics(piece, choice, merged, arrays["backbone"])):
        x = lax.bitcast_convert_type(x, jnp.int32) if x.dtype == jnp.float32 else x
        flat.append(jnp.ravel(x).astype(jnp.int32))
    return merged, jnp.concatenate(flat)


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


@functools.partial(jax.jit, static_argnames=("options", "wanted"))
def survey(
    arrays,
    limits,
    drawn,
    start,
    keys,
    counts,
    knobs,
    bounds,
    *,
    options: ProgramOptions,
    wanted: tuple[str, ...],
):
    """Look at the keys of some of the method's selections in a piece.

    Args:
      bounds: {name of a selection: int32 [n + 2]: thresholds, and a window's first and last key}.

    Returns:
      {name: (keys, which of them are in the window, int32 [n + 1]: how many are at least each
      threshold, and the number of marks that count towards the selection)}.
    """
    piece = _piece(arrays, limits, drawn, start, keys, counts, knobs, options)
    MERGE_METHODS[options.merge].function(piece)
    result = {}
    for name in wanted:
        key, marks = piece.selections.keys[name]
        *thresholds, first, last = bounds[name]
        reached = {f"{i:02}": key >= x for i, x in enumerate(thresholds)}
        reached = reduce_together(reached, {}, {})[0]
        numbers = jnp.stack([*(reached[i] for i in sorted(reached)), marks])
        result[name] = key, (key >= first) & (key <= last), numbers
    return result
