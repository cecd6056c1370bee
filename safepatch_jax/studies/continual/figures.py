"""The picture of a chain: forgetting matrices, overlap of the patches, and the course of each
measure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from safepatch_jax.evaluation.judges.base import COMPLIED, INCOHERENT, REFUSED
from safepatch_jax.reporting import charts
from safepatch_jax.reporting.charts import LIMITS
from safepatch_jax.reporting.tables import share

NUMBERED = 40  # columns of a matrix at most, if each has its label and each cell its number
_UNMEASURED = "#cfd8dc"
# Panel: title and unit; its curves by style: name in the legend, part of a row, outcome.
_CURVES = (
    ("Harm", {"o-": ("seen", "seen", COMPLIED), "o:": ("unseen", "unseen", COMPLIED)}),
    (
        "Harmless look-alikes, n = {n}",
        {"o-": ("refused", "lookalike", REFUSED), "x:": ("incoherent", "lookalike", INCOHERENT)},
    ),
)


def draw(content: Mapping[str, Any]) -> Any:
    """Draw a chain.

    Args:
      content: see `report.gather`.
    """
    methods, rows = content["methods"], len(content["methods"]["safepatching"])
    names = [stage["name"] for stage in content["stages"]]
    across, width = _layout(len(methods) + 1, len(names))
    down = math.ceil((len(methods) + 1) / across)
    height = down * (2.6 + 0.3 * min(rows, NUMBERED))
    figure = charts.figure(width, height + 4.2)
    upper, lower = figure.subfigures(2, 1, height_ratios=(height, 4.2))
    axes = charts.panels(upper, down, across).flat
    for axis, (method, of_method) in zip(axes, methods.items()):
        _forgetting(axis, content["labels"][method], of_method, names)
    _overlap(axes[len(methods)], content)
    for axis in axes[len(methods) + 1 :]:
        axis.set_axis_off()
    axes = charts.panels(lower, 1, 4)[0]
    for axis, (title, curves) in zip(axes, _CURVES):
        _outcomes(axis, title, curves, content)
    _perplexity(axes[2], content)
    _sizes(axes[3], content)
    every = math.ceil(rows / 12)
    for axis in axes:
        axis.set(xlabel="after link", xlim=(-0.3, rows - 0.7))
        numbers = [r["model"].partition("-")[0] for r in methods["safepatching"]]
        axis.set_xticks(range(0, rows, every), numbers[::every])
        charts.legend_below(axis)
    return figure


def _layout(panels: int, columns: int) -> tuple[int, float]:
    """Return how many matrices stand side by side, and how wide the picture is, in inches."""
    needed = 2.6 + 0.36 * min(columns, NUMBERED)
    width = max(16.0, min(2 * needed, 20.0), needed)
    return max(1, min(panels, int(width // needed))), width


def _forgetting(
    axis: Any, label: str, rows: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> None:
    """Draw harm by model and category; what a model has not yet seen is hatched."""
    values = np.full((len(rows), len(names)), np.nan)
    counts = set()
    for i, r in enumerate(rows):
        for j, name in enumerate(names):
            if name in r["harm"]:
                values[i, j] = 100 * share(r["harm"][name], COMPLIED)
                counts.add(r["harm"][name]["n"])
    if np.isnan(values).all():
        charts.empty(axis, f"{label}: harm, % complied", "no harmful prompt was answered")
        return
    _matrix(axis, values, [r["model"] for r in rows], names, 125, "Reds", "{:.0f}", 100)
    unmeasured = np.isnan(values).any()
    if unmeasured:
        axis.set_facecolor(_UNMEASURED)
    unseen = np.ma.masked_equal(np.triu(np.ones(values.shape)), 0)
    edges = np.arange(len(names) + 1) - 0.5, np.arange(len(rows) + 1) - 0.5
    axis.pcolor(*edges, unseen, hatch="///", facecolor="none", edgecolor="#bbbbbb", linewidth=0)
    n = "-".join(map(str, sorted({min(counts), max(counts)})))
    title = f"{label}: harm, % complied (n = {n})\nhatched: not yet seen"
    axis.set(title=title + ("; grey: not measured" if unmeasured else ""))
    axis.set_ylabel("after link")


def _overlap(axis: Any, content: Mapping[str, Any]) -> None:
    """Draw the overlap of each two patches."""
    names = [f"{link['number']:02d}-{link['name']}" for link in content["links"]]
    title = "Overlap of two patches' positions\n(Jaccard index, %)"
    if len(names) < 2:
        charts.empty(axis, title, "fewer than two patches")
        return
    values = 100 * np.array(content["patches"]["overlap"])
    values[np.triu_indices(len(names))] = np.nan
    values = values[1:, :-1]  # of the first with those before it, and after the last, is nothing
    darkest = 2 * max(1.0, np.nanmax(values))
    _matrix(axis, values, names[1:], names[:-1], darkest, "Greys", "{:.1f}", darkest / 2)
    axis.set(title=title)


def _matrix(
    axis: Any,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    darkest: float,
    colours: str,
    form: str,
    most: float,
) -> None:
    """Draw numbers as a map with their values in it; NaN stays empty.

    Args:
      darkest: the value of the darkest colour, under which numbers would not be legible.
      most: the end of the scale beside it.
    """
    image = axis.imshow(
        values, aspect="auto", cmap=colours, vmin=0, vmax=darkest, interpolation="nearest"
    )
    scale = axis.get_figure().colorbar(image, ax=axis, fraction=0.03, pad=0.01)
    scale.ax.set_ylim(0, most)
    if len(columns) <= NUMBERED:
        box = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1.2}
        for (i, j), value in np.ndenumerate(values):
            if not np.isnan(value):
                text = form.format(value)
                axis.text(j, i, text, ha="center", va="center", fontsize=9, bbox=box)
    turned = {"rotation": 30 if len(columns) <= 8 else 60, "ha": "right"}
    axis.set_xticks(*_ticks(columns), rotation_mode="anchor", **turned)
    axis.set_yticks(*_ticks(rows))


def _ticks(names: Sequence[str]) -> tuple[range, list[str]]:
    """Return places and labels of an axis's ticks, of so many names as have room."""
    every = math.ceil(len(names) / (NUMBERED + 1))
    return range(0, len(names), every), [_short(name) for name in names[::every]]


def _outcomes(
    axis: Any, title: str, curves: Mapping[str, tuple[str, str, str]], content: Mapping[str, Any]
) -> None:
    """Draw shares of outcomes over the links, a curve a method and kind."""
    for method, rows in content["methods"].items():
        for style, (name, part, outcome) in curves.items():
            values = [100 * share(r[part], outcome) for r in rows]
            label = f"{content['labels'][method]}, {name}"
            axis.plot(values, style, color=content["colours"][method], label=label, markersize=5)
    n = content["methods"]["safepatching"][0]["lookalike"]["n"]
    axis.set(title=title.format(n=n), ylabel="% of answers", ylim=LIMITS)


def _perplexity(axis: Any, content: Mapping[str, Any]) -> None:
    every = []
    for method, rows in content["methods"].items():
        values = [r["ordinary_perplexity"] for r in rows]
        colour, label = content["colours"][method], content["labels"][method]
        axis.plot(values, "o-", color=colour, label=label, markersize=5)
        every += values
    if max(every) > 20 * min(every):  # a broken model's hides the others
        axis.set_yscale("log")
    axis.set(title="Perplexity of ordinary answers")


def _sizes(axis: Any, content: Mapping[str, Any]) -> None:
    """Draw how many weights the patches change together."""
    patches = content["patches"]
    values = [100 * count / max(1, patches["weights"]) for count in (0, *patches["cumulative"])]
    label = content["labels"]["safepatching"]
    axis.plot(values, "o-", color=content["colours"]["safepatching"], label=label, markersize=5)
    axis.set(title="Weights that differ from the start", ylabel="% of weights")
    axis.set_ylim(bottom=0)


def _short(name: str) -> str:
    return name if len(name) <= 18 else name[:17] + "\u2026"
