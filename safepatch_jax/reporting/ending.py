"""How a command ends on the console: what was measured before and after, and a verdict in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from safepatch_jax.evaluation.statistics import difference
from safepatch_jax.reporting.tables import percent

MOST = 10  # lines of a table, its head among them
_WIDTH = 100  # characters of a line
_LEVEL = 0.05  # of a test that tells two models apart
_HEAD = ("", "before", "after", "difference", "verdict")

Row = tuple[str, str, str, str, str]  # name, before, after, difference, verdict


def share_row(
    name: str,
    before: Mapping[str, Any] | None,
    after: Mapping[str, Any],
    test: Any = None,
    means: bool = False,
) -> Row:
    """Return the row of a share of answers, whose difference is in percentage points.

    Args:
      name: what is counted.
      before, after: {'count', 'n'}; before may be None.
      test: of the two, see `evaluation.statistics.compare`; None where they were not tested.
      means: whether it is of means over several runs: their difference has no interval here.
    """
    told, change, moved = "", "", 0.0
    if before and before["n"] and after["n"]:
        moved = after["count"] / after["n"] - before["count"] / before["n"]
        change, told = f"{100 * moved:+.0f} points", "not tested"
    if test and test["n"]:
        if not means:
            moved, low, high = difference(test["n"], test["gained"], test["lost"])
            change += f" [{100 * low:+.0f}, {100 * high:+.0f}]"
        told = "not told apart"
        if test["p"] < _LEVEL:
            told = "fewer" if moved < 0 else "more"
        told += f" (p = {test['p']:.2g})"
    return name, _counted(before), _counted(after), change, told


def _counted(x: Mapping[str, Any] | None) -> str:
    if x is None:
        return ""
    if not x["n"]:
        return "none judged"
    return f"{x['count']:.4g} of {x['n']}, {percent(x['count'] / x['n'])}"


def perplexity_row(name: str, before: float | None, after: float | None) -> Row:
    """Return the row of a perplexity, whose difference is in percent of that before; it has no
    interval, so the verdict speaks of 5 % alone."""
    texts = ["" if x is None else f"{x:.2f}" for x in (before, after)]
    if before is None or after is None:
        return name, *texts, "", ""
    ratio = after / before
    told = "kept within 5 %"
    if not math.isfinite(ratio):
        return name, *texts, "", "not a number"
    if ratio > 1.05:
        told = "worse by more than 5 %"
    if ratio < 0.95:
        told = "better by more than 5 %"
    return name, *texts, f"{100 * (ratio - 1):+.1f} %", told


def lines(rows: Sequence[Row]) -> list[str]:
    """Return an aligned table of at most ten lines and a hundred columns."""
    shown = list(rows)
    left = len(shown) - (MOST - 1)
    if left > 0:
        shown = shown[: MOST - 2]
    figures = [row[1:] for row in (_HEAD, *shown)]
    widths = [max(map(len, column)) for column in zip(*figures)]
    room = _WIDTH - sum(widths) - 2 * len(widths)  # figures are never cut
    names = [_shortened(row[0], room) for row in (_HEAD, *shown)]
    cells = [(name, *rest) for name, rest in zip(names, figures)]
    widths.insert(0, max(map(len, names)))
    result = []
    for row in cells:
        text = "  ".join(cell.ljust(width) for cell, width in zip(row, widths))
        result.append(text.rstrip())
    if left > 0:
        result.append(f"and {left + 1} more in the report")
    return result


def _shortened(name: str, room: int) -> str:
    return name if len(name) <= room else f"{name[: max(room - 1, 0)]}…"
