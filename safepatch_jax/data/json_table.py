"""JSON and JSON Lines, read value by value: a file need not fit into memory twice, and one value
that is too large ends it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

from safepatch_jax.data.cells import twice
from safepatch_jax.data.streams import counted
from safepatch_jax.runtime.limits import limit, too_much
from safepatch_jax.runtime.reading import Refused

_BLANK = re.compile(r"[ \t\r\n]*")
_CHUNK = 1 << 16  # characters


def json_rows(stream: TextIO, where: Any, single: bool = True) -> list[dict[str, Any]]:
    """Read the objects of a list, or objects one after another (JSON Lines).

    Args:
      stream: the text.
      where: the path, for errors.
      single: whether one object alone is a table of one row.

    Raises:
      ValueError: no JSON, a key that is twice in one object, a row that is too long or no object.
    """
    rows = []
    values = _Values(stream, where)
    for value in counted(values, where):
        if not isinstance(value, dict):
            raise Refused(
                f"{where}: expected a list of objects, one a record; value {len(rows) + 1} is of "
                f"type {type(value).__name__}."
            )
        rows.append(value)
    if len(rows) == 1 and not (single or values.listed):
        raise Refused(
            f"{where}: expected a list of objects, one a record; it holds one object. Write the "
            "list alone, or one object a line in a .jsonl file."
        )
    return rows


class _Values:
    """The values of a text, in turn: those of a list, or one after another.

    Attributes:
      listed: whether they stand in a list.
    """

    def __init__(self, stream: TextIO, where: Any):
        self._stream, self._where, self._most = stream, where, limit("ROW_CHARACTERS")
        self._text, self._at, self._line = "", 0, 1
        self._decode = json.JSONDecoder(object_pairs_hook=_object).raw_decode
        self.listed = self._next() == "["

    def __iter__(self) -> Iterator[Any]:
        if not self.listed:
            while self._next():
                yield self._value()
            return
        self._at += 1
        if self._next() == "]":
            self._at += 1
        else:
            yield self._value()
            while self._take(",]") == ",":
                self._next()
                yield self._value()
        if self._next():
            raise self._error("more text after the end of the list", self._at)

    def _next(self) -> str:
        """Skip blanks; return the next character, '' at the end."""
        while True:
            self._at = _BLANK.match(self._text, self._at).end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._grow(self._at):
                return ""

    def _take(self, characters: str) -> str:
        character = self._next()
        if not character or character not in characters:
            raise self._error("expected ',' or ']' after a value", self._at)
        self._at += 1
        return character

    def _value(self) -> Any:
        start = self._at
        while True:
            try:
                value, end = self._decode(self._text, start)
            except ValueError as error:
                if isinstance(error, json.JSONDecodeError) and self._grow(start):
                    start = 0  # it may have been cut off
                    continue
                at = getattr(error, "pos", start)
                raise self._error(getattr(error, "msg", str(error)), at) from error
            if end - start > self._most:
                raise self._too_long(start)
            self._at = end
            return value

    def _grow(self, start: int) -> bool:
        """Read on, and forget what stands before `start`; returns whether there was more."""
        kept = len(self._text) - start
        if kept > self._most:
            raise self._too_long(start)
        # Twice as much each time, so that a long value is not tried too often.
        more = self._stream.read(max(_CHUNK, kept))
        if not more:
            return False
        self._line += self._text.count("\n", 0, start)
        self._text, self._at = self._text[start:] + more, 0
        return True

    def _line_of(self, at: int) -> int:
        return self._line + self._text.count("\n", 0, at)

    def _error(self, message: str, at: int) -> ValueError:
        return ValueError(f"line {self._line_of(at)}: {message}")

    def _too_long(self, start: int) -> Refused:
        return Refused(
            f"{self._where}: the value at line {self._line_of(start)} has "
            f"{too_much('ROW_CHARACTERS')}. Expected a list of objects, one a record, or one "
            "object a line."
        )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object. Raises ValueError if a key is there twice: one of the values would be
    lost."""
    result = dict(pairs)
    if len(result) < len(pairs):
        name = twice(name for name, _ in pairs)[0]
        raise ValueError(f"an object has the key {name!r:.100} twice")
    return result
