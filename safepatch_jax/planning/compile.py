"""Compiles programs ahead of time and measures their memory and least time."""

from __future__ import annotations

import dataclasses
import functools
import re
import time
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from safepatch_jax.mesh import Sharder
from safepatch_jax.planning.chips import Chip, Target
from safepatch_jax.planning.flops import count_flops
from safepatch_jax.planning.programs import Program
from safepatch_jax.planning.work import Collective, ProgramWork, read_work
from safepatch_jax.runtime.console import progress


@dataclasses.dataclass(frozen=True)
class Figures:
    """The measures of a compiled program. Bytes are those of one device.

    Attributes:
      title, kind: of the program.
      memory: bytes that programs can use; None where that is not known.
      seconds: of tracing, lowering and compiling.
      runs: how often one step, or one batch, takes it.
      flops: of its matrix products in all runs, all devices together, see `count_flops`.
      arguments, temporaries: as XLA reports them; outputs that take an argument's place are not
        temporaries.
      resident: see `Program`.
      peak: most bytes in use at once: arguments, the block of temporaries, results, and resident.
      needed: for a program that XLA refuses, the bytes that it says are needed, 0 where it does not
        say; None for a program that compiles.
      work: of all runs on a device.
      floor: {unit that limits: least seconds of all runs}; empty where the chip's figures are not
        known.
      exposed: seconds of the links in which nothing else is computed; part of the links' floor.
      step, least_flops: see `Program`.
      rated_flops: FLOP/s of all devices together, 0 where the chip's figures are not known.
    """

    title: str
    kind: str
    memory: int | None
    seconds: float
    flops: int
    resident: int
    runs: int = 1
    arguments: int = 0
    temporaries: int = 0
    peak: int = 0
    needed: int | None = None
    work: ProgramWork = ProgramWork()
    floor: dict[str, float] = dataclasses.field(default_factory=dict)
    exposed: float = 0.0
    step: str = ""
    least_flops: int = 0
    rated_flops: float = 0.0

    @property
    def fits(self) -> bool:
        return self.needed is None and (self.memory is None or self.peak <= self.memory)

    @property
    def required(self) -> int:
        """Bytes that it needs, with what is resident."""
        return self.peak if self.needed is None else self.needed + self.resident

    @property
    def bound(self) -> str:
        """The unit that limits it."""
        return max(self.floor, key=self.floor.get) if self.floor else ""

    @property
    def least_seconds(self) -> float:
        return max(self.floor.values(), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        work, collectives = self.work, {}
        for kind, (runs, sent) in work.by_kind().items():
            collectives[kind] = {"runs": runs, "bytes_sent": round(sent)}
        result = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del result["work"]
        return result | {
            "collectives": collectives,
            "largest_all_gather": work.largest("all-gather"),
            "memory_traffic": work.traffic,
            "flops_on_each_device": work.flops,
            "sorts": work.sorts,
            "loops_counted_once": work.unknown_loops,
            "fits": self.fits,
            "bound_by": self.bound,
        }


def measure(program: Program, target: Target, sharder: Sharder) -> Figures:
    """Compile a program for a target and return its figures.

    Raises:
      ValueError: settings, model and mesh do not go together.
      jax.errors.JaxRuntimeError: the compiler fails for another reason than memory; a note names
        program and target.
    """
    start = time.monotonic()
    traced = program.trace()
    flops = program.runs * count_flops(traced.jaxpr, program.while_trips)
    figures = functools.partial(
        Figures,
        title=program.title,
        kind=program.kind,
        memory=target.memory,
        flops=flops,
        resident=program.resident,
        runs=program.runs,
        step=program.step,
        least_flops=program.least_flops,
        rated_flops=target.chip.flops * len(target.devices) if target.chip else 0.0,
    )
    try:
        # The compile cache stores what is compiled for absent devices, and cannot read it.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
            compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if (needed := memory_needed(str(error))) is None:
            error.add_note(
                f"While compiling '{program.title}' for {target.title}, mesh "
                f"{dict(sharder.mesh.shape)}."
            )
            raise
        return figures(seconds=time.monotonic() - start, needed=needed)
    seconds, memory = time.monotonic() - start, compiled.memory_analysis()
    work = read_work(compiled.as_text()).times(program.runs)
    floor, devices = {}, list(sharder.mesh.devices.flat)
    exposed = 0.0
    if target.chip:
        floor = least_times(work, flops / len(devices), target.chip, devices)
        alone = [c for c in work.collectives if c.exposed and not c.across]
        exposed = link_seconds(alone, target.chip, devices)
    return figures(
        seconds=seconds,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=peak_bytes(memory) + program.resident,
        work=work,
        floor=floor,
        exposed=exposed,
    )


def whole_floor(parts: Sequence[Figures]) -> dict[str, float]:
    """Return the least seconds of a step of several programs, {unit that limits: seconds}."""
    floor: dict[str, float] = {}
    for f in parts:
        for unit, seconds in f.floor.items():
            floor[unit] = floor.get(unit, 0.0) + seconds
    return floor


def utilisation(figures: Iterable[Figures]) -> dict[str, float]:
    """Return the MFU of each step at its floor, {step: share}: the FLOPs that it needs, of those
    that all devices can do in its least time.

    A step one of whose programs does not compile, or without products, is left out.
    """
    steps: dict[str, list[Figures]] = {}
    for f in figures:
        steps.setdefault(f.step, []).append(f)
    result = {}
    for step, parts in steps.items():
        possible = parts[0].rated_flops * max(whole_floor(parts).values(), default=0.0)
        if parts[0].least_flops and possible and all(f.floor for f in parts):
            result[step] = parts[0].least_flops / possible
    return result


def peak_bytes(memory: Any) -> int:
    """Return the most bytes in use at once, of a compiled program's `memory_analysis()`."""
    # XLA's peak is that of live arrays (on CPU without temporaries), but temporaries are reserved
    # as one block.
    blocks = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return max(memory.peak_memory_in_bytes, blocks + results)


def measure_all(
    programs: Iterable[Program], target: Target, sharder: Sharder, title: str = "compile"
) -> list[Figures]:
    """Compile programs one after another, with a bar that names the current one."""
    programs, figures = list(programs), []
    with progress(len(programs), title, "program") as bar:
        for program in programs:
            bar.set_postfix_str(program.title)
            figures.append(measure(program, target, sharder))
            bar.update()
    return figures


def memory_needed(message: str) -> int | None:
    """Return the bytes that a compiler's refusal for lack of device memory says are needed: 0 if it
    names none, None for any other error (also for lack of on-chip memory, which is a fault of a
    kernel that no setting mends)."""
    if "RESOURCE_EXHAUSTED" not in message or not re.search(r"\bhbm\b", message, re.IGNORECASE):
        return None
    for pattern in (
        r"\(([\d.]+)([KMGT]?)\) exceeds available HBM",
        r"Used ([\d.]+)([KMGT]?)i?B? of [\d.]+[KMGT]?i?B? hbm",
    ):
        if match := re.search(pattern, message, re.IGNORECASE):
            return int(float(match.group(1)) * 1024 ** " KMGT".index(match.group(2).upper() or " "))
    return 0


def link_seconds(
    collectives: Iterable[Collective], chip: Chip, devices: Sequence[Any] = ()
) -> float:
    """Return the least time of collectives on a chip's links: of a torus, those along the axes in
    which the devices of a group differ.

    Args:
      collectives: within a slice.
      chip: its figures.
      devices: in the order of the mesh; without them all links count.
    """
    return sum(c.sent / (chip.link * _share_of_links(c, chip, devices)) for c in collectives)


def _share_of_links(c: Collective, chip: Chip, devices: Sequence[Any]) -> float:
    places = [getattr(devices[n], "coords", None) for n in c.group if n < len(devices)]
    if not chip.dims or not places or None in places:
        return 1.0
    spanned = sum(len(set(along)) > 1 for along in zip(*places))
    return max(1, spanned) / chip.dims


def least_times(
    work: ProgramWork, share: float, chip: Chip, devices: Sequence[Any] = ()
) -> dict[str, float]:
    """Return the roofline's times in seconds, {unit: time}; one run takes at least the largest.

    A floor and no forecast: it assumes every unit at its peak, all of them at once, and the
    links that a collective can use, see `link_seconds`.

    Args:
      work: of one device.
      share: FLOPs that a device would have if they were divided evenly; more where devices repeat
        one another's work. FLOPs of fused kernels are in this count alone.
      chip: its figures.
      devices: in the order of the mesh.
    """
    within = [c for c in work.collectives if not c.across]
    times = {
        "compute": max(share, work.flops) / chip.flops,
        "memory": work.traffic / chip.bandwidth,
        "links": link_seconds(within, chip, devices),
    }
    if any(c.across for c in work.collectives):
        times["network"] = work.sent(across=True) / chip.network
    return times
