"""Likelihood of given answers, and how far a model's predictions are from another one's."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from safepatch_jax.data.chat import Example
from safepatch_jax.evaluation.engine import Done, Engine, length_of
from safepatch_jax.models.config import same_architecture
from safepatch_jax.numerics import NotFinite
from safepatch_jax.runtime import processes
from safepatch_jax.runtime.console import progress
from safepatch_jax.training.objective import answer_divergences, answer_logprobs
from safepatch_jax.training.step import put_batch


def answer_likelihoods(
    engine: Engine, examples: Sequence[Example], other: Engine | None, title: str, done: Done
) -> None:
    """Compute the NLL of each answer, and the divergence of the two models' predictions at its
    tokens.

    Args:
      engine: the model.
      examples: prompts with answers.
      other: the model to compare with (the backbone), of the same architecture; None for none.
      done: called with (index, {'nll', 'tokens', 'kl'}) for each example: sums over its answer
        tokens, in nats. 'kl' is KL(other || model); without another model it is not there.

    Raises:
      ValueError: another architecture, or an NLL that is NaN or infinite.
    """
    if other is not None and not same_architecture(other.config, engine.config):
        raise ValueError(
            "the two models are of different architectures; their predictions are compared where "
            "config.json says the same. Give --against the model that was patched, or a suite "
            "without measures of kind 'text'."
        )
    reference = other and other.params
    with progress(len(examples), title, "answer") as bar:
        for rows, group in engine.groups([length_of(example) for example in examples]):
            batch = put_batch(engine.lay_out([examples[i] for i in group], rows), engine.sharder)
            nll_B, kl_B = _sums(engine.decoder, engine.params, reference, batch)
            for i, nll, kl in zip(group, processes.fetch(nll_B), processes.fetch(kl_B)):
                if not math.isfinite(nll):
                    raise NotFinite(
                        f"{title}: an NLL is {nll}: the model's weights hold NaN or overflow."
                    )
                row = {"nll": float(nll), "tokens": len(examples[i].answer_ids)}
                if other is not None:
                    row["kl"] = float(kl)
                done(i, row)
            bar.update(len(group))


@functools.partial(jax.jit, static_argnames="decoder")
def _sums(decoder, params: Any, reference: Any | None, batch) -> tuple[jax.Array, jax.Array]:
    """Return for each answer its NLL and the sum of KL(reference || model), float32 [B]."""
    if reference is None:
        logprobs_BA = answer_logprobs(decoder, params, batch)
        kl_BA = jnp.zeros_like(batch["weights"])
    else:
        logprobs_BA, kl_BA = answer_divergences(decoder, params, reference, batch)
    return -jnp.sum(logprobs_BA, axis=-1), jnp.sum(kl_BA, axis=-1)
