"""The picture of the predicted plane of alpha and beta."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from safepatch_jax.reporting import charts
from safepatch_jax.reporting.charts import COLOURS

_PANELS = {
    "harm": ("Harm: expected compliance, %", 100),
    "refusal": ("Over-refusal: expected refusals, %", 100),
    "auroc": ("AUROC, harmful against look-alikes", 1),
    "content_nll": ("Content NLL, nats a token", 1),
}
_LEAST = 1e-4  # what varies by less is rounding


def draw(content: Mapping[str, Any]) -> Any:
    """Draw the plane, a panel a measure; the dashed line has the backbone's value, hatched is where
    harm and over-refusal are both predicted below it.

    Args:
      content: see `slopes.gather`.
    """
    figure = charts.figure(13, 9)
    axes = charts.panels(figure, 2, 2)
    start = content["backbone"]
    alphas, betas = content["alphas"], content["betas"]
    grids = {name: _grid(content, name) for name in _PANELS}
    both = _grid(content, "both") > 0
    for axis, (name, (title, scale)) in zip(axes.flat, _PANELS.items()):
        if start[name] is None:
            charts.empty(axis, title, "no answer has content")
            continue
        values = scale * grids[name]
        if np.ptp(values) < scale * _LEAST:
            charts.empty(axis, title, f"{round(scale * start[name], 4):.3g} everywhere")
            continue
        image = axis.contourf(betas, alphas, values, 14, cmap="viridis")
        figure.colorbar(image, ax=axis)
        level = scale * start[name]
        axis.contour(betas, alphas, values, [level], colors="white", linestyles="--")
        if both.any():
            axis.contourf(betas, alphas, both, [0.5, 1.5], hatches=["//"], colors="none")
        for check in content["checks"]:
            axis.plot(check["beta"], check["alpha"], "o", color=COLOURS["chosen"])
            axis.annotate(
                f"{scale * check['true'][name]:.3g}",
                (check["beta"], check["alpha"]),
                color="white",
                fontsize=8,
                xytext=(4, 4),
                textcoords="offset points",
            )
        axis.set(title=title)
    for axis in axes[-1]:
        axis.set_xlabel("beta (OSM patch)")
    for axis in axes[:, 0]:
        axis.set_ylabel("alpha (SE patch)")
    figure.suptitle(
        "predicted from four models; dots: true models, with their values; dashed: the backbone's",
        fontsize=10,
    )
    return figure


def _grid(content: Mapping[str, Any], name: str) -> np.ndarray:
    rows = []
    for row in content["plane"]:
        rows.append([np.nan if point[name] is None else point[name] for point in row])
    return np.array(rows)
