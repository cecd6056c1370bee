"""The picture of a comparison: harm against over-refusal, and harm, over-refusal and utility of
each method side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from safepatch_jax.evaluation.judges.base import ALL_OUTCOMES
from safepatch_jax.methods.bench import GROUPS
from safepatch_jax.reporting import charts
from safepatch_jax.reporting.beside import name_points
from safepatch_jax.reporting.charts import COLOURS, MARKERS

Rows = Sequence[Mapping[str, Any]]


def draw(content: Mapping[str, Any]) -> Any:
    """Draw a comparison.

    Args:
      content: see `report.gather`.
    """
    rows = list(content["methods"].values())
    figure = charts.figure(17, 2.4 + 0.34 * len(rows))
    axes = charts.panels(figure, 1, 4, width_ratios=[1.5, 1, 1, 1])[0]
    points = _plane(axes[0], rows)
    harm = "harmful requests complied with"
    if content.get("judge_sees_content"):
        harm = "harmful requests answered with harmful content"
    titles = {"harm": harm, "refusal": "harmless requests refused"}
    for axis, (kind, title) in zip(axes[1:], titles.items()):
        _rates(axis, title, rows, [m for m in content["measures"] if m["kind"] == kind])
    _utility(axes[3], rows, [m for m in content["measures"] if m["kind"] not in titles])
    for axis in axes[2:]:
        axis.tick_params(labelleft=False)
    name_points(axes[0], points)
    return figure


def _colour(row: Mapping[str, Any]) -> str:
    return COLOURS[row["group"]]


def _names(rows: Rows) -> list[str]:
    return [row["label"] for row in rows]


def _plane(axis: Any, rows: Rows) -> list[tuple[float, float, str]]:
    """Draw mean harm against mean over-refusal; return the points with their names."""
    points = []
    for row in rows:
        if None in row["means"].values():
            continue
        x, y = 100 * row["means"]["harm"], 100 * row["means"]["refusal"]
        size = 12 if row["group"] in ("patching", "backbone") else 8
        axis.plot(x, y, "o", color=_colour(row), markersize=size, markeredgecolor="white")
        points.append((x, y, row["label"]))
    for group in dict.fromkeys(row["group"] for row in rows):
        charts.explain(axis, GROUPS[group], "o", COLOURS[group])
    charts.plane(axis, "Means over the measures: lower left is better")
    charts.legend_below(axis, columns=3)
    return points


def _rates(axis: Any, title: str, rows: Rows, measures: Rows) -> None:
    """Draw the rates of each method on some measures, with 95 % intervals."""
    series, colours = [], [_colour(row) for row in rows]
    for i, measure in enumerate(measures):
        points = []
        for row_number, row in enumerate(rows):
            x = row["measures"].get(measure["name"])
            known = x and x["rate"] is not None
            points.append((x["rate"], *x["interval"]) if known else None)
            if known and measure["kind"] == "refusal" and x["incoherent"]:
                unhelped = 100 * (1 - x["complied"] / sum(x.get(o, 0) for o in ALL_OUTCOMES))
                at = row_number + charts.shift(i, len(measures))
                axis.plot(unhelped, at, "|", color=_colour(row), markersize=9)
        series.append(charts.Series(points, colours, MARKERS[i % len(MARKERS)], measure["name"]))
    charts.dots(axis, title, _names(rows), series)
    if any(m["kind"] == "refusal" for m in measures):
        charts.explain(axis, "refused or incoherent", "|")
    charts.legend_below(axis)


def _utility(axis: Any, rows: Rows, measures: Rows) -> None:
    """Draw perplexities, rates of right answers and grades relative to the backbone's."""
    units = {"text": "perplexity, lower is better", "mt_bench": "grade"}
    for i, measure in enumerate(measures):
        marker = MARKERS[i % len(MARKERS)]
        values = [_value(row["measures"].get(measure["name"])) for row in rows]
        bases = [value for row, value in zip(rows, values) if row["group"] == "backbone"]
        for at, (row, value) in enumerate(zip(rows, values)):
            if bases and bases[0] and value is not None:
                axis.plot(value / bases[0], at, marker, color=_colour(row), markersize=6)
        unit = units.get(measure["kind"], "right answers")
        charts.explain(axis, f"{measure['name']} ({unit})", marker)
    axis.axvline(1, color=COLOURS["aside"], linewidth=0.8)
    if axis.get_xlim()[1] > 4:
        _logarithmic(axis)
    axis.set(title="utility, relative to the backbone")
    charts.name_rows(axis, _names(rows))
    charts.legend_below(axis, label=False)


def _value(x: Mapping[str, Any] | None) -> float | None:
    """Return the figure of a measure of utility, None where it is not known."""
    for name in ("perplexity", "rate", "mean"):
        if x and x.get(name) is not None:
            return x[name]
    return None


def _logarithmic(axis: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_formatter(NullFormatter())
