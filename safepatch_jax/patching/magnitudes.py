"""Sums of magnitudes in the place of gradients: of samples along a vmapped axis."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from safepatch_jax.mesh import Sharder
from safepatch_jax.models.table import Param
from safepatch_jax.numerics import flushed

SAMPLES = "samples"  # the vmapped axis


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def sum_of_magnitudes(weight: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Return the weight; its gradient is the sum over samples, the vmapped axis, of the magnitudes
    of theirs.

    The magnitude comes before any sum over samples, on one device or between devices. Within a scan
    over layers one layer's gradients of the samples in flight exist at once.
    """
    return weight


sum_of_magnitudes.defvjp(
    lambda weight, sharding: (weight, None),
    lambda sharding, _, gradient: (
        lax.with_sharding_constraint(lax.psum(flushed(jnp.abs(gradient)), SAMPLES), sharding),
    ),
)


@dataclasses.dataclass(frozen=True)
class Magnitudes:
    """`sum_of_magnitudes` as the decoder's tap."""

    sharder: Sharder

    def __call__(self, weight: jax.Array, row: Param) -> jax.Array:
        return sum_of_magnitudes(weight, self.sharder.sharding(row.layer_axes))
