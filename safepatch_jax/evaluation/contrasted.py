"""A model that writes by a decoding rule, from two streams of logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from safepatch_jax.evaluation import thought_limit
from safepatch_jax.evaluation.decoding import Rule, check_expert, decode_contrasted
from safepatch_jax.evaluation.engine import Done, Engine
from safepatch_jax.evaluation.generate import Sampling
from safepatch_jax.evaluation.prompter import Talk
from safepatch_jax.runtime import processes


class Contrasted:
    """A model that writes by a decoding rule, greedily. Likelihoods are not touched by a rule, so
    it has none.

    Args:
      engine: the model.
      rule: how the two streams of logits are combined (see `decoding`); its numbers are compiled
        in.
      expert: nested parameters of the second stream, on the mesh of the engine, for a rule that
        needs them.

    Raises:
      ValueError: an expert that is missing, not used, or of other shapes.
    """

    def __init__(self, engine: Engine, rule: Rule, expert: Any = None):
        check_expert(rule, engine.params, expert)
        self._engine, self._rule = engine, rule
        self._params = engine.params, engine.params if expert is None else expert
        self.decode = engine.decode

    def answer(
        self,
        talks: Sequence[Talk],
        max_new: int,
        title: str = "answers",
        sampling: Sampling = Sampling(),
        done: Done | None = None,
        numbers: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Continue conversations, each rendered with both of the rule's system messages; arguments
        and returns: see `Engine.answer`.

        Raises:
          ValueError: a temperature above 0, no chat template, or a prompt that is too long.
        """
        if sampling.temperature:
            raise ValueError(
                f"{type(self._rule).__name__} chooses the likeliest token; leave the temperature "
                "at 0."
            )
        streams, limit = self.streams(talks), self._engine.thought_limit
        for prompts in streams:
            self._engine.check(prompts, self._engine.room(max_new))
        if limit is None:
            return self._continued(streams, max_new, title, done)

        def write(places, written, most, keep):
            first = [[*streams[0][i], *ids] for i, ids in zip(places, written)]
            second = [[*streams[1][i], *ids] for i, ids in zip(places, written)]
            if any(written) and self._rule.steps in range(limit.tokens + 1):
                # all that the second stream has a part in is written
                self._engine.continue_ids(first, most, title, done=keep)
            else:
                self._continued((first, second), most, title, keep)

        return thought_limit.within(limit, write, len(talks), max_new, title, done)

    def _continued(
        self,
        streams: tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]],
        max_new: int,
        title: str,
        done: Done | None,
    ) -> list[list[int]]:
        first, second = streams
        # Both pasts are held, so both count.
        both = min(self._rule.steps or max_new, max_new)
        sizes = [len(a) + max_new + len(b) + both for a, b in zip(first, second)]

        def run(batch: Sequence[int], stops: np.ndarray) -> np.ndarray:
            streams = [first[i] for i in batch], [second[i] for i in batch]
            return processes.fetch(self.run(streams, stops, max_new))

        return self._engine.run_batches(sizes, title, done, run)

    def fits(self, talk: Talk, max_new: int) -> bool:
        """Tell whether a conversation and its answer fit, with either of the rule's system
        messages."""
        (first,), (second,) = self.streams([talk])
        longest = max(len(first), len(second))
        return longest + self._engine.room(max_new) <= self._engine.config.max_length

    def streams(self, talks: Sequence[Talk]) -> tuple[list[list[int]], list[list[int]]]:
        """Return the prompts of the first stream and those of the second."""
        first, second = self._rule.systems
        return (
            [self._engine.ask_talk(talk, first) for talk in talks],
            [self._engine.ask_talk(talk, second) for talk in talks],
        )

    def run(
        self,
        streams: tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]],
        stops: np.ndarray,
        max_new: int,
    ) -> jax.Array:
        """Continue one batch; see `decode_contrasted`.

        Args:
          streams: prompts of the first stream and of the second, token ids.
          stops: int32 [n], stop tokens.
        """
        first, second = streams
        return decode_contrasted(
            self._engine.decoder,
            self._params,
            (self._engine.put_prompts(first), self._engine.put_prompts(second)),
            stops,
            rule=self._rule,
            max_new=max_new,
        )
