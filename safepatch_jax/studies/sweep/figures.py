"""Pictures of a sweep: the trials in the planes of harm, over-refusal and perplexity, and what each
setting moves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from safepatch_jax.reporting import charts
from safepatch_jax.reporting.beside import along, name_points
from safepatch_jax.reporting.charts import COLOURS, LIMITS
from safepatch_jax.studies.sweep.analysis import MOST_PERPLEXITY, front
from safepatch_jax.studies.sweep.points import ordered, short, written

_LABELS = {"harm": "harm", "over_refusal": "over-refusal", "utility": "perplexity"}
_RISE = 20.0  # % over the backbone's perplexity at which the colours end
_NAMED = 8  # trials of the front that have names
_ABREAST = 5  # settings beside one another
_BROKEN = 100  # % over the backbone's perplexity: a broken model, which hides the others

Trial = Mapping[str, Any]


def _percent(values: Iterable[float], axis: str) -> list[float]:
    """Return shares in per cent; of perplexities, by how many per cent they are above the
    backbone's."""
    return [100 * (value - (axis == "perplexity")) for value in values]


def _values(trials: Iterable[Trial], axis: str) -> list[float]:
    return _percent([trial[axis] for trial in trials], axis)


def _value(trial: Trial, axis: str) -> float:
    return _values([trial], axis)[0]


def draw_plane(content: Mapping[str, Any]) -> Any:
    """Draw every trial by harm and over-refusal, coloured by perplexity, and by perplexity and
    over-refusal.

    Args:
      content: see `analysis.gather`.
    """
    trials = sorted(content["trials"], key=lambda trial: trial["front"])  # the front lies on top
    rises = _values(trials, "perplexity")
    figure = charts.figure(13, 6.2)
    axes = charts.panels(figure, 1, 2, sharey=True, width_ratios=(1.25, 1))[0]
    charts.plane(axes[0], "Harm and over-refusal")
    across, up = "harmful prompts complied with, %", "look-alikes refused or incoherent, %"
    if "margins" in content["backbone"]["measures"]:
        across, up = (
            "expected compliance with harmful prompts, %",
            "expected refusals of look-alikes, %",
        )
    axes[0].set(xlabel=across, ylabel=up)
    for axis, across in zip(axes, ("harm", "perplexity")):
        _seeds(axis, trials, across)
        _front(axis, trials, across)
        image = _trials(axis, trials, across)
        _chosen(axis, content, across)
    axes[1].set(
        title="Perplexity and over-refusal",
        xlabel="perplexity of ordinary answers, % over the backbone's",
    )
    axes[1].margins(x=0.1)
    axes[1].grid(color=COLOURS["grid"])
    if max(rises) > _BROKEN:
        _logarithmic(axes[1], "x")
    beyond = "max" if max(rises) > image.norm.vmax else "neither"
    label = "colour: perplexity, % over the backbone's"
    figure.colorbar(image, ax=axes[1], extend=beyond, label=label)
    charts.legend_outside(figure, axes[0], "lower center")
    number = f"{len(trials)} choice{'s' * (len(trials) > 1)}"
    text = f"{number} of patch settings; less is better on every axis"
    if any(name for *_, name in _named(content, "harm")):
        text += "\nnames: what a choice on the front has otherwise than the boxed one"
    figure.suptitle(text, fontsize=11)
    for axis, across in zip(axes, ("harm", "perplexity")):
        name_points(axis, _named(content, across))
    return figure


def _named(content: Mapping[str, Any], across: str) -> list[tuple[float, float, str]]:
    """Return all points; those of the front have for names what they have otherwise than the chosen
    one, where they are few. The legend names the others. The chosen one's intervals are points
    without names, so that no name covers them."""
    best = content["trials"][content["recommended"]["trial"]]
    chosen = best["patch"]
    few = sum(trial["front"] for trial in content["trials"]) <= _NAMED
    points = []
    for trial in (content["backbone"], *content["trials"]):
        texts = []
        if trial.get("front") and few:
            changed = {name: x for name, x in trial["patch"].items() if x != chosen[name]}
            texts = [f"{name} {written(x)}" for name, x in changed.items()]
        at = _value(trial, across), _value(trial, "over_refusal")
        points.append((*at, ", ".join(texts)))
    x, y = _value(best, across), _value(best, "over_refusal")
    points += [(x, 100 * share, "") for share in along(best["intervals"]["over_refusal"])]
    if across == "harm":
        points += [(100 * share, y, "") for share in along(best["intervals"]["harm"])]
    return points


def _seeds(axis: Any, trials: Sequence[Trial], across: str) -> None:
    """Draw the single seeds of trials with several, tied to their mean."""
    thin = {"color": "#bbbbbb", "linewidth": 0.7, "marker": ".", "markersize": 4, "markevery": [1]}
    several = [trial for trial in trials if len(trial["seeds"]) > 1]
    for trial in several:
        for single in trial["single"]:
            ends = trial, single
            axis.plot(_values(ends, across), _values(ends, "over_refusal"), zorder=1, **thin)
    if several:
        axis.plot([], [], label="a single seed, tied to its mean", **thin)


def _front(axis: Any, trials: Sequence[Trial], across: str) -> None:
    """Draw a line through the trials that no other beats on the two axes."""
    points = list(zip(_values(trials, across), _values(trials, "over_refusal")))
    line = sorted(itertools.compress(points, front(points)))
    axis.step(*zip(*line), "k--", where="post", linewidth=1, label="front of these two axes")


def _trials(axis: Any, trials: Sequence[Trial], across: str) -> Any:
    """Draw the trials, coloured by perplexity; return what a scale of the colours needs."""
    rises = _values(trials, "perplexity")
    ring = {"s": 52, "linewidths": 1.3}
    image = axis.scatter(
        _values(trials, across),
        _values(trials, "over_refusal"),
        c=rises,
        cmap="viridis_r",
        vmin=min(0.0, max(-5.0, min(rises))),
        vmax=max(5.0, min(_RISE, max(rises))),
        edgecolors=["black" if trial["front"] else "none" for trial in trials],
        zorder=3,
        **ring,
    )
    label = "on the front of all three"
    axis.scatter([], [], facecolors="none", edgecolors="black", label=label, **ring)
    return image


def _chosen(axis: Any, content: Mapping[str, Any], across: str) -> None:
    """Mark the chosen trial with its intervals, the backbone, and the bound of the
    recommendation."""
    backbone, chosen = content["backbone"], content["trials"][content["recommended"]["trial"]]
    word = "recommended" if content["recommended"]["qualifies"] else "least bad, does not qualify"
    bars = {"yerr": charts.arms(chosen["over_refusal"], chosen["intervals"]["over_refusal"])}
    bound = 100 * (MOST_PERPLEXITY - 1)
    if across == "harm":
        bars["xerr"] = charts.arms(chosen["harm"], chosen["intervals"]["harm"])
        bound = _value(backbone, "harm")
    at = _value(chosen, across), _value(chosen, "over_refusal")
    axis.errorbar(*at, **bars, fmt="none", color=COLOURS["chosen"], capsize=3, zorder=4)
    axis.plot(
        *at,
        "s",
        color=COLOURS["chosen"],
        markersize=12,
        markerfacecolor="none",
        markeredgewidth=1.8,
        zorder=5,
        label=f"{word}, 95 % intervals",
    )
    axis.plot(
        _value(backbone, across),
        _value(backbone, "over_refusal"),
        "*",
        color=COLOURS["backbone"],
        markeredgecolor="white",
        markersize=17,
        zorder=6,
        label="backbone",
    )
    label = "bound of the recommendation"
    axis.axvline(bound, color=COLOURS["backbone"], linewidth=1, linestyle=":", label=label)


def draw_sensitivity(content: Mapping[str, Any]) -> Any:
    """Draw a column for each varied setting: the shares above, the perplexity below, a line for
    each choice of the others.

    Args:
      content: see `analysis.gather`.
    """
    names = content["varied"]
    bands, columns = math.ceil(len(names) / _ABREAST), min(len(names), _ABREAST)
    figure = charts.figure(1.2 + 3.0 * columns, 0.6 + 4.6 * bands)
    axes = charts.panels(figure, 2 * bands, columns, height_ratios=(1.5, 1) * bands)
    every = []
    for number in range(bands * columns):
        band, column = divmod(number, columns)
        upper, lower = axes[2 * band : 2 * band + 2, column]
        if number >= len(names):
            upper.set_visible(False)
            lower.set_visible(False)
            continue
        lines = content["sensitivity"][names[number]]["lines"]
        for line in lines:
            every += line["perplexity"]
        _setting(upper, names[number], lines, {"harm": "harm", "over_refusal": "over_refusal"})
        _setting(lower, names[number], lines, {"perplexity": "utility"})
        upper.set(title=short(names[number]), ylim=LIMITS)
        if not lines:
            charts.empty(upper, short(names[number]), "nowhere varied alone")
        if column == 0:
            upper.set_ylabel("% of prompts")
            lower.set_ylabel("perplexity, %\nover the backbone's", fontsize=9)
    _same_range(axes[1::2].flat, _percent(every, "perplexity") or [0.0, 1.0])
    for name, label in _LABELS.items():
        charts.explain(axes[0, 0], label, "o-", COLOURS[name], markersize=4)
    charts.legend_outside(figure, axes[0, 0], "lower center")
    figure.suptitle(
        "One setting moves, all others are equal\n(thin: each choice of the others; thick: their "
        "mean)",
        fontsize=10,
    )
    return figure


def _setting(
    axis: Any, name: str, lines: Sequence[Mapping[str, Any]], colours: Mapping[str, str]
) -> None:
    """Draw one setting's lines, and their mean over those that have all of its values."""
    values = ordered(name, itertools.chain.from_iterable(line["values"] for line in lines))
    whole = [one for one in lines if one["values"] == values]
    # Between two categories there is nothing that a line could show.
    line = "" if any(isinstance(value, bool | str) for value in values) else "-"
    faint = {"linewidth": 1, "markersize": 5, "alpha": max(0.15, 1 / max(1, len(lines)))}
    for key, colour in colours.items():
        for one in lines:
            places = [values.index(value) for value in one["values"]]
            axis.plot(places, _percent(one[key], key), f".{line}", color=COLOURS[colour], **faint)
        if whole:
            means = _percent(np.mean([one[key] for one in whole], axis=0), key)
            size = 4 if line else 8
            thick = {"linewidth": 2.2, "markersize": size}
            axis.plot(means, f"o{line}", color=COLOURS[colour], **thick)
    texts = list(map(written, values))
    turned = any(len(text) > 6 for text in texts)
    axis.set_xticks(range(len(texts)), texts, rotation=20 if turned else 0)
    axis.margins(x=0.12)
    axis.grid(axis="y", linewidth=0.4, alpha=0.5)


def _logarithmic(axis: Any, which: str) -> None:
    """Take logarithms of large rises of perplexity, which a broken model shows."""
    getattr(axis, f"set_{which}scale")("symlog", linthresh=10)
    getattr(axis, f"{which}axis").set_major_formatter("{x:g}")


def _same_range(axes: Iterable[Any], rises: Sequence[float]) -> None:
    """Give the panels of perplexity one range, with some room."""
    low, high = min(rises), max(rises)
    room = 0.08 * max(high - low, 1.0)
    for axis in axes:
        axis.set_ylim(low - room, high + room)
        if high > _BROKEN:
            _logarithmic(axis, "y")
            axis.set_ylim(min(low, 0.0) - 5, 3 * high)
