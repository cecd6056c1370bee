"""The losses of the train step: what is made, for each sequence, of the log-probabilities of its
answer tokens.

A loss is called with the log-probabilities [B, A] (0 where there is no token) and the batch, and
returns [B]. One that compares with a reference model is also given KL(reference || model) [B, A].
The train step takes the mean over sequences, and its sign: +1 minimises.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp

from safepatch_jax.data.chat import BENIGN, HARMFUL, MISMATCH
from safepatch_jax.training.objective import sequence_nll


class Loss(Protocol):
    """What the train step asks of a loss; `compares` tells whether it is given the divergence from
    a reference model."""

    compares: ClassVar[bool]

    def __call__(
        self, logprobs_BA: jax.Array, batch: Mapping[str, jax.Array], *kl_BA: jax.Array
    ) -> jax.Array: ...


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """NLL of the answer (the paper's Eq. 1-2), over its tokens the 'mean' or the 'sum'. With sign
    -1: gradient ascent."""

    compares: ClassVar[bool] = False
    reduction: str = "mean"

    def __call__(self, logprobs_BA: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
        return sequence_nll(logprobs_BA, batch["weights"], self.reduction)


@dataclasses.dataclass(frozen=True)
class NPO:
    """Negative preference optimisation (Zhang et al. 2024, arXiv 2404.05868): -(2/beta) log
    sigmoid(-beta log(pi / pi_ref)).

    Both probabilities are those of the whole answer. The batch holds log pi_ref as 'reference' [B,
    1], see `training.reference`.
    """

    compares: ClassVar[bool] = False
    beta: float = 0.1

    def __call__(self, logprobs_BA: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
        ratio_B = jnp.sum(logprobs_BA, axis=-1) - batch["reference"][:, 0]
        return -2 / self.beta * jax.nn.log_sigmoid(-self.beta * ratio_B)


@dataclasses.dataclass(frozen=True)
class SimNPO:
    """NPO without a reference, by the mean over the answer's tokens (Fan et al. 2024, arXiv
    2410.07163):
    -(2/beta) log sigmoid(-beta/|y| log pi - gamma)."""

    compares: ClassVar[bool] = False
    beta: float = 2.5
    gamma: float = 0.0

    def __call__(self, logprobs_BA: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
        mean_B = -sequence_nll(logprobs_BA, batch["weights"], "mean")
        return -2 / self.beta * jax.nn.log_sigmoid(-self.beta * mean_B - self.gamma)


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """Ascent on harmful answers, benign answers to harmful questions, and a tie to the reference
    model on benign answers (Yao et al. 2023, arXiv 2310.10683): ascent * -NLL(harmful) + mismatch *
    NLL(mismatch) + divergence * KL(reference || model).

    Each term is the mean over a sequence's answer tokens, then over the sequences of its part. The
    batch says what part a row is of ('part' [B, 1], see `data.chat`) and how many rows there are
    for each of its part ('rows_per_own' [B, 1], see `rows_per_own`), by which a row counts; so the
    mean over all rows is the sum of the three terms.
    """

    compares: ClassVar[bool] = True
    ascent: float = 0.5
    mismatch: float = 1.0
    divergence: float = 1.0

    def __call__(
        self, logprobs_BA: jax.Array, batch: Mapping[str, jax.Array], kl_BA: jax.Array
    ) -> jax.Array:
        nll_B, kl_B = (
            sequence_nll(x_BA, batch["weights"], "mean") for x_BA in (logprobs_BA, -kl_BA)
        )
        part_B = batch["part"][:, 0]
        terms_B = jnp.select(
            [part_B == HARMFUL, part_B == MISMATCH, part_B == BENIGN],
            [-self.ascent * nll_B, self.mismatch * nll_B, self.divergence * kl_B],
        )
        return terms_B * batch["rows_per_own"][:, 0]


def rows_per_own(part_B1: jax.Array) -> jax.Array:
    """Return for each row the rows of the whole batch over those of the row's own part, float32 [B,
    1]."""
    return part_B1.shape[0] / jnp.sum(
        part_B1 == part_B1.T, axis=1, keepdims=True, dtype=jnp.float32
    )
