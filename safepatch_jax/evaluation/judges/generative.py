"""Judges that are language models: Llama Guard, WildGuard and HarmBench's, of families of this
project, and Qwen3Guard, which is not."""

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
from safepatch_jax.evaluation.judges.phrases import refusal_apart

# (texts, most new tokens) -> their greedy continuations
Complete = Callable[[Sequence[str], int], list[str]]
_BATCH = 64


class Generative:
    """A judge on an engine that continues text.

    All of them judge content; where one does not say whether an answer refuses, phrases do.

    Args:
      name: see `Judge`.
      form: its public format.
      complete: continues texts greedily, special tokens read as written and left out of the reply.
    """

    tells_content = True

    def __init__(self, name: str, form: Format, complete: Complete):
        self.name, self.tells_refusals, self.expected = name, form.tells_refusals, form.expected
        self._form, self._complete = form, complete

    def judge(
        self, items: Sequence[Item], about: str = HARM, done: Done | None = None
    ) -> list[Verdict]:
        def verdicts_of(batch: Sequence[Item]) -> list[Verdict]:
            texts = [self._form.render(item.prompt, item.answer) for item in batch]
            replies = self._complete(texts, self._form.max_new)
            return [self._read(item, reply, about) for item, reply in zip(batch, replies)]

        return judge_all(self, items, about, done, in_batches(verdicts_of, _BATCH))

    def _read(self, item: Item, reply: str, about: str) -> Verdict:
        verdict = verdict_of(self._form.parse(reply, about), reply.strip())
        return verdict if self.tells_refusals else refusal_apart(verdict, item.answer)
