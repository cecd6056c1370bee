"""Sensitivities of the blocks' weights, one block at a time.

All samples run forward once, in chunks, and what enters each block is kept. Then each block, from
the last to the first, is run again for all chunks; its sums of magnitudes take the place of its own
weights, which no earlier block needs. So weights are read once a chunk and not once a sample, and
memory is that of the weights, the kept inputs, and one block's gradients of one chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from safepatch_jax.mesh import Sharder, local_bytes
from safepatch_jax.models.decoder import Decoder
from safepatch_jax.models.layerwise import LAYERS, Blocks, Part, joined, of_layer, put_layer
from safepatch_jax.models.table import Param, nest, param_table, unnest
from safepatch_jax.patching.magnitudes import SAMPLES, Magnitudes, adding
from safepatch_jax.runtime.console import progress
from safepatch_jax.training.objective import end_logprobs, sequence_nll

Batch = Mapping[str, jax.Array]
_TOGETHER = 8  # samples that run together on one CPU device
_MOST_KEPT = 1.5  # kept inputs, as a share of the float32 weights of the scope


class BlockScores:
    """Compiles the programs of the pass; serves both patches.

    Args:
      decoder: the model.
      rows: of whose weights magnitudes are summed; of the blocks.
      sharder: the mesh.
      loss: 'mean' or 'sum' over a sequence's answer tokens.
      chunk: see `answer_logprobs`.
      keep: of which blocks the inputs are kept, the others' made again: 'all', 'some', or 'auto',
        see score.inputs.
    """

    def __init__(
        self,
        decoder: Decoder,
        rows: Sequence[Param],
        sharder: Sharder,
        loss: str,
        chunk: int,
        keep: str = "auto",
    ):
        self._rows, self._sharder, self._loss, self._chunk = rows, sharder, loss, chunk
        self._keep = keep
        self._paths = frozenset(row.path for row in rows)
        self._decoder = decoder.clone(attention="xla")
        # The batch axis of the mesh is that of the samples.
        within = sharder.with_rules(batch=())
        of_samples = decoder.clone(sharder=within, tap=Magnitudes(sharder), attention="xla")
        self._blocks, self._sample_blocks = Blocks(self._decoder), Blocks(of_samples)
        hidden = sharder.sharding(("batch", "length", "features"))
        stacked = {row.path: sharder.sharding(row.axes, row.shape, row.path) for row in rows}
        of_block = {row.path: sharder.sharding(row.layer_axes) for row in rows}
        self._begin = jax.jit(self._blocks.begin, out_shardings=hidden)
        self._forward = jax.jit(self._run_block, out_shardings=hidden)
        self._together = (
            sharder.one_cpu
            and jnp.dtype(decoder.dtype) == jnp.float32
            and all(row.kind == "linear" for row in rows)
        )
        self._end = jax.jit(self._end_gradient, out_shardings=(sharder.replicated(), hidden))
        self._backward = jax.jit(
            self._add_chunk if self._together else self._add_block,
            donate_argnums=(4, 6),
            out_shardings=(of_block, hidden),
        )
        self._zeros = jax.jit(
            lambda: {row.path: jnp.zeros(row.layer_shape, jnp.float32) for row in rows},
            out_shardings=of_block,
        )
        self._put = jax.jit(self._put_block, donate_argnums=0, out_shardings=stacked)

    def _run_block(self, scoped, others, layer, x_BTD, batch):
        block = of_layer(joined(nest(scoped), others)[LAYERS], layer)
        return self._blocks.run({LAYERS: block}, layer, x_BTD, batch)

    def _end_gradient(self, rest, x_BTD, batch):
        """Return each sample's NLL, and its gradient by what leaves the last block."""

        def total(x_BTD):
            logprobs_BA = end_logprobs(self._decoder, rest, x_BTD, batch, self._chunk)
            nll_B = sequence_nll(logprobs_BA, batch["weights"], self._loss)
            return jnp.sum(nll_B), nll_B

        gradient_BTD, nll_B = jax.grad(total, has_aux=True)(x_BTD)
        return nll_B, gradient_BTD

    def _add_block(self, scoped, others, layer, x_BTD, gradient_BTD, batch, total):
        """Add the magnitudes of one block's gradients over a chunk's samples; return the sum, and
        the gradients by what enters the block."""
        block = {LAYERS: of_layer(nest(scoped)[LAYERS], layer)}
        rest = {LAYERS: of_layer(others[LAYERS], layer)}

        def of_sample(block, x_TD, gradient_TD, sample):
            batch = {name: x[None] for name, x in sample.items()}

            def run(block, x_TD):
                return self._sample_blocks.run(joined(block, rest), layer, x_TD[None], batch)[0]

            _, back = jax.vjp(run, block, x_TD)
            return back(gradient_TD)

        of_samples = jax.vmap(
            of_sample, in_axes=(None, 0, 0, 0), out_axes=(None, 0), axis_name=SAMPLES
        )

        def add(total, xs):
            added, before_BTD = of_samples(block, *xs)
            return {path: total[path] + x for path, x in unnest(added).items()}, before_BTD

        xs = x_BTD, gradient_BTD, batch
        if self._sharder.platform != "cpu" or self._sharder.batch_ways > 1:
            return add(total, xs)
        # On CPU a product with an axis of samples is half as fast, and each sample's gradient
        # would be written and read again: one by one, in the order of the samples.
        total, before_S1TD = lax.scan(add, total, jax.tree.map(lambda x: x[:, None], xs))
        return total, before_S1TD[:, 0]

    def _add_chunk(self, scoped, others, layer, x_BTD, gradient_BTD, batch, total):
        """Do what `_add_block` does on one CPU device, for weights of products in float32: all but
        the weights' gradients for the chunk at once."""
        block = {LAYERS: of_layer(nest(scoped)[LAYERS], layer)}
        rest = {LAYERS: of_layer(others[LAYERS], layer)}
        seen: set[str] = set()

        def run(block, x_BTD):
            with nn.intercept_methods(adding(total, seen)):
                return self._blocks.run(joined(block, rest), layer, x_BTD, batch)

        sums, before_BTD = jax.vjp(run, block, x_BTD)[1](gradient_BTD)
        assert seen == total.keys(), "a scored weight is used in no product"
        return unnest(sums), before_BTD

    def chunk(self, in_flight: int) -> int:
        """Return how many samples the programs take at once, where so many gradients of one block
        may exist at once on each part of the batch axis."""
        if self._together:  # one gradient exists, of however many samples
            return max(in_flight, _TOGETHER)
        return in_flight * self._sharder.batch_ways

    def _put_block(self, scoped, block, layer):
        return unnest(put_layer(nest(scoped), nest(block), layer))

    def parts(self, batch: Mapping[str, jax.ShapeDtypeStruct], samples: int) -> list[Part]:
        """Return the programs that take a chunk, but for its begin, which looks up embeddings.

        Args:
          batch: shapes and shardings of a chunk.
          samples: so many are scored; what enters the blocks is kept of all.
        """
        sharder, config = self._sharder, self._decoder.config
        params = unnest(param_table(config).abstract(sharder))
        scoped, others, rest = self._parted(params)
        total = {}
        for row in self._rows:
            sharding = sharder.sharding(row.layer_axes)
            total[row.path] = jax.ShapeDtypeStruct(row.layer_shape, jnp.float32, sharding=sharding)
        rows, length = batch["tokens"].shape
        hidden = jax.ShapeDtypeStruct(
            (rows, length, config.embed_dim),
            self._decoder.dtype,
            sharding=sharder.sharding(("batch", "length", "features")),
        )
        layer, layers = jax.ShapeDtypeStruct((), jnp.int32), self._blocks.number
        every, kept = self._every(samples, length), self._kept_bytes(samples, length)
        weights, ends = local_bytes((scoped, others)), local_bytes(rest)

        def forward():
            return self._forward.trace(scoped, others, layer, hidden, batch)

        def end():
            return self._end.trace(rest, hidden, batch)

        def backward():
            return self._backward.trace(scoped, others, layer, hidden, hidden, batch, total)

        def put():
            return self._put.trace(scoped, total, layer)

        again = 0 if every == 1 else layers - -(-layers // every)
        return [
            Part("forward", forward, kept + ends, layers + again),
            Part("end", end, kept + weights),
            Part("backward", backward, kept + ends, layers),
            Part("put", put, kept + ends + local_bytes(others)),
        ]

    def holds(self, batch: Mapping[str, jax.ShapeDtypeStruct], samples: int) -> dict[str, int]:
        """Return the bytes that each device holds, by purpose; see `parts`."""
        params = unnest(param_table(self._decoder.config).abstract(self._sharder))
        scoped, others, rest = self._parted(params)
        block = local_bytes(scoped) // self._blocks.number
        rows, length = batch["tokens"].shape
        each = 1 if self._together else rows // self._sharder.batch_ways
        return {
            "scored weights, then sums": local_bytes(scoped),
            "other weights": local_bytes((others, rest)),
            "what enters the blocks": self._kept_bytes(samples, length),
            "sum of one block": block,
            f"gradients of one block, {each} in flight": each * block,
        }

    def _kept_bytes(self, samples: int, length: int) -> int:
        layers, every = self._blocks.number, self._every(samples, length)
        # Of every part of blocks the first's input, of one part all, and the gradients.
        return (-(-layers // every) + every) * self._input_bytes(samples, length)

    def _input_bytes(self, samples: int, length: int) -> int:
        """Bytes on each device of what enters one block, of all samples."""
        width = self._decoder.config.embed_dim * jnp.dtype(self._decoder.dtype).itemsize
        return -(-samples // self._sharder.batch_ways) * length * width

    def _every(self, samples: int, length: int) -> int:
        """Return of how many blocks the inputs of one are kept."""
        layers, weights = self._blocks.number, 0
        for row in self._rows:
            sharding = self._sharder.sharding(row.axes, row.shape, row.path)
            weights += 4 * math.prod(sharding.shard_shape(row.shape))
        keep = self._keep
        if keep == "auto":
            fits = layers * self._input_bytes(samples, length) <= _MOST_KEPT * weights
            keep = "all" if fits else "some"
        return 1 if keep == "all" else max(1, math.isqrt(layers))

    def _parted(self, flat: Mapping[str, Any]) -> tuple[dict, dict, dict]:
        """Return (scoped, flat; the blocks' others, nested; what is no block's, nested)."""
        scoped, others, rest = {}, {}, {}
        for path, x in flat.items():
            if path in self._paths:
                scoped[path] = x
            else:
                (others if path.startswith(f"{LAYERS}/") else rest)[path] = x
        return scoped, nest(others), nest(rest)

    def measure(
        self,
        params: dict[str, jax.Array],
        batches: Sequence[Batch],
        title: str,
        check: Callable[[Sequence[jax.Array]], None],
    ) -> dict[str, jax.Array]:
        """Return the sums of |gradient| over all samples.

        Args:
          params: flat, of the derived model, float32. Emptied: the buffers of the scope's weights
            take the sums.
          batches: on the mesh; rows that are no sample have no answer token.
          title: of the progress bar.
          check: given each sample's NLL, by batch, before the backward pass; may raise.
        """
        scoped, others, rest = self._parted(params)
        params.clear()
        samples = sum(batch["tokens"].shape[0] for batch in batches)
        every = self._every(samples, max(batch["tokens"].shape[1] for batch in batches))
        layers = range(self._blocks.number)
        kept: list[dict[int, jax.Array]] = [{} for _ in batches]  # by block, of each batch
        gradients, nlls = [], []
        again = len(layers) - len(layers[::every])
        with progress((2 * len(layers) + again) * len(batches), title, "block") as bar:

            def run(layer, x_BTD, batch):
                x_BTD = self._forward(scoped, others, jnp.int32(layer), x_BTD, batch)
                bar.update()
                return x_BTD

            for inputs, batch in zip(kept, batches):
                x_BTD = self._begin(rest, batch)
                for layer in layers:
                    if layer % every == 0:
                        inputs[layer] = x_BTD
                    x_BTD = run(layer, x_BTD, batch)
                nll_B, gradient_BTD = self._end(rest, x_BTD, batch)
                nlls.append(nll_B)
                gradients.append(gradient_BTD)
                jax.block_until_ready(nlls[-1])  # the bar shows finished blocks
            check(nlls)
            for layer in reversed(layers):
                total = self._zeros()
                for i, (inputs, batch) in enumerate(zip(kept, batches)):
                    first = layer - layer % every
                    for earlier in range(first, layer):  # the last block of a part comes first
                        if earlier + 1 not in inputs:
                            inputs[earlier + 1] = run(earlier, inputs[earlier], batch)
                    total, gradients[i] = self._backward(
                        scoped,
                        others,
                        jnp.int32(layer),
                        inputs.pop(layer),
                        gradients[i],
                        batch,
                        total,
                    )
                    bar.update()
                scoped = self._put(scoped, total, jnp.int32(layer))
                jax.block_until_ready(total)  # the bar shows finished blocks
        return scoped
