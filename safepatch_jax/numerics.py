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

    Exact values, NaN, infinities and what lies beyond the largest finite number are cast as usual. The rounding happens in
    float32 and on its bits: compilers may drop a cast down and up again, which a comparison of the two would rest on.

    Args:
      x: float32.
      dtype: bfloat16 or float16.
      bits: uint32, of the same shape; the upper 24 are compared with the share of the way to the next number.
    """
    raw = lax.bitcast_convert_type(x, jnp.uint32)
    if jnp.dtype(dtype) == jnp.bfloat16:  # the upper half of a float32, so the share is the lower half
        rest = raw & jnp.uint32(0xFFFF)
        raw = raw - rest + jnp.where((bits >> 8) < (rest << 8), jnp.uint32(0x10000), jnp.uint32(0))
        rounded = lax.bitcast_convert_type(raw, jnp.float32)
    else:
        exponent = jnp.clip((raw >> 23) & 0xFF, 127 - 14, 127 + 15)  # below 2^-14 numbers are as far apart as above it
        step = lax.bitcast_convert_type((exponent - 10) << 23, jnp.float32)
        steps = jnp.abs(x) * lax.bitcast_convert_type((254 - (exponent - 10)) << 23, jnp.float32)  # exact: a power of two
        below = jnp.floor(steps)
        up = (bits >> 8).astype(jnp.float32) * jnp.float32(2.0**-24) < steps - below
        rounded = jnp.copysign((below + up) * step, x)
    return jnp.where(jnp.abs(x) < jnp.finfo(dtype).max.astype(jnp.float32), rounded, x).astype(dtype)


def cast(x: jax.Array, dtype, rounding: str = "nearest", key: jax.Array | None = None) -> jax.Array:
    """Cast to a storage dtype, rounding to nearest or stochastically with bits drawn from `key` (uint32 [2])."""
    if rounding == "nearest" or jnp.dtype(dtype) == x.dtype or jnp.dtype(dtype) == jnp.float32:
        return x.astype(dtype)
    return stochastic_round(x.astype(jnp.float32), jnp.dtype(dtype), random_bits(key, x.shape))
