"""The picture of a comparison: harm against over-refusal, and harm, over-refusal and utility of
each method side by side."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from safepatch_jax.evaluation.judges.base import OUTCOMES
from safepatch_jax.methods.bench import GROUPS

_COLOURS = {
    "backbone": "#222222",
    "patching": "#4477aa",
    "training": "#ee6677",
    "merging": "#228833",
    "decoding": "#aa3377",
    "ablation": "#999999",
}
_MARKERS = "osD^vP"
_NEAR = 0.025  # points nearer to one another than this share a label
_LETTER = 0.021  # about the width of one


def draw(content: Mapping[str, Any], path: pathlib.Path) -> None:
    """Draw a comparison into a PNG file.

    Args:
      content: see `compare_report.gather`.
    """
    from matplotlib.figure import Figure

    rows = list(content["methods"].values())
    figure = Figure(figsize=(17, 2.4 + 0.34 * len(rows)), layout="constrained")
    axes = figure.subplots(1, 4, width_ratios=[1.5, 1, 1, 1])
    _scatter(axes[0], rows)
    kinds = [("harm", "harmful requests complied with"), ("refusal", "harmless requests refused")]
    for axis, (kind, title) in zip(axes[1:], kinds):
        _dots(axis, rows, [m for m in content["measures"] if m["kind"] == kind], title)
    _utility(
        axes[3], rows, [m for m in content["measures"] if m["kind"] not in ("harm", "refusal")]
    )
    for axis in axes[2:]:
        axis.tick_params(labelleft=False)
    figure.savefig(path, format="png", dpi=110)


def _scatter(axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw mean harm against mean over-refusal; the numbers are those of the rows."""
    places: list[tuple[float, float, list[int]]] = []
    for number, row in enumerate(rows, 1):
        x, y = row["means"]["harm"], row["means"]["refusal"]
        if x is None or y is None:
            continue
        axis.plot(
            x,
            y,
            "o",
            color=_COLOURS[row["group"]],
            markersize=12 if row["group"] in ("patching", "backbone") else 8,
            alpha=0.85,
            markeredgecolor="white",
            zorder=3,
        )
        near = next((p for p in places if abs(p[0] - x) < _NEAR and abs(p[1] - y) < _NEAR), None)
        near[2].append(number) if near else places.append((x, y, [number]))
    taken: list[tuple[float, float, float]] = []  # the labels: left end, right end, height
    for x, y, numbers in places:
        text = ", ".join(map(str, numbers))
        width = _LETTER * len(text)
        sides = [(7, 5), (7, -13), (-7, 5), (-7, -13)]  # points to the right, up
        begin = lambda right: x + right / 400 - (width if right < 0 else 0)
        ends = lambda right, up: (begin(right), begin(right) + width, y + up / 700)
        free = lambda a, b, height: (
            -0.04 < a
            and b < 1.04
            and not any(a < d and c < b and abs(height - other) < 0.02 for c, d, other in taken)
        )
        side = next((side for side in sides if free(*ends(*side))), sides[0])
        taken.append(ends(*side))
        axis.annotate(
            text,
            (x, y),
            xytext=side,
            textcoords="offset points",
            ha="right" if side[0] < 0 else "left",
            fontsize=10,
        )
    for group in dict.fromkeys(row["group"] for row in rows):
        axis.plot([], [], "o", color=_COLOURS[group], label=GROUPS[group])
    axis.legend(loc="best", fontsize=9, framealpha=0.9)
    _percent(axis.xaxis)
    _percent(axis.yaxis)
    axis.set(
        xlim=(-0.04, 1.04),
        ylim=(-0.04, 1.04),
        xlabel="harm: mean over the harm measures",
        ylabel="over-refusal: mean",
        title="Lower left is better",
    )
    axis.grid(alpha=0.3)


def _dots(
    axis: Any, rows: Sequence[Mapping[str, Any]], measures: Sequence[Mapping[str, Any]], title: str
) -> None:
    """Draw the rates of each method on some measures, with 95 % intervals."""
    for i, measure in enumerate(measures):
        shift = 0.5 * (i - (len(measures) - 1) / 2) / max(1, len(measures))
        for at, row in enumerate(rows):
            x = row["measures"].get(measure["name"])
            if x and x["rate"] is not None:
                low, high = x["interval"]
                axis.plot(
                    [low, high],
                    [at + shift] * 2,
                    "-",
                    color=_COLOURS[row["group"]],
                    linewidth=1.2,
                    alpha=0.7,
                )
                axis.plot(
                    x["rate"],
                    at + shift,
                    _MARKERS[i % len(_MARKERS)],
                    color=_COLOURS[row["group"]],
                    markersize=5,
                )
                if measure["kind"] == "refusal" and x["incoherent"]:
                    told = sum(x[outcome] for outcome in OUTCOMES)
                    axis.plot(
                        (x["refused"] + x["incoherent"]) / told,
                        at + shift,
                        "|",
                        color=_COLOURS[row["group"]],
                        markersize=7,
                    )
        axis.plot(
            [],
            [],
            _MARKERS[i % len(_MARKERS)],
            color="#555555",
            label=measure["name"],
            linestyle="",
        )
    if any(m["kind"] == "refusal" for m in measures):
        axis.plot([], [], "|", color="#555555", label="refused or incoherent", linestyle="")
    _percent(axis.xaxis)
    axis.set(xlim=(-0.03, 1.03), title=title)
    _finish(axis, rows)


def _utility(
    axis: Any, rows: Sequence[Mapping[str, Any]], measures: Sequence[Mapping[str, Any]]
) -> None:
    """Draw perplexity relative to the backbone's, and for tasks and grades the value relative to
    the backbone's."""
    value = lambda x: next(
        (x[name] for name in ("perplexity", "rate", "mean") if x.get(name) is not None), None
    )
    for i, measure in enumerate(measures):
        base = next(
            (
                v
                for row in rows
                if row["group"] == "backbone"
                and (x := row["measures"].get(measure["name"]))
                and (v := value(x))
            ),
            None,
        )
        for at, row in enumerate(rows if base else ()):
            x = row["measures"].get(measure["name"])
            if x and value(x) is not None:
                axis.plot(
                    value(x) / base,
                    at,
                    _MARKERS[i % len(_MARKERS)],
                    color=_COLOURS[row["group"]],
                    markersize=6,
                )
        what = {"text": "perplexity, lower is better", "mt_bench": "grade"}.get(
            measure["kind"], "right answers"
        )
        axis.plot(
            [],
            [],
            _MARKERS[i % len(_MARKERS)],
            color="#555555",
            label=f"{measure['name']} ({what})",
            linestyle="",
        )
    axis.axvline(1, color="#555555", linewidth=0.8)
    if axis.get_xlim()[1] > 4:
        from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set(title="utility, relative to the backbone")
    _finish(axis, rows)


def _finish(axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    axis.set_yticks(
        range(len(rows)), [f"{row['label']}  {number}" for number, row in enumerate(rows, 1)]
    )
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.grid(axis="x", alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.05), fontsize=8, frameon=False)


def _percent(axis: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
