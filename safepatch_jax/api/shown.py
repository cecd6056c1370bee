"""How a notebook shows a handle: a small table, a picture."""

from __future__ import annotations

import abc
import dataclasses
import pathlib
from collections.abc import Iterable, Sequence

from safepatch_jax.reporting import tables


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG on the disk, which a notebook shows."""

    path: pathlib.Path

    def _repr_png_(self) -> bytes:
        return self.path.read_bytes()


class Shown(abc.ABC):
    """A handle with a title and rows, shown as text or, in a notebook, as a table."""

    @abc.abstractmethod
    def _title(self) -> str: ...

    def _head(self) -> Sequence[str]:
        return ("", "")

    @abc.abstractmethod
    def _rows(self) -> Iterable[Sequence[str]]: ...

    def __repr__(self) -> str:
        rows = [list(map(str, row)) for row in self._rows()]
        if any(self._head()):
            rows.insert(0, list(self._head()))
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = [self._title()]
        for row in rows:
            cells = [f"{cell:{width}}" for cell, width in zip(row, widths)]
            lines.append(f"  {'  '.join(cells)}".rstrip())
        return "\n".join(lines)

    def _repr_markdown_(self) -> str:
        title = tables.escaped(self._title())
        rows = []
        for row in self._rows():
            rows.append([tables.escaped(str(cell)) for cell in row])
        return f"**{title}**\n\n{tables.table(self._head(), rows)}\n"
