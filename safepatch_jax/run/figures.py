"""Pictures of a patch: where in the model it lies, and how large it is against the steps of
bfloat16."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from safepatch_jax.patching import PATCH_ROLES
from safepatch_jax.patching.statistics import STEPS, totals

PATCH = "patch.png"
_COLOURS = {"se": "#4477aa", "osm": "#ee6677"}
_BLOCK = re.compile(r"model\.layers\.(\d+)\.(?:\w+\.)?(\w+?)(?:_proj)?\.(weight|bias)")


def draw_patch(statistics: Mapping[str, Mapping[str, Any]], path: str | pathlib.Path) -> None:
    """Draw density and overlap by layer and module, and the sizes of the kept entries.

    Args:
      statistics: by HF tensor name, see `tensor_statistics`.
      path: of the PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells, rest = _cells(statistics)
    modules = list(dict.fromkeys(module for _, module in cells))
    layers = 1 + max((layer for layer, _ in cells), default=0)
    density = lambda role: lambda s: 100 * s[f"kept_{role}"] / s["size"]
    maps = [
        ("SE entries kept, % of each matrix", density("se"), "Blues"),
        ("OSM entries kept, %", density("osm"), "Reds"),
        ("Overlap of the two top sets\n(Jaccard index, %)", lambda s: 100 * s["overlap"], "Greys"),
    ]
    figure, axes = plt.subplots(
        2,
        3,
        figsize=(15, 4.6 + 0.13 * layers),
        constrained_layout=True,
        height_ratios=(1.6 + 0.13 * layers, 3),
    )
    for axis, (title, value, colours) in zip(axes[0], maps):
        grid = np.full((layers, len(modules)), np.nan)
        for (layer, module), s in cells.items():
            grid[layer, modules.index(module)] = value(s)
        axis.yaxis.get_major_locator().set_params(integer=True)
        image = axis.imshow(grid, aspect="auto", cmap=colours, vmin=0, interpolation="nearest")
        axis.set(title=title, ylabel="layer", xticks=range(len(modules)), xticklabels=modules)
        figure.colorbar(image, ax=axis)
    _by_layer(axes[1, 0], cells, layers)
    _by_module(axes[1, 1], cells, modules, rest)
    _sizes(axes[1, 2], totals(statistics))
    for axis in axes[1]:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _cells(statistics: Mapping[str, Any]) -> tuple[dict[tuple[int, str], Any], dict[str, Any]]:
    """Return ({(layer, module): statistics} of the blocks, {name: statistics} of what lies outside
    of them)."""
    cells, rest = {}, {}
    for name, s in statistics.items():
        if found := _BLOCK.fullmatch(name):
            module = (
                found[2]
                .replace("input_layernorm", "norm 1")
                .replace("post_attention_layernorm", "norm 2")
            )
            cells[int(found[1]), module + (" bias" if found[3] == "bias" else "")] = s
        else:
            rest[name.removeprefix("model.").removesuffix(".weight")] = s
    return cells, rest


def _share(many: list[Mapping[str, Any]], role: str) -> float:
    """Return the kept entries in percent of all entries of several tensors."""
    return 100 * sum(s[f"kept_{role}"] for s in many) / max(1, sum(s["size"] for s in many))


def _by_layer(axis, cells, layers: int) -> None:
    for role in PATCH_ROLES:
        values = [
            _share([s for (at, _), s in cells.items() if at == layer], role)
            for layer in range(layers)
        ]
        axis.plot(
            range(layers),
            values,
            marker="o",
            markersize=3,
            color=_COLOURS[role],
            label=role.upper(),
        )
    axis.set(
        title="Kept entries by layer",
        xlabel="layer",
        ylabel="% of the layer's entries",
        ylim=(0, 1.1 * max(1e-9, *axis.get_ylim())),
    )
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(frameon=False)


def _by_module(axis, cells, modules: list[str], rest) -> None:
    groups = {module: [s for (_, m), s in cells.items() if m == module] for module in modules}
    groups |= {name: [s] for name, s in rest.items()}
    for offset, role in ((-0.2, "se"), (0.2, "osm")):
        axis.bar(
            [i + offset for i in range(len(groups))],
            [_share(many, role) for many in groups.values()],
            0.4,
            color=_COLOURS[role],
            label=role.upper(),
        )
    axis.set(
        title="Kept entries by module",
        ylabel="% of the module's entries",
        xticks=range(len(groups)),
    )
    axis.set_xticklabels(
        groups, rotation=0 if len(groups) < 9 else 40, ha="center" if len(groups) < 9 else "right"
    )


def _sizes(axis, total: Mapping[str, Any]) -> None:
    """Draw how many of the kept patch entries lie between two powers of two of bfloat16 steps."""
    edges = [f"$2^{{{k}}}$" for k in STEPS]
    for offset, role in ((-0.2, "se"), (0.2, "osm")):
        at_least = [total[f"kept_{role}"], *total[f"steps_{role}"], 0]
        share = [
            100 * (a - b) / max(1, total[f"kept_{role}"]) for a, b in zip(at_least, at_least[1:])
        ]
        axis.bar(
            [i + offset for i in range(len(share))],
            share,
            0.4,
            color=_COLOURS[role],
            label=role.upper(),
        )
    axis.set_xticks([i + 0.5 for i in range(0, len(edges), 3)], edges[::3])
    for power, style, text in (
        (0, "-", "one bfloat16 step"),
        (-1, ":", "half a step: less is lost\nby rounding to nearest"),
    ):
        axis.axvline(
            STEPS.index(power) + 0.5, color="black", linestyle=style, linewidth=1, label=text
        )
    axis.set(
        title="Size of the kept patch entries",
        xlabel="bfloat16 steps of the weight",
        ylabel="% of the kept entries",
    )
    axis.legend(frameon=False, fontsize=8)
