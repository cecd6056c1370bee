"""Reads the text of a compiled program: its computations, instructions, shapes and replica groups.

The text is that of ``jax.stages.Compiled.as_text()``, after partitioning: every shape in it is that
of one device.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_ARRAY = re.compile(r"\b(pred|token|opaque|[a-z]+\d+\w*)\[([\d,<= ]*)\](\{[^{}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = ")
_CALLED = re.compile(r"\b(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_BITS = {"token": 0, "opaque": 0, "pred": 8}  # other types end with theirs
_LISTED = re.compile(r"\b(?:branch_computations|called_computations)=\{([^{}]*)\}")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape: bytes without padding, sizes, and whether it is in the device's main
    memory."""

    size: int
    dims: tuple[int, ...]
    main: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line; `text` begins with the operation's name and has operands and attributes as they are
    written."""

    name: str
    op: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str
    root: bool

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it runs."""
        listed = re.findall(r"[\w.-]+", " ".join(_LISTED.findall(self.text)))
        return (*listed, *_CALLED.findall(self.text))

    def attribute(self, name: str) -> str:
        """Return the computation that an attribute of a loop names: its body or condition."""
        return re.search(rf"{name}=%?([\w.-]+)", self.text).group(1)

    @property
    def size(self) -> int:
        """Bytes of its result."""
        return sum(a.size for a in self.arrays)

    @property
    def main_size(self) -> int:
        """Bytes of its result in main memory."""
        return sum(a.size for a in self.arrays if a.main)

    @property
    def kind(self) -> str:
        """The operation, whether it is started here or done at once."""
        return self.op.removesuffix("-start")

    @property
    def is_collective(self) -> bool:
        return self.kind.removesuffix("-done") in COLLECTIVES

    @property
    def hands_on(self) -> bool:
        """Whether, within a fusion, it only passes arrays on: to the result, or to an asynchronous
        collective."""
        return (
            self.op == "tuple"
            or self.is_collective
            or (self.op == "custom-call" and "AsyncCollective" in self.text)
        )


Computation = Mapping[str, Instruction]


class Module:
    """The computations of a compiled program, {name: {name of instruction: instruction}}.

    Raises:
      ValueError: the text is not that of a compiled program.
    """

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if match := _HEADER.match(line):
                current = self.computations[match.group(2)] = {}
                self.entry = match.group(2) if match.group(1) else self.entry
            elif instruction := parse_instruction(line):
                current[instruction.name] = instruction
        if not self.entry:
            raise ValueError(
                "this is not the text of a compiled program: it has no ENTRY computation."
            )
        self.readers, self.parameters, self._uses = map(
            functools.cache, (self._readers, self._parameters, self._uses_in)
        )

    def inside(
        self, computation: Computation, i: Instruction
    ) -> Iterator[tuple[Computation, Instruction]]:
        """Yield an instruction and, of a fusion, all within, each with its computation."""
        yield computation, i
        if i.op in ("fusion", "custom-call"):
            for name in i.called:
                for j in self.computations.get(name, {}).values():
                    yield from self.inside(self.computations[name], j)

    def origin(self, computation: Computation, name: str) -> Instruction | None:
        """Return the instruction that made a value, through bitcasts and the parts of tuples."""
        i = computation.get(name)
        while i is not None and i.op in ("bitcast", "get-tuple-element"):
            i = computation.get(i.operands[0])
        return i

    def trips(self, computation: Computation, loop: Instruction) -> int | None:
        """Return a loop's trips: as XLA notes them, or from a counter that the condition compares
        with a constant.

        With a condition of several parts (a decode loop that may end early) these are the most that
        there can be. None where the text does not say.
        """
        if match := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text):
            return int(match.group(1))
        condition = self.computations.get(loop.attribute("condition"), {})
        counts = set()
        for line in condition.values():
            for scope, i in self.inside(condition, line):
                direction = re.search(r"^compare.*direction=(LT|LE|NE)", i.text)
                limit = self._constant(scope, condition, i.operands[1]) if direction else None
                if limit is not None:
                    start, step = self._counter(computation, loop, scope.get(i.operands[0]))
                    end = limit + (direction.group(1) == "LE")
                    counts.add(max(0, -(-(end - start) // step)))
        return counts.pop() if len(counts) == 1 else None

    def _counter(
        self, computation: Computation, loop: Instruction, i: Instruction | None
    ) -> tuple[int, int]:
        """Return start and step of a loop's counter; (0, 1), as JAX's scans have, where they cannot
        be followed."""
        start = computation.get(loop.operands[0])
        body = self.computations.get(loop.attribute("body"), {})
        for value, op in ((i, "get-tuple-element"), (start, "tuple"), (root(body), "tuple")):
            if value is None or value.op != op:
                return 0, 1
        at = int(re.search(r"index=(\d+)", i.text).group(1))
        first = self._constant(computation, computation, start.operands[at]) or 0
        total = body.get(root(body).operands[at])
        if total is None or total.op != "add":
            return first, 1
        steps = (self._constant(body, body, name) for name in total.operands)
        return first, next(filter(None, steps), 1)

    def _constant(self, scope: Computation, outer: Computation, name: str) -> int | None:
        """Return the value of a constant whole number; a parameter of a fusion is looked up where
        the fusion is called."""
        i = scope.get(name)
        while i is not None and i.op in ("copy", "bitcast", "convert", "broadcast", "reshape"):
            i = scope.get(i.operands[0])
        if i is None:
            return None
        if i.op == "parameter" and scope is not outer:
            for call in outer.values():
                called = map(self.computations.get, call.called)
                if call.op == "fusion" and any(computation is scope for computation in called):
                    return self._constant(outer, outer, call.operands[int(i.operands[0])])
        match = re.match(r"constant\((-?\d+)\)", i.text)
        return int(match.group(1)) if match else None

    def _parameters(self, name: str) -> dict[int, str]:
        """Return {number: name} of a computation's parameters."""
        instructions = self.computations.get(name, {}).values()
        return {int(j.operands[0]): j.name for j in instructions if j.op == "parameter"}

    def _uses_in(self, name: str) -> dict[str, list[Instruction]]:
        uses: dict[str, list[Instruction]] = {}
        for j in self.computations.get(name, {}).values():
            for operand in dict.fromkeys(j.operands):
                uses.setdefault(operand, []).append(j)
        return uses

    def _readers(self, name: str, value: str) -> list[tuple[Computation, Instruction, int]]:
        """Return the readers of a value of a fused computation, and as which operand they read it,
        through bitcasts and fusions within."""
        result = []
        for j in self._uses(name).get(value, []):
            if j.op == "bitcast":
                result += self.readers(name, j.name)
            elif j.op == "fusion" and j.called:
                inside = self.parameters(j.called[0])
                for at, operand in enumerate(j.operands):
                    if operand == value and at in inside:
                        result += self.readers(j.called[0], inside[at])
            else:
                result.append((self.computations[name], j, j.operands.index(value)))
        return result


def root(computation: Computation) -> Instruction | None:
    """Return the instruction whose value a computation returns."""
    return next((i for i in computation.values() if i.root), None)


def parse_instruction(line: str) -> Instruction | None:
    """Read one line; None if it is not an instruction."""
    match = _NAME.match(line)
    if not match:
        return None
    rest = line[match.end() :]
    end = _closing(rest, 0) if rest.startswith("(") else rest.find(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    op, parenthesis, _ = rest.partition("(")
    if not parenthesis or not re.fullmatch(r"[a-z][\w-]*", op):
        return None
    inside = rest[len(op) + 1 : _closing(rest, len(op)) - 1]
    operands = re.findall(r"%([\w.-]+)", inside)
    if not operands:
        operands = [part.split()[-1] for part in inside.split(",") if part.strip()]
    return Instruction(
        match.group(2), op, parse_arrays(shape), tuple(operands), rest, bool(match.group(1))
    )


def parse_arrays(shape: str) -> tuple[Array, ...]:
    """Read the arrays of a shape, those of a tuple in order; layouts of TPU say S(n) for a memory
    other than the main one."""
    arrays = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        sizes = numbers(dims.replace("<=", "").replace(" ", ""))
        bits = _BITS[dtype] if dtype in _BITS else int(re.search(r"\d+", dtype).group())
        main = not re.search(r"S\([1-9]\d*\)", layout)
        arrays.append(Array(-(-math.prod(sizes) * bits // 8), sizes, main))
    return tuple(arrays)


def parse_groups(text: str) -> tuple[tuple[int, ...], ...]:
    """Read an instruction's replica groups, in any of their three spellings; empty where it names
    none.

    ``{{0,1},{2,3}}``; ``[2,4]<=[4,2]T(1,0)``: 2 groups of 4, filled from numbers counted over 4x2
    and transposed; ``mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}``: devices, in that order,
    over a mesh, grouped along the axes named.
    """
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", text):
        return tuple(map(numbers, re.findall(r"\{([\d, ]+)\}", match.group(1))))
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, counted, order = (numbers(g) for g in match.groups())
        ids = np.arange(math.prod(counted)).reshape(counted).transpose(order or range(len(counted)))
        return _cut(ids, shape[-1])
    order = r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
    if match := re.search(rf"replica_groups=mesh\[([^\]]*)\]{order}\s*\{{([^}}]*)\}}", text):
        return _mesh_groups(*match.groups())
    return ()


def _mesh_groups(
    axes: str, counted: str | None, order: str | None, grouped: str
) -> tuple[tuple[int, ...], ...]:
    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", axes)}
    ids = np.arange(math.prod(sizes.values()))
    if counted:
        shape = numbers(counted)
        ids = ids.reshape(shape).transpose(numbers(order) or range(len(shape)))
    # A part of an axis is written 'axis':(size of what is before it)its size.
    parts = {}
    for name, before, n in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", grouped):
        parts[name] = int(before or 1), int(n or sizes[name])
    dims: list[int] = []
    for name, size in sizes.items():
        before, part = parts.get(name, (size, 1))
        dims += [before, part, size // before // part]
    inside = range(1, len(dims), 3)
    outside = [d for d in range(len(dims)) if d not in inside]
    ids = ids.reshape(dims).transpose(*outside, *inside)
    return _cut(ids, math.prod(dims[1::3]))


def _cut(ids: np.ndarray, size: int) -> tuple[tuple[int, ...], ...]:
    """Cut device numbers into groups of a size."""
    return tuple(map(tuple, ids.reshape(-1, size).tolist()))


def numbers(text: str | None) -> tuple[int, ...]:
    """Read whole numbers with commas between them."""
    return tuple(int(n) for n in text.split(",") if n) if text else ()


def _closing(text: str, start: int) -> int:
    """Return the position after the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i + 1
    return len(text)
