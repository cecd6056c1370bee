"""Answers of models that think: what comes after the thoughts is the answer.

Stored answers keep the whole text; whatever judges, grades or reads one takes this part alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_BEGIN, _END = "<think>", "</think>"
_OPENED = re.compile(rf"\s*{_BEGIN}")


def after_thought(text: str) -> str:
    """Return the answer behind a block of thoughts; '' where the block has no end: the answer has
    not begun. A block whose begin is in the prompt has an end alone."""
    if _OPENED.match(text):  # a thought may speak of the tags, and another may follow
        _, end, answer = text.rpartition(_END)
        return answer.strip() if end else ""
    before, end, answer = text.partition(_END)
    return answer.strip() if end and _BEGIN not in before else text


def unfinished_of(rows: Iterable[Mapping[str, Any]]) -> int:
    """Return how many stored answers are thoughts without an end.

    Args:
      rows: with 'answer', 'answers' or 'text', where a model wrote something.
    """
    count = 0
    for row in rows:
        texts = row.get("answers") or [row.get("answer"), row.get("text")]
        count += sum(isinstance(text, str) and unfinished(text) for text in texts)
    return count


def ended(text: str) -> bool:
    """Tell whether a text holds the end of a thought that it begins with, or that began before."""
    before, end, _ = text.partition(_END)
    return bool(end) and (_BEGIN not in before or _OPENED.match(text) is not None)


def unfinished(text: str) -> bool:
    """Tell whether a text is thoughts without an end."""
    return _OPENED.match(text) is not None and _END not in text
