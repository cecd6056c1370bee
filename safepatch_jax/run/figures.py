"""Pictures of a run: the outcomes of its models; where in the model a patch lies, and how large it
is against the steps of bfloat16."""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from safepatch_jax.evaluation.judges.base import OUTCOMES
from safepatch_jax.patching import PATCH_ROLES
from safepatch_jax.patching.statistics import STEPS, totals
from safepatch_jax.reporting import charts
from safepatch_jax.reporting.charts import COLOURS
from safepatch_jax.reporting.tables import share

PATCH = "patch.png"
_BLOCK = re.compile(r"model\.layers\.(\d+)\.(?:\w+\.)?(\w+?)(?:_proj)?\.(weight|bias)")
_NORMS = {"input_layernorm": "norm 1", "post_attention_layernorm": "norm 2"}
_FEW = 7  # modules, whose names have room side by side
_SHOWN = 6  # per cent of answers, in whose bar a number has room


def draw_outcomes(measures: Mapping[str, Mapping[str, Any]], labels: Mapping[str, str]) -> Any:
    """Draw the outcomes on both prompt sets, and the NLL of reference answers.

    Args:
      measures: by variant, see `safepatch_jax.evaluation.measures.evaluate_model`.
      labels: of the variants.
    """
    names = [labels[variant] for variant in measures]
    figure = charts.figure(15, 1.4 + 0.55 * len(names))
    axes = charts.panels(figure, 1, 3)[0]
    titles = {
        "harmful": "Harmful requests\n(complied = harm)",
        "lookalike": "Harmless look-alikes\n(refused = over-refusal)",
    }
    for axis, (role, title) in zip(axes, titles.items()):
        counts = [m[role] for m in measures.values()]
        _stack(axis, names, counts)
        axis.set(title=f"{title}, n = {measures['backbone'][role]['n']}")
    charts.legend_below(axes[0], columns=3)
    series = [
        ("harmful answers", COLOURS["harm"], [m["harmful_nll"] for m in measures.values()]),
        ("ordinary answers", COLOURS["utility"], [m["ordinary_nll"] for m in measures.values()]),
    ]
    charts.bars(axes[2], names, series, "%.2f")
    axes[2].set(title="NLL of reference answers", xlabel="nats a token")
    charts.legend_below(axes[2], columns=2)
    for axis in axes[1:]:
        axis.tick_params(labelleft=False)
    return figure


def _stack(axis: Any, names: Sequence[str], counts: Sequence[Mapping[str, int]]) -> None:
    """Draw the outcomes of each row as parts of one bar."""
    start = np.zeros(len(names))
    for outcome in OUTCOMES:
        values = np.array([100 * share(of, outcome) for of in counts])
        drawn = axis.barh(
            range(len(names)), values, left=start, color=COLOURS[outcome], label=outcome
        )
        texts = [f"{x:.0f}" if x >= _SHOWN else "" for x in values]
        axis.bar_label(drawn, texts, label_type="center", color="white", fontsize=9)
        start += values
    charts.name_rows(axis, names)
    axis.set(xlabel="% of answers", xlim=(0, 100))


def draw_patch(statistics: Mapping[str, Mapping[str, Any]], path: str | pathlib.Path) -> None:
    """Draw density and overlap by layer and module, the sizes of the kept entries, and, where the
    statistics have them, cosine and norms of the two patches before selection.

    Args:
      statistics: by HF tensor name, see `tensor_statistics`.
      path: of the PNG.
    """
    cells, rest = _cells(statistics)
    layers = _layers(cells)
    compared = all("cosine" in s for s in statistics.values())
    figure = charts.figure(20 if compared else 15, 5.4 + 0.13 * layers)
    axes = charts.panels(figure, 2, 3 + compared, height_ratios=(1.9 + 0.13 * layers, 3.5))
    overlap = "Overlap of the two top sets\n(Jaccard index, %)"
    maps = [
        ("SE entries kept, % of each matrix", lambda s: _kept([s], "se"), "Blues"),
        ("OSM entries kept, %", lambda s: _kept([s], "osm"), "Reds"),
        (overlap, lambda s: 100 * s["overlap"], "Greys"),
    ]
    for axis, (title, value, colours) in zip(axes[0], maps):
        if cells:
            _map(axis, cells, value, colours)
            axis.set(title=title)
        else:
            charts.empty(axis, title, "no tensor of a block is patched")
    if compared and cells:
        _map(axes[0, 3], cells, lambda s: s["cosine"], "PuOr", (-1, 1))
        axes[0, 3].set(title="Cosine of the two patches\n(-1: opposite)")
        _norms(axes[1, 3], cells)
    _by_layer(axes[1, 0], cells)
    _by_module(axes[1, 1], cells, rest)
    _sizes(axes[1, 2], totals(statistics))
    charts.save(figure, path)


def _cells(statistics: Mapping[str, Any]) -> tuple[dict[tuple[int, str], Any], dict[str, Any]]:
    """Return ({(layer, module): statistics} of the blocks, {name: statistics} of what lies outside
    of them)."""
    cells, rest = {}, {}
    for name, s in statistics.items():
        match = _BLOCK.fullmatch(name)
        if match:
            layer, module, kind = match.groups()
            suffix = " bias" * (kind == "bias")
            cells[int(layer), _NORMS.get(module, module) + suffix] = s
        else:
            rest[name.removeprefix("model.").removesuffix(".weight")] = s
    return cells, rest


def _kept(tensors: Sequence[Mapping[str, Any]], role: str) -> float:
    """Return the kept entries in per cent of all entries of several tensors."""
    return 100 * sum(s[f"kept_{role}"] for s in tensors) / max(1, sum(s["size"] for s in tensors))


def _layers(cells: Mapping[tuple[int, str], Any]) -> int:
    return 1 + max((layer for layer, _ in cells), default=0)


def _groups(cells: Mapping[tuple[int, str], Any], part: int) -> dict[Any, list[Any]]:
    """Return the tensors of each layer (part 0) or module (part 1)."""
    groups: dict[Any, list[Any]] = {}
    for place, s in cells.items():
        groups.setdefault(place[part], []).append(s)
    return groups


def _name_columns(axis: Any, names: Sequence[str]) -> None:
    """Name the columns of an axis; many names are turned, so that none covers another."""
    turned = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    axis.set_xticks(range(len(names)), names, **(turned if len(names) > _FEW else {}))


def _map(
    axis: Any,
    cells: Mapping[tuple[int, str], Any],
    value: Callable[[Any], float],
    colours: str,
    limits: tuple[float, float | None] = (0, None),
) -> None:
    """Draw a value of each tensor by layer and module, in colours between two limits."""
    modules = list(_groups(cells, 1))
    grid = np.full((_layers(cells), len(modules)), np.nan)
    for (layer, module), s in cells.items():
        grid[layer, modules.index(module)] = value(s)
    image = axis.imshow(grid, aspect="auto", cmap=colours, interpolation="nearest")
    image.set_clim(*limits)
    axis.set(ylabel="layer")
    axis.yaxis.get_major_locator().set_params(integer=True)
    _name_columns(axis, modules)
    axis.get_figure().colorbar(image, ax=axis)


def _by_layer(axis: Any, cells: Mapping[tuple[int, str], Any]) -> None:
    groups = sorted(_groups(cells, 0).items())
    for role in PATCH_ROLES:
        values = [_kept(tensors, role) for _, tensors in groups]
        layers = [layer for layer, _ in groups]
        axis.plot(layers, values, "o-", markersize=3, color=COLOURS[role], label=role.upper())
    axis.set(title="Kept entries by layer", xlabel="layer", ylabel="% of the layer's entries")
    axis.set_ylim(0, 1.1 * max(1e-9, *axis.get_ylim()))
    axis.xaxis.get_major_locator().set_params(integer=True)
    charts.legend_below(axis, columns=2)


def _norm(tensors: Sequence[Mapping[str, Any]], role: str) -> float:
    """Return the L2 norm of a patch over several tensors."""
    return math.hypot(*(s[f"norm_{role}"] for s in tensors))


def _norms(axis: Any, cells: Mapping[tuple[int, str], Any]) -> None:
    """Draw the L2 norm of each patch by layer, before selection."""
    groups = sorted(_groups(cells, 0).items())
    layers = [layer for layer, _ in groups]
    for role in PATCH_ROLES:
        values = [_norm(tensors, role) for _, tensors in groups]
        axis.plot(layers, values, "o-", markersize=3, color=COLOURS[role], label=role.upper())
    axis.set(title="Norm of each patch by layer", xlabel="layer", ylabel="L2 norm, all entries")
    axis.set_ylim(0, 1.1 * max(1e-30, *axis.get_ylim()))
    axis.xaxis.get_major_locator().set_params(integer=True)
    charts.legend_below(axis, columns=2)


def _by_module(
    axis: Any, cells: Mapping[tuple[int, str], Any], rest: Mapping[str, Mapping[str, Any]]
) -> None:
    groups = _groups(cells, 1) | {name: [s] for name, s in rest.items()}
    values = {}
    for role in PATCH_ROLES:
        values[role] = [_kept(tensors, role) for tensors in groups.values()]
    _columns(axis, values)
    axis.set(title="Kept entries by module", ylabel="% of the module's entries")
    _name_columns(axis, list(groups))


def _columns(axis: Any, values: Mapping[str, Sequence[float]]) -> None:
    """Draw the values of both patches side by side."""
    for shift, role in zip((-0.2, 0.2), values):
        places = np.arange(len(values[role])) + shift
        axis.bar(places, values[role], 0.4, color=COLOURS[role], label=role.upper())


def _sizes(axis: Any, total: Mapping[str, Any]) -> None:
    """Draw how many of the kept patch entries lie between two powers of two of bfloat16 steps."""
    values = {}
    for role in PATCH_ROLES:
        at_least = np.array([total[f"kept_{role}"], *total[f"steps_{role}"], 0])
        values[role] = -100 * np.diff(at_least) / max(1, total[f"kept_{role}"])
    _columns(axis, values)
    edges = {i + 0.5: f"$2^{{{power}}}$" for i, power in enumerate(STEPS)}
    axis.set_xticks(list(edges)[::3], list(edges.values())[::3])
    lines = [
        (0, "-", "one bfloat16 step"),
        (-1, ":", "half a step: less is lost\nby rounding to nearest"),
    ]
    for power, style, text in lines:
        place = STEPS.index(power) + 0.5
        axis.axvline(place, color="black", linestyle=style, linewidth=1, label=text)
    axis.set(
        title="Size of the kept patch entries",
        xlabel="bfloat16 steps of the weight",
        ylabel="% of the kept entries",
    )
    charts.legend_below(axis, columns=2)
