"""Exact top-k by counting: no sort, no gather; only counts cross devices."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from safepatch_jax.numerics import flushed, row_major_index

PASSES = 34  # counts that `share_out` asks for, at most
NOT_FINITE = 0x7F800000  # the bits of infinity; above them are those of NaN
NONE = 0x7FFFFFFF  # above the bits of every finite number, and above every index


def top_count(rate: float, size: int) -> int:
    """Return floor(rate * size), exact in the decimal digits of `rate` (0.29 * 100 is 29, not
    28)."""
    return math.floor(Fraction(repr(float(rate))) * size)


def float_bits(x: jax.Array) -> jax.Array:
    """Return |x| of a float32 as int32: bits without a sign order as the numbers do."""
    return lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF


def top_mask(importance: jax.Array, k: jax.Array, axes: Sequence[int] | None = None) -> jax.Array:
    """Mark the k most important entries (float32, finite, >= 0; below the smallest normal number
    they count as 0); see `top_of_keys`."""
    # No -0 is marked either: its bits are negative.
    return top_of_keys(lax.bitcast_convert_type(flushed(importance), jnp.int32), k, axes)


# Traced once for all selections of one shape; no function of its own in their programs.
@functools.partial(jax.jit, static_argnames="axes", inline=True)
def top_of_keys(key: jax.Array, k: jax.Array, axes: Sequence[int] | None = None) -> jax.Array:
    """Mark the k largest keys of each group.

    The threshold is found digit by digit, by counting. Ties go to the lower row-major index; zeros
    are never marked, so fewer than k may be.

    Args:
      key: int32, fewer than 2^31 in a group; those below 0 count as 0.
      k: int32 scalar, may be traced; of each group.
      axes: a group is what these axes span: all of them (the default) for one group, (-1,) for one
        group a row.

    Returns:
      bool array of the key's shape with min(k, number of positive keys) True in each group.
    """
    axes = tuple(a % key.ndim for a in (range(key.ndim) if axes is None else axes))
    # On CPU a pass over memory is what costs, and XLA spreads only reductions of several operands
    # over the cores.
    return lax.platform_dependent(
        key,
        k,
        cpu=functools.partial(_top_of_keys, axes=axes, bits=3),
        default=functools.partial(_top_of_keys, axes=axes, bits=1),
    )


def in_memory(true: jax.Array, function: Callable[..., jax.Array], *arrays: Any) -> jax.Array:
    """Return what a function makes of arrays; a CPU makes it once and writes it to memory.

    XLA would put it together with what is made of it, and hold the arrays until then. There a
    branch that the compiler cannot decide is what no fusion crosses; a barrier is gone before.

    Args:
      true: bool scalar, True, and the compiler does not know it.
      function: takes the arrays.
    """

    def branch(*arrays):
        made = jax.eval_shape(function, *arrays)
        return lax.cond(true, function, lambda *_: jnp.zeros(made.shape, made.dtype), *arrays)

    return lax.platform_dependent(*arrays, cpu=branch, default=function)


def _top_of_keys(key: jax.Array, k: jax.Array, *, axes: tuple[int, ...], bits: int) -> jax.Array:
    def reached(thresholds):
        return _count([key >= threshold for threshold in thresholds], axes, together=bits > 1)

    groups = tuple(1 if axis in axes else n for axis, n in enumerate(key.shape))
    threshold, above, reach = _search(reached, jnp.broadcast_to(k, groups), bits)
    # Where the positive keys are fewer than k the search ends at 0: all of them are marked, and no
    # zero.
    some = threshold > 0
    ties = jnp.where(some, reach - above, 0)
    needed = jnp.where(some, k - above, 0)

    def marked(key):
        return (key > threshold) | some & lowest(key, threshold, ties, needed, axes, bits)

    # All others may let the keys go.
    return in_memory(jnp.all(k >= 0), marked, key)


def lowest(
    key: jax.Array,
    threshold: jax.Array,
    count: jax.Array,
    needed: jax.Array,
    axes: tuple[int, ...],
    bits: int,
) -> jax.Array:
    """Mark of each group the `needed` keys that equal the threshold at the lowest row-major
    indices.

    Args:
      key: int32.
      threshold, count, needed: int32, the reduced axes kept with size 1; `count` is how many keys
        equal the threshold.
      axes: what spans a group.
      bits: see `_search`.
    """

    def first_left_out(key):
        """Return the largest index from which on enough of them lie to be left out."""
        tied = key == threshold

        def outside(bounds):
            index = row_major_index(key.shape, axes, _zeros(bounds[0]))
            return _count([tied & (index >= bound) for bound in bounds], axes, together=bits > 1)

        return _search(outside, count - needed, bits)[0]

    # Only the bound leaves the branches, so that no mask and no index lies in memory where there is
    # nothing to leave out.
    bound = lax.cond(
        jnp.all(count <= needed), lambda key: jnp.full_like(count, NONE), first_left_out, key
    )
    return (key == threshold) & (row_major_index(key.shape, axes, _zeros(bound)) < bound)


def _zeros(x: jax.Array) -> jax.Array:
    """Return zeros for numbers that are not negative, which the compiler does not know."""
    return x >> 31


def _count(masks: Sequence[jax.Array], axes: tuple[int, ...], together: bool) -> list[jax.Array]:
    """Count the marks of several masks in each group, int32 with the reduced axes kept; together in
    one reduction."""
    if not together:
        return [jnp.sum(mask, axes, dtype=jnp.int32, keepdims=True) for mask in masks]
    ones = tuple(mask.astype(jnp.int32) for mask in masks)
    zeros = (jnp.int32(0),) * len(ones)

    def add(a, b):
        return tuple(x + y for x, y in zip(a, b))

    return [lax.expand_dims(count, axes) for count in lax.reduce(ones, zeros, add, axes)]


def reduce_together(
    sums: Mapping[str, jax.Array],
    largest: Mapping[str, jax.Array],
    smallest: Mapping[str, jax.Array],
    axes: tuple[int, ...] | None = None,
) -> tuple[dict[str, jax.Array], ...]:
    """Reduce arrays of one shape along some axes, or to scalars, in one pass over them on CPU.

    Args:
      sums: bool, to be counted, or int32.
      largest, smallest: int32, of which the largest (0 if there is none) and the smallest (NONE)
        is wanted.
      axes: of them; None for all.

    Returns:
      three dictionaries of int32 scalars, or of arrays of what is left.
    """

    def one_by_one(trees):
        sums, largest, smallest = trees
        return (
            {name: jnp.sum(x, axes, dtype=jnp.int32) for name, x in sums.items()},
            {name: jnp.max(x, axes) for name, x in largest.items()},
            {name: jnp.min(x, axes) for name, x in smallest.items()},
        )

    rules = [lax.add] * len(sums) + [lax.max] * len(largest) + [lax.min] * len(smallest)
    starts = [0] * (len(sums) + len(largest)) + [NONE] * len(smallest)

    def combine(a, b):
        return tuple(rule(x, y) for rule, x, y in zip(rules, a, b))

    def together(trees):
        sums, largest, smallest = trees
        ones = {name: x.astype(jnp.int32) for name, x in sums.items()}
        arrays, tree = jax.tree.flatten((ones, largest, smallest))  # in the order of `rules`
        over = tuple(range(arrays[0].ndim)) if axes is None else axes
        reduced = lax.reduce(tuple(arrays), tuple(map(jnp.int32, starts)), combine, over)
        return jax.tree.unflatten(tree, reduced)

    return lax.platform_dependent(
        (dict(sums), dict(largest), dict(smallest)), cpu=together, default=one_by_one
    )


def _search(
    reached: Callable[[list[jax.Array]], list[jax.Array]], k: jax.Array, bits: int
) -> tuple[jax.Array, ...]:
    """Find the largest threshold in [0, 2^31) that at least k things reach.

    Args:
      reached: counts for several thresholds at once how many things reach each, int32 of k's shape.
      k: int32; may be 0, which every threshold has.
      bits: of the threshold that are found at a time, from 2^bits - 1 counts.

    Returns:
      (threshold, how many reach the number above it, how many reach it; the last is k at least, and
      not to be used where the threshold is 0).
    """

    def digit(state, shift, width):
        low, above, at = state
        counts = reached([low | jnp.int32(j) << shift for j in range(1, 1 << width)])
        chosen = sum((n >= k).astype(jnp.int32) for n in counts)
        for j, n in enumerate(counts, 1):
            at = jnp.where(chosen == j, n, at)
            above = jnp.where(chosen == j - 1, n, above)
        return low + (chosen << shift), above, at

    state = (jnp.zeros_like(k),) * 3
    state = lax.fori_loop(
        0, 31 // bits - 1, lambda i, state: digit(state, 31 - bits * (i + 1), bits), state
    )
    return digit(state, 0, bits + 31 % bits)  # 31 bits may be no multiple: the last digit has more


def share_out(count_at: Callable[[int], Sequence[int]], k: int) -> list[int]:
    """Return how many of the k largest keys of several tensors lie in each of them.

    Ties go to the earlier tensor. A tensor's top set by that count is then its part of the top set
    of all, with ties within it going to the lower index. The counts are Python's whole numbers, so
    their sums may exceed 2^31.

    Args:
      count_at: returns how many keys of each tensor are at least the given threshold in [1, 2^31).
      k: zeros are never selected, so fewer may be shared out.
    """
    positive = count_at(1)
    k = min(k, sum(positive))
    if not k:
        return [0] * len(positive)
    threshold = threshold_of(count_at, k)
    above, reached = count_at(threshold + 1), count_at(threshold)
    remaining, shares = k - sum(above), []
    for more, at_least in zip(above, reached):
        ties = min(remaining, at_least - more)
        remaining -= ties
        shares.append(more + ties)
    return shares


def threshold_of(count_at: Callable[[int], Sequence[int]], k: int) -> int:
    """Return the largest threshold that at least k keys of all tensors reach; see `share_out`."""
    threshold = 0
    for bit in range(30, -1, -1):
        if sum(count_at(threshold | 1 << bit)) >= k:
            threshold |= 1 << bit
    return threshold
