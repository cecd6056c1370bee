"""The objective: negative log-likelihood of answer tokens (METHOD: Eq. 1-2)."""

from __future__ import annotations

from typing import Any, Mapping

import jax
import jax.numpy as jnp

from safepatch_jax.models.decoder import Decoder


def answer_logprobs(decoder: Decoder, params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Return log p of each answer token, float32 [B, A] (0 where there is none).

    Args:
      decoder: the model.
      params: nested parameter dictionary.
      batch: see `safepatch_jax.data.chat.training_batch`.
    """
    positions_BT = jnp.arange(batch["tokens"].shape[1])[None]
    logits_BAV, _ = decoder.apply(
        {"params": params}, batch["tokens"], positions_BT, batch["valid"], logits_at_BA=batch["predict_at"])
    target_BA = jnp.take_along_axis(logits_BAV, batch["targets"][..., None], axis=-1)[..., 0]
    return batch["weights"] * (target_BA - jax.nn.logsumexp(logits_BAV, axis=-1))


def sequence_nll(logprobs_BA: jax.Array, weights_BA: jax.Array, reduction: str) -> jax.Array:
    """Return each sequence's NLL in nats [B]: over its answer tokens the mean ('mean') or the sum ('sum')."""
    total_B = -jnp.sum(logprobs_BA, axis=-1)
    return total_B if reduction == "sum" else total_B / jnp.maximum(jnp.sum(weights_BA, axis=-1), 1.0)
