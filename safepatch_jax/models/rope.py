"""Rotary positions, and what sets one layer apart from another."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from safepatch_jax.models.config import DecoderConfig, LinearScaling


def rotary_frequencies(config: DecoderConfig, kind: str = "global") -> np.ndarray:
    """Return radians a position [H/2], float32 (RoPE; Su et al. 2021).

    Args:
      config: with base and scaling.
      kind: of DecoderConfig.ropes.

    Computed once, with float32 rounding at the same places as in the reference: at position 8000
    one float32 step of a frequency turns by half a milliradian.
    """
    one = np.float32(1)
    if kind == "none":
        return np.zeros(config.head_dim // 2, np.float32)
    theta = config.local_rope_theta if kind == "local" else config.rope_theta
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    powers = np.power(theta, exponents.astype(np.float64))
    frequencies = one / powers.astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None or kind == "local":
        return frequencies
    if isinstance(scaling, LinearScaling):
        return frequencies / np.float32(scaling.factor)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    factor = np.float32(scaling.factor)
    # Two roundings each, as torch divides a number by a tensor: the inverse, then the product.
    wavelengths = one / frequencies * np.float32(2 * np.pi)
    turns = one / wavelengths * np.float32(scaling.original_max_length)
    smooth = (turns - np.float32(low)) / np.float32(high - low)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    scaled = np.where(turns > high, frequencies, between)
    return np.where(turns < low, frequencies / factor, scaled)


class LayerKind(NamedTuple):
    """What sets a layer apart from others with the same parameters; None where all are alike.

    window: how many positions a query sees, 0 for all; frequencies: as of `rotary_frequencies`.
    """

    window: Any = None
    frequencies: Any = None


def layer_kinds(config: DecoderConfig) -> LayerKind:
    """Return the kinds of all layers: int32 [L] and float32 [L, H/2]."""
    window, frequencies = None, None
    if config.windows:
        window = np.asarray(config.windows, np.int32)
    if config.ropes:
        frequencies = np.stack([rotary_frequencies(config, kind) for kind in config.ropes])
    return LayerKind(window, frequencies)


def rotary_angles(config: DecoderConfig, positions_BT: jax.Array) -> jax.Array:
    """Return rotation angles [B, T, H/2] in radians, float32; where layers differ [B, T, 1], to be
    multiplied by a layer's frequencies."""
    positions_BT1 = positions_BT[..., None].astype(jnp.float32)
    return positions_BT1 if config.ropes else positions_BT1 * rotary_frequencies(config)


def rotate(x_BTNH: jax.Array, sin_BTh: jax.Array, cos_BTh: jax.Array) -> jax.Array:
    """Apply RoPE, by the sines and cosines of `rotary_angles`, in the half-split convention of
    Hugging Face checkpoints."""
    sin, cos = sin_BTh[:, :, None, :], cos_BTh[:, :, None, :]
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x_BTNH.dtype)
