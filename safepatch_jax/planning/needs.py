"""FLOPs that a run cannot do without, by the architecture alone: without what a program computes
twice, or beyond attention's mask."""

from __future__ import annotations

import math

from safepatch_jax.models.config import DecoderConfig
from safepatch_jax.models.table import param_table


def train_flops(
    config: DecoderConfig, rows: int, length: int, answers: int, head: bool = True
) -> int:
    """Return the FLOPs of a forward and a backward pass: 6 a weight of the blocks and token, 6 a
    weight of the head and answer token, and attention's products with the keys that a query sees.

    Args:
      config: the architecture.
      rows, length, answers: sequences, tokens of each, answer tokens of each.
      head: whether the head has a gradient; 4 a weight without.
    """
    passes = 6 if head else 4
    of_head = passes * config.vocab_size * config.embed_dim * answers
    return rows * (6 * _blocks(config) * length + of_head + 3 * _attention(config, length))


def decode_flops(config: DecoderConfig, rows: int, prompt: int, new: int) -> int:
    """Return the FLOPs of reading prompts and all new tokens but the last.

    Args:
      config: the architecture.
      rows, prompt, new: sequences, tokens of a prompt, tokens of an answer.
    """
    read = prompt + new - 1
    of_head = 2 * config.vocab_size * config.embed_dim * new
    return rows * (2 * _blocks(config) * read + of_head + _attention(config, read))


def _blocks(config: DecoderConfig) -> int:
    """Return the number of weights of the blocks' products."""
    return sum(math.prod(row.shape) for row in param_table(config) if row.kind == "linear")


def _attention(config: DecoderConfig, length: int) -> int:
    """Return the FLOPs of attention's two products, forward, for the queries of a sequence."""
    pairs = 0
    for window in config.windows or (0,) * config.num_layers:
        seen = min(window or length, length)
        pairs += seen * (seen + 1) // 2 + (length - seen) * seen
    return 4 * config.num_heads * config.head_dim * pairs
