"""Random retention (METHOD 3e): Bernoulli(p) with bits that depend on the tensor and the position alone."""

from __future__ import annotations

import hashlib

import jax
import jax.numpy as jnp
import numpy as np


def tensor_keys(seed: int, role: str, hf_names: tuple[str, ...]) -> np.ndarray:
    """Return one Threefry key for each HF tensor, uint32 [L, 2], from a hash of (seed, role, name)."""
    digests = [hashlib.sha256(f"{seed}|{role}|{name}".encode()).digest() for name in hf_names]
    return np.stack([np.frombuffer(d[:8], "<u4") for d in digests]).astype(np.uint32)


def retained(key: jax.Array, shape: tuple[int, ...], retention: jax.Array) -> jax.Array:
    """Draw Bernoulli(p) for each entry of a tensor in the HF layout.

    The bit of an entry is a function of the key and its row-major index only: the same on every mesh.

    Args:
      key: uint32 [2].
      shape: shape of the tensor.
      retention: p in (0, 1], float32 scalar; p = 1 keeps everything.
    """
    with jax.threefry_partitionable(True):
        bits = jax.random.bits(jax.random.wrap_key_data(key, impl="threefry2x32"), shape, jnp.uint32)
    threshold = (retention * jnp.float32(2.0**24)).astype(jnp.uint32)  # exact for p in steps of 2^-24
    return (bits >> 8) < threshold
