"""SNIP importance (METHOD 3a): I(W) = sum over samples of |W * dNLL/dW|, absolute value per sample.

W does not depend on the sample, so I(W) = |W| * sum |dNLL/dW|. We accumulate the second factor, the sensitivity; the
choice of W (patch entry or weight) then costs nothing and can be changed without new gradients. A batched gradient
gives |sum dNLL/dW| of each batch, another ranking: faster, as an option, with a measure of how far the two agree.
"""

from __future__ import annotations

import functools
from typing import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from safepatch_jax.console import progress
from safepatch_jax.data.chat import Example, training_batch
from safepatch_jax.mesh import Sharder
from safepatch_jax.models.decoder import Decoder
from safepatch_jax.models.table import Param, nest
from safepatch_jax.patching.layer import importance
from safepatch_jax.patching.selection import top_mask
from safepatch_jax.training.objective import answer_logprobs, sequence_nll
from safepatch_jax.training.step import put_batch


class SensitivityMeter:
    """Compiles one program that adds one batch's |gradient| to a sharded accumulator; serves both patches."""

    def __init__(self, decoder: Decoder, rows: Sequence[Param], sharder: Sharder, loss: str = "mean"):
        self._rows, self._sharder = rows, sharder
        self._shardings = {row.path: sharder.sharding(row.axes, row.shape, row.path) for row in rows}

        def add(total, scoped, rest, batch):
            def objective(scoped):
                logprobs_BA = answer_logprobs(decoder, nest({**rest, **scoped}), batch)
                return jnp.sum(sequence_nll(logprobs_BA, batch["weights"], loss))

            nll, gradients = jax.value_and_grad(objective)(scoped)
            return {path: total[path] + jnp.abs(g) for path, g in gradients.items()}, nll

        self._add = jax.jit(add, donate_argnums=0, out_shardings=(self._shardings, sharder.replicated()))

    def measure(self, params: dict[str, jax.Array], examples: Sequence[Example], shape: tuple[int, int],
                title: str, batch_size: int = 1) -> dict[str, jax.Array]:
        """Return the sum over batches of |d(summed NLL of the batch)/dW|: over samples, for batches of one.

        Args:
          params: flat ``{path: array}`` of the derived model, float32.
          examples: calibration samples.
          shape: T and A to which samples are padded.
          title: shown at the progress bar.
          batch_size: samples a gradient; the last batch may have fewer.

        Returns:
          flat ``{path: array}`` over the scope, float32, shaped and sharded as the parameters.

        Raises:
          ValueError: the NLL of a sample, or of a batch, is NaN or infinite.
        """
        scoped = {row.path: params[row.path] for row in self._rows}
        rest = {path: x for path, x in params.items() if path not in scoped}
        total = {row.path: jnp.zeros(row.shape, jnp.float32, device=self._shardings[row.path]) for row in self._rows}
        losses = []
        with progress(len(examples), title, "sample") as bar:
            for start in range(0, len(examples), batch_size):
                chosen = examples[start:start + batch_size]
                batch = put_batch(_full_batch(chosen, shape, batch_size), self._sharder)
                total, nll = self._add(total, scoped, rest, batch)
                losses.append(nll)
                if len(losses) > 1:
                    jax.block_until_ready(losses[-2])  # one batch stays in flight; the bar shows finished ones
                bar.update(len(chosen))
        bad = [i * batch_size for i, nll in enumerate(losses) if not np.isfinite(float(nll))]
        if bad:
            raise ValueError(f"{title}: the NLL of {len(bad)} of {len(losses)} samples or batches (first: from sample "
                             f"{bad[0]}) is not finite; the derived model is broken. Lower derive.*_learning_rate.")
        return total


def _full_batch(examples: Sequence[Example], shape: tuple[int, int], size: int) -> dict[str, np.ndarray]:
    """Lay examples out in so many rows; rows beyond them repeat the last one with no answer token, so with gradient 0."""
    batch = training_batch([*examples, *[examples[-1]] * (size - len(examples))], *shape)
    batch["weights"][len(examples):] = 0
    return batch


def witness_row(rows: Sequence[Param]) -> Param:
    """Return the weight on which the score modes are compared: the last linear one of the blocks (all layers)."""
    return next(row for row in reversed(rows) if row.kind == "linear")  # every scope holds some


@functools.partial(jax.jit, static_argnames="kind")
def mode_agreement(backbone: jax.Array, derived: jax.Array, sensitivities: tuple[jax.Array, jax.Array], k: jax.Array, *,
                   kind: str) -> tuple[jax.Array, jax.Array]:
    """Return in how many entries the top sets by two sensitivities agree, and how many either holds; int32 [L].

    Args:
      backbone, derived: one weight, [L, out, in].
      sensitivities: of the same shape, by the two modes.
      k: size of each matrix's top set.
      kind: see `importance`.
    """
    def one_layer(layer):
        backbone, derived, sensitivities = layer
        a, b = (top_mask(importance(derived - backbone.astype(jnp.float32), derived, s, kind), k) for s in sensitivities)
        return jnp.sum(a & b, dtype=jnp.int32), jnp.sum(a | b, dtype=jnp.int32)

    return jax.lax.map(one_layer, (backbone, derived, sensitivities))
