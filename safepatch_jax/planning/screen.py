"""Estimates of a train step by arithmetic alone, to leave out what cannot fit, and to rank meshes
so that only the promising ones are compiled."""

from __future__ import annotations

import dataclasses
import math

from safepatch_jax.mesh import Sharder
from safepatch_jax.models.config import DecoderConfig
from safepatch_jax.models.table import param_table
from safepatch_jax.planning.chips import Chip
from safepatch_jax.planning.programs import device_bytes
from safepatch_jax.settings import Settings


@dataclasses.dataclass(frozen=True)
class Screen:
    """Estimates for one device.

    Attributes:
      arguments: bytes of parameters and moments, float32.
      least: bytes that any train step needs: arguments and gradients.
      memory: an estimate of its peak, bytes.
      seconds: an estimate of the least time of a step; for ranking alone.
    """

    arguments: int
    least: int
    memory: int
    seconds: float


def screen_train(
    settings: Settings,
    config: DecoderConfig,
    sharder: Sharder,
    shape: tuple[int, int],
    chip: Chip | None = None,
    flops: int = 0,
) -> Screen:
    """Estimate a train step.

    Args:
      settings: of the run.
      config: the architecture.
      sharder: the mesh.
      shape: T and A.
      chip: for the estimate of time.
      flops: of a step, all devices together, see `count_flops`.
    """
    derive, (length, answers) = settings.derive, shape
    table, sizes = param_table(config), sharder.mesh.shape
    fsdp, tensor = sizes["fsdp"], sizes["tensor"]
    width = 2 if settings.model.compute_dtype == "bfloat16" else 4
    trained = table.rows
    if derive.train == "scope":
        trained = table.scope(settings.patch.scope)
    params = device_bytes(trained, sharder, "float32")
    frozen = device_bytes([row for row in table if row not in trained], sharder, config.dtype)
    arguments = params * (3 if derive.optimizer == "adamw" else 1) + frozen
    gradients = params * (2 if derive.accumulate > 1 else 1)
    if derive.backward == "layerwise":
        gradients = params // config.num_layers
    least = arguments + gradients

    rows = -(-derive.batch_size // derive.accumulate)
    rows = rows // sharder.batch_ways if rows % sharder.batch_ways == 0 else rows
    tokens, heads = rows * length, config.num_heads * config.head_dim // tensor
    inner = (
        2 * (heads + config.num_kv_heads * config.head_dim // tensor) + 2 * config.mlp_dim // tensor
    )
    weights_of_attention = rows * config.num_heads // tensor * length * length
    kept = {
        "full": tokens * config.embed_dim * width,
        "dots": tokens * (3 * config.embed_dim + inner) * width,
        "none": tokens * (8 * config.embed_dim + 2 * inner) * width
        + weights_of_attention * (4 + width),
    }
    stacked = [row for row in table if row.stacked]
    block = device_bytes(stacked, sharder, "bfloat16") // 2 * width // config.num_layers * fsdp
    logits = 3 * rows * min(answers, settings.model.loss_chunk) * config.vocab_size // tensor * 4
    weights = params // 4 * width  # in the dtype of the arithmetic
    memory = (
        least
        + weights
        + config.num_layers * kept[settings.model.remat]
        + kept["none"]
        + 2 * block
        + logits
    )

    if chip is None:
        return Screen(arguments, least, memory, 0.0)
    passes = 3 * derive.accumulate  # forward, backward, and the gradients' way back
    reductions = config.num_layers * (6 if settings.model.remat == "full" else 4)
    activations = derive.accumulate * tokens * config.embed_dim * width
    exchanged = reductions * activations * 2 * (tensor - 1) / tensor
    seconds = max(
        flops / math.prod(sizes.values()) / chip.flops,
        (passes * weights * (fsdp - 1) + exchanged) / chip.link,
        (8 * params + passes * weights * fsdp) / chip.bandwidth,
    )
    return Screen(arguments, least, memory, seconds)
