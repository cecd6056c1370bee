"""CSV as people have it: the separator is told from the header, and a row that does not fit the
header is an error."""

from __future__ import annotations

import contextlib
import csv
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from safepatch_jax.data.cells import twice
from safepatch_jax.data.streams import counted
from safepatch_jax.runtime.console import say, some
from safepatch_jax.runtime.limits import limit, too_much
from safepatch_jax.runtime.reading import Refused

_NAMES = {";": "semicolon", "\t": "tab", "|": "vertical bar"}


def csv_rows(stream: TextIO, where: Any) -> list[dict[str, str]]:
    """Read all rows; of a table without a header none.

    Args:
      stream: the text, line breaks as they are.
      where: the path, for errors.

    Raises:
      ValueError: a quote that is not closed, a row that is too long, that has more or fewer cells
        than the header, or two columns of one name.
    """
    lines = _Lines(stream, where)
    header = next((line for line in lines if line.strip()), "")
    delimiter = _delimiter(header, where)
    (cells,) = list(csv.reader([header], delimiter=delimiter))[:1] or [[]]
    spaced = len(cells) > 1 and all(name.startswith(" ") for name in cells[1:])
    if delimiter != ",":
        say(f"  {where}: cells are separated by {delimiter!r}.")
    records = _records(lines, [header], delimiter, spaced)
    names = _header(next(records, (0, []))[1], where)
    rows = []
    for line, cells in counted(records, where):
        if any(map(str.strip, cells[len(names) :])) or _is_short(cells, names):
            raise Refused(
                f"{where}: the row at line {line} has {len(cells)} cells, the header {len(names)}. "
                f"A text that holds {delimiter!r} must stand in double quotes, and a double quote "
                'within it is written twice: "so, he said ""no""".'
            )
        if len(cells) >= len(names):
            rows.append(dict(zip(names, cells)))
    return rows


def csv_records(stream: TextIO, where: Any) -> Iterator[tuple[int, list[str]]]:
    """Yield (line, cells) of each row of a table without a header, see `csv_rows`."""
    return _records(_Lines(stream, where), [], ",", False)


def _is_short(cells: list[str], names: list[str]) -> bool:
    """Tell whether a row lacks cells; a line of blanks is no row."""
    return len(cells) < len(names) and any(map(str.strip, cells))


def _header(cells: list[str], where: Any) -> list[str]:
    """Return the names of the columns, blanks around them left out."""
    names = [name.strip() for name in cells]
    while names and not names[-1]:  # a separator at the end of each line
        names.pop()
    if several := [f"{name!r:.60}" for name in twice(filter(None, names))]:
        raise Refused(
            f"{where}: the header names the column {some(several, ', ')} more than once. Rename or "
            "remove all but one."
        )
    return names


def _delimiter(header: str, where: Any) -> str:
    """Return what separates the names of a header: a comma, or another if that alone does."""
    if _count(header, ",") > 1:
        return ","
    fitting = [delimiter for delimiter in _NAMES if _count(header, delimiter) > 1]
    if len(fitting) > 1:
        raise Refused(
            f"{where}: it cannot be told whether {' or '.join(_NAMES[d] for d in fitting)} "
            "separates the columns of the header. Separate them with commas."
        )
    return fitting[0] if fitting else ","


def _count(header: str, delimiter: str) -> int:
    return max(map(len, csv.reader([header], delimiter=delimiter)), default=0)


class _Lines:
    """Lines of a text; `characters` since the beginning of a row are bounded."""

    def __init__(self, stream: TextIO, where: Any):
        self.stream, self.where, self.most = stream, where, limit("ROW_CHARACTERS")
        self.number = self.characters = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self.stream.readline(self.most + 1)
        if not line:
            raise StopIteration
        self.number += 1
        self.characters += len(line)
        if self.characters > self.most:
            raise Refused(
                f"{self.where}: the row at or before line {self.number} has "
                f"{too_much('ROW_CHARACTERS')}. Is a quote not closed?"
            )
        return line


def _records(
    lines: _Lines, before: Iterable[str], delimiter: str, spaced: bool
) -> Iterator[tuple[int, list[str]]]:
    """Yield (line, cells) of each row that is not an empty line; `before` was read already."""
    reader = csv.reader(
        itertools.chain(before, lines), delimiter=delimiter, skipinitialspace=spaced, strict=True
    )
    with _wide_cells(lines.most):
        while True:
            start = max(lines.number, 1) + (reader.line_num > 0)
            lines.characters = 0
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise ValueError(f"the row at line {start}: {error}") from error
            if cells:
                yield start, cells


@contextlib.contextmanager
def _wide_cells(most: int) -> Iterator[None]:
    """Let cells be as long as a row may be; it is a setting of the whole process."""
    before = csv.field_size_limit(max(most, csv.field_size_limit()))
    try:
        yield
    finally:
        csv.field_size_limit(before)
