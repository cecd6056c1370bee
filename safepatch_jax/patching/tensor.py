"""One HF tensor as a merging method sees it, and what the method decides about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from safepatch_jax.numerics import bernoulli, random_bits
from safepatch_jax.patching.selection import ROLES, float_bits, top_count, top_of_keys
from safepatch_jax.settings import PatchSettings

TRIMMED = ("ties",)  # their top sets are by magnitude, at patch.density
UNTRIMMED = ("average", "task_arithmetic", "dare", "dare_ties", "resta")  # they have no top sets
UNSCORED = ("magnitude", "random")  # importances that need no sensitivity
DROPPED = ("dare", "dare_ties", "resta")  # they always divide what they keep by patch.retention


class Method(NamedTuple):
    """The options of the patch operation that decide which program is compiled.

    A global top set reaches the program as a count for each matrix, see `share_out`, so `by_row` is
    what is left of patch.granularity.
    """

    merge: str
    importance: str
    by_row: bool
    combine: str
    support: str

    @classmethod
    def of(cls, patch: PatchSettings) -> Method:
        own = patch.merge == "safepatching"
        return cls(
            patch.merge,
            patch.importance if own else "magnitude",
            patch.granularity == "row",
            patch.combine,
            patch.support,
        )


@dataclasses.dataclass(frozen=True)
class Knobs:
    """The options that are traced scalars, so that a change of value compiles nothing."""

    retention: float
    quota: int
    alpha: float
    beta: float

    @classmethod
    def of(cls, patch: PatchSettings, size: int) -> Knobs:
        divided = patch.rescale if patch.merge == "safepatching" else patch.merge in DROPPED
        scale = 1.0 / patch.retention if divided else 1.0
        return cls(
            patch.retention,
            top_count(patch.retention, size),
            patch.alpha * scale,
            patch.beta * scale,
        )

    def traced(self) -> dict[str, Any]:
        return {
            "retention": np.float32(self.retention),
            "quota": np.int32(self.quota),
            "alpha": np.float32(self.alpha),
            "beta": np.float32(self.beta),
            "zero": np.int32(0),
        }


def top_rates(patch: PatchSettings) -> dict[str, float]:
    """Return the share of entries in each patch's top set."""
    if patch.merge in UNTRIMMED:
        return dict.fromkeys(ROLES, 1.0)
    if patch.merge in TRIMMED:
        return dict.fromkeys(ROLES, patch.density)
    return {"se": patch.top_rate_se, "osm": patch.top_rate_osm}


@dataclasses.dataclass(frozen=True)
class Layer:
    """One HF tensor within the compiled program; dictionaries are by role.

    Attributes:
      patch: derived model - backbone, float32.
      score: importance, float32, >= 0.
      keys: uint32 [2] by role, and for 'fill', 'rounding', 'top_se' and 'top_osm'.
      counts: int32 scalars, sizes of the top sets (of each row where method.by_row).
      knobs: see `Knobs.traced`.
      method: static options.
    """

    patch: Mapping[str, jax.Array]
    score: Mapping[str, jax.Array]
    keys: Mapping[str, jax.Array]
    counts: Mapping[str, jax.Array]
    knobs: Mapping[str, jax.Array]
    method: Method

    def top_sets(self) -> dict[str, jax.Array]:
        axes = (-1,) if self.method.by_row else None
        return {
            role: self.select(role, float_bits(self.score[role]), self.counts[role], axes=axes)
            for role in ROLES
        }

    def select(
        self,
        name: str,
        key: jax.Array,
        number: jax.Array,
        taken: jax.Array | None = None,
        axes: tuple[int, ...] | None = None,
    ) -> jax.Array:
        """Mark the entries with the largest keys.

        Args:
          name: of this selection; one of a kind within a method.
          key, axes: see `top_of_keys`.
          number: int32 scalar, how many.
          taken: marks that count towards the number.
        """
        del name
        if taken is not None:
            number = jnp.maximum(number - jnp.sum(taken, dtype=jnp.int32), 0)
        return top_of_keys(key, number, axes)

    def bits(self, user: str) -> jax.Array:
        """Return the random bits of one user of `keys`, uint32, of the patch's shape."""
        return random_bits(self.keys[user], self.patch["se"].shape)

    def nonzero(self) -> dict[str, jax.Array]:
        return {role: self.patch[role] != 0 for role in ROLES}

    def dropped(self, masks: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Keep each entry of the masks with probability p, independently for each role."""
        return {
            role: mask & bernoulli(self.bits(role), self.knobs["retention"])
            for role, mask in masks.items()
        }

    def weights(self) -> dict[str, jax.Array]:
        return {"se": self.knobs["alpha"], "osm": self.knobs["beta"]}


class Choice(NamedTuple):
    """A method's decision: theta + sum over roles of weight * patch[kept].

    Attributes:
      top: {role: bool}: entries that the method considers before it combines or drops any.
      kept: {role: bool}: entries whose patch is added.
      weight: {role: float32 scalar or array}.
    """

    top: Mapping[str, jax.Array]
    kept: Mapping[str, jax.Array]
    weight: Mapping[str, jax.Array]


def importance(
    patch: jax.Array,
    derived: jax.Array,
    sensitivity: jax.Array | None,
    kind: str,
    key: jax.Array | None = None,
    start: jax.Array | int = 0,
) -> jax.Array:
    """Return the scores of a tensor, or of a run of its entries; float32, >= 0, not finite where
    the patch is not.

    Args:
      patch, derived, sensitivity: float32, of one shape; the last may be None for the kinds in
        `UNSCORED`.
      kind: SNIP's |W| * sensitivity with W the patch entry ('delta') or the derived weight
        ('weight'); |patch| ('magnitude'); or uniform in (0, 1] in steps of 2^-24, but 0 where the
        patch is ('random').
      key, start: of the random bits, see `random_bits`; used by 'random' alone.
    """
    if kind == "random":
        drawn = ((random_bits(key, patch.shape, start) >> 8) + 1).astype(jnp.float32) * jnp.float32(
            2.0**-24
        )
        return jnp.where((patch != 0) & jnp.isfinite(patch), drawn, jnp.abs(patch))
    if kind == "magnitude":
        return jnp.abs(patch)
    return jnp.abs(patch if kind == "delta" else derived) * sensitivity


def rounded(product: jax.Array, zero: jax.Array) -> jax.Array:
    """Round a product to float32 before it is added: a zero that the compiler does not know keeps
    it from fusing
    product and sum to one FMA, which some machines would do and others not."""
    return lax.bitcast_convert_type(
        lax.bitcast_convert_type(product, jnp.int32) ^ zero, jnp.float32
    )
