"""The measures of a run: judged answers on harmful and look-alike prompts, NLL of harmful and
ordinary answers."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from safepatch_jax.data.chat import Chat, Encoded, Example, lengths, training_batch
from safepatch_jax.evaluation.generate import generate
from safepatch_jax.evaluation.judges.base import OUTCOMES
from safepatch_jax.evaluation.judges.phrases import judge
from safepatch_jax.mesh import Sharder
from safepatch_jax.models.decoder import Decoder
from safepatch_jax.numerics import NotFinite
from safepatch_jax.runtime.console import progress
from safepatch_jax.settings import EvaluateSettings
from safepatch_jax.training.objective import answer_logprobs
from safepatch_jax.training.step import put_batch


@functools.partial(jax.jit, static_argnames="decoder")
def _nll_sums(decoder, params, batch):
    return -jnp.sum(answer_logprobs(decoder, params, batch)), jnp.sum(batch["weights"])


def answer_nll(
    decoder: Decoder,
    params: Any,
    examples: Sequence[Example],
    batch_size: int,
    sharder: Sharder,
    title: str,
) -> float:
    """Return the mean NLL of answer tokens in nats; all batches have one shape.

    Raises:
      NotFinite: the NLL is NaN or infinite.
    """
    shape = lengths(examples)
    nll = tokens = 0.0
    with progress(len(examples), title, "answer") as bar:
        for start in range(0, len(examples), batch_size):
            group = list(examples[start : start + batch_size])
            batch = training_batch(group + [group[-1]] * (batch_size - len(group)), *shape)
            batch["weights"][len(group) :] = 0.0
            sums = _nll_sums(decoder, params, put_batch(batch, sharder))
            nll, tokens = nll + float(sums[0]), tokens + float(sums[1])
            bar.update(len(group))
    if not math.isfinite(nll):
        raise NotFinite(
            f"{title}: the NLL is {nll}: the model's weights hold NaN or overflow. Check the "
            "model folder."
        )
    return nll / tokens


def evaluate_model(
    decoder: Decoder,
    params: Any,
    chat: Chat,
    encoded: Mapping[str, Encoded],
    stop_ids: Sequence[int],
    settings: EvaluateSettings,
    sharder: Sharder,
    title: str,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure one model.

    Args:
      encoded: tokenised evaluation records of each role.
      stop_ids: ids that end an answer.

    Returns:
      (measures, answers). Measures: for harmful and lookalike the number of each outcome and ``n``;
      ``harmful_nll`` and ``ordinary_nll`` in nats a token; ``ordinary_perplexity``; ``data``, by
      role the number of examples, of prompts left out and of answers cut. Answers: role, number,
        prompt, outcome and text.
    """
    measures: dict[str, Any] = {
        "data": {
            role: {"examples": len(e.examples), "left_out": e.dropped, "cut": e.cut}
            for role, e in encoded.items()
        }
    }
    answers = []
    roles = ("harmful", "lookalike")
    prompts = [
        (role, i, e.prompt_ids) for role in roles for i, e in enumerate(encoded[role].examples)
    ]
    texts = [
        chat.decode(ids)
        for ids in generate(
            decoder,
            params,
            [ids for *_, ids in prompts],
            stop_ids,
            max_new=settings.max_new_tokens,
            batch_size=settings.batch_size,
            sharder=sharder,
            title=f"{title}: answers",
        )
    ]
    for (role, i, _), text in zip(prompts, texts):
        answers.append(
            {
                "role": role,
                "number": i,
                "prompt": encoded[role].examples[i].prompt,
                "outcome": judge(text),
                "answer": text,
            }
        )
    for role in roles:
        outcomes = [a["outcome"] for a in answers if a["role"] == role]
        measures[role] = {o: outcomes.count(o) for o in OUTCOMES} | {"n": len(outcomes)}
    for role in ("harmful", "ordinary"):
        measures[f"{role}_nll"] = answer_nll(
            decoder,
            params,
            encoded[role].examples,
            settings.batch_size,
            sharder,
            f"{title}: {role} NLL",
        )
    measures["ordinary_perplexity"] = float(np.exp(min(measures["ordinary_nll"], 80.0)))
    return measures, answers
