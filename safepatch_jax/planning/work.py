"""What a compiled program does on each device: collectives, bytes through memory, FLOPs, times the
trips of its loops.

XLA's own cost analysis counts the body of a loop once, and a scan over layers is a loop.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable

import numpy as np

from safepatch_jax.planning.hlo import (
    Array,
    Computation,
    Instruction,
    Module,
    numbers,
    parse_groups,
    root,
)

# Operations that move nothing: names for arrays that exist.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id "
    "add-dependency opt-barrier domain iota recv".split()
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
      kind: all-gather, all-reduce, reduce-scatter ... (TPU writes a reduce-scatter as an all-reduce
        that is cut at once).
      size: bytes of each device's operand.
      ways: devices that exchange with one another; for an exchange between slices, slices.
      count: how often it runs, loops included.
      across: it goes between TPU slices, over the data centre network.
      exposed: nothing else is computed meanwhile: it is not started and awaited apart.
      group: the numbers of devices, in the order of the mesh, of one of its groups.
    """

    kind: str
    size: int
    ways: int
    count: int = 1
    across: bool = False
    exposed: bool = False
    group: tuple[int, ...] = ()

    @property
    def sent(self) -> float:
        """Bytes that each device sends in all runs, by the ring algorithm, which sends the least
        that is possible."""
        n = self.ways
        factor = {
            "all-gather": n - 1,
            "all-reduce": 2 * (n - 1) / n,
            "collective-permute": 1.0,
            "collective-broadcast": 1.0,
        }.get(self.kind, (n - 1) / n)
        return self.size * factor * self.count

    @property
    def result(self) -> int:
        """Bytes of one run's result on a device."""
        if self.kind == "all-gather":
            return self.size * self.ways
        return self.size // self.ways if self.kind == "reduce-scatter" else self.size


@dataclasses.dataclass(frozen=True)
class ProgramWork:
    """What one run of a program does on each device.

    Attributes:
      collectives: one entry for each collective operation of the text.
      traffic: bytes read from and written to main memory by its operations, each array once for
        each operation; without arrays that the compiler keeps in on-chip memory, and those that
        asynchronous collectives move.
      flops: of matrix products, 2 for a multiplication and its addition.
      unknown_loops: loops whose number of trips the text does not say; their bodies count once.
      sorts: number of sorts.
    """

    collectives: tuple[Collective, ...] = ()
    traffic: int = 0
    flops: int = 0
    unknown_loops: int = 0
    sorts: int = 0

    def __add__(self, other: ProgramWork) -> ProgramWork:
        return ProgramWork(
            self.collectives + other.collectives,
            self.traffic + other.traffic,
            self.flops + other.flops,
            self.unknown_loops + other.unknown_loops,
            self.sorts + other.sorts,
        )

    def times(self, n: int) -> ProgramWork:
        """Return the work of n runs; a loop of unknown length is still one."""
        return ProgramWork(
            tuple(dataclasses.replace(c, count=c.count * n) for c in self.collectives),
            self.traffic * n,
            self.flops * n,
            self.unknown_loops,
            self.sorts * n,
        )

    def by_kind(self) -> dict[str, tuple[int, float]]:
        """Return {kind: (runs, bytes sent by each device)}, the most bytes first; those between
        slices apart."""
        totals: dict[str, tuple[int, float]] = {}
        for c in self.collectives:
            name = c.kind + (" between slices" if c.across else "")
            runs, sent = totals.get(name, (0, 0.0))
            totals[name] = (runs + c.count, sent + c.sent)
        return dict(sorted(totals.items(), key=lambda item: -item[1][1]))

    def sent(self, across: bool = False) -> float:
        """Return the bytes that each device sends: within its slice, or between slices."""
        return sum(c.sent for c in self.collectives if c.across == across)

    def largest(self, kind: str) -> int:
        """Return the bytes of the largest result of a kind of collective, 0 if there is none."""
        return max((c.result for c in self.collectives if c.kind == kind), default=0)


def read_work(text: str) -> ProgramWork:
    """Return what one run of a program does on each device.

    Loops whose trips the text does not say count once; of a conditional's branches the one with the
    most bytes counts.

    Args:
      text: of a compiled module.

    Raises:
      ValueError: it is not that.
    """
    module = Module(text)
    return _Reader(module).computation(module.entry)


def trip_counts(text: str) -> dict[str, int | None]:
    """Return how often each loop of a program runs, {name of the instruction: trips, None if the
    text does not say}."""
    module, counts = Module(text), {}
    for computation in module.computations.values():
        for i in computation.values():
            if i.op == "while":
                counts[i.name] = module.trips(computation, i)
    return counts


class _Reader:
    """Adds up the work of a module's instructions."""

    def __init__(self, module: Module):
        self._module = module
        self.computation = functools.cache(self._computation)

    def _computation(self, name: str) -> ProgramWork:
        """Return the work of a computation whose instructions are operations of the device."""
        scope = self._module.computations.get(name, {})
        total, channels = ProgramWork(), set()
        for i in scope.values():
            work, within = self._instruction(scope, i)
            # The parts of an asynchronous collective share a channel; it counts once.
            fresh = {key: c for key, c in within.items() if key not in channels}
            channels |= fresh.keys()
            total = total + work + ProgramWork(tuple(fresh.values()))
        return total

    def _instruction(
        self, scope: Computation, i: Instruction
    ) -> tuple[ProgramWork, dict[str, Collective]]:
        """Return an instruction's work, and apart from it the collectives within, by channel."""
        if i.op == "while":
            trips, body = self._module.trips(scope, i), self.computation(i.attribute("body"))
            if trips is None:
                return body + ProgramWork(unknown_loops=1), {}
            return body.times(trips), {}
        if i.op == "conditional":
            branches = map(self.computation, i.called)
            return max(branches, key=lambda w: (w.traffic, w.flops), default=ProgramWork()), {}
        if i.op == "async-start" and i.called:
            return _hidden(self.computation(i.called[0])), {}
        if i.op == "call" and i.called:
            return self.computation(i.called[0]), {}
        free = i.op in _FREE or 'custom_call_target="AllocateBuffer"' in i.text
        if free or i.op.endswith("-done"):
            return ProgramWork(), {}
        collectives, flops, sorts = {}, 0, 0
        for inner, j in self._module.inside(scope, i):
            flops += self._flops(inner, j)
            sorts += j.op == "sort"
            if collective := self._collective(inner, j):
                if j is not i:  # within a fusion, which computes meanwhile
                    collective = dataclasses.replace(collective, exposed=False)
                collectives[_channel(j)] = collective
        traffic = self._traffic(scope, i)
        return ProgramWork(traffic=traffic, flops=flops, sorts=sorts), collectives

    def _collective(self, scope: Computation, i: Instruction) -> Collective | None:
        transfer = re.search(r'^send\(.*_xla_megascale_transfer_type="(\w+)"', i.text)
        if transfer:
            return _between_slices(scope, i, transfer.group(1))
        if not i.is_collective or i.op.endswith("-done"):
            return None
        kind, groups = i.kind, parse_groups(i.text)
        size = sum(scope[name].size for name in i.operands if name in scope)
        ways = max(map(len, groups), default=self._partitions)
        if kind == "collective-permute":
            ways = 2
        cut = any(j.op == "dynamic-slice" and j.operands[0] == i.name for j in scope.values())
        if kind == "all-reduce" and cut and "from-cross-replica-sharding" in i.text:
            kind = "reduce-scatter"
        exposed = not i.op.endswith("-start") or bool(re.search(r'"is_sync":true', i.text))
        group = groups[0] if groups else tuple(range(ways))
        return Collective(kind, size, ways, exposed=exposed, group=group)

    @functools.cached_property
    def _partitions(self) -> int:
        """The number of devices: one more than the largest that a collective names."""
        largest = 0
        for computation in self._module.computations.values():
            for i in computation.values():
                for group in parse_groups(i.text) if i.is_collective else ():
                    largest = max(largest, *group)
        return 1 + largest

    def _flops(self, scope: Computation, i: Instruction) -> int:
        if i.op not in ("dot", "convolution", "custom-call"):
            return 0
        operands = [scope[name].arrays[:1] if name in scope else () for name in i.operands[:2]]
        if len(operands) < 2 or not all(operands):
            return 0
        (left,), (right,) = operands
        if i.op == "convolution":
            return _convolution_flops(i, left, right)
        # Of a call of cuBLAS the first array of its tuple is the product.
        match = re.search(r'lhs_contracting_dim(?:s=|ensions":)[{[]([\d,"]*)[]}]', i.text)
        if not match:
            return 0
        contracted = numbers(match.group(1).replace('"', ""))
        return 2 * math.prod(i.arrays[0].dims) * math.prod(left.dims[d] for d in contracted)

    def _traffic(self, scope: Computation, i: Instruction) -> int:
        """Return the bytes that an instruction reads from and writes to main memory."""
        started = i.op.endswith("-start")
        if i.op == "fusion":
            return self._fusion_traffic(scope, i)
        if i.kind in ("dynamic-slice", "slice", "gather"):
            return 2 * sum(a.size for a in i.arrays[started : started + 1])
        if i.kind == "dynamic-update-slice":
            return 2 * _main_size(scope, i.operands[1:2])
        if i.kind == "scatter":
            return 3 * _main_size(scope, i.operands[2:3])
        # The arrays of a copy that is started: destination, source, context.
        written = i.arrays[:1] if started else i.arrays
        if i.op == "send":
            written = ()
        return _main_size(scope, i.operands) + sum(a.size for a in written if a.main)

    def _fusion_traffic(self, scope: Computation, i: Instruction) -> int:
        """As `_traffic`: of an operand that is only sliced the slices count, of one that is updated
        in place the update."""
        name = i.called[0]
        body, parameters = self._module.computations.get(name, {}), self._module.parameters(name)
        total, updated = 0, set()
        for number, operand in enumerate(i.operands):
            size = _main_size(scope, [operand])
            readers = []
            if size and number in parameters:
                readers = self._module.readers(name, parameters[number])
            if all(j.hands_on for _, j, _ in readers):
                # Into an asynchronous collective, whose buffers may be on the chip, or out again.
                continue
            if all(j.op == "dynamic-slice" and at == 0 for _, j, at in readers):
                total += sum(j.arrays[0].size for _, j, _ in readers)
            elif all(j.op == "dynamic-update-slice" and at == 0 for _, j, at in readers):
                for inner, j, _ in readers:
                    if j.operands[1] in inner:
                        total += 2 * inner[j.operands[1]].arrays[0].size
                    updated.add(j.arrays[0].size)
            elif all(j.op == "scatter" and at == 0 for _, j, at in readers):
                # In place: the rows that are written are read before.
                for inner, j, _ in readers:
                    total += 2 * _whole_size(inner, j.operands[2])
                    updated.add(j.arrays[0].size)
            elif all(j.op in ("dynamic-slice", "gather") and at == 0 for _, j, at in readers):
                total += sum(j.arrays[0].size for _, j, _ in readers)
            else:
                total += size
        written = self._written(body, i)
        return total + sum(a.size for a in written if a.main and a.size not in updated)

    def _written(self, body: Computation, i: Instruction) -> list[Array]:
        """Return the arrays of a fusion's result that it makes, and does not only hand on."""
        result = root(body)
        if result is None or not result.hands_on:
            return list(i.arrays)
        if result.op != "tuple":
            return []
        written = []
        for operand, array in zip(result.operands, i.arrays):
            origin = self._module.origin(body, operand)
            if origin is None or not (origin.op == "parameter" or origin.hands_on):
                written.append(array)
        return written


def _main_size(scope: Computation, names: Iterable[str]) -> int:
    """Return the bytes of arrays in main memory, each once."""
    return sum(scope[name].main_size for name in dict.fromkeys(names) if name in scope)


def _whole_size(scope: Computation, name: str) -> int:
    """Return the bytes of a value of a computation, 0 if it is not there."""
    return scope[name].size if name in scope else 0


def _hidden(work: ProgramWork) -> ProgramWork:
    collectives = [dataclasses.replace(c, exposed=False) for c in work.collectives]
    return dataclasses.replace(work, collectives=tuple(collectives))


def _between_slices(scope: Computation, i: Instruction, transfer: str) -> Collective:
    """Read the sending half of an exchange between slices, which TPU programs leave to hosts."""
    kind = transfer.lower().replace("_", "-")
    if transfer == "ONE_TO_ONE":
        kind = "collective-permute"
    size = scope[i.operands[0]].arrays[0].size if i.operands[0] in scope else 0
    slices = re.search(r'_xla_megascale_target="\{([\d,]+)\}', i.text)
    ways = len(numbers(slices.group(1))) if slices else 2
    return Collective(kind, size, ways, across=True)


def _channel(i: Instruction) -> str:
    match = re.search(r"channel_id=(\d+)", i.text)
    return match.group(1) if match else i.name


def _convolution_flops(i: Instruction, left: Array, right: Array) -> int:
    """Count as XLA does: window positions in padding or in a hole of a dilation are no products.

    TPU writes every matrix product as a convolution, batch dimensions as window dimensions with
    holes.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.text)
    if not labels:
        return 0
    lhs, rhs, out = labels.groups()
    spatial = sorted(c for c in lhs if c.isdigit())
    window = re.search(r"window=\{([^}]*)\}", i.text)
    attributes = dict(re.findall(r"(\w+)=([\d_x-]+)", window.group(1) if window else ""))

    def field(name: str, default: int) -> list[int]:
        """Return an attribute for each spatial dimension; of the padding, that at the beginning."""
        if name not in attributes:
            return [default] * len(spatial)
        return [int(part.split("_")[0]) for part in attributes[name].split("x")]

    strides, pads = field("stride", 1), field("pad", 0)
    holes, spreads = field("lhs_dilate", 1), field("rhs_dilate", 1)
    dims = i.arrays[0].dims
    total = 2 * dims[out.index("b")] * dims[out.index("f")] * right.dims[rhs.index("i")]
    for c, stride, pad, hole, spread in zip(spatial, strides, pads, holes, spreads):
        results, kernel = np.arange(dims[out.index(c)]), np.arange(right.dims[rhs.index(c)])
        at = results[:, None] * stride - pad + kernel[None] * spread
        size = left.dims[lhs.index(c)]
        total *= int(np.sum((at >= 0) & (at % hole == 0) & (at // hole < size)))
    return total
