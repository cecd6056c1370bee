"""The objective: negative log-likelihood of answer tokens (the paper's Eq. 1-2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from safepatch_jax.models.decoder import Decoder, Readout


def answer_logprobs(
    decoder: Decoder, params: Any, batch: Mapping[str, jax.Array], chunk: int = 64
) -> jax.Array:
    """Return log p of each answer token, float32 [B, A] (0 where there is none); see
    `over_answers`."""
    return batch["weights"] * over_answers(decoder, [params], batch, target_logprobs, chunk)


def answer_divergences(
    decoder: Decoder,
    params: Any,
    reference: Any,
    batch: Mapping[str, jax.Array],
    chunk: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """Return log p of each answer token and, where it is predicted, KL(reference || model) over the
    vocabulary, in nats.

    Both are float32 [B, A] (0 where there is no token). No gradient flows into the reference,
    nested parameters of a model of the same architecture.
    """

    def of_logits(logits_BCV, reference_BCV, targets_BC):
        ours_BCV, theirs_BCV = jax.nn.log_softmax(logits_BCV), jax.nn.log_softmax(reference_BCV)
        logprobs_BC = target_logprobs(logits_BCV, targets_BC)
        return logprobs_BC, jnp.sum(jnp.exp(theirs_BCV) * (theirs_BCV - ours_BCV), axis=-1)

    models = [params, jax.lax.stop_gradient(reference)]
    logprobs_BA, kl_BA = over_answers(decoder, models, batch, of_logits, chunk)
    return batch["weights"] * logprobs_BA, batch["weights"] * kl_BA


def target_logprobs(logits_BCV: jax.Array, targets_BC: jax.Array) -> jax.Array:
    """Return log p of each target, float32 [B, C]."""
    # A comparison, and no index: a vocabulary that is cut over devices then stays cut.
    vocabulary_V = jnp.arange(logits_BCV.shape[-1])
    target_BC = jnp.sum(jnp.where(vocabulary_V == targets_BC[..., None], logits_BCV, 0.0), axis=-1)
    return target_BC - jax.nn.logsumexp(logits_BCV, axis=-1)


def over_answers(
    decoder: Decoder,
    models: Sequence[Any],
    batch: Mapping[str, jax.Array],
    of_logits: Callable[..., Any],
    chunk: int = 64,
) -> Any:
    """Apply a function to the logits at answer positions, `chunk` positions at a time.

    Where there are several chunks the head runs again in the backward pass, so that of float32
    logits, and of their gradient, [B, chunk, V] exist at once.

    Args:
      decoder: the model.
      models: nested parameter dictionaries, of one model or of several that are compared.
      batch: see `safepatch_jax.data.chat.training_batch`.
      of_logits: maps logits float32 [B, C, V] of each model, and targets int32 [B, C], to arrays
        [B, C, ...].
      chunk: answer positions whose logits exist at once.

    Returns:
      what `of_logits` returns, [B, A, ...]; to be ignored where `weights` is 0.
    """
    positions_1T = jnp.arange(batch["tokens"].shape[1])[None]
    hidden = [
        decoder.apply(
            {"params": params},
            batch["tokens"],
            positions_1T,
            batch["valid"],
            logits_at_BA=batch["predict_at"],
            hidden=True,
            prefix_1P=batch.get("prefix"),
        )[0]
        for params in models
    ]
    return of_answers(decoder, models, hidden, batch, of_logits, chunk)


def of_answers(
    decoder: Decoder,
    models: Sequence[Any],
    hidden: Sequence[jax.Array],
    batch: Mapping[str, jax.Array],
    of_logits: Callable[..., Any],
    chunk: int = 64,
) -> Any:
    """Do what `over_answers` does, from the hidden states [B, A, D] of each model at answer
    positions; of the batch `targets` are read."""
    readout = Readout(decoder.config, decoder.dtype, decoder.sharder)

    def of_hidden(hidden, targets_BC):
        logits = [readout.apply({"params": params}, x) for params, x in zip(models, hidden)]
        return of_logits(*logits, targets_BC)

    batch_size, answers = batch["targets"].shape
    if answers <= chunk:
        return of_hidden(hidden, batch["targets"])
    room = (-answers) % chunk

    def pieces(x):
        """Cut [B, A, ...] into [pieces, B, chunk, ...]."""
        padded = jnp.pad(x, ((0, 0), (0, room)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(batch_size, -1, chunk, *x.shape[2:]), 1, 0)

    xs = jax.tree.map(pieces, hidden), pieces(batch["targets"])
    _, out = jax.lax.scan(
        lambda _, x: (None, jax.checkpoint(of_hidden, prevent_cse=False)(*x)), None, xs
    )

    def whole(x):
        """Join [pieces, B, chunk, ...]."""
        return jnp.moveaxis(x, 0, 1).reshape(batch_size, -1, *x.shape[3:])[:, :answers]

    return jax.tree.map(whole, out)


def end_logprobs(
    decoder: Decoder, params: Any, x_BTD: jax.Array, batch: Mapping[str, jax.Array], chunk: int
) -> jax.Array:
    """Return what `answer_logprobs` does, from what leaves the last block; of `params` the final
    norm and the head are read."""
    x_BAD = jnp.take_along_axis(x_BTD, batch["predict_at"][..., None], axis=1)
    logprobs_BA = of_answers(decoder, [params], [x_BAD], batch, target_logprobs, chunk)
    return batch["weights"] * logprobs_BA


def sequence_nll(logprobs_BA: jax.Array, weights_BA: jax.Array, reduction: str) -> jax.Array:
    """Return each sequence's NLL in nats [B]: over its answer tokens the mean ('mean') or the sum
    ('sum')."""
    total_B = -jnp.sum(logprobs_BA, axis=-1)
    if reduction == "sum":
        return total_B
    return total_B / jnp.maximum(jnp.sum(weights_BA, axis=-1), 1.0)
