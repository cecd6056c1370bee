"""What a compiled program does on each device: collectives, bytes through memory, FLOPs, times the
trips of its loops.

XLA's own cost analysis counts the body of a loop once, and a scan over layers is a loop.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import numpy as np

from safepatch_jax.planning.hlo import (
    Array,
    Computation,
    Instruction,
    Module,
    numbers,
    parse_groups,
)

# Operations that move nothing: names for what is already there.
_FREE = frozenset(
    {
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "after-all",
        "partition-id",
        "replica-id",
        "add-dependency",
        "opt-barrier",
        "domain",
        "iota",
        "recv",
    }
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
      kind: all-gather, all-reduce, reduce-scatter ... (TPU writes a reduce-scatter as an all-reduce
        that is cut at once).
      size: bytes that each device brings in.
      ways: devices that exchange with one another; for an exchange between slices, slices.
      count: how often it runs, loops taken into account.
      across: it goes between TPU slices, over the data centre network.
    """

    kind: str
    size: int
    ways: int
    count: int = 1
    across: bool = False

    @property
    def sent(self) -> float:
        """Bytes that each device sends, in all runs, by the ring algorithm's count, the least that
        is possible."""
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
        return (
            self.size * self.ways
            if self.kind == "all-gather"
            else (self.size // self.ways if self.kind == "reduce-scatter" else self.size)
        )


@dataclasses.dataclass(frozen=True)
class Work:
    """What one run of a program does on each device.

    Attributes:
      collectives: one entry for each collective operation of the text.
      traffic: bytes read from and written to main memory by its operations, each array once for
        each operation; what the compiler keeps in on-chip memory is left out, and what asynchronous
        collectives move by themselves.
      flops: of matrix products, 2 for a multiplication and its addition.
      unknown_loops: loops whose number of trips the text does not tell; their bodies count once.
      sorts: number of sorts.
    """

    collectives: tuple[Collective, ...] = ()
    traffic: int = 0
    flops: int = 0
    unknown_loops: int = 0
    sorts: int = 0

    def times(self, n: int) -> Work:
        return Work(
            tuple(dataclasses.replace(c, count=c.count * n) for c in self.collectives),
            self.traffic * n,
            self.flops * n,
            self.unknown_loops,
            self.sorts * n,
        )

    def by_kind(self) -> dict[str, tuple[int, float]]:
        """Return {kind: (runs, bytes sent by each device)}, the most bytes first; those between
        slices apart."""
        found: dict[str, tuple[int, float]] = {}
        for c in self.collectives:
            name = c.kind + (" between slices" if c.across else "")
            runs, sent = found.get(name, (0, 0.0))
            found[name] = (runs + c.count, sent + c.sent)
        return dict(sorted(found.items(), key=lambda item: -item[1][1]))

    def sent(self, across: bool = False) -> float:
        """Return the bytes that each device sends: within its slice, or between slices."""
        return sum(c.sent for c in self.collectives if c.across == across)

    def largest(self, kind: str) -> int:
        """Return the bytes of the largest result of a kind of collective, 0 if there is none."""
        return max((c.result for c in self.collectives if c.kind == kind), default=0)


def read_work(text: str) -> Work:
    """Return what one run of a program does on each device.

    Loops whose trips the text does not tell count once; of a conditional's branches the one with
    the most bytes counts.

    Args:
      text: of a compiled module.

    Raises:
      ValueError: it is none.
    """
    module = Module(text)
    return _Reader(module).computation(module.entry)


def trip_counts(text: str) -> dict[str, int | None]:
    """Return how often each loop of a program runs, {name of the instruction: trips, None if the
    text does not tell}."""
    module = Module(text)
    return {
        i.name: module.trips(computation, i)
        for computation in module.computations.values()
        for i in computation.values()
        if i.op == "while"
    }


class _Reader:
    """Adds up the work of a module's instructions."""

    def __init__(self, module: Module):
        self._module = module
        self.computation = functools.cache(self._computation)

    def _computation(self, name: str) -> Work:
        """Return the work of a computation whose instructions are operations of the device."""
        scope = self._module.computations.get(name, {})
        total, seen = Work(), set()
        for i in scope.values():
            work, within = self._instruction(scope, i)
            # Parts of an asynchronous one share a channel.
            fresh = {key: c for key, c in within.items() if key not in seen}
            seen |= fresh.keys()
            total = Work(
                (*total.collectives, *work.collectives, *fresh.values()),
                total.traffic + work.traffic,
                total.flops + work.flops,
                total.unknown_loops + work.unknown_loops,
                total.sorts + work.sorts,
            )
        return total

    def _instruction(
        self, scope: Computation, i: Instruction
    ) -> tuple[Work, dict[str, Collective]]:
        """Return an instruction's work, and apart from it the collectives within, by channel."""
        if i.op == "while":
            trips = self._module.trips(scope, i)
            body = self.computation(re.search(r"body=%?([\w.-]+)", i.text).group(1)).times(
                1 if trips is None else trips
            )
            return dataclasses.replace(body, unknown_loops=body.unknown_loops + (trips is None)), {}
        if i.op == "conditional":
            return max(
                map(self.computation, i.called), key=lambda w: (w.traffic, w.flops), default=Work()
            ), {}
        if i.op in ("call", "async-start") and i.called:
            return self.computation(i.called[0]), {}
        if (
            i.op.endswith("-done")
            or i.op in _FREE
            or 'custom_call_target="AllocateBuffer"' in i.text
        ):
            return Work(), {}
        inner = list(self._module.inside(scope, i))
        collectives = {_channel(j): c for s, j in inner if (c := self._collective(s, j))}
        return Work(
            (),
            self._traffic(scope, i),
            sum(self._flops(s, j) for s, j in inner),
            0,
            sum(j.op == "sort" for _, j in inner),
        ), collectives

    def _collective(self, scope: Computation, i: Instruction) -> Collective | None:
        if i.op == "send" and (
            between := re.search(r'_xla_megascale_transfer_type="(\w+)"', i.text)
        ):
            return self._between_slices(scope, i, between.group(1))
        if not i.is_collective or i.op.endswith("-done"):
            return None
        kind, groups = i.kind, parse_groups(i.text)
        size = sum(
            a.size for name in i.operands for a in (scope[name].arrays if name in scope else ())
        )
        ways = (
            2 if kind == "collective-permute" else max(map(len, groups), default=self._partitions)
        )
        cut = any(j.op == "dynamic-slice" and j.operands[0] == i.name for j in scope.values())
        if kind == "all-reduce" and cut and "from-cross-replica-sharding" in i.text:
            kind = "reduce-scatter"
        return Collective(kind, size, ways)

    @staticmethod
    def _between_slices(scope: Computation, i: Instruction, transfer: str) -> Collective:
        """Read the sending half of an exchange between slices, which TPU programs leave to the
        hosts."""
        kind = {"ONE_TO_ONE": "collective-permute"}.get(
            transfer, transfer.lower().replace("_", "-")
        )
        size = scope[i.operands[0]].arrays[0].size if i.operands[0] in scope else 0
        slices = re.search(r'_xla_megascale_target="\{([\d,]+)\}', i.text)
        return Collective(kind, size, slices.group(1).count(",") + 1 if slices else 2, across=True)

    @functools.cached_property
    def _partitions(self) -> int:
        everything = (
            i for c in self._module.computations.values() for i in c.values() if i.is_collective
        )
        return 1 + max(
            (n for i in everything for group in parse_groups(i.text) for n in group), default=0
        )

    def _flops(self, scope: Computation, i: Instruction) -> int:
        if (
            i.op not in ("dot", "convolution", "custom-call")
            or not i.operands
            or i.operands[0] not in scope
        ):
            return 0
        left, right = (
            next(iter(scope[name].arrays), None) if name in scope else None
            for name in (*i.operands, "")[:2]
        )
        if i.op == "convolution":
            return _convolution_flops(i, left, right)
        if i.op == "dot":
            contracted = numbers(re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.text).group(1))
        # CuBLAS; its result comes first.
        elif match := re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', i.text):
            contracted = numbers(match.group(1).replace('"', ""))
        else:
            return 0
        return (
            2 * math.prod(i.arrays[0].dims) * math.prod(left.dims[d] for d in contracted)
            if left
            else 0
        )

    def _traffic(self, scope: Computation, i: Instruction) -> int:
        """Return the bytes that an instruction reads from and writes to main memory."""
        sizes = lambda names: sum(
            a.size for n in dict.fromkeys(names) if n in scope for a in scope[n].arrays if a.main
        )
        written = sum(a.size for a in i.arrays if a.main)
        if i.op == "fusion":
            return self._fusion_traffic(scope, i)
        if i.op == "send":
            return sizes(i.operands)
        if i.kind in ("dynamic-slice", "slice", "gather"):
            return 2 * (i.arrays[0].size if i.op == i.kind else sum(a.size for a in i.arrays[1:2]))
        if i.kind == "dynamic-update-slice":
            return 2 * sizes(i.operands[1:2])
        if i.kind == "scatter":
            return 3 * sizes(i.operands[2:3])
        if i.op.endswith("-start"):  # of a copy: (destination, source, context)
            return sizes(i.operands) + sum(a.size for a in i.arrays[:1] if a.main)
        return sizes(i.operands) + written

    def _fusion_traffic(self, scope: Computation, i: Instruction) -> int:
        """As `_traffic`: of an operand that is only sliced the slices count, of one that is updated
        in place the update."""
        name = i.called[0]
        body, parameters = self._module.computations.get(name, {}), self._module.parameters(name)
        total, updated = 0, set()
        for number, operand in enumerate(i.operands):
            size = sum(a.size for a in scope[operand].arrays if a.main) if operand in scope else 0
            readers = (
                self._module.readers(name, parameters[number])
                if size and number in parameters
                else []
            )
            if all(j.hands_on for _, j, _ in readers):
                # into an asynchronous collective, whose buffers may lie on the chip, or out again
                continue
            if all(j.op == "dynamic-slice" and at == 0 for _, j, at in readers):
                total += sum(j.arrays[0].size for _, j, _ in readers)
            elif all(j.op == "dynamic-update-slice" and at == 0 for _, j, at in readers):
                for inner, j, _ in readers:
                    total += 2 * (
                        inner[j.operands[1]].arrays[0].size if j.operands[1] in inner else 0
                    )
                    updated.add(j.arrays[0].size)
            else:
                total += size
        root = next((j for j in body.values() if j.root), None)
        written = list(i.arrays)
        if root is not None and root.op == "tuple":
            made = [self._module.origin(body, operand) for operand in root.operands]
            written = [
                a
                for j, a in zip(made, i.arrays)
                if j is None or not (j.op == "parameter" or j.hands_on)
            ]
        elif root is not None and root.hands_on:
            written = []
        return total + sum(a.size for a in written if a.main and a.size not in updated)


def _channel(i: Instruction) -> str:
    match = re.search(r"channel_id=(\d+)", i.text)
    return match.group(1) if match else i.name


def _convolution_flops(i: Instruction, left: Array | None, right: Array | None) -> int:
    """Count as XLA does: products of a window position that falls into padding or a hole of a
    dilation are none.

    TPU writes every matrix product as a convolution, batch dimensions as window dimensions with
    holes.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.text)
    if left is None or right is None or not labels:
        return 0
    lhs, rhs, out = labels.groups()
    window = re.search(r"window=\{([^}]*)\}", i.text)
    field = lambda name, default: (
        re.search(rf"\b{name}=([\d_x-]+)", window.group(1)).group(1).split("x")
        if window and re.search(rf"\b{name}=", window.group(1))
        else default
    )
    spatial = sorted(c for c in lhs if c.isdigit())
    n = len(spatial)
    strides, pads = field("stride", ["1"] * n), field("pad", ["0_0"] * n)
    holes, spread = field("lhs_dilate", ["1"] * n), field("rhs_dilate", ["1"] * n)
    total = (
        2
        * i.arrays[0].dims[out.index("b")]
        * i.arrays[0].dims[out.index("f")]
        * right.dims[rhs.index("i")]
    )
    for d, c in enumerate(spatial):
        size, kernel, results = (
            left.dims[lhs.index(c)],
            right.dims[rhs.index(c)],
            i.arrays[0].dims[out.index(c)],
        )
        low, stride, hole, wide = (
            int(pads[d].split("_")[0]),
            int(strides[d]),
            int(holes[d]),
            int(spread[d]),
        )
        at = np.arange(results)[:, None] * stride - low + np.arange(kernel)[None] * wide
        total *= int(np.sum((at >= 0) & (at % hole == 0) & (at // hole < size)))
    return total
