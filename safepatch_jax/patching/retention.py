"""Random retention (METHOD 3e): Bernoulli(p) with bits that depend on the tensor and the position alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from safepatch_jax.numerics import random_bits


def retained(key: jax.Array, shape: tuple[int, ...], retention: jax.Array) -> jax.Array:
    """Draw Bernoulli(p) for each entry of a tensor in the HF layout.

    Args:
      key: uint32 [2], see `tensor_keys`.
      shape: shape of the tensor.
      retention: p in (0, 1], float32 scalar; p = 1 keeps everything.
    """
    threshold = (retention * jnp.float32(2.0**24)).astype(jnp.uint32)  # exact for p in steps of 2^-24
    return (random_bits(key, shape) >> 8) < threshold
