"""Fused attention: the kernels that the libraries bring for a platform, and when they can be used.

They serve causal attention over whole, right-padded sequences, as training has them: a real query
then looks at real keys alone, so the kernels need no padding mask; what they give at padding is
never read. Scoring takes each sample for itself, and plain attention.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import PartitionSpec

from safepatch_jax.mesh import Sharder
from safepatch_jax.models.config import DecoderConfig

SPLASH_BLOCK = 128  # lengths are padded to a multiple of it
SPLASH_FROM = 512  # below it the logits of plain attention are small, and auto stays with that


_PLANNED: contextvars.ContextVar[tuple[int, int] | None] = contextvars.ContextVar(
    "capability", default=None
)


def kernel_for(attention: str, config: DecoderConfig, dtype, length: int, platform: str) -> str:
    """Return which attention runs: 'xla', 'cudnn' or 'splash'.

    Args:
      attention: 'xla', 'fused', or 'auto': fused where it is possible and of use.
      config: architecture.
      dtype: of queries, keys and values.
      length: of the sequences.
      platform: cpu, gpu or tpu.

    Raises:
      ValueError: 'fused' is asked for and impossible; says why.
    """
    if attention == "xla":
        return "xla"
    why_not = _why_not(config, dtype, length, platform)
    if attention == "fused" and why_not:
        raise ValueError(
            f"model.attention = fused is not possible here: {why_not}. Use --model.attention=auto."
        )
    if why_not or (attention == "auto" and platform == "tpu" and length < SPLASH_FROM):
        return "xla"
    return {"gpu": "cudnn", "tpu": "splash"}[platform]


def _why_not(config: DecoderConfig, dtype, length: int, platform: str) -> str | None:
    if platform not in ("gpu", "tpu"):
        return f"the platform '{platform}' has no fused kernel"
    if config.attention_cap:
        return "attention's logits are capped, which the kernels do not do"
    windows = {0 if window >= length else window for window in config.windows}
    if len(windows) > 1:
        return "layers have different windows, which the kernels do not take in one scan"
    if platform == "tpu":
        if config.head_dim % 128:
            return f"splash needs a head size that is a multiple of 128, not {config.head_dim}"
        return None
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return "cuDNN needs --model.compute_dtype=bfloat16"
    capability = _compute_capability()
    if capability < (8, 0):
        return "cuDNN's attention needs an NVIDIA GPU of compute capability 8.0 or more"
    most = 256 if capability >= (9, 0) else 128
    if config.head_dim > most or config.head_dim % 8:
        return (
            f"cuDNN needs a head size of at most {most} here and a multiple of 8, not "
            f"{config.head_dim}"
        )
    return None


def _compute_capability() -> tuple[int, int]:
    """Return the capability of the GPUs that are compiled for (see `compiling_for`), else of this
    process's; without one that of the oldest that is supported, (0, 0) for other makers' GPUs."""
    if planned := _PLANNED.get():
        return planned
    gpus = [device for device in jax.local_devices() if device.platform == "gpu"]
    if not gpus:
        return 8, 0
    version = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(gpus[0], "compute_capability", "")))
    return (int(version[1]), int(version[2])) if version else (0, 0)


@contextlib.contextmanager
def compiling_for(capability: tuple[int, int] | None) -> Iterator[None]:
    """Let programs be traced and lowered for absent GPUs of a compute capability; None changes
    nothing."""
    if capability is None:
        yield
        return
    # JAX's own check of the head size asks the machine at hand, which has no GPU.
    checked = fused_attention_stablehlo.check_compute_capability

    def at_least(version: str) -> bool:
        return capability >= tuple(map(int, version.split(".")))

    token = _PLANNED.set(capability)
    fused_attention_stablehlo.check_compute_capability = at_least
    try:
        yield
    finally:
        fused_attention_stablehlo.check_compute_capability = checked
        _PLANNED.reset(token)


def fused_attention(
    kernel: str,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    window: int | None,
    sharder: Sharder | None,
    *,
    scale: float,
    interpret: bool = False,
) -> jax.Array:
    """Attend causally over right-padded sequences.

    Args:
      kernel: 'cudnn' (`jax.nn.dot_product_attention`), 'splash' (JAX's Pallas kernel for TPU), or
        'xla' (the former's plain version, for tests).
      q_BTNH, k_BTKH, v_BTKH: after RoPE; N is a multiple of K.
      window: a query looks at so many positions, itself included; None for all.
      sharder: the mesh.
      scale: of the products of queries and keys.
      interpret: run splash step by step on any platform (tests).

    Returns:
      [B, T, N, H].
    """
    if kernel != "splash":
        local = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            scale=scale,
            is_causal=True,
            local_window_size=local,
            implementation=kernel,
        )
    attend = functools.partial(_splash, window=window, scale=scale, interpret=interpret)
    if sharder is None:
        return attend(q_BTNH, k_BTKH, v_BTKH)
    rules = dict(sharder.rules)

    def spec(heads: str) -> PartitionSpec:
        return PartitionSpec(rules["batch"] or None, None, rules[heads] or None, None)

    return jax.shard_map(
        attend,
        mesh=sharder.mesh,
        in_specs=(spec("heads"), spec("kv_heads"), spec("kv_heads")),
        out_specs=spec("heads"),
        check_vma=False,
    )(q_BTNH, k_BTKH, v_BTKH)


def _splash(q_BTNH, k_BTKH, v_BTKH, *, window: int | None, scale: float, interpret: bool):
    """Run the kernel on one device's sequences and heads, padded to whole blocks."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    length, heads = q_BTNH.shape[1:3]
    padded = -(-length // SPLASH_BLOCK) * SPLASH_BLOCK
    square = (padded, padded)
    if window is None or window >= length:
        mask = splash_attention_mask.CausalMask(square)
    else:
        mask = splash_attention_mask.LocalMask(square, (window - 1, 0), 0)
    kernel = splash_attention_kernel.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask([mask] * heads), interpret=interpret
    )

    def heads_first(x_BTNH):
        whole_BTNH = jnp.pad(x_BTNH, ((0, 0), (0, padded - length), (0, 0), (0, 0)))
        return whole_BTNH.swapaxes(1, 2)

    scaled_BTNH = (q_BTNH.astype(jnp.float32) * scale).astype(q_BTNH.dtype)
    mixed_BNTH = jax.vmap(kernel)(
        heads_first(scaled_BTNH), heads_first(k_BTKH), heads_first(v_BTKH)
    )
    return mixed_BNTH.swapaxes(1, 2)[:, :length]
