"""The picture of a margin map: the margins of harmful and harmless prompts, a panel for each model,
before above after; and the content NLL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from safepatch_jax.reporting import charts
from safepatch_jax.reporting.charts import COLOURS

_BINS = 48
_LABELS = {"harm": "harmful prompts", "refusal": "harmless prompts"}
_HUES = {"harm": COLOURS["harm"], "refusal": COLOURS["model"]}


def draw(content: Mapping[str, Any]) -> Any:
    """Draw a margin map.

    Args:
      content: see `report.gather`.
    """
    whos = [who for who in ("against", "model") if who in content["models"]]
    nlls = [m for m in content["measures"] if m["nll"]]
    figure = charts.figure(12, 1.4 + 2.3 * len(whos))
    left, right = figure.subfigures(1, 2, width_ratios=(3, 2))
    axes = charts.panels(left, len(whos), 1, sharex=True, sharey=True)[:, 0]
    pools = {who: _pools(content, who) for who in whos}
    every = np.concatenate([np.concatenate(list(pool.values())) for pool in pools.values()])
    bins = np.linspace(*np.quantile(every, (0.002, 0.998)), _BINS)
    for axis, who in zip(axes, whos):
        _distributions(axis, pools[who], bins)
        value = content["auroc"][who]["value"]
        name = charts.escaped(content["models"][who])
        axis.set_title(f"{name}: AUROC {value:.3f}", loc="left", fontsize=10)
    axes[-1].set_xlabel("margin m, nats: refusals are likelier to the right of 0")
    charts.legend_outside(left, axes[0], "upper center", columns=2)
    _contents(charts.panels(right, 1, 1)[0, 0], nlls, whos, content["models"])
    return figure


def _pools(content: Mapping[str, Any], who: str) -> dict[str, np.ndarray]:
    pools = {}
    for kind in _LABELS:
        values = []
        for m in content["measures"]:
            if m["kind"] == kind and m["form"] == "plain" and m["margins"]:
                values += m["margins"][who]["values"]
        pools[kind] = np.array(values)
    return pools


def _distributions(axis: Any, pools: Mapping[str, np.ndarray], bins: np.ndarray) -> None:
    for kind, values in pools.items():
        weights = np.full(len(values), 100 / len(values))
        inside = np.clip(values, bins[0], bins[-1])
        axis.hist(inside, bins, weights=weights, color=_HUES[kind], alpha=0.3)
        axis.hist(inside, bins, weights=weights, color=_HUES[kind], histtype="step")
        charts.explain(axis, _LABELS[kind], "-", _HUES[kind])
        axis.axvline(np.median(values), color=_HUES[kind], linestyle="--", linewidth=1)
    axis.axvline(0, color=COLOURS["aside"], linewidth=1)
    axis.set_ylabel("prompts, %")
    axis.grid(color=COLOURS["grid"])
    axis.set_axisbelow(True)


def _contents(axis: Any, measures: Any, whos: Any, names: Mapping[str, str]) -> None:
    """Draw the NLL of the content of harmful answers, and of ordinary answers."""
    title = "NLL of given answers, nats a token"
    if not measures:
        charts.empty(axis, title)
        return
    labels = []
    for m in measures:
        labels.append(m["name"] if m["kind"] == "text" else f"{m['name']},\ncontent")
    for i, who in enumerate(whos):
        colour = COLOURS["model"] if who == "model" else COLOURS["against"]
        charts.explain(axis, names[who], "o", colour)
        for row, m in enumerate(measures):
            at = row + charts.shift(i, len(whos))
            axis.plot(m["nll"][who]["interval"], [at, at], color=colour)
            axis.plot(m["nll"][who]["mean"], at, "o", color=colour, markersize=5)
    axis.set(title=title)
    charts.name_rows(axis, labels)
    charts.legend_below(axis, columns=1, label=False)
