"""Describes in lines of text the memory and time of programs, and whether they fit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from safepatch_jax.mesh import Sharder
from safepatch_jax.models.config import DecoderConfig
from safepatch_jax.models.table import param_table
from safepatch_jax.planning import PROGRAMS
from safepatch_jax.planning.chips import GIB, OWN_POOL, POOL, Chip, Target, present
from safepatch_jax.planning.compile import Figures, measure_all, utilisation
from safepatch_jax.planning.programs import holdings, in_blocks, lengths, programs
from safepatch_jax.planning.screen import screen_train
from safepatch_jax.planning.search import (
    LAYERWISE,
    Changes,
    Fit,
    Planner,
    as_flags,
)
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
    mesh = ", ".join(f"{axis} {n}" for axis, n in sharder.mesh.shape.items())
    return [
        f"Target:   {target.title}{memory}; mesh {mesh}",
        f"Model:    {config.family}, {param_table(config).size / 1e6:,.1f} M parameters, "
        f"{config.num_layers} layers, width {config.embed_dim}, {config.num_heads} heads over "
        f"{config.num_kv_heads}, stored as {config.dtype}",
        f"Settings: compute {model.compute_dtype}, remat {model.remat}, attention "
        f"{model.attention}; train step of {derive.batch_size} x {length} tokens ({answers} of "
        f"answers) in {derive.accumulate} part(s), {derive.optimizer}, trains {derive.train}, "
        f"backward pass {derive.backward}; decode "
        f"{settings.evaluate.batch_size} x {settings.evaluate.max_new_tokens} tokens",
    ]


def table(figures: Sequence[Figures]) -> list[str]:
    """Lay out the figures, a row for each program, then the collectives."""
    compiled = [f for f in figures if f.needed is None]
    memory = next((f.memory for f in figures if f.memory is not None), None)
    units = list(dict.fromkeys(itertools.chain.from_iterable(f.floor for f in compiled)))
    header = ["program", "arguments", "temporaries", "resident", "peak"]
    if memory:
        header.append(f"of {memory / GIB:.2f} GiB")
    header += ["TFLOP", *units]
    if units:
        header.append("bound by")
    header.append("compiled in")
    lines = aligned([header, *(_row(f, memory, units) for f in figures)])
    if units:
        lines.append(FLOOR)
    if shares := utilisation(figures):
        steps = ", ".join(f"{step} {share:.1%}" for step, share in shares.items())
        lines.append(
            f"MFU at the floor (FLOPs that a step needs, of the peak in that time): {steps}"
        )
    if exchanging := [f for f in compiled if f.work.collectives]:
        lines.append("Collectives, of all runs together, and the bytes that each device sends:")
        lines += map(_collectives, exchanging)
    if unknown := [f.title for f in compiled if f.work.unknown_loops]:
        lines.append(f"Loops of unknown length count once in {', '.join(unknown)}.")
    return lines


def _row(f: Figures, memory: int | None, units: Sequence[str]) -> list[str]:
    """Return the cells of a program: those of memory, if it is known, then those of time."""
    cells = [_title(f), "", "", size(f.resident), _required(f, "too much")]
    if f.needed is None:
        cells[1:3] = size(f.arguments), size(f.temporaries)
    if memory:
        cells.append(f"{f.peak / memory:.0%}" if f.fits else "does not fit")
    cells.append(f"{f.flops / 1e12:.3g}")
    cells += [duration(f.floor[unit]) if f.floor else "" for unit in units]
    if units:
        cells.append(f.bound)
    return [*cells, f"{f.seconds:.1f} s"]


def _title(f: Figures) -> str:
    return f.title if f.runs == 1 else f"{f.title}, {f.runs} x"


def _required(f: Figures, unknown: str) -> str:
    """Return the bytes that a program needs; `unknown` where the compiler did not say."""
    return unknown if f.needed == 0 else size(f.required)


def _collectives(f: Figures) -> str:
    kinds = [f"{kind} {runs:,} x {size(sent)}" for kind, (runs, sent) in f.work.by_kind().items()]
    if largest := f.work.largest("all-gather"):
        kinds.append(f"largest all-gather {size(largest)}")
    if f.exposed:
        kinds.append(f"exposed, with nothing computed meanwhile: {duration(f.exposed)}")
    return f"  {f.title}: {'; '.join(kinds)}"


def verdict(figures: Sequence[Figures]) -> str:
    """Say whether all programs fit, and which is the largest, or which do not."""
    if all(f.memory is None for f in figures):
        worst = max(figures, key=lambda f: f.peak)
        return (
            f"The most is {size(worst.peak)} a device ({worst.title}); how much these devices have "
            "is not known."
        )
    needs = []
    for f in figures:
        if not f.fits:
            needs.append(f"{f.title} needs {_required(f, 'more')} of {size(f.memory)}")
    if needs:
        return f"Verdict: does not fit. {'; '.join(needs)}."
    worst = max(figures, key=lambda f: f.peak)
    return (
        f"Verdict: fits. The most is {size(worst.peak)} of {size(worst.memory)} a device "
        f"({worst.title})."
    )


def pool_lines(figures: Sequence[Figures], target: Target) -> list[str]:
    """Say which share of a card JAX must be given; nothing for TPUs, or where nothing fits."""
    chip, most = target.chip, max((f.required for f in figures), default=0)
    if chip is None or chip.platform != "gpu" or not most or most > POOL * chip.hbm:
        return []
    of_itself = f"JAX takes {OWN_POOL:.0%} of a card of itself, {size(OWN_POOL * chip.hbm)}"
    if most <= OWN_POOL * chip.hbm:
        return [f"Pool: {of_itself}, which is enough."]
    least = math.ceil(100 * most / chip.hbm) / 100
    return [
        f"Pool: {of_itself}, which is too little. Set XLA_CLIENT_MEM_FRACTION to {least:.2f} or "
        f"more (at most {POOL})."
    ]


def remedy_lines(
    fit: Fit | None, settings: Settings, config: DecoderConfig, target: Target, sharder: Sharder
) -> list[str]:
    """Name the nearest setting that fits, or how many chips are needed."""
    if fit is not None:
        return [f"Nearest setting that fits: {as_flags(fit.changes)}", *table(fit.figures)]
    chips, memory = len(target.devices), target.memory or math.inf
    least = {"derive.optimizer": "adafactor", "derive.accumulate": 1}
    if in_blocks(settings, config):
        least |= LAYERWISE
    smallest = screen_train(
        settings.override(least),
        config,
        sharder,
        lengths(settings),
    ).least
    enough = chips
    while smallest * chips / enough > 0.9 * memory:
        enough *= 2
    consequence = (
        ": activations or the patch's arrays are too large; take fewer tokens, a smaller batch or "
        "more chips."
    )
    if enough > chips:
        consequence = f"; {enough} chips or more are needed."
    return [
        "No setting of remat, micro-batches, backward pass, optimiser, scores in flight, mesh and "
        f"decode batch makes it fit. Weights and gradients alone take {size(smallest)} a device "
        f"with {as_flags(least)}{consequence}"
    ]


def suggestion_lines(compiled: Sequence[tuple[Changes, Figures]], best: Fit | None) -> list[str]:
    """Lay out the compiled train steps, the shortest first, and name the best with which every
    program fits."""
    rows = [["mesh", "remat", "peak", "fits", "at least", "bound by"]]
    for changes, f in compiled:
        fits = "yes" if f.fits else "no"
        least = duration(f.least_seconds) if f.floor else ""
        mesh, remat = changes["mesh.shape"], changes["model.remat"]
        rows.append([mesh, remat, size(f.required), fits, least, f.bound])
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
    """Return the same table for the devices of a mesh that is present, also of a CPU; nothing is
    allocated or run.

    Args:
      settings: of the run.
      config: the architecture.
      sharder: the mesh.
      chip: its figures, if the devices' kind is not in the table of chips.
      shape: T and A of training and scoring; the largest that the settings allow, if not given.
        With the shape of the data what is compiled here is found in the compile cache when the run
        needs it.
      compiled: compile the programs (a minute on a CPU for a small model); else give only an
        estimate from sizes.
    """
    target = present(sharder, chip)
    if not compiled:
        s = screen_train(settings, config, sharder, shape or lengths(settings))
        memory = "" if target.memory is None else f"; there are {size(target.memory)}"
        return [
            f"A train step takes about {size(s.memory)} on each device, {size(s.arguments)} of it "
            f"weights and moments{memory}."
        ]
    kinds = programs(settings, config, sharder, PROGRAMS, shape)
    measured = measure_all(kinds, target, sharder, "memory of each program")
    lines = purposes(settings, config, sharder)
    lines += [*table(measured), verdict(measured)]
    if not all(f.fits for f in measured):
        fit = Planner(config, target).remedy(settings)
        lines += remedy_lines(fit, settings, config, target, sharder)
    return lines


def purposes(settings: Settings, config: DecoderConfig, sharder: Sharder) -> list[str]:
    """Say for what training and scoring hold memory on each device; by arithmetic."""
    lines = []
    for kind, holds in holdings(settings, config, sharder).items():
        parts = ", ".join(f"{name} {size(n)}" for name, n in holds.items() if n)
        lines.append(f"Memory of {kind}: {parts}; together {size(sum(holds.values()))}")
    return lines


def to_json(
    target: Target,
    sharder: Sharder,
    settings: Settings,
    config: DecoderConfig,
    figures: Sequence[Figures],
    fit: Fit | None = None,
    compiled: Sequence[tuple[Changes, Figures]] = (),
) -> dict[str, Any]:
    """Return everything as plain data; bytes and seconds."""
    nearest = None
    if fit is not None:
        measured = [f.to_dict() for f in fit.figures]
        nearest = {"changes": fit.changes, "programs": measured}
    return {
        "target": target.title,
        "chips": len(target.devices),
        "memory": target.memory,
        "mesh": dict(sharder.mesh.shape),
        "parameters": param_table(config).size,
        "settings": settings.to_dict(),
        "fits": bool(figures) and all(f.fits for f in figures),
        "programs": [f.to_dict() for f in figures],
        "mfu_at_the_floor": utilisation(figures),
        "nearest_that_fits": nearest,
        "searched": [{"changes": changes, "train": f.to_dict()} for changes, f in compiled],
    }


def size(n: float) -> str:
    """Return bytes as people read them."""
    for unit, scale in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= scale / 10:
            return f"{n / scale:.2f} {unit}"
    return f"{n:.0f} B"


def duration(seconds: float) -> str:
    """Return seconds as people read them."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    if seconds >= 1e-4 or not seconds:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds * 1e6:.2g} us"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lay out rows in columns: the first to the left, the others to the right."""
    first, *others = (max(map(len, column)) for column in zip(*rows))
    lines = []
    for name, *cells in rows:
        right = map(str.rjust, cells, others)
        lines.append("  ".join([name.ljust(first), *right]).rstrip())
    return lines
