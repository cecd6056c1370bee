"""Log-probabilities of the answers by a reference model, for losses that compare with one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from safepatch_jax.data.chat import Example, lengths, training_batch
from safepatch_jax.mesh import Sharder
from safepatch_jax.models.decoder import Decoder
from safepatch_jax.runtime import processes
from safepatch_jax.training.batch import put_batch
from safepatch_jax.training.objective import answer_logprobs


def with_reference(
    decoder: Decoder,
    params: Any,
    examples: Sequence[Example],
    batch_size: int,
    sharder: Sharder,
) -> list[Example]:
    """Return the examples with the log-probability that a model gives each answer.

    Args:
      params: nested, of the reference model.
      batch_size: sequences that run together.
    """
    shape, result = lengths(examples), []
    for start in range(0, len(examples), batch_size):
        group = list(examples[start : start + batch_size])
        filled = group + [group[-1]] * (batch_size - len(group))
        batch = put_batch(training_batch(filled, *shape), sharder)
        sums = processes.fetch(_answer_sums(decoder, params, batch))
        result += [dataclasses.replace(e, reference=float(x)) for e, x in zip(group, sums)]
    return result


@functools.partial(jax.jit, static_argnames="decoder")
def _answer_sums(decoder: Decoder, params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    return jnp.sum(answer_logprobs(decoder, params, batch), axis=-1)
