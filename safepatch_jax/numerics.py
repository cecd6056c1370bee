"""Random bits that depend on a tensor's name and a position alone, the one cast to the storage
dtype, and what is not finite."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class NotFinite(ValueError):
    """A model's NLL or gradient is NaN or infinite."""


def tensor_keys(seed: int, role: str, hf_names: Sequence[str]) -> np.ndarray:
    """Return one Threefry key for each HF tensor, uint32 [L, 2], from a hash of (seed, role,
    name)."""
    digests = [hashlib.sha256(f"{seed}|{role}|{name}".encode()).digest() for name in hf_names]
    return np.stack([np.frombuffer(d[:8], "<u4") for d in digests]).astype(np.uint32)


def random_bits(key: jax.Array, shape: tuple[int, ...], start: jax.Array | int = 0) -> jax.Array:
    """Return uint32 random bits; those of an entry are a function of the key and its row-major
    index only.

    Threefry-2x32 with 20 rounds (Salmon et al. 2011), of the counter (0, index), the two words
    joined by exclusive or: what `jax.random.bits` gives too. Written out here because these bits
    are part of what a patch is, whatever a later JAX draws, and because XLA on CPU makes a loop of
    JAX's own, at a third of the speed.

    Args:
      key: uint32 [2].
      shape: of a tensor, or of a run of its entries; any sharding.
      start: row-major index of the first entry, uint32 scalar, may be traced; all indices are below
        2^32.
    """
    keys = key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA)
    low = row_major_index(shape, range(len(shape)), jnp.uint32(start) + keys[1])
    high = jnp.broadcast_to(keys[0], shape)
    for group in range(5):
        for distance in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            high = high + low
            low = high ^ (low << distance | low >> 32 - distance)
        high = high + keys[(group + 1) % 3]
        low = low + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return high ^ low


def row_major_index(shape: tuple[int, ...], axes: Iterable[int], start: jax.Array) -> jax.Array:
    """Return each entry's row-major index within its group, which is what the given axes span.

    Args:
      shape: of a tensor.
      axes: of it.
      start: index of a group's first entry, of the dtype wanted; a scalar, or one for each group.
        In a loop it should change from turn to turn: XLA would write an index that does not to
        memory once for all turns, and hold it there.
    """
    index, stride = jnp.broadcast_to(start, shape), 1
    for axis in sorted(axes, reverse=True):
        step = jnp.asarray(stride, index.dtype)
        index += step * lax.broadcasted_iota(index.dtype, shape, axis)
        stride *= shape[axis]
    return index


def flushed(x: jax.Array) -> jax.Array:
    """Return float32 with numbers below the smallest normal one (1.2e-38) as zeros of their sign.

    XLA's CPU backend computes so and its GPU backend does not: with this around what is computed
    both give the same bits.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    zero = lax.bitcast_convert_type(bits & jnp.uint32(0x80000000), jnp.float32)
    return jnp.where((bits & jnp.uint32(0x7F800000)) != 0, x, zero)


def bernoulli(bits: jax.Array, share: jax.Array) -> jax.Array:
    """Return True with a probability, for each of the random bits.

    Args:
      bits: uint32.
      share: the probability, in (0, 1], float32 scalar; 1 is always True.
    """
    # Exact for a share in steps of 2^-24.
    threshold = (share * jnp.float32(2.0**24)).astype(jnp.uint32)
    return (bits >> 8) < threshold


def stochastic_round(x: jax.Array, dtype, bits: jax.Array) -> jax.Array:
    """Cast float32 to bfloat16 or float16, up with the probability that makes the cast right on
    average.

    Exact values, NaN, infinities and what lies beyond the largest finite number are cast as usual.
    The rounding happens in float32 and on its bits: compilers may drop a cast down and up again,
    which a comparison of the two would rest on.

    Args:
      x: float32.
      dtype: bfloat16 or float16.
      bits: uint32, of the same shape; the upper 24 are compared with the share of the way to the
        next number.
    """
    to_bfloat16 = jnp.dtype(dtype) == jnp.bfloat16
    rounded = _to_bfloat16(x, bits) if to_bfloat16 else _to_float16(x, bits)
    finite = jnp.abs(x) < jnp.finfo(dtype).max.astype(jnp.float32)
    return jnp.where(finite, rounded, x).astype(dtype)


def _to_bfloat16(x: jax.Array, bits: jax.Array) -> jax.Array:
    """Round to a float32 that is exact in bfloat16, which is the upper half of a float32: the share
    of the way is the lower half."""
    raw = lax.bitcast_convert_type(x, jnp.uint32)
    rest = raw & jnp.uint32(0xFFFF)
    step = jnp.where((bits >> 8) < (rest << 8), jnp.uint32(0x10000), jnp.uint32(0))
    return lax.bitcast_convert_type(raw - rest + step, jnp.float32)


def _to_float16(x: jax.Array, bits: jax.Array) -> jax.Array:
    """Round to a float32 that is exact in float16."""
    raw = lax.bitcast_convert_type(x, jnp.uint32)
    # Below 2^-14 numbers are as far apart as above it.
    exponent = jnp.clip((raw >> 23) & 0xFF, 127 - 14, 127 + 15)
    step = lax.bitcast_convert_type((exponent - 10) << 23, jnp.float32)
    inverse = lax.bitcast_convert_type((254 - (exponent - 10)) << 23, jnp.float32)
    steps = jnp.abs(x) * inverse  # exact: a power of two
    below = jnp.floor(steps)
    up = (bits >> 8).astype(jnp.float32) * jnp.float32(2.0**-24) < steps - below
    return jnp.copysign((below + up) * step, x)


def cast(
    x: jax.Array, dtype, rounding: str = "nearest", bits: Callable[[], jax.Array] | None = None
) -> jax.Array:
    """Cast to a storage dtype, rounding to nearest, or stochastically with what `bits` returns (see
    `stochastic_round`)."""
    if rounding == "nearest" or jnp.dtype(dtype) == x.dtype or jnp.dtype(dtype) == jnp.float32:
        return x.astype(dtype)
    return stochastic_round(x.astype(jnp.float32), jnp.dtype(dtype), bits())
