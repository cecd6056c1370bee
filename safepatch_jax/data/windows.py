"""Which tokens of an answer carry loss: all of them, the opening, or what follows it.

A window is `all`, `head:N` (the first N answer tokens), `tail:N` (the last N) or `after:N` (all but
the first N). Tokens before a window are given to the model, as the prompt is; those behind it are
left out, which a causal model does not notice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from safepatch_jax.data.chat import Example

ALL, DERIVE = "all", "derive"
_KINDS = ("head", "tail", "after")


def check_window(text: str) -> str:
    """Return a window as it is written in the settings. Raises ValueError if it is none."""
    kind, colon, count = text.partition(":")
    if text == ALL:
        return text
    if kind not in _KINDS or not colon or not count.isascii() or not count.isdecimal():
        raise ValueError(
            f"'{text}' is no window of answer tokens; give all, head:N (the first N), tail:N (the "
            "last N) or after:N (all but the first N), such as head:8."
        )
    if not int(count):
        raise ValueError(f"'{text}': N is 1 or more; all tokens are 'all'.")
    return f"{kind}:{int(count)}"


def check_score_window(text: str) -> str:
    """Return a window of `score`, which may be 'derive'. Raises ValueError if it is none."""
    return text if text == DERIVE else check_window(text)


def in_window(examples: Sequence[Example], window: str) -> list[Example]:
    """Return examples whose answer is a window of theirs, and whose prompt is all before it.

    Examples that have no token in the window (`after:N` of an answer of N) are left out.

    Args:
      examples: prompts with answers.
      window: see `check_window`.

    Raises:
      ValueError: no example has a token in it, or it is no window.
    """
    if check_window(window) == ALL:
        return list(examples)
    result = []
    for example in examples:
        start, stop = _bounds(window, len(example.answer_ids))
        if start < stop:
            before, answer = example.answer_ids[:start], example.answer_ids[start:stop]
            prompt = example.prompt_ids + before
            result.append(dataclasses.replace(example, prompt_ids=prompt, answer_ids=answer))
    if not result:
        longest = max((len(example.answer_ids) for example in examples), default=0)
        raise ValueError(
            f"None of {len(examples)} answers has a token in the window '{window}': the longest "
            f"has {longest} tokens. Give longer answers, raise data.max_answer_tokens, or choose "
            "another window."
        )
    return result


def _bounds(window: str, length: int) -> tuple[int, int]:
    """Return where a window of an answer begins and ends."""
    kind, _, text = window.partition(":")
    count = int(text)
    if kind == "head":
        return 0, min(count, length)
    if kind == "tail":
        return max(0, length - count), length
    return count, length
