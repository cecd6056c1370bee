"""Weights as a quantised server has them: quantised to nearest and dequantised, on the mesh.

A row of a matrix [out, in] is cut into groups of columns, the last of which may be shorter; a group
shares a float32 scale. Symmetric: scale = largest magnitude / (2^(bits-1) - 1), code =
round(weight / scale). Asymmetric: scale = (largest - least) / (2^bits - 1) with 0 in that range,
zero = round(-least / scale), code = round(weight / scale) + zero. Halves are rounded to even. A
weight becomes (code - zero) * scale, float32; groups of zeros stay zeros.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from safepatch_jax.models.table import Param, ParamTable
from safepatch_jax.studies.durability.options import Scheme

_MATRICES = ("linear", "head")  # kinds of parameters


def quantised_rows(table: ParamTable, scope: str) -> list[Param]:
    """Return the matrices that quantisation takes: those of a patch scope (see SCOPES) but for
    embeddings, norms and biases, which are kept."""
    return [row for row in table.scope(scope) if row.kind in _MATRICES]


def dequantised(row: Param, x: jax.Array, scheme: Scheme) -> jax.Array:
    """Return a parameter quantised and dequantised, float32, in its own shape.

    Args:
      row: its declaration.
      x: any float dtype.
    """
    top = 2 ** (scheme.bits - 1) - 1 if scheme.symmetric else 2**scheme.bits - 1
    x_LOI = row.as_matrices(x)
    # Two programs: within one a compiler turns x * (m / top) into x * m / top, which rounds
    # otherwise. For the same reason the constant is an argument.
    scale, low = _ranges(x_LOI, jnp.float32(top), scheme)
    return _of_layers(x_LOI, scale, low, jnp.int32(top), scheme).reshape(row.shape)


@functools.partial(jax.jit, static_argnames="scheme")
def _ranges(x_LOI: jax.Array, top: jax.Array, scheme: Scheme) -> tuple[jax.Array, jax.Array]:
    """Return scale and least weight of each group, [L, O, G, 1]."""

    def of_layer(x_OI):
        x_OGC = _grouped(x_OI.astype(jnp.float32), scheme.group)
        low = jnp.minimum(jnp.min(x_OGC, axis=-1, keepdims=True), 0.0)
        high = jnp.maximum(jnp.max(x_OGC, axis=-1, keepdims=True), 0.0)
        width = jnp.maximum(high, -low) if scheme.symmetric else high - low
        return width / top, low

    return jax.lax.map(of_layer, x_LOI)  # one by one: float32 beside the stored dtype is large


@functools.partial(jax.jit, static_argnames="scheme")
def _of_layers(
    x_LOI: jax.Array, scale: jax.Array, low: jax.Array, top: jax.Array, scheme: Scheme
) -> jax.Array:
    def of_layer(layer):
        x_OI, scale, low = layer
        divisor = jnp.where(scale > 0, scale, 1.0)
        codes = jnp.round(_grouped(x_OI.astype(jnp.float32), scheme.group) / divisor)
        codes = codes.astype(jnp.int32)  # which have no -0
        if not scheme.symmetric:
            zero = jnp.round(-low / divisor).astype(jnp.int32)
            codes = jnp.clip(codes + zero, 0, top) - zero
        weights_OGC = codes.astype(jnp.float32) * scale
        return weights_OGC.reshape(x_OI.shape[0], -1)[:, : x_OI.shape[1]]

    return jax.lax.map(of_layer, (x_LOI, scale, low))


def _grouped(x_OI: jax.Array, group: int) -> jax.Array:
    """Cut rows into groups [out, groups, columns]; the last is filled with zeros, which move no
    range."""
    out, columns = x_OI.shape
    size = min(group, columns) if group else columns
    number = math.ceil(columns / size)
    return jnp.pad(x_OI, ((0, 0), (0, number * size - columns))).reshape(out, number, size)
