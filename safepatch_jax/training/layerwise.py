"""The layerwise update: one block's gradient exists at a time, and the block is updated at once.

For models of which weights, gradients and what XLA keeps beside them do not fit together. Trained
are weights of the blocks alone. What enters each block is kept, for all micro-batches; the backward
pass takes the blocks from the last to the first and runs each again. A bound on the gradient's
global norm must be known before the first update, so it costs a backward pass of its own; with
clip_norm 0 there is one.

Dimension key: M micro-batches, R rows of one, T positions, A answer positions, D model, L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from safepatch_jax.models.decoder import Decoder
from safepatch_jax.models.layerwise import LAYERS, Blocks, joined, of_layer, put_layer
from safepatch_jax.models.table import Param, nest, unnest
from safepatch_jax.training.losses import Loss
from safepatch_jax.training.objective import end_logprobs
from safepatch_jax.training.optimizers import updated

Micros = Mapping[str, jax.Array]  # a batch with an axis of micro-batches in front


@dataclasses.dataclass(frozen=True)
class LayerwisePass:
    """Forward and backward pass of the train step, block by block.

    Attributes:
      decoder: the model.
      rows: the trained parameters, of the blocks.
      loss: of one model, see `safepatch_jax.training.losses`.
      chunk: see `answer_logprobs`.
    """

    decoder: Decoder
    rows: tuple[Param, ...]
    loss: Loss
    chunk: int

    def __post_init__(self):
        if strangers := [row.path for row in self.rows if not row.stacked]:
            raise ValueError(
                f"The layerwise backward pass trains weights of the blocks alone, not "
                f"{', '.join(strangers)}. Use --derive.backward=whole, or "
                "--patch.scope=block_linear."
            )
        if self.loss.compares:
            raise ValueError(
                "The layerwise backward pass has no losses that compare with a reference model. "
                "Use --derive.backward=whole."
            )

    def forward(
        self, trained: Any, frozen: Any, micros: Micros, sign: jax.Array, rows: int
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Run the model, and the backward pass to where the last block ends.

        Args:
          trained, frozen: nested parameters that together are the model's.
          micros: see `Micros`.
          sign: of the objective.
          rows: of the whole batch, over which the objective is a mean.

        Returns:
          (what enters each block [L, M, R, T, D], the objective's gradient by what leaves the last
          one [M, R, T, D], log p of each answer token float32 [M, R, A]).
        """
        blocks = Blocks(self.decoder)
        stacked = joined(trained, {LAYERS: frozen[LAYERS]})[LAYERS]

        def of_block(x_MRTD, layer):
            block = {LAYERS: of_layer(stacked, layer)}

            def of_micro(xs):
                x_RTD, micro = xs
                return blocks.run(block, layer, x_RTD, micro)

            return lax.map(of_micro, (x_MRTD, micros)), x_MRTD

        begun_MRTD = lax.map(lambda micro: blocks.begin(frozen, micro), micros)
        x_MRTD, inputs_LMRTD = lax.scan(of_block, begun_MRTD, jnp.arange(blocks.number))

        def of_micro(xs):
            x_RTD, micro = xs

            def objective(x_RTD):
                logprobs_RA = end_logprobs(self.decoder, frozen, x_RTD, micro, self.chunk)
                return sign * jnp.sum(self.loss(logprobs_RA, micro)) / rows, logprobs_RA

            return jax.grad(objective, has_aux=True)(x_RTD)

        gradient_MRTD, logprobs_MRA = lax.map(of_micro, (x_MRTD, micros))
        return inputs_LMRTD, gradient_MRTD, logprobs_MRA

    def block_gradient(
        self,
        block: Any,
        others: Any,
        layer: jax.Array,
        inputs_MRTD: jax.Array,
        gradient_MRTD: jax.Array,
        micros: Micros,
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        """Return the gradient of one block's trained parameters, flat by path, summed over the
        micro-batches, and the objective's gradient by what enters the block.

        Args:
          block, others: its trained parameters, and its others; nested, below 'layers'.
          layer: its number.
          inputs_MRTD: what enters it.
          gradient_MRTD: the objective's gradient by what leaves it.
        """
        blocks, sharder = Blocks(self.decoder), self.decoder.sharder

        def of_micro(total, xs):
            x_RTD, gradient_RTD, micro = xs

            def run(block, x_RTD):
                return blocks.run({LAYERS: joined(block, others)}, layer, x_RTD, micro)

            _, back = jax.vjp(run, block, x_RTD)
            share, before_RTD = back(gradient_RTD)
            return jax.tree.map(jnp.add, total, share), before_RTD

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), block)
        total, before_MRTD = lax.scan(of_micro, zeros, (inputs_MRTD, gradient_MRTD, micros))
        flat = unnest({LAYERS: total})
        for row in self.rows:
            flat[row.path] = sharder.constrain(flat[row.path], *row.layer_axes)
        return flat, before_MRTD


def layerwise_update(
    passes: LayerwisePass,
    optimizer: optax.GradientTransformation,
    clip_norm: float,
    state: Mapping[str, Any],
    frozen: Any,
    micros: Micros,
    sign: jax.Array,
    learning_rate: jax.Array,
    weight_decay: jax.Array,
    stops: Callable[[jax.Array], jax.Array],
) -> tuple[dict[str, Any], jax.Array, jax.Array, jax.Array]:
    """Take one step.

    Args:
      passes: the model and its loss.
      optimizer: of one block; its moments are stacked by layers, see `layer_moments`.
      clip_norm: see `Trainer`.
      state: {params, moments}; nested, the trained alone.
      frozen: the other parameters, nested, any float dtype.
      micros: the batch.
      sign, learning_rate, weight_decay: see `Recipe`.
      stops: told the log-probabilities, says whether parameters stay as they are.

    Returns:
      ({params, moments}, the gradient's global norm, log p float32 [M, R, A], whether it stopped).
    """
    trained, rows = state["params"], micros["tokens"].shape[0] * micros["tokens"].shape[1]
    inputs_LMRTD, last_MRTD, logprobs_MRA = passes.forward(trained, frozen, micros, sign, rows)
    stopped = stops(logprobs_MRA)
    layers = jnp.arange(inputs_LMRTD.shape[0])

    def gradient_of(block, layer, after_MRTD):
        others, inputs_MRTD = of_layer(frozen[LAYERS], layer), of_layer(inputs_LMRTD, layer)
        return passes.block_gradient(block, others, layer, inputs_MRTD, after_MRTD, micros)

    def add_squares(carry, layer):
        after_MRTD, total = carry
        flat, before_MRTD = gradient_of(of_layer(trained[LAYERS], layer), layer, after_MRTD)
        return (before_MRTD, total + _squares(flat)), None

    scale = jnp.float32(1)
    if clip_norm:
        (_, squares), _ = lax.scan(add_squares, (last_MRTD, jnp.float32(0)), layers, reverse=True)
        norm = jnp.sqrt(squares)
        scale = jnp.where(norm < clip_norm, 1.0, clip_norm / norm)

    def update(carry, layer):
        params, moments, after_MRTD, total = carry
        block = of_layer(params[LAYERS], layer)
        flat, before_MRTD = gradient_of(block, layer, after_MRTD)
        scaled = nest({path: scale * g for path, g in flat.items()})
        updates, new = optimizer.update(scaled, of_layer(moments, layer), {LAYERS: block})
        block = updated({LAYERS: block}, updates, stopped, learning_rate, weight_decay)
        params = {LAYERS: put_layer(params[LAYERS], block[LAYERS], layer)}
        return (params, put_layer(moments, new, layer), before_MRTD, total + _squares(flat)), None

    start = trained, state["moments"], last_MRTD, jnp.float32(0)
    (params, moments, _, squares), _ = lax.scan(update, start, layers, reverse=True)
    return {"params": params, "moments": moments}, jnp.sqrt(squares), logprobs_MRA, stopped


def layer_moments(optimizer: optax.GradientTransformation, trained: Any) -> Any:
    """Return an optimiser's first moments for stacked parameters: of each layer its own, stacked
    likewise."""
    return jax.vmap(lambda block: optimizer.init({LAYERS: block}))(trained[LAYERS])


def _squares(flat: Mapping[str, jax.Array]) -> jax.Array:
    return sum(jnp.sum(jnp.square(g)) for g in flat.values())
