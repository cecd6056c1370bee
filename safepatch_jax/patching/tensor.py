"""One HF tensor within the compiled patch program: what a merging method may ask of it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from safepatch_jax.numerics import bernoulli, flushed, random_bits
from safepatch_jax.patching import PATCH_ROLES
from safepatch_jax.patching.importances import IMPORTANCES, Entries
from safepatch_jax.patching.selection import float_bits, top_of_keys


class ProgramOptions(NamedTuple):
    """The options of the patch operation that decide which program is compiled.

    A global top set reaches the program as a count for each matrix, see `share_out`, so of
    patch.granularity only `by_row` matters.
    """

    merge: str
    importance: str
    by_row: bool
    support: str


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One HF tensor within the compiled program; dictionaries are by role.

    Its entries are in the tensor's row-major order. The last axis holds its rows where
    `options.by_row`; else the shape may be any.

    Attributes:
      patch: derived model - backbone, float32.
      importance: what entries are ranked by, float32, >= 0.
      keys: uint32 [2] by role, and for 'fill', 'rounding', 'top_se' and 'top_osm'.
      counts: int32 scalars, sizes of the top sets (of each row where options.by_row).
      knobs: see `Knobs.traced`.
      options: static.
    """

    patch: Mapping[str, jax.Array]
    importance: Mapping[str, jax.Array]
    keys: Mapping[str, jax.Array]
    counts: Mapping[str, jax.Array]
    knobs: Mapping[str, jax.Array]
    options: ProgramOptions

    def weights(self) -> dict[str, jax.Array]:
        """Return alpha and beta, divided by the retention where the method says so."""
        return {"se": self.knobs["alpha"], "osm": self.knobs["beta"]}

    def combined(self) -> tuple[jax.Array, jax.Array]:
        """Return patch.combine as `combine_sets` takes it."""
        return self.knobs["alone"], self.knobs["shared"]

    def nonzero(self) -> dict[str, jax.Array]:
        """Mark every entry of a patch that changes something."""
        return {role: self.patch[role] != 0 for role in PATCH_ROLES}

    def no_entries(self) -> jax.Array:
        """Return the empty set."""
        return jnp.zeros(self.patch["se"].shape, bool)

    def top_sets(self) -> dict[str, jax.Array]:
        """Mark the most important entries of each patch."""
        axes = (-1,) if self.options.by_row else None
        result = {}
        for role in PATCH_ROLES:
            result[role] = self.select(
                role, self.ranked(role, result), self.counts[role], axes=axes
            )
        return result

    def ranked(self, role: str, before: Mapping[str, jax.Array]) -> jax.Array:
        """Return the keys by which `top_sets` ranks entries, see `top_of_keys`; `before` are the
        top sets that are marked already."""
        del before
        return float_bits(self.importance[role])

    def select(
        self,
        name: str,
        key: jax.Array,
        number: jax.Array,
        included: jax.Array | None = None,
        axes: tuple[int, ...] | None = None,
    ) -> jax.Array:
        """Mark the entries with the largest keys.

        Args:
          name: of this selection; one of a kind within a method.
          key, axes: see `top_of_keys`.
          number: int32 scalar, how many.
          included: marks that count towards the number.
        """
        del name  # what reads a tensor in pieces tells selections apart by it
        if included is not None:
            number = jnp.maximum(number - jnp.sum(included, dtype=jnp.int32), 0)
        return top_of_keys(key, number, axes)

    def retained(self, masks: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Keep each entry of the masks with probability p, independently for each role."""
        result = {}
        for role, mask in masks.items():
            result[role] = mask & self.coin(role)
        return result

    def coin(self, role: str) -> jax.Array:
        """Return whether each entry is retained, bool, drawn anew for each role."""
        return bernoulli(self.bits(role), self.knobs["retention"])

    def filled(
        self, candidates: Mapping[str, jax.Array], top: Mapping[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """Keep every candidate, and random other entries up to a number in all (support 'fill').

        [choice] The number is exact, as "a fraction p in all" names a size: the knob `quota`,
        floor(p * size), for each patch; where the candidates are more, no others are added. The
        others of both patches lie outside both top sets, which were left out or kept on purpose. A
        coin (one random bit) offers each such entry to one patch alone, so where the candidates are
        disjoint the supports are too; at p above about one half a patch may therefore run out of
        offered entries and stay below p. Entries whose patch is zero need no keeping and are not
        counted. Of the offered entries those with the largest random numbers are kept, ties to the
        lower row-major index.

        Args:
          candidates, top: {role: bool}, the tensor's shape; see `combine_sets`.
        """
        bits = self.bits("fill")
        order = lax.bitcast_convert_type(bits >> 1 | 1, jnp.int32)  # 30 random bits, positive
        free = ~(top["se"] | top["osm"])
        kept = {}
        for side, role in enumerate(PATCH_ROLES):
            offered = free & (bits & 1 == side) & (self.patch[role] != 0)
            others = self.select(
                f"fill_{role}", jnp.where(offered, order, 0), self.knobs["quota"], candidates[role]
            )
            kept[role] = candidates[role] | others
        return kept

    def elected(
        self, kept: Mapping[str, jax.Array]
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Return (kept, weight) after TIES' election of a sign for each entry.

        The elected sign is that of the sum of both weighted patches; entries of the other sign are
        not kept, and where the two cancel exactly none is. The mean is over the patches that are
        kept at an entry.
        """
        weights, votes, agree = self.weights(), {}, {}
        for role in kept:
            votes[role] = jnp.where(kept[role], self.weighted(role, weights[role]), 0.0)
        sign = jnp.sign(flushed(votes["se"] + votes["osm"]))
        for role, vote in votes.items():
            agree[role] = (vote != 0) & (jnp.sign(vote) == sign)
        share = jnp.where(agree["se"] & agree["osm"], jnp.float32(0.5), jnp.float32(1))
        return agree, {role: share * weights[role] for role in kept}

    def weighted(self, role: str, weight: jax.Array | float) -> jax.Array:
        """Return weight * patch, rounded to float32 before anything is added to it.

        The exclusive or with a zero that the compiler does not know keeps it from fusing product
        and sum to one FMA, which some machines would do and others not.
        """
        product = lax.bitcast_convert_type(flushed(weight * self.patch[role]), jnp.int32)
        return lax.bitcast_convert_type(product ^ self.knobs["zero"], jnp.float32)

    def bits(self, user: str) -> jax.Array:
        """Return the random bits of one user of `keys`, uint32, of the patch's shape."""
        return random_bits(self.keys[user], self.patch["se"].shape)


def importance_of(
    patch: jax.Array,
    derived: jax.Array,
    sensitivity: jax.Array | None,
    kind: str,
    key: jax.Array | None = None,
    start: jax.Array | int = 0,
) -> jax.Array:
    """Return the importance of a tensor's entries, or of a run of them; float32, >= 0, not finite
    where the patch is not. Scores below the smallest normal number are 0, on every platform.

    Args:
      patch, derived, sensitivity: see `Entries`.
      kind: a name in `IMPORTANCES`.
      key, start: of the random bits, see `random_bits`; for importances that draw some.
    """
    bits = functools.partial(random_bits, key, patch.shape, start)
    if sensitivity is not None:
        sensitivity = flushed(sensitivity)
    return flushed(IMPORTANCES[kind].function(Entries(patch, derived, sensitivity, bits)))
