"""A limit on the thoughts of an answer: a thought that reaches it is ended, and the answer follows.

Answers are written in two parts, each by the usual programs: up to the limit, and, where something
is left to write, what follows, behind the end of the thought.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from safepatch_jax.evaluation.thoughts import ended, unfinished
from safepatch_jax.runtime.console import say

ENDING = "\n</think>\n\n"

Keep = Callable[[int, list[int]], None]
# Continues prompts: given their numbers, the ids written behind each so far, the most new tokens,
# and what is called with (place among these, new ids).
Write = Callable[[Sequence[int], Sequence[Sequence[int]], int, Keep], object]


@dataclasses.dataclass(frozen=True)
class ThoughtLimit:
    """How long a thought may become.

    Args:
      tokens: of a thought at most.
      ending: ids of what ends a thought.
      decode: maps ids to a text in which the tags of a thought are.
    """

    tokens: int
    ending: tuple[int, ...]
    decode: Callable[[Sequence[int]], str]

    @property
    def room(self) -> int:
        """Tokens that a thought and its end may take."""
        return self.tokens + len(self.ending)

    def answer_start(self, ids: Sequence[int]) -> int | None:
        """Return where the answer behind the thought begins; 0 where there is no thought, None
        where it has no end."""
        text = self.decode(ids)
        if unfinished(text):
            return None
        if not ended(text):
            return 0
        low, high = 0, len(ids)  # the thought is ended at `high`, and not at `low`
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if ended(self.decode(ids[:middle])) else (middle, high)
        return high


def within(
    limit: ThoughtLimit, write: Write, number: int, max_new: int, title: str, done: Keep | None
) -> list[list[int]]:
    """Write answers whose thoughts are ended at a limit.

    Args:
      write: writes one part of some answers.
      number: of prompts.
      max_new: tokens at most of an answer, behind its thought.
      title: of what is written.
      done: called with (index, ids) as soon as an answer is there.

    Returns:
      for each prompt the ids, thought and its end included.
    """
    answers: list[list[int]] = [[] for _ in range(number)]
    starts: dict[int, int] = {}  # of the answers that something is left to write of
    closed = 0

    def keep(i: int, ids: list[int], start: int) -> None:
        answers[i] = ids[: start + max_new]
        if done:
            done(i, answers[i])

    def first(i: int, ids: list[int]) -> None:
        nonlocal closed
        start = limit.answer_start(ids)
        if len(ids) < limit.tokens:
            keep(i, ids, len(ids) if start is None else start)
        elif start is None:
            closed += 1
            answers[i] = [*ids, *limit.ending]
            starts[i] = len(answers[i])
        elif len(ids) - start >= max_new:
            keep(i, ids, start)
        else:
            answers[i], starts[i] = ids, start

    write(range(number), [()] * number, limit.tokens, first)
    if closed:
        say(f"  {title}: {closed} of {number} thoughts were ended at {limit.tokens} tokens")
    left = list(starts)

    def second(k: int, ids: list[int]) -> None:
        i = left[k]
        keep(i, [*answers[i], *ids], starts[i])

    if left:
        write(left, [tuple(answers[i]) for i in left], max_new, second)
    return answers
