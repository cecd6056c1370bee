"""A trained model as an export would store it: each weight cast once, rounded as the settings
say."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from safepatch_jax.models.table import ParamTable, nest, unnest
from safepatch_jax.numerics import NotFinite, cast, random_bits, tensor_keys


def as_stored(
    params: Mapping[str, Any],
    table: ParamTable,
    dtypes: Mapping[str, Any],
    rounding: str,
    seed: int,
) -> dict[str, Any]:
    """Return a model's parameters in the dtypes of an export.

    Args:
      params: nested, as `table` declares them; on any mesh, on which they stay.
      table: rows of all of them.
      dtypes: by path.
      rounding: 'nearest'; or 'stochastic', whose bits follow from the seed, a tensor's name and an
        entry's place alone. A number that the dtype has stays as it is.
      seed: of the random bits.

    Raises:
      NotFinite: a number is beyond the range of its dtype.
    """
    flat, result = unnest(params), {}
    for row in table:
        x, dtype = flat[row.path], jnp.dtype(dtypes[row.path])
        if rounding == "nearest" or x.dtype == dtype:
            result[row.path] = x.astype(dtype)
        else:
            stack = x if row.stacked else x[None]
            keys = tensor_keys(seed, "rounding", row.hf_names)
            rounded = _cast(stack, keys, dtype=dtype, rounding=rounding).reshape(x.shape)
            result[row.path] = jax.device_put(rounded, x.sharding)
        if x.dtype != dtype and not bool(jnp.isfinite(result[row.path]).all()):
            raise NotFinite(f"{row.hf_name} holds numbers beyond the range of {dtype}.")
    return nest(result)


@functools.partial(jax.jit, static_argnames=("dtype", "rounding"))
def _cast(stack: jax.Array, keys: jax.Array, *, dtype: Any, rounding: str) -> jax.Array:
    def one(layer_and_key):
        layer, key = layer_and_key
        return cast(layer, dtype, rounding, lambda: random_bits(key, layer.shape))

    return lax.map(one, (stack, keys))
