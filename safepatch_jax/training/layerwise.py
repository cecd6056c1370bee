"""The layerwise train step: one block's gradient at a time, and the block is updated at once.

For models of which weights, gradients and what XLA keeps beside them do not fit together. Trained
are weights of the blocks alone. What enters each block is kept, for all micro-batches; the backward
pass takes the blocks from the last to the first and runs each again. A step is several programs,
each run once a block: their memory is that of a block whatever the number of blocks, and a program
compiles in the time of one block. The stacks are written by a program that does not read them, so
that no compiler keeps a copy of what is overwritten. A bound on the gradient's global norm must be
known before the first update, so it costs a backward pass of its own; with clip_norm 0 there is
one.

Dimension key: M micro-batches, R rows of one, T positions, A answer positions, D model, L layers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from safepatch_jax.mesh import Sharder, local_bytes
from safepatch_jax.models.decoder import Decoder
from safepatch_jax.models.layerwise import LAYERS, Blocks, Part, joined, of_layer, put_layer
from safepatch_jax.models.table import Param, nest, unnest
from safepatch_jax.training.batch import batch_layout, micro_batches, reported
from safepatch_jax.training.losses import Loss
from safepatch_jax.training.objective import end_logprobs
from safepatch_jax.training.optimizers import factor_to_norm, updated

Batch = Mapping[str, jax.Array]
Micros = Mapping[str, jax.Array]  # a batch with an axis of micro-batches in front
_AHEAD = 1  # blocks that the host may be ahead of the devices, each with its gradient


class LayerwiseStep:
    """Compiles the programs of the step; called as the whole tree's step is.

    Args:
      decoder: the model; its attention holds for the step.
      rows: the trained parameters, see `check_layerwise`.
      sharder: the mesh.
      loss: likewise.
      optimizer: of one block; its moments are stacked by layers, see `layer_moments`.
      clip_norm, chunk: see `Trainer`.
      accumulate: micro-batches.
      shardings: of the state's params and moments.
    """

    def __init__(
        self,
        decoder: Decoder,
        rows: Sequence[Param],
        sharder: Sharder,
        loss: Loss,
        optimizer: optax.GradientTransformation,
        clip_norm: float,
        chunk: int,
        accumulate: int,
        shardings: Mapping[str, Any],
    ):
        self._decoder, self._blocks, self._rows = decoder, Blocks(decoder), rows
        self._sharder, self._loss, self._optimizer = sharder, loss, optimizer
        self._clip_norm, self._chunk, self._accumulate = clip_norm, chunk, accumulate
        one = sharder.replicated()
        of_block = {row.path: sharder.sharding(row.layer_axes) for row in rows}
        stacks = shardings["params"], shardings["moments"]
        self._of_layer = jax.tree.map(_without_layers, stacks)
        self._begin = jax.jit(self._begin_batch)
        self._forward = jax.jit(self._run_block)
        self._end = jax.jit(self._end_gradient, out_shardings=(None, one, one))
        self._backward = jax.jit(self._block_gradient, out_shardings=(of_block, None, one))
        self._update = jax.jit(self._update_block, out_shardings=self._of_layer)
        self._put = jax.jit(self._put_block, donate_argnums=(0, 1), out_shardings=stacks)
        self._scale = jax.jit(self._clip_scale, out_shardings=(one, one))

    def __call__(
        self,
        state: Mapping[str, Any],
        frozen: Any,
        batch: Batch,
        sign: jax.Array,
        learning_rate: jax.Array,
        weight_decay: jax.Array,
        nll_ceiling: jax.Array,
        reference: None = None,
    ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        """Take one step; see `Trainer`.

        Args:
          state: {params, moments, stopped}; its arrays are taken over.
          frozen: the other parameters, nested, any float dtype.
          batch: of training.
          sign, learning_rate, weight_decay, nll_ceiling: see `Recipe`.
          reference: None.

        Returns:
          (state, {nll, gradient_norm, stopped}).
        """
        params, moments = state["params"], state["moments"]
        rest = {name: x for name, x in frozen.items() if name != LAYERS}
        others, layers = frozen[LAYERS], range(self._blocks.number)
        micros, x_MRTD = self._begin(rest, batch)
        inputs = []
        for layer in layers:
            inputs.append(x_MRTD)
            x_MRTD = self._forward(params, others, jnp.int32(layer), x_MRTD, micros)
        end_MRTD, nll, stopped = self._end(
            rest, x_MRTD, micros, sign, nll_ceiling, state["stopped"]
        )
        del x_MRTD

        def gradients(kept, after_MRTD):
            """Yield (layer, the gradient of its block, the sum of its squares)."""
            waiting = []
            for layer in reversed(layers):
                flat, after_MRTD, squares = self._backward(
                    params, others, jnp.int32(layer), kept.pop(), after_MRTD, micros
                )
                waiting.append(squares)
                if len(waiting) > _AHEAD:
                    jax.block_until_ready(waiting.pop(0))
                yield layer, flat, squares
                del flat

        scale, total = None, []
        if self._clip_norm:
            for _, flat, squares in gradients(list(inputs), end_MRTD):
                total.append(squares)
                del flat  # before the next block's gradient comes
            scale, norm = self._scale(total)
            total = []
        for layer, flat, squares in gradients(inputs, end_MRTD):
            total.append(squares)
            number = jnp.int32(layer)
            new = self._update(
                params, moments, flat, number, scale, stopped, learning_rate, weight_decay
            )
            params, moments = self._put(params, moments, number, new)
            del flat, new
        if not self._clip_norm:
            _, norm = self._scale(total)
        state = {"params": params, "moments": moments, "stopped": stopped}
        return state, {"nll": nll, "gradient_norm": norm, "stopped": stopped}

    def _begin_batch(self, rest, batch):
        """Return (micro-batches, what enters the first block [M, R, T, D])."""
        micros = micro_batches(batch, self._accumulate, self._sharder)
        return micros, self._laid(lax.map(functools.partial(self._blocks.begin, rest), micros))

    def _laid(self, x_MRTD):
        return self._sharder.constrain(x_MRTD, *_layout(x_MRTD.shape, self._sharder), "features")

    def _run_block(self, params, others, layer, x_MRTD, micros):
        block = of_layer(joined(params, {LAYERS: others})[LAYERS], layer)

        def of_micro(xs):
            return self._blocks.run({LAYERS: block}, layer, *xs)

        return self._laid(lax.map(of_micro, (x_MRTD, micros)))

    def _end_gradient(self, rest, x_MRTD, micros, sign, nll_ceiling, stopped):
        """Return (the objective's gradient by what leaves the last block, the batch's answer NLL,
        whether the updates have stopped)."""
        rows = micros["tokens"].shape[0] * micros["tokens"].shape[1]

        def of_micro(xs):
            x_RTD, micro = xs

            def objective(x_RTD):
                logprobs_RA = end_logprobs(self._decoder, rest, x_RTD, micro, self._chunk)
                return sign * jnp.sum(self._loss(logprobs_RA, micro)) / rows, logprobs_RA

            return jax.grad(objective, has_aux=True)(x_RTD)

        gradient_MRTD, logprobs_MRA = lax.map(of_micro, (x_MRTD, micros))
        tokens = jnp.sum(reported(micros, micros["weights"]))
        nll = -jnp.sum(reported(micros, logprobs_MRA)) / tokens
        return self._laid(gradient_MRTD), nll, stopped | (nll > nll_ceiling)

    def _block_gradient(self, params, others, layer, x_MRTD, after_MRTD, micros):
        """Return (the gradient of one block's trained parameters, flat by path, summed over the
        micro-batches; the objective's gradient by what enters the block; the former's sum of
        squares)."""
        block = of_layer(params[LAYERS], layer)
        rest = of_layer(others, layer)

        def of_micro(total, xs):
            x_RTD, after_RTD, micro = xs

            def run(block, x_RTD):
                return self._blocks.run({LAYERS: joined(block, rest)}, layer, x_RTD, micro)

            _, back = jax.vjp(run, block, x_RTD)
            share, before_RTD = back(after_RTD)
            return jax.tree.map(jnp.add, total, share), before_RTD

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), block)
        total, before_MRTD = lax.scan(of_micro, zeros, (x_MRTD, after_MRTD, micros))
        flat = unnest({LAYERS: total})
        for row in self._rows:
            flat[row.path] = self._sharder.constrain(flat[row.path], *row.layer_axes)
        return flat, self._laid(before_MRTD), sum(jnp.sum(jnp.square(g)) for g in flat.values())

    def _update_block(
        self, params, moments, flat, layer, scale, stopped, learning_rate, weight_decay
    ):
        if scale is not None:
            flat = {path: scale * g for path, g in flat.items()}
        block = {LAYERS: of_layer(params[LAYERS], layer)}
        updates, new = self._optimizer.update(nest(flat), of_layer(moments, layer), block)
        return updated(block, updates, stopped, learning_rate, weight_decay), new

    def _put_block(self, params, moments, layer, new):
        return tuple(put_layer(*pair, layer) for pair in zip((params, moments), new))

    def _clip_scale(self, squares):
        """Return (the factor that bounds the gradient's global norm, that norm)."""
        norm = jnp.sqrt(sum(squares))
        if not self._clip_norm:
            return jnp.float32(1), norm
        return factor_to_norm(norm, self._clip_norm), norm

    def parts(self, state: Any, frozen: Any, batch: Mapping[str, Any]) -> list[Part]:
        """Return the programs of a step but for its begin, which looks up embeddings.

        Args:
          state, frozen, batch: as in a call; jax.ShapeDtypeStruct with shardings.
        """
        params, moments = state["params"], state["moments"]
        rest = {name: x for name, x in frozen.items() if name != LAYERS}
        others = frozen[LAYERS]
        micros, hidden, gradient = self._of_block(batch)
        layer, number = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32)
        yes = jax.ShapeDtypeStruct((), bool)
        scale = number if self._clip_norm else None
        new = self._of_one(state)
        kept, *ahead = self.holds(state, batch).values()
        ahead = sum(ahead) - local_bytes((gradient, new))  # the program's own
        passes = 2 if self._clip_norm else 1
        number_of, stacks, weights = self._blocks.number, (params, moments), (params, others)
        everything = kept + local_bytes((stacks, frozen))

        def forward():
            return self._forward.trace(params, others, layer, hidden, micros)

        def end():
            return self._end.trace(rest, hidden, micros, number, number, yes)

        def backward():
            return self._backward.trace(params, others, layer, hidden, hidden, micros)

        def update():
            return self._update.trace(params, moments, gradient, layer, scale, yes, number, number)

        def put():
            return self._put.trace(params, moments, layer, new)

        def part(name, trace, arguments, more=0, runs=number_of):
            return Part(name, trace, everything + more - local_bytes(arguments), runs)

        return [
            part("forward", forward, weights),
            part("end", end, rest, runs=1),
            part("backward", backward, weights, ahead, number_of * passes),
            part("update", update, stacks, ahead),
            part("put", put, stacks, ahead + local_bytes(gradient)),
        ]

    def _of_block(self, batch):
        """Return shapes and shardings of (micro-batches, what enters a block, a block's gradient)
        for those of a batch."""
        micros, sharder = {}, self._sharder
        for name, x in batch.items():
            shape = (self._accumulate, x.shape[0] // self._accumulate, *x.shape[1:])
            sharding = sharder.sharding(_layout(shape, sharder))
            micros[name] = jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding)
        shape = micros["tokens"].shape
        hidden = jax.ShapeDtypeStruct(
            (*shape, self._decoder.config.embed_dim),
            self._decoder.dtype,
            sharding=sharder.sharding((*_layout(shape, sharder), "features")),
        )
        gradient = {}
        for row in self._rows:
            gradient[row.path] = jax.ShapeDtypeStruct(
                row.layer_shape, jnp.float32, sharding=sharder.sharding(row.layer_axes)
            )
        return micros, hidden, gradient

    def _of_one(self, state):
        """Return shapes and shardings of one block's params and moments."""
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=s),
            (state["params"], state["moments"]),
            self._of_layer,
        )

    def holds(self, state: Any, batch: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, int]:
        """Return the bytes that each device holds beside weights and moments, by purpose; see
        `parts` for arguments."""
        _, hidden, gradient = self._of_block(batch)
        blocks = 1 + _AHEAD  # the one at work, and those whose programs still wait
        return {
            "what enters the blocks": (self._blocks.number + 1) * local_bytes(hidden),
            f"gradients of {blocks} blocks": blocks * local_bytes(gradient),
            f"{blocks} updated blocks": blocks * local_bytes(self._of_one(state)),
        }


def check_layerwise(rows: Iterable[Param], loss: Loss) -> None:
    """Raise ValueError for trained parameters that are no block's, and for a loss that compares."""
    if strangers := [row.path for row in rows if not row.stacked]:
        raise ValueError(
            f"The layerwise backward pass trains weights of the blocks alone, not "
            f"{', '.join(strangers)}. Use --derive.backward=whole, or --patch.scope=block_linear."
        )
    if loss.compares:
        raise ValueError(
            "The layerwise backward pass has no losses that compare with a reference model. Use "
            "--derive.backward=whole."
        )


def layer_moments(optimizer: optax.GradientTransformation, trained: Any) -> Any:
    """Return an optimiser's first moments for stacked parameters: of each layer its own, stacked
    likewise."""
    return jax.vmap(lambda block: optimizer.init({LAYERS: block}))(trained[LAYERS])


def _layout(shape: tuple[int, ...], sharder: Sharder) -> tuple[str, ...]:
    """Return the logical axes of the first three dimensions of [M, R, T, ...]."""
    return "layers", *batch_layout(shape[1], sharder)


def _without_layers(sharding: NamedSharding) -> NamedSharding:
    """Return the sharding of one layer of a stack."""
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
