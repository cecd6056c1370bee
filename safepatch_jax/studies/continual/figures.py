"""The picture of a chain: forgetting matrices, overlap of the patches, and the course of each
measure."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from safepatch_jax.evaluation.judges.base import COMPLIED, INCOHERENT, REFUSED

_SHARE = "% of answers"


def draw(content: Mapping[str, Any], path: str | pathlib.Path) -> None:
    """Draw a chain.

    Args:
      content: see `continual_report.gather`.
      path: of the PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    methods, labels, stages = (
        content["methods"],
        content["labels"],
        [s["name"] for s in content["stages"]],
    )
    rows = len(methods["safepatching"])
    figure = plt.figure(figsize=(16, 7.2 + 0.3 * rows), constrained_layout=True)
    upper, lower = figure.subfigures(2, 1, height_ratios=(3 + 0.3 * rows, 3.6))
    axes = upper.subplots(1, len(methods) + 1)
    for axis, (method, own) in zip(axes, methods.items()):
        values = np.array([[_share(r["harm"][name], COMPLIED) for name in stages] for r in own])
        counts = {r["harm"][name]["n"] for r in own for name in stages}
        _matrix(axis, values, [r["model"] for r in own], stages, 125, "Reds", "{:.0f}")
        axis.set(
            title=f"{labels[method]}: harm, % complied (n = "
            f"{'-'.join(map(str, sorted({min(counts), max(counts)})))})\n"
            "hatched: not yet seen",
            ylabel="after link",
        )
        for i in range(len(own)):
            for j in range(i, len(stages)):
                axis.add_patch(
                    plt.Rectangle(
                        (j - 0.5, i - 0.5),
                        1,
                        1,
                        fill=False,
                        hatch="///",
                        edgecolor="#888888",
                        linewidth=0,
                        alpha=0.6,
                    )
                )
    links = [f"{link['number']:02d}-{link['name']}" for link in content["links"]]
    if links:
        overlap = 100 * np.array(content["patches"]["overlap"])
        overlap[np.triu_indices(len(links))] = np.nan
        _matrix(
            axes[-1],
            overlap,
            links,
            links,
            2 * max(1.0, np.nanmax(overlap, initial=0.0)),
            "Greys",
            "{:.1f}",
        )
    axes[-1].set(title="Overlap of two patches' positions\n(Jaccard index, %)")
    _curves(lower.subplots(1, 4), content, rows)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _matrix(
    axis,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    darkest: float,
    colours: str,
    form: str,
) -> None:
    """Draw numbers as a map with their values in it; NaN stays empty."""
    axis.imshow(values, aspect="auto", cmap=colours, vmin=0, vmax=darkest, interpolation="nearest")
    for (i, j), value in np.ndenumerate(values):
        if not np.isnan(value):
            axis.text(
                j,
                i,
                form.format(value),
                ha="center",
                va="center",
                fontsize=9,
                bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1.2},
            )
    axis.set_xticks(
        range(len(columns)),
        [_short(name) for name in columns],
        rotation=30,
        ha="right",
        rotation_mode="anchor",
    )
    axis.set_yticks(range(len(rows)), [_short(name) for name in rows])


def _curves(axes, content: Mapping[str, Any], rows: int) -> None:
    """Draw harm, over-refusal, perplexity and the size of the patch over the links."""
    for method, own in content["methods"].items():
        colour, label, at = content["colours"][method], content["labels"][method], range(len(own))
        line = lambda axis, values, style, name: axis.plot(
            at,
            values,
            style,
            color=colour,
            label=f"{label}, {name}" if name else label,
            markersize=5,
        )
        line(axes[0], [_share(r["seen"], COMPLIED) for r in own], "o-", "seen")
        line(axes[0], [_share(r["unseen"], COMPLIED) for r in own], "o:", "unseen")
        line(axes[1], [_share(r["lookalike"], REFUSED) for r in own], "o-", "refused")
        line(axes[1], [_share(r["lookalike"], INCOHERENT) for r in own], "x:", "incoherent")
        line(axes[2], [r["ordinary_perplexity"] for r in own], "o-", "")
    sizes = [
        0.0,
        *(100 * x / content["patches"]["weights"] for x in content["patches"]["cumulative"]),
    ]
    colour, label = (content[key]["safepatching"] for key in ("colours", "labels"))
    axes[3].plot(range(len(sizes)), sizes, "o-", color=colour, label=label)
    n = content["methods"]["safepatching"][0]["lookalike"]["n"]
    titles = (
        "Harm",
        f"Harmless look-alikes, n = {n}",
        "Perplexity of ordinary answers",
        "Patches: weights that differ from the start",
    )
    for axis, title, unit in zip(axes, titles, (_SHARE, _SHARE, "", "% of weights")):
        axis.set(title=title, xlabel="after link", ylabel=unit, xlim=(-0.3, rows - 0.7))
        axis.set_xticks(
            range(rows), [r["model"].partition("-")[0] for r in content["methods"]["safepatching"]]
        )
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False, fontsize=9)
    for axis in axes[:2]:
        axis.set_ylim(-4, 104)
    perplexities = [r["ordinary_perplexity"] for own in content["methods"].values() for r in own]
    if max(perplexities) > 20 * min(perplexities):  # a broken model's hides the others
        axes[2].set_yscale("log")
    axes[3].set_ylim(bottom=0)


def _share(counts: Mapping[str, int], outcome: str) -> float:
    return 100 * counts[outcome] / counts["n"] if counts["n"] else float("nan")


def _short(name: str) -> str:
    return name if len(name) <= 18 else name[:17] + "\u2026"
