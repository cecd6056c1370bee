"""SNIP importance (METHOD 3a): I(W) = sum over samples of |W * dNLL/dW|, absolute value per sample.

W does not depend on the sample, so I(W) = |W| * sum |dNLL/dW|. We accumulate the second factor, the sensitivity; the
choice of W (patch entry or weight) then costs nothing and can be changed without new gradients. A batched gradient
would give |sum dNLL/dW|, another ranking.
"""

from __future__ import annotations

from typing import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from safepatch_jax.console import progress
from safepatch_jax.data.chat import Example, training_batch
from safepatch_jax.mesh import Sharder
from safepatch_jax.models.decoder import Decoder
from safepatch_jax.models.table import Param, nest
from safepatch_jax.training.objective import answer_logprobs, sequence_nll
from safepatch_jax.training.step import put_batch


class SensitivityMeter:
    """Compiles one program that adds one sample's |gradient| to a sharded accumulator; serves both patches."""

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
                title: str) -> dict[str, jax.Array]:
        """Return the sum over samples of |dNLL/dW|.

        Args:
          params: flat ``{path: array}`` of the derived model, float32.
          examples: calibration samples.
          shape: T and A to which samples are padded.
          title: shown at the progress bar.

        Returns:
          flat ``{path: array}`` over the scope, float32, shaped and sharded as the parameters.

        Raises:
          ValueError: a sample's NLL is NaN or infinite.
        """
        scoped = {row.path: params[row.path] for row in self._rows}
        rest = {path: x for path, x in params.items() if path not in scoped}
        total = {row.path: jnp.zeros(row.shape, jnp.float32, device=self._shardings[row.path]) for row in self._rows}
        losses = []
        with progress(len(examples), title, "sample") as bar:
            for example in examples:
                batch = put_batch(training_batch([example], *shape), self._sharder)
                total, nll = self._add(total, scoped, rest, batch)
                losses.append(nll)
                if len(losses) > 1:
                    jax.block_until_ready(losses[-2])  # one sample stays in flight; the bar shows finished ones
                bar.update()
        bad = [i for i, nll in enumerate(losses) if not np.isfinite(float(nll))]
        if bad:
            raise ValueError(f"{title}: the NLL of {len(bad)} of {len(losses)} samples (first: number {bad[0]}) is not "
                             "finite; the derived model is broken. Lower derive.*_learning_rate.")
        return total
