"""How a setting is declared, and how a name that does not exist is refused."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

Row = TypeVar("Row")


def option(
    default: Any,
    help_text: str,
    *,
    choices: Sequence[str] | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    read: Callable[[str], str] | None = None,
) -> Any:
    """Declare one setting, a dataclass field; `low` and `high` are inclusive bounds, `above` is an
    exclusive lower one; `read` makes the value of what a user wrote, where that is not empty."""
    metadata = {"help": help_text, "choices": choices, "low": low, "high": high, "above": above}
    metadata["read"] = read
    return dataclasses.field(default=default, metadata=metadata)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the words " (did you mean 'x'?)" with the closest known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def row_of(rows: Mapping[str, Row], name: str, what: str) -> Row:
    """Return the row of that name; `what` says in the error what the rows are.

    Raises:
      ValueError: there is none (with the nearest match).
    """
    if name not in rows:
        raise ValueError(
            f"There is no {what} '{name}'{nearest(name, rows)}. There are {', '.join(rows)}."
        )
    return rows[name]
