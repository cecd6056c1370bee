"""Random retention (METHOD 3e) with bits that depend on the tensor and the position alone."""

from __future__ import annotations

from typing import Mapping

import jax
import jax.numpy as jnp
from jax import lax

from safepatch_jax.numerics import random_bits
from safepatch_jax.patching.selection import ROLES, top_of_keys


def retained(key: jax.Array, shape: tuple[int, ...], retention: jax.Array) -> jax.Array:
    """Draw Bernoulli(p) for each entry of a tensor in the HF layout.

    Args:
      key: uint32 [2], see `tensor_keys`.
      shape: shape of the tensor.
      retention: p in (0, 1], float32 scalar; p = 1 keeps everything.
    """
    threshold = (retention * jnp.float32(2.0**24)).astype(jnp.uint32)  # exact for p in steps of 2^-24
    return (random_bits(key, shape) >> 8) < threshold


def filled(key: jax.Array, candidates: Mapping[str, jax.Array], top: Mapping[str, jax.Array],
           patch: Mapping[str, jax.Array], quota: jax.Array) -> dict[str, jax.Array]:
    """Keep every candidate, and random other entries of the tensor up to a number in all (support 'fill').

    [choice] The number is exact, as "a fraction p in all" names a size. The others of both patches lie outside both top
    sets, which were left out or taken on purpose. A coin (one random bit) offers each such entry to one patch alone, so
    where the candidates are disjoint the supports are too; at p above about one half a patch may therefore run out of
    offered entries and stay below p. Entries whose patch is zero need no keeping and are not counted. Of the offered
    entries those with the largest random numbers are taken, ties to the lower row-major index.

    Args:
      key: uint32 [2], see `tensor_keys`.
      candidates, top: {'se', 'osm'}: bool, the tensor's shape; see `combine_sets`.
      patch: {'se', 'osm'}: float32.
      quota: int32 scalar, floor(p * size): kept entries of each patch; where the candidates are more, no others are added.
    """
    bits = random_bits(key, patch["se"].shape)
    order = lax.bitcast_convert_type(bits >> 1 | 1, jnp.int32)  # 30 random bits, positive
    free = ~(top["se"] | top["osm"])
    kept = {}
    for side, role in enumerate(ROLES):
        offered = free & (bits & 1 == side) & (patch[role] != 0)
        room = jnp.maximum(quota - jnp.sum(candidates[role], dtype=jnp.int32), 0)
        kept[role] = candidates[role] | top_of_keys(jnp.where(offered, order, 0), room)
    return kept
