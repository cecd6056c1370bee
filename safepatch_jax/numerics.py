"""Random bits that depend on a tensor's name and a position alone, and the one cast to the storage dtype."""

from __future__ import annotations

import hashlib
from typing import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def tensor_keys(seed: int, role: str, hf_names: Sequence[str]) -> np.ndarray:
    """Return one Threefry key for each HF tensor, uint32 [L, 2], from a hash of (seed, role, name)."""
    digests = [hashlib.sha256(f"{seed}|{role}|{name}".encode()).digest() for name in hf_names]
    return np.stack([np.frombuffer(d[:8], "<u4") for d in digests]).astype(np.uint32)


def random_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return uint32 random bits; those of an entry are a function of the key and its row-major index only.

    So they are the same on every mesh (partitionable Threefry; Salmon et al. 2011).
    """
    with jax.threefry_partitionable(True):
        return jax.random.bits(jax.random.wrap_key_data(key, impl="threefry2x32"), shape, jnp.uint32)


def stochastic_round(x: jax.Array, dtype, bits: jax.Array) -> jax.Array:
    """Cast float32 to bfloat16 or float16, up with the probability that makes the cast right on average.

    Exact values, NaN, infinities and what lies beyond the largest finite number are cast as usual.

    Args:
      x: float32.
      dtype: bfloat16 or float16.
      bits: uint32, of the same shape; the upper 24 are compared with the share of the way to the next number.
    """
    nearest = x.astype(dtype)
    raw = lax.bitcast_convert_type(nearest, jnp.uint16)
    outside = jnp.abs(nearest.astype(jnp.float32)) > jnp.abs(x)
    below = lax.bitcast_convert_type(jnp.where(outside, raw - 1, raw), dtype)  # next number towards zero
    above = lax.bitcast_convert_type(jnp.where(outside, raw, raw + 1), dtype)  # next number away from zero
    low, high = jnp.abs(below.astype(jnp.float32)), jnp.abs(above.astype(jnp.float32))
    share = (jnp.abs(x) - low) / (high - low)  # both differences are exact, the divisor a power of two
    chosen = jnp.where((bits >> 8).astype(jnp.float32) * jnp.float32(2.0**-24) < share, above, below)
    exact = (nearest.astype(jnp.float32) == x) | ~jnp.isfinite(nearest.astype(jnp.float32)) | ~jnp.isfinite(high)
    return jnp.where(exact, nearest, chosen)


def cast(x: jax.Array, dtype, rounding: str = "nearest", key: jax.Array | None = None) -> jax.Array:
    """Cast to a storage dtype, rounding to nearest or stochastically with bits drawn from `key` (uint32 [2])."""
    if rounding == "nearest" or jnp.dtype(dtype) == x.dtype or jnp.dtype(dtype) == jnp.float32:
        return x.astype(dtype)
    return stochastic_round(x.astype(jnp.float32), jnp.dtype(dtype), random_bits(key, x.shape))
