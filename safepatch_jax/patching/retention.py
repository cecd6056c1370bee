"""Support 'fill': every candidate is kept, and random other entries beside."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

from safepatch_jax.patching.selection import ROLES
from safepatch_jax.patching.tensor import Layer


def filled(
    layer: Layer, candidates: Mapping[str, jax.Array], top: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """Keep every candidate, and random other entries of the tensor up to a number in all (support
    'fill').

    [choice] The number is exact, as "a fraction p in all" names a size. The others of both patches
    lie outside both top sets, which were left out or taken on purpose. A coin (one random bit)
    offers each such entry to one patch alone, so where the candidates are disjoint the supports are
    too; at p above about one half a patch may therefore run out of offered entries and stay below
    p. Entries whose patch is zero need no keeping and are not counted. Of the offered entries those
    with the largest random numbers are taken, ties to the lower row-major index.

    Args:
      layer: its knob `quota`, floor(p * size), is the number of kept entries of each patch; where
        the candidates are more, no others are added.
      candidates, top: {'se', 'osm'}: bool, the tensor's shape; see `combine_sets`.
    """
    bits = layer.bits("fill")
    order = lax.bitcast_convert_type(bits >> 1 | 1, jnp.int32)  # 30 random bits, positive
    free = ~(top["se"] | top["osm"])
    kept = {}
    for side, role in enumerate(ROLES):
        offered = free & (bits & 1 == side) & (layer.patch[role] != 0)
        kept[role] = candidates[role] | layer.select(
            f"fill_{role}", jnp.where(offered, order, 0), layer.knobs["quota"], candidates[role]
        )
    return kept
