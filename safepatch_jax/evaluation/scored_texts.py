"""Texts whose likelihood is taken, each read once for all its ends."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from safepatch_jax.data.chat import Example
from safepatch_jax.models.decoder import Decoder
from safepatch_jax.training.objective import over_answers, target_logprobs

Pair = tuple[Sequence[int], Sequence[int]]  # context and continuation, token ids


class Text(NamedTuple):
    """A text that the model must read once for all pairs that differ in their last token alone.

    So the choices of a question are one text where each is one token.
    """

    example: Example
    indices: list[int]  # of the pairs
    ends: list[int]  # last token of each pair


def texts_of(pairs: Sequence[Pair]) -> list[Text]:
    """Return the texts that hold these (context, continuation), token ids."""
    texts: dict[tuple, Text] = {}
    for i, (context, continuation) in enumerate(pairs):
        key = tuple(context), tuple(continuation[:-1])
        if key not in texts:
            texts[key] = Text(Example(tuple(context), tuple(continuation)), [], [])
        texts[key].indices.append(i)
        texts[key].ends.append(continuation[-1])
    return list(texts.values())


@functools.partial(jax.jit, static_argnames="decoder")
def likelihoods(decoder: Decoder, params: Any, batch) -> jax.Array:
    """Return [B, E, 2] for answers that end in each of `ends` [B, E]: log-likelihood, and 1 where
    it is the greedy answer."""
    last_B1 = jnp.sum(batch["weights"] > 0, axis=-1, dtype=jnp.int32)[:, None] - 1

    def of_logits(logits_BCV, targets_BC):
        ends = [
            target_logprobs(logits_BCV, jnp.broadcast_to(end[:, None], targets_BC.shape))
            for end in batch["ends"].T
        ]
        return target_logprobs(logits_BCV, targets_BC), jnp.argmax(logits_BCV, axis=-1), tuple(ends)

    logprob_BA, best_BA, ends = over_answers(decoder, [params], batch, of_logits)
    before_BA = jnp.arange(logprob_BA.shape[1])[None] < last_B1
    sum_B1 = jnp.sum(jnp.where(before_BA, logprob_BA, 0.0), axis=-1, keepdims=True)
    greedy_B1 = jnp.all((best_BA == batch["targets"]) | ~before_BA, axis=-1, keepdims=True)

    def at_end(x_BA):
        return jnp.take_along_axis(x_BA, last_B1, axis=1)

    end_BE = jnp.concatenate([at_end(x) for x in ends], axis=1)
    greedy_BE = greedy_B1 & (at_end(best_BA) == batch["ends"])
    return jnp.stack([sum_B1 + end_BE, greedy_BE], axis=-1)
