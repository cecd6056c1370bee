"""Sensitivity: the sum over samples of |dNLL/dW|, absolute value per sample.

SNIP's importance is I(W) = sum over samples of |W * dNLL/dW|. W does not depend on the sample, so
I(W) = |W| * sum |dNLL/dW|. Accumulated is the second factor, the sensitivity; the choice of W
(patch entry or weight) then costs nothing and can be changed without new gradients. A batched
gradient gives |sum dNLL/dW| of each batch, another ranking: faster, as an option, with a measure of
how far the two agree.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from safepatch_jax.data.chat import Example, lengths, training_batch
from safepatch_jax.mesh import Sharder, local_bytes
from safepatch_jax.models.decoder import Decoder
from safepatch_jax.models.layerwise import Part
from safepatch_jax.models.table import Param, nest, param_table, unnest
from safepatch_jax.numerics import flushed
from safepatch_jax.patching.layerwise_scores import BlockScores
from safepatch_jax.patching.magnitudes import SAMPLES, Magnitudes
from safepatch_jax.patching.selection import top_mask
from safepatch_jax.patching.tensor import importance_of
from safepatch_jax.runtime.console import progress
from safepatch_jax.training.batch import put_batch
from safepatch_jax.training.objective import answer_logprobs, sequence_nll


class SensitivityMeter:
    """Compiles the programs that sum |gradient|; serves both patches.

    Magnitudes of each sample's gradient by weights of the blocks are summed block by block, see
    `layerwise_scores`. Where other weights are scored too, and for batches, the whole tree's
    gradient is added to an accumulator: 4 bytes a parameter each for weight, accumulator and what
    is added, over all devices.

    Args:
      decoder: the model.
      rows: what is scored.
      sharder: the mesh.
      loss: 'mean' or 'sum' over a sequence's answer tokens.
      chunk: see `answer_logprobs`.
      in_flight: samples on each part of the batch axis whose gradients of one block exist at once;
        of the whole tree it is one.
      keep: see `BlockScores`.
    """

    def __init__(
        self,
        decoder: Decoder,
        rows: Sequence[Param],
        sharder: Sharder,
        loss: str = "mean",
        chunk: int = 64,
        in_flight: int = 1,
        keep: str = "auto",
    ):
        self._rows, self._sharder, self._loss, self._chunk = rows, sharder, loss, chunk
        self._decoder, self._blocks = decoder, None
        self._in_flight = sharder.batch_ways
        if all(row.stacked for row in rows):
            self._blocks = BlockScores(decoder, rows, sharder, loss, chunk, keep)
            self._in_flight = self._blocks.chunk(in_flight)
        shardings = {row.path: sharder.sharding(row.axes, row.shape, row.path) for row in rows}
        self._zeros = jax.jit(
            lambda: {row.path: jnp.zeros(row.shape, jnp.float32) for row in rows},
            out_shardings=shardings,
        )
        out = shardings, sharder.replicated()
        self._add_samples = jax.jit(self._samples, donate_argnums=0, out_shardings=out)
        self._add_batch = jax.jit(self._batch, donate_argnums=0, out_shardings=out)

    def _batch(self, total, scoped, rest, batch):
        """Add |gradient of the batch's summed NLL|."""

        def objective(scoped):
            logprobs_BA = answer_logprobs(
                self._decoder, nest({**rest, **scoped}), batch, self._chunk
            )
            return jnp.sum(sequence_nll(logprobs_BA, batch["weights"], self._loss))

        nll, gradients = jax.value_and_grad(objective)(scoped)
        return {path: total[path] + flushed(jnp.abs(g)) for path, g in gradients.items()}, nll

    def _samples(self, total, scoped, rest, batch):
        """Add the sum over the batch's samples of |gradient of a sample's NLL|."""
        # The batch axis of the mesh is that of the samples.
        within = self._sharder.with_rules(batch=())
        magnitudes = Magnitudes(self._sharder)
        decoder = self._decoder.clone(sharder=within, tap=magnitudes, attention="xla")

        def objective(scoped, sample):
            tapped = {}
            for row in self._rows:  # the decoder taps those of the blocks
                weight = scoped[row.path]
                tapped[row.path] = weight if row.stacked else magnitudes(weight, row)
            batch = {name: x[None] for name, x in sample.items()}
            logprobs_1A = answer_logprobs(decoder, nest({**rest, **tapped}), batch, self._chunk)
            return sequence_nll(logprobs_1A, batch["weights"], self._loss)[0]

        nll_B, gradients = jax.vmap(
            jax.value_and_grad(objective), in_axes=(None, 0), out_axes=(0, None), axis_name=SAMPLES
        )(scoped, batch)
        return {path: total[path] + g for path, g in gradients.items()}, nll_B

    def parts(
        self, batch: Mapping[str, jax.ShapeDtypeStruct], samples: int, batched: bool = False
    ) -> list[Part]:
        """Return the programs that take a batch of these shapes and shardings; nothing is run.

        Args:
          batch: of `in_flight` samples; of any number where it is `batched`.
          samples: so many are scored.
          batched: the program of batches' gradients, not of samples'.
        """
        if self._blocks and not batched:
            return self._blocks.parts(batch, samples)

        def trace():
            params = unnest(param_table(self._decoder.config).abstract(self._sharder))
            scoped = {row.path: params.pop(row.path) for row in self._rows}
            add = self._add_batch if batched else self._add_samples
            return add.trace(scoped, scoped, params, batch)

        return [Part("", trace)]

    def holds(self, batch: Mapping[str, jax.ShapeDtypeStruct], samples: int) -> dict[str, int]:
        """Return the bytes that each device holds while samples are scored one by one, by purpose;
        see `parts`."""
        if self._blocks:
            return self._blocks.holds(batch, samples)
        table = param_table(self._decoder.config)
        params = unnest(table.abstract(self._sharder))
        scoped = [params.pop(row.path) for row in self._rows]
        return {
            "scored weights": local_bytes(scoped),
            "other weights": local_bytes(params),
            "sums": local_bytes(scoped),
            "what is added": local_bytes(scoped),
        }

    @property
    def in_flight(self) -> int:
        """Samples that the per-sample program takes at once, over all devices."""
        return self._in_flight

    def measure(
        self,
        params: dict[str, jax.Array],
        examples: Sequence[Example],
        shapes: Sequence[tuple[int, int]],
        title: str,
        batch_size: int = 1,
    ) -> dict[str, jax.Array]:
        """Return the sum of |gradient| over samples, or over batches (of the batch's summed NLL).

        Args:
          params: flat ``{path: array}`` of the derived model, float32. It is emptied, and the
            scope's arrays may be taken over.
          examples: calibration samples.
          shapes: T and A to which samples may be padded, ascending; the last holds every sample.
            With several, samples are taken in the order of their length.
          title: shown at the progress bar.
          batch_size: samples a gradient; 1 is SNIP's own reading. The last batch may have fewer.

        Returns:
          flat ``{path: array}`` over the scope, float32, shaped and sharded as the parameters.

        Raises:
          ValueError: the NLL of a sample, or of a batch, is NaN or infinite.
        """
        size = batch_size if batch_size > 1 else self._in_flight
        if self._sharder.one_cpu and batch_size == 1:
            size = min(size, len(examples))
        if len(shapes) > 1:
            examples = sorted(examples, key=lambda e: len(e.prompt_ids) + len(e.answer_ids))
        batches = []
        for start in range(0, len(examples), size):
            chosen = examples[start : start + size]
            shape = next(shape for shape in shapes if shape[0] >= lengths(chosen, 1)[0])
            batches.append(put_batch(_full_batch(chosen, shape, size), self._sharder))
        if batch_size == 1 and self._blocks:
            check = functools.partial(_check_losses, title=title, size=size)
            total = self._blocks.measure(params, batches, title, check)
        else:
            add = self._add_batch if batch_size > 1 else self._add_samples
            total, losses = self._add_all(add, params, batches, title)
            _check_losses(losses, title, size)
        return total

    def _add_all(self, add, params, batches, title):
        """Return (sums of |gradient|, NLLs by batch), by a program that adds a batch's."""
        scoped = {row.path: params[row.path] for row in self._rows}
        rest = {path: x for path, x in params.items() if path not in scoped}
        params.clear()
        total, losses = self._zeros(), []
        with progress(len(batches), title, "batch") as bar:
            for batch in batches:
                total, nll = add(total, scoped, rest, batch)
                losses.append(nll)
                if len(losses) > 1:
                    # One batch stays in flight; the bar shows finished ones.
                    jax.block_until_ready(losses[-2])
                bar.update()
        return total, losses


def _check_losses(losses: Sequence[jax.Array], title: str, size: int) -> None:
    """Raise ValueError if a batch's NLL, of so many samples each, is NaN or infinite."""
    bad = [i for i, nll in enumerate(losses) if not np.all(np.isfinite(np.asarray(nll)))]
    if bad:
        raise ValueError(
            f"{title}: the NLL is not finite in {len(bad)} of {len(losses)} batches (first: "
            f"from sample {bad[0] * size}); the derived model is broken. Lower "
            "derive.*_learning_rate."
        )


def _full_batch(
    examples: Sequence[Example], shape: tuple[int, int], size: int
) -> dict[str, np.ndarray]:
    """Lay examples out in so many rows; rows beyond them repeat the last one with no answer token,
    so with gradient 0."""
    padding = [examples[-1]] * (size - len(examples))
    batch = training_batch([*examples, *padding], *shape)
    batch["weights"][len(examples) :] = 0
    return batch


def witness_row(rows: Sequence[Param]) -> Param:
    """Return the weight on which the values of score.mode are compared: the last linear one of the
    blocks (in all layers)."""
    return next(row for row in reversed(rows) if row.kind == "linear")  # every scope holds some


@functools.partial(jax.jit, static_argnames="kind")
def mode_agreement(
    backbone: jax.Array,
    derived: jax.Array,
    sensitivities: tuple[jax.Array, jax.Array],
    k: jax.Array,
    *,
    kind: str,
) -> tuple[jax.Array, jax.Array]:
    """Return in how many entries the top sets by two sensitivities agree, and how many either
    holds; int32 [L].

    Args:
      backbone, derived: one weight, [L, out, in].
      sensitivities: of the same shape, by the two values of score.mode.
      k: size of each matrix's top set.
      kind: see `importance_of`.
    """

    def one_matrix(xs):
        backbone, derived, sensitivities = xs
        patch = derived - backbone.astype(jnp.float32)
        a, b = (top_mask(importance_of(patch, derived, s, kind), k) for s in sensitivities)
        return jnp.sum(a & b, dtype=jnp.int32), jnp.sum(a | b, dtype=jnp.int32)

    return jax.lax.map(one_matrix, (backbone, derived, sensitivities))
