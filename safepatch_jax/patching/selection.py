"""Exact top-k by counting (METHOD 3c, 4.4): no sort, no gather; only counts cross devices."""

from __future__ import annotations

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
from jax import lax


def top_count(rate: float, size: int) -> int:
    """Return floor(rate * size), exact in the decimal digits of `rate` (0.29 * 100 is 29, not 28)."""
    return math.floor(Fraction(repr(float(rate))) * size)


def top_mask(score: jax.Array, k: jax.Array) -> jax.Array:
    """Mark the k largest entries.

    Scores are non-negative, so their bit patterns order as integers: the threshold is found bit by bit by counting.
    Ties go to the lower row-major index; zeros are never marked, so fewer than k may be.

    Args:
      score: float32, finite, >= 0, fewer than 2^31 elements.
      k: int32 scalar, may be traced.

    Returns:
      bool array of the score's shape with min(k, number of positive scores) True.
    """
    key = lax.bitcast_convert_type(score, jnp.int32)  # sign bit is clear
    count = lambda mask: jnp.sum(mask, dtype=jnp.int32)
    k = jnp.minimum(k, count(key > 0))
    threshold = _largest(lambda t: count(key >= t) >= k)
    tied = key == threshold
    needed = k - count(key > threshold)

    def lowest_ties(_):
        index = jnp.arange(score.size, dtype=jnp.int32).reshape(score.shape)
        last = _largest(lambda i: count(tied & (index < i)) < needed)
        return tied & (index <= last) & (needed > 0)

    kept_ties = lax.cond(count(tied) == needed, lambda _: tied, lowest_ties, None)
    return (key > threshold) | kept_ties


def _largest(holds) -> jax.Array:
    """Return the largest x in [0, 2^31) with holds(x), for a predicate that is true up to some x and false above."""
    def try_bit(i, low):
        candidate = low | (jnp.int32(1) << (30 - i))
        return jnp.where(holds(candidate), candidate, low)

    return lax.fori_loop(0, 31, try_bit, jnp.int32(0))


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
