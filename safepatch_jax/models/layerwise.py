"""The decoder's blocks one at a time, for backward passes that hold the gradient of one block.

The forward pass keeps what enters each block; the backward pass takes the blocks from the last to
the first, runs each again from its input, and hands the cotangent on. What becomes of a block's
gradient is the caller's: a train step updates the block at once, a score adds up magnitudes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
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

    def run_keeping(
        self, block: Params, layer: jax.Array, x_BTD: jax.Array, batch: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, list[jax.Array]]:
        """Run one block, see `run`; return (what leaves it, its products with weights)."""
        products = []

        def keep(method, args, options, context):
            y = method(*args, **options)
            if context.method_name == "product":
                products.append(y)
            return y

        with nn.intercept_methods(keep):
            return self.run(block, layer, x_BTD, batch), products

    def run_again(
        self,
        block: Params,
        layer: jax.Array,
        x_BTD: jax.Array,
        batch: Mapping[str, jax.Array],
        products: Sequence[jax.Array],
    ) -> jax.Array:
        """Do what `run` does with products that `run_keeping` has returned, for its derivative:
        this computes all but the products."""
        kept = list(products)

        def take(method, args, options, context):
            if context.method_name != "product":
                return method(*args, **options)
            equation, x, weight, *dtype = args

            def product(x, weight):
                return method(equation, x, weight, *dtype, **options)

            return _known(product, kept.pop(0), x, weight)

        with nn.intercept_methods(take):
            return self.run(block, layer, x_BTD, batch)

    @property
    def _attributes(self):
        return self.decoder.config, self.decoder.dtype, self.decoder.sharder


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _known(product, y, x, weight):
    """Return y, which is product(x, weight), with the derivative of that."""
    return y


def _known_forward(product, y, x, weight):
    return y, (x, weight)


def _known_backward(product, factors, cotangent):
    # The product is linear in each factor: its derivative needs no value of it.
    x, weight = factors
    (of_x,) = jax.linear_transpose(lambda x: product(x, weight), x)(cotangent)
    (of_weight,) = jax.linear_transpose(lambda weight: product(x, weight), weight)(cotangent)
    return None, of_x, of_weight


_known.defvjp(_known_forward, _known_backward)


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
