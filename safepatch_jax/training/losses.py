"""The losses of the train step: what is made, for each sequence, of the log-probabilities of its answer tokens.

A loss is called with the log-probabilities [B, A] (0 where there is no token) and the batch, and returns [B]. The train step takes
the mean over sequences, and its sign: +1 minimises.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from safepatch_jax import processes
from safepatch_jax.data.chat import Example, lengths, training_batch
from safepatch_jax.mesh import Sharder
from safepatch_jax.models.decoder import Decoder
from safepatch_jax.training.objective import answer_logprobs, sequence_nll

Loss = Callable[[jax.Array, Mapping[str, jax.Array]], jax.Array]


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """NLL of the answer (the paper's Eq. 1-2), over its tokens the 'mean' or the 'sum'. With sign -1: gradient ascent."""

    reduction: str = "mean"

    def __call__(self, logprobs_BA: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
        return sequence_nll(logprobs_BA, batch["weights"], self.reduction)


@dataclasses.dataclass(frozen=True)
class NPO:
    """Negative preference optimisation (Zhang et al. 2024, arXiv 2404.05868): -(2/beta) log sigmoid(-beta log(pi / pi_ref)).

    Both probabilities are those of the whole answer. The batch holds log pi_ref as 'reference' [B, 1], see `with_reference`.
    """

    beta: float = 0.1

    def __call__(self, logprobs_BA: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
        ratio_B = jnp.sum(logprobs_BA, axis=-1) - batch["reference"][:, 0]
        return -2 / self.beta * jax.nn.log_sigmoid(-self.beta * ratio_B)


@dataclasses.dataclass(frozen=True)
class SimNPO:
    """NPO without a reference, by the mean over the answer's tokens (Fan et al. 2024, arXiv 2410.07163):
    -(2/beta) log sigmoid(-beta/|y| log pi - gamma)."""

    beta: float = 2.5
    gamma: float = 0.0

    def __call__(self, logprobs_BA: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
        mean_B = -sequence_nll(logprobs_BA, batch["weights"], "mean")
        return -2 / self.beta * jax.nn.log_sigmoid(-self.beta * mean_B - self.gamma)


def with_reference(decoder: Decoder, params: Any, examples: Sequence[Example], batch_size: int, sharder: Sharder) -> list[Example]:
    """Return the examples with the log-probability that a model gives each answer.

    Args:
      params: nested, of the reference model.
      batch_size: sequences that run together.
    """
    from safepatch_jax.training.step import put_batch

    shape, found = lengths(examples), []
    for start in range(0, len(examples), batch_size):
        group = list(examples[start:start + batch_size])
        filled = group + [group[-1]] * (batch_size - len(group))
        sums = processes.fetch(_answer_sums(decoder, params, put_batch(training_batch(filled, *shape), sharder)))
        found += [dataclasses.replace(e, reference=float(x)) for e, x in zip(group, sums)]
    return found


@functools.partial(jax.jit, static_argnames="decoder")
def _answer_sums(decoder: Decoder, params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    return jnp.sum(answer_logprobs(decoder, params, batch), axis=-1)
