"""The whole tree's train step on one CPU device: its blocks one by one from the host.

XLA on CPU keeps what a loop's backward pass reads in stacks, which it zeroes, fills and cuts, and
lays them in new pages at every step. Here one program of a block is compiled for the forward pass
and one for the backward pass, and each is run once a block; what one leaves for the other are the
products with weights (remat 'dots'), or what enters the block alone ('full'). The update is the
whole step's.

Dimension key: B batch, T positions, D model.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from safepatch_jax.mesh import Sharder, local_bytes
from safepatch_jax.models.decoder import Decoder
from safepatch_jax.models.layerwise import LAYERS, Blocks, Part, joined, of_layer, put_layer
from safepatch_jax.training.batch import micro_batches, reported
from safepatch_jax.training.losses import Loss
from safepatch_jax.training.objective import end_divergences, end_logprobs

EMBEDDER = "embedder"  # the part that the begin reads
_AHEAD = 2  # blocks that the host may be ahead of the device, each with what it leaves


class ByBlockStep:
    """Compiles the programs of the step; called as the whole program is.

    Args:
      decoder: the model; its remat is 'dots' or 'full'.
      sharder: the mesh, one CPU device.
      loss: see `safepatch_jax.training.losses`.
      chunk, accumulate: see `Trainer`.
      prepare: maps a batch to the batch of which micro-batches are cut.
      finish: maps (state, gradients, nll, learning_rate, weight_decay, nll_ceiling) to (state,
        metrics).
    """

    def __init__(
        self,
        decoder: Decoder,
        sharder: Sharder,
        loss: Loss,
        chunk: int,
        accumulate: int,
        prepare: Callable[..., Any],
        finish: Callable[..., Any],
    ):
        self._decoder, self._blocks = decoder, Blocks(decoder)
        self._sharder, self._loss = sharder, loss
        self._chunk, self._accumulate = chunk, accumulate
        self._prepare_batch, self._finish_step = prepare, finish
        self._cut = jax.jit(self._micro_batches)
        self._begin = jax.jit(self._blocks.begin)
        self._forward, self._follow = jax.jit(self._run_block), jax.jit(self._run_reference)
        self._end = jax.jit(self._end_gradient, donate_argnames="total")
        self._backward = jax.jit(
            self._block_gradient, static_argnames="first", donate_argnames="total"
        )
        self._begin_back = jax.jit(self._begin_gradient, donate_argnames="total")
        self._finish = jax.jit(self._update, donate_argnames=("state", "gradients"))
        self._room: Any = None  # the blocks' gradients, in the same memory at every step

    def __call__(
        self,
        state: Mapping[str, Any],
        frozen: Any,
        batch: Mapping[str, jax.Array],
        sign: jax.Array,
        learning_rate: jax.Array,
        weight_decay: jax.Array,
        nll_ceiling: jax.Array,
        reference: Any = None,
    ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        """Take one step; see `Trainer`.

        Args:
          state: {params, moments, stopped}; its arrays are taken over.
          frozen: the other parameters, nested, any float dtype.
          batch: of training.
          sign, learning_rate, weight_decay, nll_ceiling: see `Recipe`.
          reference: nested parameters of the model that the loss compares with, or None.

        Returns:
          (state, {nll, gradient_norm, stopped}).
        """
        trained = state["params"]
        blocks, self._room = self._room, None
        if blocks is None:
            blocks = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), _stacks(trained))
        ends, total = None, 0.0
        for i, micro in enumerate(self._cut(batch)):
            gradients = self._gradients(
                trained, frozen, reference, micro, sign, (blocks, ends), first=i == 0
            )
            blocks, ends, logprob = gradients
            total = total + logprob
        rates = learning_rate, weight_decay, nll_ceiling
        gradients = ends | ({LAYERS: blocks} if blocks else {})
        state, metrics, gradients = self._finish(state, gradients, batch, total, *rates)
        self._room = _stacks(gradients)
        return state, metrics

    def free(self) -> None:
        """Let go of what is kept between steps: memory of the size of the trained weights."""
        self._room = None

    def _gradients(self, trained, frozen, reference, micro, sign, totals, *, first):
        """Add the gradients of a micro-batch's share of the objective to those of the ones before;
        return (those of the blocks, those of the rest, its summed log p)."""
        stacks, others = _stacks(trained), _stacks(frozen)
        trained_ends, ends = _without_stacks(trained), _without_stacks(frozen)
        theirs = None
        if reference is not None:
            theirs = _without_stacks(reference), self._reference_hidden(reference, micro)
        x_BTD = self._begin(joined(trained_ends, ends), micro)
        inputs, waiting = [], []
        for layer in range(self._blocks.number):
            after_BTD, products = self._forward(stacks, others, layer, x_BTD, micro)
            inputs.append((x_BTD, products))
            x_BTD = after_BTD
        blocks, total = totals
        inputs_of_end = x_BTD, theirs, micro, sign
        total, x_BTD, logprob = self._end(trained_ends, ends, *inputs_of_end, total=total)
        for layer in reversed(range(self._blocks.number)):
            x_BTD, blocks = self._backward(
                stacks, others, layer, *inputs.pop(), x_BTD, micro, total=blocks, first=first
            )
            waiting.append(x_BTD)
            if len(waiting) > _AHEAD:
                waiting.pop(0).block_until_ready()
        embedder = [_part(tree, EMBEDDER) for tree in (trained_ends, ends)]
        return blocks, self._begin_back(*embedder, x_BTD, micro, total=total), logprob

    def _reference_hidden(self, reference, micro):
        x_BTD = self._begin(_without_stacks(reference), micro)
        for layer in range(self._blocks.number):
            x_BTD = self._follow(_stacks(reference), layer, x_BTD, micro)
        return x_BTD

    def _micro_batches(self, batch):
        batch = self._prepare_batch(batch)
        micros = micro_batches(batch, self._accumulate, self._sharder)
        return [jax.tree.map(operator.itemgetter(i), micros) for i in range(self._accumulate)]

    def _run_block(self, stacks, others, layer, x_BTD, micro):
        block = {LAYERS: of_layer(joined(stacks, others), layer)}
        if self._decoder.remat == "full":
            return self._blocks.run(block, layer, x_BTD, micro), []
        return self._blocks.run_keeping(block, layer, x_BTD, micro)

    def _run_reference(self, stacks, layer, x_BTD, micro):
        return self._blocks.run({LAYERS: of_layer(stacks, layer)}, layer, x_BTD, micro)

    def _end_gradient(self, trained, others, x_BTD, theirs, micro, sign, *, total):
        """Return (the gradients of what is no block's, added to those of the micro-batches before,
        without what the begin adds; that of what leaves the last block; the summed log p)."""
        rows = micro["tokens"].shape[0] * self._accumulate

        def objective(trained, x_BTD):
            ends, chunk = joined(trained, others), self._chunk
            if theirs is None:
                logprobs_BA, kl = end_logprobs(self._decoder, ends, x_BTD, micro, chunk), ()
            else:
                models, hidden = zip((ends, x_BTD), theirs)
                logprobs_BA, *kl = end_divergences(self._decoder, models, hidden, micro, chunk)
            share = sign * jnp.sum(self._loss(logprobs_BA, micro, *kl)) / rows
            return share, jnp.sum(reported(micro, logprobs_BA))

        gradients, logprob = jax.grad(objective, argnums=(0, 1), has_aux=True)(trained, x_BTD)
        share, before_BTD = gradients
        if total is not None:
            share = jax.tree.map(jnp.add, total, share)
        return share, before_BTD, logprob

    def _block_gradient(
        self, stacks, others, layer, x_BTD, products, after_BTD, micro, *, total, first
    ):
        """Return (the objective's gradient by what enters a block, the blocks' gradients with this
        one's added; of the first micro-batch put in its place)."""
        block, rest = of_layer(stacks, layer), of_layer(others, layer)

        def run(block, x_BTD):
            whole = {LAYERS: joined(block, rest)}
            if self._decoder.remat == "full":
                return self._blocks.run(whole, layer, x_BTD, micro)
            return self._blocks.run_again(whole, layer, x_BTD, micro, products)

        _, back = jax.vjp(run, block, x_BTD)
        share, before_BTD = back(after_BTD)
        if not first:
            share = jax.tree.map(jnp.add, of_layer(total, layer), share)
        return before_BTD, put_layer(total, share, layer)

    def _begin_gradient(self, trained, others, after_BTD, micro, *, total):
        """Return the gradients of what is no block's, with what the begin adds to them."""

        def begin(trained):
            return self._blocks.begin(joined(trained, others), micro)

        (share,) = jax.vjp(begin, trained)[1](after_BTD)
        return total | jax.tree.map(jnp.add, _part(total, EMBEDDER), share)

    def _update(self, state, gradients, batch, logprob, learning_rate, weight_decay, nll_ceiling):
        batch = self._prepare_batch(batch)
        nll = -logprob / jnp.sum(reported(batch, batch["weights"]))
        rates = learning_rate, weight_decay, nll_ceiling
        return *self._finish_step(state, gradients, nll, *rates), gradients

    def parts(self, state: Any, frozen: Any, batch: Mapping[str, Any]) -> list[Part]:
        """Return the programs of a step that take its time and memory.

        Args:
          state, frozen, batch: as in a call; jax.ShapeDtypeStruct with shardings.
        """
        trained, number = state["params"], jax.ShapeDtypeStruct((), jnp.float32)
        stacks, others = _stacks(trained), _stacks(frozen)
        trained_ends, ends = _without_stacks(trained), _without_stacks(frozen)
        micro, hidden, products = self._of_block(trained, frozen, batch)
        layer, weights = 0, (stacks, others)
        everything = local_bytes((state, frozen)) + sum(self.holds(trained, frozen, batch).values())
        of_blocks = jax.tree.map(lambda x: _float32(x, x.shape), stacks)
        gradients = jax.tree.map(lambda x: _float32(x, x.shape), trained)

        def forward():
            return self._forward.trace(*weights, layer, hidden, micro)

        def end():
            inputs = hidden, None, micro, number
            return self._end.trace(trained_ends, ends, *inputs, total=None)

        def backward():
            inputs = hidden, products, hidden, micro
            return self._backward.trace(*weights, layer, *inputs, total=of_blocks, first=True)

        def update():
            rates = [number] * 3
            return self._finish.trace(state, gradients, batch, number, *rates)

        def part(name, trace, arguments, runs=self._accumulate * self._blocks.number):
            return Part(name, trace, everything - local_bytes(arguments), runs)

        return [
            part("forward", forward, weights),
            part("end", end, (trained_ends, ends), self._accumulate),
            part("backward", backward, (weights, of_blocks)),
            part("update", update, (state, gradients), 1),
        ]

    def _of_block(self, trained, frozen, batch):
        """Return shapes of (a micro-batch, what enters a block, the products that it keeps)."""
        micro = {}
        for name, x in batch.items():
            micro[name] = _float32(x, (x.shape[0] // self._accumulate, *x.shape[1:]), x.dtype)
        if "row_weights" not in micro and "part" in micro:
            micro["row_weights"] = _float32(micro["part"], micro["part"].shape)
        shape = (*micro["tokens"].shape, self._decoder.config.embed_dim)
        hidden = _float32(micro["tokens"], shape, self._decoder.dtype)
        weights = _stacks(trained), _stacks(frozen)
        _, products = jax.eval_shape(self._run_block, *weights, 0, hidden, micro)
        return micro, hidden, [_float32(hidden, x.shape, x.dtype) for x in products]

    def holds(
        self, trained: Any, frozen: Any, batch: Mapping[str, jax.ShapeDtypeStruct]
    ) -> dict[str, int]:
        """Return the bytes that the device holds beside weights and moments, by purpose."""
        _, hidden, products = self._of_block(trained, frozen, batch)
        gradients = jax.tree.map(lambda x: _float32(x, x.shape), trained)
        return {
            "gradients": local_bytes(gradients),
            "what the blocks keep": self._blocks.number * local_bytes((hidden, products)),
        }


def _stacks(tree: Mapping[str, Any]) -> Any:
    return tree.get(LAYERS, {})


def _without_stacks(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in tree.items() if name != LAYERS}


def _part(tree: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {name: tree[name]} if name in tree else {}


def _float32(like: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=like.sharding)
