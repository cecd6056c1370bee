"""Judges that are language models of this project: Llama Guard, WildGuard, HarmBench's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from safepatch_jax.evaluation.judges.base import (
    HARM,
    Done,
    Item,
    Verdict,
    in_batches,
    judge_all,
    verdict_of,
)
from safepatch_jax.evaluation.judges.formats import Format

# (texts, most new tokens) -> their greedy continuations
Complete = Callable[[Sequence[str], int], list[str]]
_BATCH = 64


class Generative:
    """A judge on an engine that continues text.

    Args:
      name: see `Judge`.
      form: its public format.
      complete: continues texts greedily, special tokens read as written and left out of the reply.
    """

    def __init__(self, name: str, form: Format, complete: Complete):
        self.name, self.tells_refusals, self.expected = name, form.tells_refusals, form.expected
        self._form, self._complete = form, complete

    def judge(
        self, items: Sequence[Item], about: str = HARM, done: Done | None = None
    ) -> list[Verdict]:
        def verdicts_of(batch: Sequence[Item]) -> list[Verdict]:
            texts = [self._form.render(item.prompt, item.answer) for item in batch]
            replies = self._complete(texts, self._form.max_new)
            return [verdict_of(self._form.parse(reply, about), reply.strip()) for reply in replies]

        return judge_all(self, items, about, done, in_batches(verdicts_of, _BATCH))
