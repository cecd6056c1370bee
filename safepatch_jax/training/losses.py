"""The losses of the train step: what is made, for each sequence, of the log-probabilities of its answer tokens.

A loss is called with the log-probabilities [B, A] (0 where there is no token) and the batch, and returns [B]. The train step
takes the mean over sequences, and its sign: +1 minimises.
"""

from __future__ import annotations

import dataclasses
from typing import Callable, Mapping

import jax
import jax.numpy as jnp

from safepatch_jax.training.objective import sequence_nll

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

    Both probabilities are those of the whole answer. The batch holds log pi_ref as 'reference' [B, 1], see `training.reference`.
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
