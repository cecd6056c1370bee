"""Exact top-k by counting (METHOD 3c, 4.4): no sort, no gather; only counts cross devices."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

ROLES = ("se", "osm")
PASSES = 34  # counts that `share_out` asks for, at most


def top_count(rate: float, size: int) -> int:
    """Return floor(rate * size), exact in the decimal digits of `rate` (0.29 * 100 is 29, not 28)."""
    return math.floor(Fraction(repr(float(rate))) * size)


def float_bits(x: jax.Array) -> jax.Array:
    """Return |x| of a float32 as int32: bits without a sign order as the numbers do."""
    return lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF


def top_mask(score: jax.Array, k: jax.Array, axes: Sequence[int] | None = None) -> jax.Array:
    """Mark the k largest scores (float32, finite, >= 0); see `top_of_keys`."""
    return top_of_keys(float_bits(score), k, axes)


def top_of_keys(key: jax.Array, k: jax.Array, axes: Sequence[int] | None = None) -> jax.Array:
    """Mark the k largest keys of each group.

    The threshold is found bit by bit, by counting. Ties go to the lower row-major index; zeros are never marked, so
    fewer than k may be.

    Args:
      key: int32, >= 0, fewer than 2^31 in a group.
      k: int32 scalar, may be traced; of each group.
      axes: a group is what these axes span: all of them (the default) for one group, (-1,) for one group a row.

    Returns:
      bool array of the key's shape with min(k, number of positive keys) True in each group.
    """
    axes = tuple(a % key.ndim for a in (range(key.ndim) if axes is None else axes))
    count = lambda mask: jnp.sum(mask, axes, dtype=jnp.int32, keepdims=True)
    k = jnp.minimum(k, count(key > 0))
    threshold = _largest(lambda t: count(key >= t) >= k, k)
    tied = key == threshold
    needed = k - count(key > threshold)

    def lowest_ties(_):
        index = _row_major_index(key.shape, axes)
        last = _largest(lambda i: count(tied & (index < i)) < needed, k)
        return tied & (index <= last) & (needed > 0)

    kept_ties = lax.cond(jnp.all(count(tied) == needed), lambda _: tied, lowest_ties, None)
    return (key > threshold) | kept_ties


def _largest(holds, like: jax.Array) -> jax.Array:
    """Return the largest x in [0, 2^31), shaped as `like`, with holds(x): true up to some x and false above."""
    def try_bit(i, low):
        candidate = low | (jnp.int32(1) << (30 - i))
        return jnp.where(holds(candidate), candidate, low)

    return lax.fori_loop(0, 31, try_bit, jnp.zeros_like(like))


def _row_major_index(shape: tuple[int, ...], axes: Sequence[int]) -> jax.Array:
    """Return each entry's row-major index within its group, int32."""
    index, stride = jnp.zeros(shape, jnp.int32), 1
    for axis in sorted(axes, reverse=True):
        index += stride * lax.broadcasted_iota(jnp.int32, shape, axis)
        stride *= shape[axis]
    return index


def share_out(count_at: Callable[[int], Sequence[int]], k: int) -> list[int]:
    """Return how many of the k largest keys of several tensors lie in each of them.

    Ties go to the earlier tensor. A tensor's top set by that count is then its part of the top set of all, with ties
    within it going to the lower index. The counts are Python's whole numbers, so their sums may exceed 2^31.

    Args:
      count_at: returns how many keys of each tensor are at least the given threshold in [1, 2^31).
      k: zeros are never selected, so fewer may be shared out.
    """
    positive = count_at(1)
    if not (k := min(k, sum(positive))):
        return [0] * len(positive)
    threshold = 0
    for bit in range(30, -1, -1):
        if sum(count_at(threshold | 1 << bit)) >= k:
            threshold |= 1 << bit
    above, reached = count_at(threshold + 1), count_at(threshold)
    left, shares = k - sum(above), []
    for more, at_least in zip(above, reached):
        ties = min(left, at_least - more)
        left -= ties
        shares.append(more + ties)
    return shares


def combine_sets(se: jax.Array, osm: jax.Array, combine: str) -> tuple[jax.Array, jax.Array]:
    """Return the candidate sets (SE, OSM) from the two top sets (METHOD 3d).

    difference: what only one of them holds; intersection: what both hold, for both; union: each its own top set.
    """
    if combine == "difference":
        return se & ~osm, osm & ~se
    if combine == "intersection":
        return se & osm, se & osm
    if combine == "union":
        return se, osm
    raise ValueError(f"unknown combine '{combine}'; one of difference, intersection, union.")
