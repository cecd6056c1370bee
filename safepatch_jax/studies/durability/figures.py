"""The picture of a durability study: what is left of each effect, and of the patch's entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from safepatch_jax.reporting import charts
from safepatch_jax.reporting.charts import COLOURS, CYCLE, MARKERS
from safepatch_jax.studies.durability.effects import NONE

_LIMITS = (-60, 220)  # per cent; what lies beyond is drawn at the edge
_ENTRIES = {"differ": "still differ", "same_sign": "same sign"}


def draw(content: Mapping[str, Any]) -> Any:
    """Draw a durability study.

    Args:
      content: see `report.gather`.
    """
    measured = [x for x in content["treatments"] if not x["failed"]]
    shown = [name for name in content["measures"] if content["before"][name]["shown"] != NONE]
    rows = max(1, len(measured))
    figure = charts.figure(14, 2.6 + 0.75 * rows)
    axes = charts.panels(figure, 1, 2, width_ratios=(3, 2))[0]
    labels = {}
    for name in shown:
        title, kind = content["measures"][name]["title"], content["before"][name]["shown"]
        labels[name] = f"{title} ({kind})"
    _effects(axes[0], measured, labels)
    _entries(axes[1], measured)
    return figure


def _effects(
    axis: Any,
    measured: Sequence[Mapping[str, Any]],
    labels: Mapping[str, str],
) -> None:
    title = "What is left of each effect, %"
    if not measured or not labels:
        charts.empty(axis, title, "no effect was shown before")
        return
    axis.axvline(0, color=COLOURS["aside"], linewidth=1)
    axis.axvline(100, color=COLOURS["aside"], linewidth=1, linestyle="--")
    for i, (name, label) in enumerate(labels.items()):
        colour, marker = CYCLE[i % len(CYCLE)], MARKERS[i % len(MARKERS)]
        charts.explain(axis, label, marker, colour)
        for row, treatment in enumerate(measured):
            x, at = treatment["left"][name], row + charts.shift(i, len(labels))
            axis.plot([_inside(end) for end in x["interval"]], [at, at], color=colour)
            axis.plot(_inside(x["value"]), at, marker, color=colour, markersize=5)
    axis.set(title=title, xlabel="100: as before any treatment; lines: 95 %", xlim=_LIMITS)
    charts.name_rows(axis, [treatment["name"] for treatment in measured])
    charts.legend_below(axis, columns=2)


def _inside(share: float) -> float:
    low, high = _LIMITS
    return min(high, max(low, 100 * share))


def _entries(axis: Any, measured: Sequence[Mapping[str, Any]]) -> None:
    title = "What is left of its entries, %"
    if not measured:
        charts.empty(axis, title)
        return
    series = []
    for i, (name, label) in enumerate(_ENTRIES.items()):
        values = [100 * x["entries"][name] / x["entries"]["changed"] for x in measured]
        series.append((label, CYCLE[i], values))
    along = [100 * x["entries"]["along_patch"] for x in measured]
    series.append(("along the patch", CYCLE[len(series)], along))
    charts.bars(axis, [x["name"] for x in measured], series, "%.1f")
    axis.set(title=title, xlabel="of the entries that the patch changes; of its squared norm")
    charts.legend_below(axis, columns=3)
