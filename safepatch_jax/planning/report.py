"""Says in lines of text what programs need and take, and whether they fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from safepatch_jax.mesh import Sharder
from safepatch_jax.models.config import DecoderConfig
from safepatch_jax.models.table import param_table
from safepatch_jax.planning.chips import GIB, Chip, Target, present
from safepatch_jax.planning.compile import Figures, measure_all
from safepatch_jax.planning.programs import PROGRAMS, lengths, programs
from safepatch_jax.planning.screen import screen_train
from safepatch_jax.planning.search import Changes, Found, as_flags
from safepatch_jax.settings import Settings

FLOOR = (
    "Times are floors, by the roofline: peak rates of the data sheet, all units busy at once, no "
    "latency. Nothing was run; a real run takes longer."
)


def heading(
    target: Target, settings: Settings, config: DecoderConfig, sharder: Sharder
) -> list[str]:
    """Describe devices, model and the settings that decide about memory."""
    model, derive = settings.model, settings.derive
    length, answers = lengths(settings)
    memory = "" if target.memory is None else f", {target.memory / GIB:.2f} GiB each for programs"
    return [
        f"Target:   {target.title}{memory}; mesh "
        + ", ".join(f"{a} {n}" for a, n in sharder.mesh.shape.items()),
        f"Model:    {config.family}, {param_table(config).size / 1e6:,.1f} M parameters, "
        f"{config.num_layers} layers, width {config.embed_dim}, {config.num_heads} heads over "
        f"{config.num_kv_heads}, stored as {config.dtype}",
        f"Settings: compute {model.compute_dtype}, remat {model.remat}, attention "
        f"{model.attention}; train step of {derive.batch_size} x {length} tokens ({answers} of "
        f"answers) in {derive.accumulate} part(s), {derive.optimizer}; decode "
        f"{settings.evaluate.batch_size} x {settings.evaluate.max_new_tokens} tokens",
    ]


def table(figures: Sequence[Figures]) -> list[str]:
    """Lay out the figures, a row for each program, then the collectives."""
    known = [f for f in figures if f.needed is None]
    limit = next((f.memory for f in figures if f.memory is not None), None)
    limits = list(dict.fromkeys(what for f in known for what in f.floor))
    rows = [
        [
            "program",
            "arguments",
            "temporaries",
            "resident",
            "peak",
            *([f"of {limit / GIB:.2f} GiB"] if limit else []),
            "TFLOP",
            *limits,
            *(["bound by"] if limits else []),
            "compiled in",
        ]
    ]
    for f in figures:
        need = (
            size(f.peak)
            if f.needed is None
            else size(f.needed + f.resident)
            if f.needed
            else "too much"
        )
        own = [size(f.arguments), size(f.temporaries)] if f.needed is None else ["", ""]
        share = f"{f.peak / limit:.0%}" if limit and f.fits else "does not fit"
        rows.append(
            [
                f.title,
                *own,
                size(f.resident),
                need,
                *([share] if limit else []),
                f"{f.flops / 1e12:.3g}",
                *(duration(f.floor[what]) if f.floor else "" for what in limits),
                *([f.bound] if limits else []),
                f"{f.seconds:.1f} s",
            ]
        )
    lines = aligned(rows) + ([FLOOR] if limits else [])
    if exchanged := [line for f in known if (line := _collectives(f))]:
        lines += ["Collectives of one run, and the bytes that each device sends:", *exchanged]
    if unknown := [f.title for f in known if f.work.unknown_loops]:
        lines.append(f"Loops of unknown length count once in {', '.join(unknown)}.")
    return lines


def _collectives(f: Figures) -> str:
    if not f.work.collectives:
        return ""
    kinds = "; ".join(
        f"{kind} {runs:,} x {size(sent)}" for kind, (runs, sent) in f.work.by_kind().items()
    )
    largest = f.work.largest("all-gather")
    return f"  {f.title}: {kinds}" + (f"; largest all-gather {size(largest)}" if largest else "")


def verdict(figures: Sequence[Figures]) -> str:
    """Say whether all programs fit, and which is the largest, or which do not."""
    if all(f.memory is None for f in figures):
        worst = max(figures, key=lambda f: f.peak)
        return f"The most is {size(worst.peak)} a device ({worst.title}); how much these devices have is not known."
    if wrong := [f for f in figures if not f.fits]:
        need = lambda f: (
            size(f.needed + f.resident if f.needed is not None else f.peak)
            if f.needed != 0
            else "more"
        )
        return (
            "Verdict: does not fit. "
            + "; ".join(f"{f.title} needs {need(f)} of {size(f.memory)}" for f in wrong)
            + "."
        )
    worst = max(figures, key=lambda f: f.peak)
    return f"Verdict: fits. The most is {size(worst.peak)} of {size(worst.memory)} a device ({worst.title})."


def remedy_lines(
    found: Found | None, settings: Settings, config: DecoderConfig, target: Target, sharder: Sharder
) -> list[str]:
    """Name the nearest setting that fits, or how many chips there must be."""
    if found is not None:
        return [f"Nearest setting that fits: {as_flags(found.changes)}", *table(found.figures)]
    chips, memory = len(target.devices), target.memory or math.inf
    smallest = screen_train(
        settings.override({"derive.optimizer": "adafactor", "derive.accumulate": 1}),
        config,
        sharder,
        lengths(settings),
    ).least
    enough = chips
    while smallest * chips / enough > 0.9 * memory:
        enough *= 2
    more = (
        f" Weights and gradients alone take {size(smallest)} a device with "
        "derive.optimizer=adafactor"
        + (
            f"; {enough} chips or more are needed."
            if enough > chips
            else ": activations or the patch's arrays are too large; take fewer tokens, a smaller "
            "batch or more chips."
        )
    )
    return [
        "No setting of remat, micro-batches, optimiser, mesh and decode batch makes it fit." + more
    ]


def suggestion_lines(compiled: Sequence[tuple[Changes, Figures]], best: Found | None) -> list[str]:
    """Lay out the train steps that were compiled, the shortest first, and name the best with which
    every program fits."""
    rows = [["mesh", "remat", "peak", "fits", "at least", "bound by"]]
    for changes, f in compiled:
        peak = f.peak if f.needed is None else f.needed + f.resident
        rows.append(
            [
                changes["mesh.shape"],
                changes["model.remat"],
                size(peak),
                "yes" if f.fits else "no",
                duration(f.least_seconds) if f.floor else "",
                f.bound,
            ]
        )
    lines = ["Train steps, the shortest floor first:", *aligned(rows)]
    if best is None:
        return lines + [FLOOR, "None of these fits with every program."]
    return [*lines, f"Best: {as_flags(best.changes)}", *table(best.figures), verdict(best.figures)]


def figures(
    settings: Settings,
    config: DecoderConfig,
    sharder: Sharder,
    chip: Chip | None = None,
    *,
    shape: tuple[int, int] | None = None,
    compiled: bool = True,
) -> list[str]:
    """Return the same table for the devices of a mesh that is at hand, a CPU's too; nothing is
    allocated or run.

    Args:
      settings: of the run.
      config: the architecture.
      sharder: the mesh.
      chip: its figures, if the devices' kind is not in the table of chips.
      shape: T and A of training and scoring; the largest that the settings allow, if not given.
        With the shape of the data what is compiled here is found in the compile cache when the run
        needs it.
      compiled: compile the programs (a minute on a CPU for a small model); else tell what follows
        from sizes alone.
    """
    target = present(sharder, chip)
    if not compiled:
        s = screen_train(settings, config, sharder, shape or lengths(settings))
        return [
            f"A train step takes about {size(s.memory)} on each device, {size(s.arguments)} of it "
            "weights and moments"
            + ("." if target.memory is None else f"; there are {size(target.memory)}.")
        ]
    measured = measure_all(
        programs(settings, config, sharder, PROGRAMS, shape),
        target,
        sharder,
        "memory of each program",
    )
    return [*table(measured), verdict(measured)]


def to_json(
    target: Target,
    sharder: Sharder,
    settings: Settings,
    config: DecoderConfig,
    figures: Sequence[Figures],
    found: Found | None = None,
    compiled: Sequence[tuple[Changes, Figures]] = (),
) -> dict[str, Any]:
    """Return everything as plain data; bytes and seconds."""
    return {
        "target": target.title,
        "chips": len(target.devices),
        "memory": target.memory,
        "mesh": dict(sharder.mesh.shape),
        "parameters": param_table(config).size,
        "settings": settings.to_dict(),
        "fits": bool(figures) and all(f.fits for f in figures),
        "programs": [f.to_dict() for f in figures],
        "nearest_that_fits": found
        and {"changes": found.changes, "programs": [f.to_dict() for f in found.figures]},
        "searched": [{"changes": changes, "train": f.to_dict()} for changes, f in compiled],
    }


def size(n: float) -> str:
    """Return bytes as people read them."""
    for unit, scale in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= scale / 10:
            return f"{n / scale:.2f} {unit}"
    return f"{n:.0f} B"


def duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return (
        f"{seconds * 1e3:.3g} ms" if seconds >= 1e-4 or not seconds else f"{seconds * 1e6:.2g} us"
    )


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lay out rows in columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lay = lambda row: [
        row[0].ljust(widths[0]),
        *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:])),
    ]
    return ["  ".join(lay(row)).rstrip() for row in rows]
