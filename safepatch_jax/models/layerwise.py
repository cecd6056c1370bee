"""The decoder's blocks one at a time, for backward passes that hold the gradient of one block.

The forward pass keeps what enters each block; the backward pass takes the blocks from the last to
the first, runs each again from its input, and hands the cotangent on. What becomes of a block's
gradient is the caller's: a train step updates the block at once, a score adds up magnitudes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from safepatch_jax.models.decoder import Begin, Decoder, OneBlock
from safepatch_jax.models.rope import layer_kinds
from safepatch_jax.models.table import nest, unnest

LAYERS = "layers"  # of the parameter dictionary: the blocks, stacked
Params = Mapping[str, Any]  # nested


class Part(NamedTuple):
    """One program of a pass over a batch, for plans.

    Attributes:
      name: empty where it is the only one.
      trace: traces it; nothing is run.
      resident: bytes on each device of what the pass holds beside the program's own arrays.
      runs: how often a batch takes it.
    """

    name: str
    trace: Callable[[], jax.stages.Traced]
    resident: int = 0
    runs: int = 1


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The begin and the blocks of a decoder; its remat counts for nothing here.

    A batch is that of `safepatch_jax.data.chat.training_batch`; of it tokens and valid are read.
    """

    decoder: Decoder

    @property
    def number(self) -> int:
        return self.decoder.config.num_layers

    def begin(self, params: Params, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Return what enters the first block, [B, T, D]."""
        if "prefix" in batch:
            raise ValueError(
                "blocks are run on whole sequences, and the batch has a prefix of all of them. Lay "
                "it out without (`training_batch(..., prefix=0)`)."
            )
        module = Begin(*self._attributes)
        return module.apply({"params": params}, batch["tokens"])

    def run(
        self, block: Params, layer: jax.Array, x_BTD: jax.Array, batch: Mapping[str, jax.Array]
    ) -> jax.Array:
        """Run one block.

        Args:
          block: its parameters, see `of_layer`.
          layer: its number.
          x_BTD: what enters it.
        """
        kind = jax.tree.map(lambda x: jnp.asarray(x)[layer], layer_kinds(self.decoder.config))
        module = OneBlock(*self._attributes, self.decoder.tap, self.decoder.attention)
        positions_1T = jnp.arange(x_BTD.shape[1])[None]
        return module.apply({"params": block}, x_BTD, kind, positions_1T, batch["valid"])[0]

    @property
    def _attributes(self):
        return self.decoder.config, self.decoder.dtype, self.decoder.sharder


def of_layer(stacked: Params, layer: jax.Array) -> Params:
    """Return one block's parameters, or what else is stacked by layers: [L, ...] to [...]."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), stacked)


def put_layer(stacked: Params, part: Params, layer: jax.Array) -> Params:
    """Return the stack with one layer's part in its place; within a loop this writes in place."""
    return jax.tree.map(
        lambda x, p: jax.lax.dynamic_update_index_in_dim(x, p.astype(x.dtype), layer, 0),
        stacked,
        part,
    )


def joined(*parts: Params) -> dict[str, Any]:
    """Return one nested dictionary of several that share no path."""
    flat: dict[str, Any] = {}
    for part in parts:
        flat |= unnest(part)
    return nest(flat)
