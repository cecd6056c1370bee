"""Weights as a quantised server has them: quantised to nearest and dequantised, on the mesh.

A row of a matrix [out, in] is cut into groups of columns, the last of which may be shorter; a group
shares a float32 scale. Symmetric: scale = m * step with the largest magnitude m and step =
1 / (2^(bits-1) - 1), code = round(w * (1 / scale)). Asymmetric: scale = (largest - least) * step
with 0 in that range and step = 1 / (2^bits - 1), zero = round(-least * (1 / scale)), code =
round(w * (1 / scale)) + zero. Halves are rounded to even. A weight becomes (code - zero) * scale,
float32; groups of zeros stay zeros. Inverses are written out: a compiler multiplies with the
rounded inverse of what many numbers are divided by, and near a half that decides.
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
    width, low = _ranges(x_LOI, scheme)
    # Each a program of its own: within one a compiler takes w / (m * step) apart, which rounds
    # otherwise.
    scale = width * jnp.float32(1 / top)
    inverse = jnp.where(scale > 0, 1.0 / scale, 0.0)
    return _of_layers(x_LOI, (scale, inverse, low), jnp.int32(top), scheme).reshape(row.shape)


@functools.partial(jax.jit, static_argnames="scheme")
def _ranges(x_LOI: jax.Array, scheme: Scheme) -> tuple[jax.Array, jax.Array]:
    """Return the width of each group's range (half of a symmetric one) and its least weight, 0 at
    most, [L, O, G, 1]."""

    def of_layer(x_OI):
        x_OGC = _grouped(x_OI.astype(jnp.float32), scheme.group)
        low = jnp.minimum(jnp.min(x_OGC, axis=-1, keepdims=True), 0.0)
        high = jnp.maximum(jnp.max(x_OGC, axis=-1, keepdims=True), 0.0)
        return (jnp.maximum(high, -low) if scheme.symmetric else high - low), low

    return jax.lax.map(of_layer, x_LOI)  # one by one: float32 beside the stored dtype is large


@functools.partial(jax.jit, static_argnames="scheme")
def _of_layers(
    x_LOI: jax.Array, ranges: tuple[jax.Array, ...], top: jax.Array, scheme: Scheme
) -> jax.Array:
    def of_layer(layer):
        x_OI, (scale, inverse, low) = layer
        codes = jnp.round(_grouped(x_OI.astype(jnp.float32), scheme.group) * inverse)
        codes = codes.astype(jnp.int32)  # which have no -0
        if not scheme.symmetric:
            zero = jnp.round(-low * inverse).astype(jnp.int32)
            codes = jnp.clip(codes + zero, 0, top) - zero
        weights_OGC = codes.astype(jnp.float32) * scale
        return weights_OGC.reshape(x_OI.shape[0], -1)[:, : x_OI.shape[1]]

    return jax.lax.map(of_layer, (x_LOI, ranges))


def _grouped(x_OI: jax.Array, group: int) -> jax.Array:
    """Cut rows into groups [out, groups, columns]; the last is filled with zeros, which move no
    range."""
    out, columns = x_OI.shape
    size = min(group, columns) if group else columns
    number = math.ceil(columns / size)
    return jnp.pad(x_OI, ((0, 0), (0, number * size - columns))).reshape(out, number, size)
