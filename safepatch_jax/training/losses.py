"""The losses of the train step: a number for each sequence, from the log-probabilities of its
answer tokens.

A loss is called with the log-probabilities [B, A] (0 where there is no token) and the batch, and
returns [B]. One that compares with a reference model is also given KL(reference || model) [B, A].
The train step takes the mean over sequences, times its sign: +1 minimises.
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
    """What the train step needs of a loss; `compares` says whether it is given the divergence from
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
    batch has each row's part ('part' [B, 1], see `data.chat`) and weight ('row_weights' [B, 1], see
    `row_weights`), with which the mean over all rows is the sum of the three terms.
    """

    compares: ClassVar[bool] = True
    ascent: float = 0.5
    mismatch: float = 1.0
    divergence: float = 1.0

    def __call__(
        self, logprobs_BA: jax.Array, batch: Mapping[str, jax.Array], kl_BA: jax.Array
    ) -> jax.Array:
        negative_BA = -kl_BA
        nll_B = sequence_nll(logprobs_BA, batch["weights"], "mean")
        kl_B = sequence_nll(negative_BA, batch["weights"], "mean")
        part_B = batch["part"][:, 0]
        terms_B = jnp.select(
            [part_B == HARMFUL, part_B == MISMATCH, part_B == BENIGN],
            [-self.ascent * nll_B, self.mismatch * nll_B, self.divergence * kl_B],
        )
        return terms_B * batch["row_weights"][:, 0]


def row_weights(part_B1: jax.Array) -> jax.Array:
    """Return for each row: rows of the batch / rows of the batch in its part, float32 [B, 1]."""
    same_BB = part_B1 == part_B1.T
    return part_B1.shape[0] / jnp.sum(same_BB, axis=1, keepdims=True, dtype=jnp.float32)
