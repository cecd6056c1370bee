"""The objective: negative log-likelihood of answer tokens (METHOD: Eq. 1-2)."""

from __future__ import annotations

from typing import Any, Mapping

import jax
import jax.numpy as jnp

from safepatch_jax.models.decoder import Decoder, Readout


def answer_logprobs(decoder: Decoder, params: Any, batch: Mapping[str, jax.Array], chunk: int = 64) -> jax.Array:
    """Return log p of each answer token, float32 [B, A] (0 where there is none).

    The head runs at answer positions alone, `chunk` of them at a time. Where there are several chunks it runs again in the
    backward pass, so that of float32 logits, and of their gradient, [B, chunk, V] exist at once.

    Args:
      decoder: the model.
      params: nested parameter dictionary.
      batch: see `safepatch_jax.data.chat.training_batch`.
      chunk: answer positions whose logits exist at once.
    """
    positions_BT = jnp.arange(batch["tokens"].shape[1])[None]
    hidden_BAD, _ = decoder.apply({"params": params}, batch["tokens"], positions_BT, batch["valid"],
                                  logits_at_BA=batch["predict_at"], hidden=True)
    readout = Readout(decoder.config, decoder.dtype, decoder.sharder)

    def logprobs(hidden_BCD, targets_BC):
        logits_BCV = readout.apply({"params": params}, hidden_BCD)
        vocabulary_V = jnp.arange(logits_BCV.shape[-1])  # compared, not indexed: a cut vocabulary then stays cut
        target_BC = jnp.sum(jnp.where(vocabulary_V == targets_BC[..., None], logits_BCV, 0.0), axis=-1)
        return target_BC - jax.nn.logsumexp(logits_BCV, axis=-1)

    batch_size, answers = batch["targets"].shape
    if answers <= chunk:
        return batch["weights"] * logprobs(hidden_BAD, batch["targets"])
    room = (-answers) % chunk
    pieces = lambda x: jnp.moveaxis(  # [B, A, ...] -> [pieces, B, chunk, ...]
        jnp.pad(x, ((0, 0), (0, room)) + ((0, 0),) * (x.ndim - 2)).reshape(batch_size, -1, chunk, *x.shape[2:]), 1, 0)
    xs = pieces(hidden_BAD), pieces(batch["targets"])
    _, out = jax.lax.scan(lambda _, x: (None, jax.checkpoint(logprobs, prevent_cse=False)(*x)), None, xs)
    return batch["weights"] * jnp.moveaxis(out, 0, 1).reshape(batch_size, -1)[:, :answers]


def sequence_nll(logprobs_BA: jax.Array, weights_BA: jax.Array, reduction: str) -> jax.Array:
    """Return each sequence's NLL in nats [B]: over its answer tokens the mean ('mean') or the sum ('sum')."""
    total_B = -jnp.sum(logprobs_BA, axis=-1)
    return total_B if reduction == "sum" else total_B / jnp.maximum(jnp.sum(weights_BA, axis=-1), 1.0)
