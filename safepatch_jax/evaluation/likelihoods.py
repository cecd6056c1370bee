"""Likelihood of given answers, and how far a model's predictions are from another one's."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from safepatch_jax.data.chat import Example
from safepatch_jax.evaluation.batching import length_of
from safepatch_jax.evaluation.engine import Done, Engine
from safepatch_jax.models.config import same_architecture
from safepatch_jax.numerics import NotFinite
from safepatch_jax.runtime import processes
from safepatch_jax.runtime.console import progress
from safepatch_jax.training.batch import put_batch
from safepatch_jax.training.objective import answer_divergences, answer_logprobs


def answer_likelihoods(
    engine: Engine,
    examples: Sequence[Example],
    other: Engine | None,
    title: str,
    done: Done,
    forced: int = 0,
) -> None:
    """Compute the NLL of each answer, and the divergence of the two models' predictions at its
    tokens.

    Args:
      engine: the model.
      examples: prompts with answers.
      other: the model to compare with (the backbone), of the same architecture; None for none.
      done: called with (index, {'nll', 'tokens', 'kl'}) for each example: sums over its answer
        tokens, in nats. 'kl' is KL(other || model); without another model it is not there.
      forced: so many first tokens of each answer do not count in 'nll' and 'tokens' (which may be
        0); their NLL is 'opening_nll'.

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
    prefix = engine.batching.prefix([example.prompt_ids for example in examples])
    with progress(len(examples), title, "answer") as bar:
        for rows, group in engine.batching.groups(list(map(length_of, examples)), few_idle=True):
            laid_out = engine.lay_out([examples[i] for i in group], rows, prefix)
            batch = put_batch(laid_out, engine.sharder)
            sums = _sums(engine.decoder, engine.params, reference, batch, forced)
            for i, nll, kl, opening in zip(group, *map(processes.fetch, sums)):
                if not math.isfinite(nll):
                    raise NotFinite(
                        f"{title}: an NLL is {nll}: the model's weights hold NaN or overflow."
                    )
                tokens = len(examples[i].answer_ids)
                row = {"nll": float(nll), "tokens": max(0, tokens - forced)}
                if forced:
                    row["opening_nll"] = float(opening)
                if other is not None:
                    row["kl"] = float(kl)
                done(i, row)
            bar.update(len(group))


@functools.partial(jax.jit, static_argnames=("decoder", "forced"))
def _sums(
    decoder, params: Any, reference: Any | None, batch, forced: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return for each answer its NLL after the forced tokens, the sum of KL(reference || model),
    and the NLL of the forced tokens, float32 [B]."""
    if reference is None:
        logprobs_BA = answer_logprobs(decoder, params, batch)
        kl_BA = jnp.zeros_like(batch["weights"])
    else:
        logprobs_BA, kl_BA = answer_divergences(decoder, params, reference, batch)
    kl_B = jnp.sum(kl_BA, axis=-1)
    if not forced:
        return -jnp.sum(logprobs_BA, axis=-1), kl_B, jnp.zeros_like(kl_B)
    opening_BA = jnp.where(jnp.arange(logprobs_BA.shape[1]) < forced, logprobs_BA, 0.0)
    opening_B = -jnp.sum(opening_BA, axis=-1)
    return -jnp.sum(logprobs_BA - opening_BA, axis=-1), kl_B, opening_B
