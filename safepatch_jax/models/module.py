"""What all modules of the decoder are made of: weights by the parameter table, products, norms.

Dimension key: see `decoder`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from safepatch_jax.mesh import Sharder
from safepatch_jax.models.config import DecoderConfig
from safepatch_jax.models.table import Param, param_table

_FEW = 64  # sequences


class Module(nn.Module):
    """A module whose parameters are the table's rows below its own path."""

    config: DecoderConfig
    dtype: Any
    sharder: Sharder | None
    tap: Callable[[jax.Array, Param], jax.Array] | None = None

    def weight(self, name: str) -> jax.Array:
        """Return a parameter in the arithmetic's dtype, sharded as it is stored."""
        row = param_table(self.config)["/".join((*self.path, name))]
        weight = self.param(name, row.layer_initializer(), row.layer_shape, jnp.float32)
        if self.tap is not None and row.stacked:
            weight = self.tap(weight, row)
        # Constrained after the cast, so that a mesh gathers the fewer bytes of the narrower dtype.
        return self.constrain(weight.astype(self.dtype), *row.layer_axes)

    def constrain(self, x, *axes):
        return x if self.sharder is None else self.sharder.constrain(x, *axes)

    @property
    def platform(self) -> str:
        return jax.default_backend() if self.sharder is None else self.sharder.platform

    def product(self, equation, x, weight, dtype=None):
        """Return jnp.einsum(equation, x [B, T, ...], weight ), over the last dimensions of
        both."""
        if self.platform != "cpu":
            return jnp.einsum(equation, x, weight, preferred_element_type=dtype)
        # As a product of two matrices. XLA on CPU transposes a weight with two dimensions to sum
        # over, and for a weight's gradient, which sums over batch and length, all that led to it.
        rows, length = x.shape[:2]
        x_MK = x.reshape(rows * length, -1)
        weight_OK = weight.reshape(-1, x_MK.shape[1])
        if length == 1 and 1 < rows <= _FEW:
            # One token of each sequence: up to twice as fast with the large factor first. The
            # barrier keeps XLA from turning the product round again.
            y_OM = jnp.einsum("OK,MK->OM", weight_OK, x_MK, preferred_element_type=dtype)
            y_MO = jax.lax.optimization_barrier(y_OM).T
        else:
            y_MO = jnp.einsum("MK,OK->MO", x_MK, weight_OK, preferred_element_type=dtype)
        return y_MO.reshape(rows, length, *weight.shape[: weight.ndim + 2 - x.ndim])

    def child(self, kind, name, *attributes):
        attributes = self.config, self.dtype, self.sharder, self.tap, *attributes
        return kind(*attributes, name=name)


class RMSNorm(Module):
    """Root-mean-square norm over the last `dimensions` of its input, as many as its weight has."""

    dimensions: int = 1

    @nn.compact
    def __call__(self, x_BTD):
        x32_BTD = x_BTD.astype(jnp.float32)
        over = tuple(range(-self.dimensions, 0))
        mean_square_BT1 = jnp.mean(jnp.square(x32_BTD), axis=over, keepdims=True)
        normed_BTD = x32_BTD * jax.lax.rsqrt(mean_square_BT1 + self.config.norm_eps)
        scale_D = self.weight("scale")
        if self.config.norm_offset:  # added and multiplied in float32, before the cast
            return (normed_BTD * (1.0 + scale_D.astype(jnp.float32))).astype(self.dtype)
        if self.config.norm_float32:
            return (normed_BTD * scale_D.astype(jnp.float32)).astype(self.dtype)
        return scale_D * normed_BTD.astype(self.dtype)


def capped(x: jax.Array, cap: float) -> jax.Array:
    """Return x drawn smoothly into -cap .. cap; a cap of 0 is none."""
    return jnp.tanh(x / cap) * cap if cap else x


def times(x: jax.Array, factor: float) -> jax.Array:
    """Multiply as torch multiplies by a number: in float32, rounded once, whatever the dtype."""
    return (x.astype(jnp.float32) * factor).astype(x.dtype)
