"""Pictures of a sweep: the trials in the planes of harm, over-refusal and perplexity, and what each
setting moves."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping
from typing import Any

from safepatch_jax.studies.sweep.analysis import MOST_PERPLEXITY, front
from safepatch_jax.studies.sweep.points import ordered, short, written

_COLOURS = {"harm": "#ee6677", "over_refusal": "#4477aa", "perplexity": "#228833"}
_RISE = 20.0  # % over the backbone's perplexity at which the colours end
_ABREAST = 5  # settings beside one another


def draw_plane(content: Mapping[str, Any], path: str | pathlib.Path) -> None:
    """Draw every trial by harm and over-refusal, coloured by perplexity, and by perplexity and
    over-refusal.

    Args:
      content: see `sweep_analysis.gather`.
      path: of the PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    backbone, chosen = content["backbone"], content["trials"][content["recommended"]["trial"]]
    tried = sorted(content["trials"], key=lambda t: t["front"])  # the front lies on top
    word = "recommended" if content["recommended"]["qualifies"] else "least bad, does not qualify"
    harm, unhelped, rise = ([form(t) for t in tried] for form in _FORMS.values())
    figure, axes = plt.subplots(
        1, 2, figsize=(13, 6.2), constrained_layout=True, sharey=True, width_ratios=(1.25, 1)
    )
    stretch = max(5.0, min(_RISE, max(rise)))
    for axis, across, name in ((axes[0], harm, "harm"), (axes[1], rise, "perplexity")):
        for trial in tried:
            if len(trial["seeds"]) > 1:  # single seeds, tied to their mean
                for single in trial["single"]:
                    axis.plot(
                        [_FORMS[name](trial), _FORMS[name](single)],
                        [_FORMS["over_refusal"](t) for t in (trial, single)],
                        color="#bbbbbb",
                        linewidth=0.7,
                        marker=".",
                        markersize=4,
                        markevery=[1],
                        zorder=1,
                    )
        line = sorted(
            p for p, on in zip(zip(across, unhelped), front(list(zip(across, unhelped)))) if on
        )
        axis.step(
            *zip(*line),
            where="post",
            color="black",
            linewidth=1,
            linestyle="--",
            zorder=2,
            label="front of these two axes",
        )
        edge = ["black" if t["front"] else "none" for t in tried]
        image = axis.scatter(
            across,
            unhelped,
            c=rise,
            cmap="viridis_r",
            vmin=min(0.0, max(-5.0, min(rise))),
            vmax=stretch,
            s=52,
            edgecolors=edge,
            linewidths=1.3,
            zorder=3,
        )
        axis.scatter(
            [],
            [],
            facecolors="none",
            edgecolors="black",
            linewidths=1.3,
            s=52,
            label="on the front of all three",
        )
        if any(len(t["seeds"]) > 1 for t in tried):
            axis.plot(
                [],
                [],
                color="#bbbbbb",
                linewidth=0.7,
                marker=".",
                markevery=[1],
                label="a single seed, tied to its mean",
            )
        bars = _bars(chosen, "over_refusal") | (
            {"xerr": _bars(chosen, "harm")["yerr"]} if name == "harm" else {}
        )
        at = _FORMS[name](chosen), _FORMS["over_refusal"](chosen)
        axis.errorbar(*at, **bars, color="#cc3311", linewidth=1.2, capsize=3, zorder=4)
        axis.scatter(
            *at,
            facecolors="none",
            edgecolors="#cc3311",
            marker="s",
            s=150,
            linewidths=1.8,
            zorder=5,
            label=f"{word}, 95 % intervals",
        )
        axis.scatter(
            _FORMS[name](backbone),
            _FORMS["over_refusal"](backbone),
            color="#ee7733",
            edgecolors="black",
            marker="*",
            s=260,
            zorder=6,
            label="backbone",
        )
        bound = _FORMS[name](backbone) if name == "harm" else 100 * (MOST_PERPLEXITY - 1)
        axis.axvline(
            bound,
            color="#ee7733",
            linewidth=1,
            linestyle=":",
            zorder=0,
            label="bound of the recommendation",
        )
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(
        title="Harm and over-refusal",
        xlabel="harmful prompts complied with, %",
        ylabel="look-alikes refused or incoherent, %",
        xlim=(-4, 104),
        ylim=(-4, 104),
    )
    axes[1].set(
        title="Perplexity and over-refusal",
        xlabel="perplexity of ordinary answers, % over the backbone's",
    )
    axes[1].margins(x=0.1)
    _tame(axes[1], "x", rise)
    figure.colorbar(
        image,
        ax=axes[1],
        extend="max" if max(rise) > stretch else "neither",
        label="colour: perplexity, % over the backbone's",
    )
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(
        f"{len(tried)} choice{'s' * (len(tried) > 1)} of patch settings; less is better on every "
        "axis",
        fontsize=11,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_sensitivity(content: Mapping[str, Any], path: str | pathlib.Path) -> None:
    """Draw a column for each varied setting: the shares above, the perplexity below, a line for
    each choice of the others.

    Args:
      content: see `sweep_analysis.gather`.
      path: of the PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = content["varied"]
    bands, wide = math.ceil(len(names) / _ABREAST), min(len(names), _ABREAST)
    figure, axes = plt.subplots(
        2 * bands,
        wide,
        figsize=(1.2 + 3.0 * wide, 0.6 + 4.6 * bands),
        constrained_layout=True,
        squeeze=False,
        height_ratios=(1.5, 1) * bands,
    )
    rises = [
        _percent_over(v)
        for found in content["sensitivity"].values()
        for line in found["lines"]
        for v in line["perplexity"]
    ]
    for i in range(bands * wide):
        pair = axes[2 * (i // wide), i % wide], axes[2 * (i // wide) + 1, i % wide]
        if i < len(names):
            _column(pair, names[i], content["sensitivity"][names[i]]["lines"])
            pair[0].set_ylim(-4, 104)
            _same_range(pair[1], rises)
        else:
            for axis in pair:
                axis.set_visible(False)
        if i % wide == 0:
            pair[0].set_ylabel("% of prompts")
            pair[1].set_ylabel("perplexity, %\nover the backbone's", fontsize=9)
    for name, text in (
        ("harm", "harm"),
        ("over_refusal", "over-refusal"),
        ("perplexity", "perplexity"),
    ):
        axes[0, 0].plot([], [], color=_COLOURS[name], marker="o", markersize=4, label=text)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(
        "One setting moves, all others are equal\n(thin: each choice of the others; thick: their "
        "mean)",
        fontsize=10,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _column(pair, name: str, lines: list[Mapping[str, Any]]) -> None:
    """Draw one setting's lines, and their mean over those that have all of its values."""
    values = ordered(name, [v for line in lines for v in line["values"]])
    place = {value: i for i, value in enumerate(values)}
    whole = [line for line in lines if line["values"] == values]
    for axis, shown in ((pair[0], ("harm", "over_refusal")), (pair[1], ("perplexity",))):
        for key in shown:
            form = _percent_over if key == "perplexity" else lambda share: 100 * share
            for line in lines:
                axis.plot(
                    [place[v] for v in line["values"]],
                    [form(v) for v in line[key]],
                    color=_COLOURS[key],
                    linewidth=1,
                    alpha=max(0.15, 1 / len(lines)),
                    marker=".",
                    markersize=5,
                )
            if whole:
                mean = [
                    form(math.fsum(line[key][i] for line in whole) / len(whole))
                    for i in range(len(values))
                ]
                axis.plot(
                    range(len(values)),
                    mean,
                    color=_COLOURS[key],
                    linewidth=2.2,
                    marker="o",
                    markersize=4,
                )
        long = any(len(written(v)) > 6 for v in values)
        axis.set_xticks(range(len(values)), map(written, values), rotation=20 if long else 0)
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", linewidth=0.4, alpha=0.5)
    if not lines:
        pair[0].text(
            0.5, 0.5, "nowhere varied alone", ha="center", va="center", transform=pair[0].transAxes
        )
    pair[0].set_title(short(name), fontsize=10)


def _percent_over(ratio: float) -> float:
    return 100 * (ratio - 1)


_FORMS = {
    "harm": lambda t: 100 * t["harm"],
    "over_refusal": lambda t: 100 * t["over_refusal"],
    "perplexity": lambda t: _percent_over(t["perplexity"]),
}


def _bars(trial: Mapping[str, Any], axis: str) -> dict[str, Any]:
    low, high = trial["intervals"][axis]
    return {"yerr": [[100 * (trial[axis] - low)], [100 * (high - trial[axis])]]}


def _tame(axis, which: str, rises: list[float]) -> None:
    """Take logarithms of large rises of perplexity, which a broken model shows."""
    if _broken(rises):
        getattr(axis, f"set_{which}scale")("symlog", linthresh=10)
        getattr(axis, f"{which}axis").set_major_formatter("{x:g}")


def _same_range(axis, rises: list[float]) -> None:
    """Give the panels of perplexity one range, with some room."""
    low, high = min(rises, default=0.0), max(rises, default=1.0)
    room = 0.08 * max(high - low, 1.0)
    _tame(axis, "y", rises)
    axis.set_ylim(*((min(low, 0.0) - 5, 3 * high) if _broken(rises) else (low - room, high + room)))


def _broken(rises: list[float]) -> bool:
    return max(rises, default=0.0) > 100
