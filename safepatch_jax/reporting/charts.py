"""Pictures of reports: one colour a meaning, and the charts that several reports draw.

Matplotlib is imported where a figure is made: that takes time, and most commands draw nothing. Its
figures are used as objects, without pyplot, so no window system and no global state has a part.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from safepatch_jax.runtime import libraries

# Paul Tol's bright scheme, which the colour-blind tell apart.
_BLUE, _RED, _GREEN, _PURPLE, _AMBER = "#4477aa", "#ee6677", "#228833", "#aa3377", "#dd9922"
_BLACK, _GREY = "#222222", "#999999"
COLOURS = {
    # models, and groups of methods
    "model": _BLUE,
    "against": _GREY,
    "backbone": _BLACK,
    "patching": _BLUE,
    "training": _RED,
    "merging": _GREEN,
    "decoding": _PURPLE,
    "ablation": _GREY,
    # the two patches
    "se": _BLUE,
    "osm": _RED,
    # outcomes of answers
    "complied": _BLUE,
    "refused": _AMBER,
    "incoherent": _GREY,
    # what is measured
    "harm": _RED,
    "over_refusal": _AMBER,
    "utility": _GREEN,
    # parts of a picture
    "chosen": "#cc3311",
    "aside": "#888888",
    "grid": "#e5e5e5",
}
# For series that are told apart by nothing but their order.
CYCLE = (_BLUE, _RED, _GREEN, _PURPLE, "#ccbb44", "#66ccee", "#bbbbbb")
MARKERS = "osD^vP"
LIMITS = (-4, 104)  # of an axis in per cent, so that points at its ends are whole
_DPI = 120


@dataclasses.dataclass(frozen=True)
class Series:
    """Rates of one kind, one a row.

    Attributes:
      points: (share, low, high) of each row, None where there is none.
      colours: of each row.
      label: in the legend; none without one.
    """

    points: Sequence[Sequence[float] | None]
    colours: Sequence[str]
    marker: str = "o"
    label: str = ""


def check() -> None:
    """Raise ValueError if pictures cannot be drawn; for what draws at its end."""
    libraries.refuse_missing("Pictures of reports", "matplotlib")


def load() -> None:
    """Import what draws, half a second's work, beside work that waits for other things."""
    check()
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401


def figure(width: float, height: float) -> Any:
    """Return an empty figure; sizes in inches."""
    check()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def panels(parent: Any, rows: int, columns: int, **options: Any) -> Any:
    """Return a (rows, columns) array of axes in a figure or a part of one."""
    axes = parent.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return axes


def save(drawn: Any, path: str | pathlib.Path) -> None:
    """Write a figure as PNG; `savefig` draws once without output, for the layout, and then
    again."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    drawn.set_dpi(_DPI)
    FigureCanvasAgg(drawn).print_png(path)


def legend_below(axis: Any, columns: int = 1, label: bool = True) -> None:
    """Put an axis's legend below it, where it covers nothing.

    Args:
      label: whether the axis has a label below its ticks, for which there must be room.
    """
    from matplotlib.transforms import ScaledTranslation

    if not axis.get_legend_handles_labels()[0]:
        return
    inches = 0.52 if label else 0.32  # a share of the axis would depend on its height
    down = ScaledTranslation(0, -inches, axis.get_figure(root=True).dpi_scale_trans)
    axis.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        bbox_transform=axis.transAxes + down,
        ncols=columns,
        frameon=False,
        fontsize=9,
    )


def legend_outside(drawn: Any, axis: Any, place: str, columns: int = 3) -> None:
    """Put the legend of one axis outside all axes of a figure: 'lower center', 'upper center'."""
    handles, labels = axis.get_legend_handles_labels()
    drawn.legend(handles, labels, loc=f"outside {place}", ncols=columns, frameon=False, fontsize=9)


def escaped(text: str) -> str:
    """Return foreign text as text: a pair of $ in it sets no mathematics."""
    return text.replace("$", r"\$")


def explain(axis: Any, label: str, style: str, colour: str = "#555555", **options: Any) -> None:
    """Add an entry to an axis's legend for what is drawn piece by piece."""
    axis.plot([], [], style, color=colour, label=escaped(label), **options)


def empty(axis: Any, title: str, text: str = "not measured") -> None:
    """Leave an axis empty, and say so."""
    axis.set(title=escaped(title), xticks=[], yticks=[])
    axis.text(
        0.5,
        0.5,
        text,
        ha="center",
        va="center",
        color=COLOURS["aside"],
        transform=axis.transAxes,
    )


def name_rows(axis: Any, names: Sequence[str]) -> None:
    """Give each row of an axis its name; the first is on top."""
    labels = [escaped(name) for name in names]
    axis.set(yticks=range(len(names)), yticklabels=labels, ylim=(len(names) - 0.4, -0.6))
    axis.grid(axis="x", color=COLOURS["grid"])
    axis.set_axisbelow(True)


def shift(i: int, series: int) -> float:
    """Return how far below the middle of its row the i-th of several series lies."""
    return 0.7 * ((i + 0.5) / series - 0.5)


def dots(axis: Any, title: str, names: Sequence[str], series: Sequence[Series]) -> None:
    """Draw rates in per cent with their intervals; the series of a row lie side by side."""
    for i, one in enumerate(series):
        for row, (point, colour) in enumerate(zip(one.points, one.colours)):
            if point is not None:
                value, low, high = (100 * x for x in point)
                at = row + shift(i, len(series))
                axis.plot([low, high], [at, at], color=colour)
                axis.plot(value, at, one.marker, color=colour, markersize=5)
        if one.label:
            explain(axis, one.label, one.marker)
    axis.set(title=escaped(title), xlabel="%", xlim=LIMITS)
    name_rows(axis, names)


def bars(
    axis: Any, names: Sequence[str], series: Iterable[tuple[str, str, Sequence[float]]], form: str
) -> None:
    """Draw numbers as bars, those of a row below one another, each with its number behind it.

    Args:
      series: label, colour and the numbers by row.
      form: of the numbers, such as '%.2f'.
    """
    series = list(series)
    height = 0.76 / len(series)
    for i, (label, colour, values) in enumerate(series):
        places = [row + height * (i - (len(series) - 1) / 2) for row in range(len(names))]
        drawn = axis.barh(places, values, height, color=colour, label=label)
        axis.bar_label(drawn, fmt=form, padding=2, fontsize=8)
    name_rows(axis, names)
    axis.margins(x=0.15)


def plane(axis: Any, title: str) -> None:
    """Make an axis the plane of harm (across) and over-refusal (up), in per cent."""
    axis.set(title=title, xlabel="harm, %", ylabel="over-refusal, %", xlim=LIMITS, ylim=LIMITS)
    axis.grid(color=COLOURS["grid"])
    axis.set_axisbelow(True)


def arms(value: float, interval: Sequence[float]) -> list[list[float]]:
    """Return in per cent how far an interval reaches to both sides of a share, for `errorbar`.

    Rounding may put an end of an interval 1e-16 on the wrong side, which `errorbar` refuses.
    """
    low, high = interval
    return [[max(0.0, 100 * (value - low))], [max(0.0, 100 * (high - value))]]


def cross(axis: Any, harm: Mapping[str, Any], refusal: Mapping[str, Any], colour: str) -> None:
    """Draw a model in the plane with both intervals; rates are {'rate', 'interval'}."""
    axis.errorbar(
        100 * harm["rate"],
        100 * refusal["rate"],
        xerr=arms(harm["rate"], harm["interval"]),
        yerr=arms(refusal["rate"], refusal["interval"]),
        fmt="o",
        color=colour,
        markersize=8,
        capsize=3,
    )
