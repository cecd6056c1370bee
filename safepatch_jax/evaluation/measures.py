"""What a run measures of one model: judged answers to prompts, the likelihood of given answers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from safepatch_jax.data.chat import Encoded, Example
from safepatch_jax.evaluation.engine import Engine
from safepatch_jax.evaluation.judges.base import OUTCOMES
from safepatch_jax.evaluation.judges.phrases import judge
from safepatch_jax.evaluation.likelihoods import answer_likelihoods
from safepatch_jax.evaluation.thoughts import unfinished

ANSWERS = "answers.jsonl"
ANSWERED = ("harmful", "lookalike")  # data roles whose prompts a model answers
GIVEN = ("harmful", "ordinary")  # data roles whose answers' likelihood is taken


def measure_roles(
    engine: Engine, encoded: Mapping[str, Encoded], max_new: int, title: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure a model on the records of all three data roles; the prompts of all are answered
    together, in fewer batches.

    Args:
      engine, max_new, title: see `measure_role`.
      encoded: the tokenised records, by role.

    Returns:
      (measures, see `combine_roles`; answers, see `measure_role`).
    """
    prompts = []
    for role in ANSWERED:
        prompts += [example.asked_ids for example in encoded[role].examples]
    every = iter(engine.complete_ids(prompts, max_new, f"{title}: answers"))
    written = {}
    for role in ANSWERED:
        written[role] = list(itertools.islice(every, len(encoded[role].examples)))
    parts, answers = {}, []
    for role, records in encoded.items():
        part, rows = measure_role(engine, role, records, max_new, title, written.get(role))
        parts[role] = part
        answers += rows
    return combine_roles(parts), answers


def measure_role(
    engine: Engine,
    role: str,
    encoded: Encoded,
    max_new: int,
    title: str,
    written: Sequence[Sequence[int]] | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure a model on the records of one data role.

    Args:
      engine: the model.
      role: 'harmful', 'lookalike' or 'ordinary'.
      encoded: the tokenised records.
      max_new: greedy tokens of an answer, at most.
      title: of the progress bars.
      written: token ids of its answers, where the model has written them already.

    Returns:
      (measures, answers). Measures: data, the numbers of examples, of prompts left out and of
      answers cut; for prompts that are answered the number of each outcome and n, and where there
      are any unfinished, the answers that are thoughts without an end (incoherent); for given
      answers nll, nats a token. Answers: role, number, prompt, outcome and text.
    """
    examples = encoded.examples
    counts = {"examples": len(examples), "left_out": encoded.dropped, "cut": encoded.cut}
    measures: dict[str, Any] = {"data": counts}
    answers = []
    if role in ANSWERED:
        if written is None:
            prompts = [example.asked_ids for example in examples]
            written = engine.complete_ids(prompts, max_new, f"{title}: {role} answers")
        answers = _judged(engine, role, examples, written)
        outcomes = [answer["outcome"] for answer in answers]
        for outcome in OUTCOMES:
            measures[outcome] = outcomes.count(outcome)
        measures["n"] = len(outcomes)
        if thoughts := sum(unfinished(answer["answer"]) for answer in answers):
            measures["unfinished"] = thoughts
    if role in GIVEN:
        measures["nll"] = mean_nll(engine, examples, f"{title}: {role} NLL")
    return measures, answers


def _judged(
    engine: Engine, role: str, examples: Sequence[Example], written: Sequence[Sequence[int]]
) -> list[dict[str, Any]]:
    answers = []
    for i, ids in enumerate(written):
        text = engine.decode(ids)
        answers.append(
            {
                "role": role,
                "number": i,
                "prompt": examples[i].prompt,
                "outcome": judge(text),
                "answer": text,
            }
        )
    return answers


def mean_nll(engine: Engine, examples: Sequence[Example], title: str) -> float:
    """Return the mean NLL of the answer tokens of all examples, in nats.

    Raises:
      NotFinite: an NLL is NaN or infinite.
    """
    rows = []
    answer_likelihoods(engine, examples, None, title, lambda _, row: rows.append(row))
    tokens = sum(row["tokens"] for row in rows)
    return math.fsum(row["nll"] for row in rows) / tokens


def combine_roles(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the measures of a model from those of its three data roles.

    Returns:
      data: by role; harmful and lookalike: the number of each outcome and n; harmful_nll and
      ordinary_nll in nats a token; ordinary_perplexity.
    """
    measures: dict[str, Any] = {"data": {role: part["data"] for role, part in parts.items()}}
    for role in ANSWERED:
        names = [name for name in (*OUTCOMES, "n", "unfinished") if name in parts[role]]
        measures[role] = {name: parts[role][name] for name in names}
    for role in GIVEN:
        measures[f"{role}_nll"] = parts[role]["nll"]
    measures["ordinary_perplexity"] = perplexity(measures["ordinary_nll"])
    return measures


def perplexity(nll: float) -> float:
    """Return exp(nll), bounded so that a broken model's is still a number."""
    return math.exp(min(nll, 80.0))
