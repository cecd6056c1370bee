"""What the entries of a patch are ranked by, one row each in `IMPORTANCES`.

Settings, flags, the patch program and reports read the rows, so this module needs no JAX until an
importance is computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import jax


class Entries(NamedTuple):
    """A tensor, or a run of its entries, as an importance sees it: float32 arrays of one shape.

    Attributes:
      patch: derived model - backbone.
      derived: the derived model.
      sensitivity: sum of |gradient|; None for importances that need none.
      random_bits: returns uint32 bits that depend on seed, patch role, HF tensor name and position
        alone.
    """

    patch: jax.Array
    derived: jax.Array
    sensitivity: jax.Array | None
    random_bits: Callable[[], jax.Array]


@dataclasses.dataclass(frozen=True)
class Importance:
    """A row of `IMPORTANCES`.

    Attributes:
      name: patch.importance.
      function: returns float32 >= 0, not finite where the patch is not.
      help: in a few words, for --help.
      without_snip: in reports, of an importance that needs no sensitivity; '' if it is SNIP's.
    """

    name: str
    function: Callable[[Entries], jax.Array]
    help: str
    without_snip: str = ""

    @property
    def needs_sensitivity(self) -> bool:
        """Whether it is SNIP's."""
        return not self.without_snip


def delta(entries: Entries) -> jax.Array:
    """SNIP's |W| * sensitivity with W the patch entry."""
    return abs(entries.patch) * entries.sensitivity


def weight(entries: Entries) -> jax.Array:
    """SNIP's |W| * sensitivity with W the derived model's weight."""
    return abs(entries.derived) * entries.sensitivity


def magnitude(entries: Entries) -> jax.Array:
    """|patch|."""
    return abs(entries.patch)


def random(entries: Entries) -> jax.Array:
    """Uniform in (0, 1] in steps of 2^-24, but 0 where the patch is."""
    import jax.numpy as jnp  # here: settings and --help read this module and start without JAX

    patch = entries.patch
    uniform = ((entries.random_bits() >> 8) + 1).astype(jnp.float32) * jnp.float32(2.0**-24)
    return jnp.where((patch != 0) & jnp.isfinite(patch), uniform, abs(patch))


IMPORTANCES = {
    importance.name: importance
    for importance in (
        Importance("delta", delta, "SNIP with W the patch entry itself"),
        Importance("weight", weight, "SNIP with W the derived model's weight"),
        Importance("magnitude", magnitude, "the entry's magnitude", "by magnitude (no SNIP)"),
        Importance("random", random, "random numbers", "at random (no SNIP)"),
    )
}
