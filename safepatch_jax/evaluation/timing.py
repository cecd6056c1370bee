"""How long a model takes for a generated token."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from safepatch_jax.evaluation.contrasted import Contrasted
from safepatch_jax.evaluation.decoding import Rule
from safepatch_jax.evaluation.engine import NO_STOP, Engine
from safepatch_jax.evaluation.generate import decode
from safepatch_jax.evaluation.serving import Rows, Server

_STOPS = np.asarray(NO_STOP, np.int32)


def seconds_per_token(engine: Engine, new: int = 64, repeats: int = 3) -> float:
    """Return the median time of one decoded token of a full batch, prefill included; no stop token
    ends it earlier."""
    number = engine.batch_size
    prompts = list(enumerate([(engine.encode("the") * 32)[:32]] * number))
    rows = Rows(number, number, 32 + new, width=lambda length: length)
    server = Server(engine.model, rows, _STOPS, None, new, engine.put)
    (seconds,) = _seconds([functools.partial(server.run, prompts, lambda i, ids: None)], repeats)
    return statistics.median(seconds) / (new * number)


def atgr(
    engine: Engine,
    rule: Rule | None = None,
    expert: Any = None,
    new: int = 64,
    repeats: int = 3,
    talk: str = "Tell me about the sea.",
    params: Any = None,
) -> tuple[float, float, float]:
    """Return the time of a generated token with a method divided by that of plain greedy decoding
    (average token generation time ratio; Xu et al. 2024, arXiv 2402.08983).

    Both run in turn, as programs of the whole model, so that what slows the machine down slows
    both; on a CPU an engine is quicker than that (see `by_block`). A full batch of one
    conversation, prefill included; a rule's prompts are as long as its system messages make them.
    No stop token ends a batch earlier.

    Args:
      rule, expert: see `Contrasted`; None for a method that leaves decoding alone.
      new: tokens.
      talk: the user's text.
      params: nested parameters, of the model's shapes, that decode in place of its own (those of a
        patched model).

    Returns:
      (median time with / median time without, the least and the largest ratio of one repeat).

    Raises:
      ValueError: see `Contrasted`.
    """
    batch = engine.put_prompts([engine.ask(talk)] * engine.batch_size)

    without = functools.partial(_decode, engine, batch, new)
    if rule is None:
        method = functools.partial(_decode, engine, batch, new, params)
    else:
        contrasted = Contrasted(engine, rule, expert)
        streams = contrasted.streams([talk] * engine.batch_size)
        method = functools.partial(contrasted.run, streams, _STOPS, new)
    plain, ours = _seconds([without, method], repeats)
    ratios = [a / b for a, b in zip(ours, plain)]
    return statistics.median(ours) / statistics.median(plain), min(ratios), max(ratios)


def _decode(
    engine: Engine, batch: dict[str, jax.Array], max_new: int, params: Any = None
) -> jax.Array:
    if params is None:
        params = engine.params
    return decode(
        engine.decoder, params, batch["tokens"], batch["lengths"], _STOPS, max_new=max_new
    )


def _seconds(runs: Sequence[Callable[[], Any]], repeats: int) -> list[list[float]]:
    """Return the seconds of each repeat of each run; they run in turn."""
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats + 1):
        for values, run in zip(seconds, runs):
            start = time.perf_counter()
            jax.block_until_ready(run())
            values.append(time.perf_counter() - start)
    return [values[1:] for values in seconds]  # the first one compiles
