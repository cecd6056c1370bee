"""Markdown of reports: tables, rates with their intervals, foreign text; and a report's files."""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from safepatch_jax.evaluation.statistics import wilson
from safepatch_jax.reporting import charts
from safepatch_jax.runtime import files


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table; cells are shown as text."""
    return "\n".join([_row(head), "|" + "---|" * len(head), *map(_row, rows)])


def _row(cells: Iterable[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def share(counts: Mapping[str, int], *outcomes: str) -> float:
    """Return the share of answers with one of these outcomes; NaN where there are no answers."""
    if not counts["n"]:
        return math.nan
    return sum(counts[outcome] for outcome in outcomes) / counts["n"]


def percent(value: float, digits: int = 0, unit: str = "%") -> str:
    """Return a share in per cent."""
    return f"{100 * value:.{digits}f}{unit}"


def rate(
    value: float, interval: Iterable[float], digits: int = 0, unit: str = "%", ends: int = 0
) -> str:
    """Return a share with its interval in per cent, such as '42% [30-55]'.

    Args:
      value, interval: as shares.
      digits, unit: of the share.
      ends: digits of the interval's ends.
    """
    bounds = "-".join(percent(end, ends, "") for end in interval)
    return f"{percent(value, digits, unit)} [{bounds}]"


def counted(counts: Mapping[str, int], outcome: str) -> str:
    """Return the share of one outcome with its 95 % interval (Wilson), '-' without answers."""
    if not counts["n"]:
        return "-"
    return rate(share(counts, outcome), wilson(counts[outcome], counts["n"]))


def number(value: float | None, digits: int) -> str:
    """Return a number, nothing where it is not known."""
    return "" if value is None else f"{value:.{digits}f}"


def paired(test: Mapping[str, Any]) -> str:
    """Return a paired test, see `evaluation.statistics.paired`."""
    return f"+{test['gained']} / -{test['lost']}, p = {test['p']:.2g}"


def escaped(text: str) -> str:
    """Return a model's or user's text on one line, as text: its markup takes no effect."""
    return re.sub(r"([\\`*_{}\[\]<>!|#])", r"\\\1", " ".join(text.split()))


def code(text: str) -> str:
    """Return a text on one line as code, in which Markdown has no effect."""
    return "`" + text.replace("`", "'") + "`"


def publish(folder: pathlib.Path, contents: Mapping[str, Any]) -> None:
    """Write the files of a report: each appears whole, and none where one cannot be made.

    Args:
      contents: by file name: Markdown for .md, what JSON can hold for .json, a figure for .png.
    """
    with files.published(folder) as temporary:
        for name, content in contents.items():
            if name.endswith(".png"):
                charts.save(content, temporary / name)
            elif name.endswith(".md"):
                files.write_text(temporary / name, content)
            else:
                files.write_json(temporary / name, content)
