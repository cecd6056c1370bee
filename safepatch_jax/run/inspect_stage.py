"""A stage's arrays shown, and compared between two workdirs tensor by tensor: where do two runs
part that should be equal?"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from safepatch_jax.run.stage_arrays import StageArray, StageArrays, open_arrays
from safepatch_jax.runtime import addresses
from safepatch_jax.runtime.console import say, some
from safepatch_jax.runtime.reading import Refused

_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_SHOWN = 6  # values of a tensor
_HASH = 16  # digits of a hash in a table


@dataclasses.dataclass(frozen=True)
class Difference:
    """How two arrays of one shape and dtype differ, bit by bit.

    Attributes:
      entries: how many differ.
      largest: of the absolute differences, computed in float64; NaN where one of the two is.
      index: of the first entry that differs, row-major.
      values: there, one of each.
    """

    entries: int
    largest: float
    index: tuple[int, ...]
    values: tuple[np.generic, np.generic]


def compare(a: np.ndarray, b: np.ndarray) -> Difference | None:
    """Return how two arrays of one shape and dtype differ, None where all bits are equal."""
    places = np.flatnonzero(_bits(a) != _bits(b))
    if not len(places):
        return None
    x, y = a.reshape(-1)[places], b.reshape(-1)[places]
    with np.errstate(invalid="ignore", over="ignore"):
        largest = np.max(np.abs(x.astype(np.float64) - y.astype(np.float64)))
    index = tuple(int(i) for i in np.unravel_index(places[0], a.shape))
    return Difference(len(places), float(largest), index, (x[0], y[0]))


def _bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).reshape(-1).view(_BITS[x.dtype.itemsize])


def inspect_stage(
    workdir: str, stage: str, *, tensor: str = "", other: str = "", model: str = ""
) -> bool:
    """Print the hashes of a stage's tensors, in the order of the parameter table; with a second
    workdir compare them, and describe the first that differs.

    Args:
      workdir: of a run.
      stage: a name, such as 'score_se'.
      tensor: HF name of the one tensor to show, or the path of its parameter, which is all its
        layers; '' for every tensor.
      other: a second workdir, '' for none.
      model: see `open_arrays`.

    Returns:
      whether nothing differs.

    Raises:
      ValueError: see `open_arrays`; a tensor that the stage does not hold.
    """
    with addresses.copies_apart():
        opened = [open_arrays(place, stage, model) for place in filter(None, (workdir, other))]
        return _shown(opened, tensor, stage)


def _shown(opened: Sequence[StageArrays], tensor: str, stage: str) -> bool:
    names = _names(opened, tensor, stage)
    for letter, stored in zip("AB", opened):
        finished, key = stored.manifest.get("finished", "?"), stored.manifest["key"][:_HASH]
        say(f"{letter}: {stored.folder}, finished {finished}, key {key}")
    if len(opened) == 1:
        for line in _one(opened[0], names, details=bool(tensor)):
            say(line)
        return True
    say(_of_manifests(opened[0].manifest, opened[1].manifest))
    return _both(*opened, names)


def _names(opened: Sequence[StageArrays], tensor: str, stage: str) -> list[str]:
    """Return the names of the tensors to look at, of either workdir. Raises ValueError if there are
    none."""
    arrays: dict[str, StageArray] = {}
    for stored in opened:
        for name, array in stored.arrays.items():
            arrays.setdefault(name, array)
    if not tensor:
        return list(arrays)
    names = [name for name, array in arrays.items() if tensor in (name, array.parameter)]
    if not names:
        known = [*arrays, *{array.parameter for array in arrays.values()}]
        close = difflib.get_close_matches(tensor, known, n=3, cutoff=0.3)
        raise Refused(
            f"--tensor={tensor}: the stage {stage} holds no such tensor. Near it are "
            f"{some(close, ', ')}; without --tensor all are listed."
        )
    return names


def _one(stored: StageArrays, names: Sequence[str], details: bool) -> Iterator[str]:
    width = max(map(len, names))
    for name in names:
        array = stored.arrays[name]
        x = array.read()
        yield f"{name:{width}}  {array.dtype:8}  {list(array.shape)!s:16}  {_sha256(x)}"
        if details:
            yield f"  {_described(x, array)}"


def _sha256(x: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(x).view(np.uint8)).hexdigest()


def _described(x: np.ndarray, array: StageArray) -> str:
    """Say in a line what a tensor holds."""
    flat = x.reshape(-1)
    if array.flips:
        places = np.flatnonzero(flat)
        kept = some([f"{list(_at(i, x.shape))}" for i in places[:_SHOWN]], ", ")
        return f"changes {len(places):,} of {x.size:,} entries, first at {kept or 'none'}"
    values = flat.astype(np.float32) if flat.dtype.itemsize < 4 else flat
    finite = values[np.isfinite(values)]
    parts = [f"{np.count_nonzero(flat == 0):,} of {x.size:,} entries are 0"]
    if len(finite):
        mean = np.mean(np.abs(finite), dtype=np.float64)
        parts.append(f"from {finite.min()!s} to {finite.max()!s}, mean of absolutes {mean:.6g}")
    if len(finite) < x.size:
        parts.append(f"{x.size - len(finite):,} not finite")
    parts.append(f"first {', '.join(str(value) for value in values[:_SHOWN])}")
    return "; ".join(parts)


def _at(place: int, shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(place, shape))


def _of_manifests(a: Mapping, b: Mapping) -> str:
    """Say in a line what the manifests of a stage have otherwise."""
    if a["key"] == b["key"]:
        return "The keys are equal: the same settings, sources, inputs and versions."
    changes = []
    for part in ("settings", "sources", "versions", "inputs"):
        before, after = a.get(part, {}), b.get(part, {})
        names = sorted(x for x in {*before, *after} if before.get(x) != after.get(x))
        shown = names
        if part in ("settings", "versions"):
            shown = [f"{x} {before.get(x)!s:.60} / {after.get(x)!s:.60}" for x in names]
        if names:
            changes.append(f"{part} {some(shown, ', ')}")
    return f"The keys differ: {'; '.join(changes) or 'other versions of this project'}."


def _both(a: StageArrays, b: StageArrays, names: Sequence[str]) -> bool:
    """Print a table of both, then how the first that differs does; return whether none does."""
    width, differing, first = max(map(len, names)), [], ""
    for name in names:
        left, right = (stored.arrays.get(name) for stored in (a, b))
        if left is None or right is None:
            words, problem = "only in A" if left else "only in B", "is not in both"
        else:
            words, problem = _compared(left, right)
        say(f"{name:{width}}  {_kind(left or right)}  {words}")
        if problem:
            differing.append(name)
            first = first or f"{name} {problem}"
    if not differing:
        say(f"All {len(names)} tensors are equal, bit for bit.")
        return True
    say(f"{len(differing)} of {len(names)} tensors differ. The first: {first}")
    return False


def _kind(array: StageArray) -> str:
    return f"{array.dtype:8}  {list(array.shape)!s:16}"


def _compared(a: StageArray, b: StageArray) -> tuple[str, str]:
    """Return the hashes of a tensor in both workdirs, and how the two differ; '' if they are
    equal."""
    x, y = a.read(), b.read()
    hashes = [_sha256(x)[:_HASH], _sha256(y)[:_HASH]]
    if (x.dtype, x.shape) != (y.dtype, y.shape):
        return " != ".join(hashes), f"is {_kind(a).strip()} in A and {_kind(b).strip()} in B"
    difference = compare(x, y)
    if difference is None:
        return hashes[0], ""
    return " != ".join(hashes), _told(a, x, y, difference)


def _told(array: StageArray, x: np.ndarray, y: np.ndarray, difference: Difference) -> str:
    """Describe a difference in words."""
    head = (
        f"({array.dtype}, {list(array.shape)}): {difference.entries:,} of {x.size:,} entries differ"
    )
    if array.flips:
        alone = [int(np.sum((p != 0) & (q == 0))) for p, q in ((x, y), (y, x))]
        size = f"{alone[0]:,} are changed in A alone, {alone[1]:,} in B alone"
    else:
        size = f"the largest difference is {difference.largest:.9g}"
    left, right = map(_value, difference.values)
    return f"{head}; {size}; first at {list(difference.index)}: {left} in A, {right} in B"


def _value(x: np.generic) -> str:
    """Return a value with its bits, which tell -0 from 0 and one NaN from another."""
    digits = 2 * x.dtype.itemsize
    return f"{x!s} (0x{int(_bits(np.asarray([x]))[0]):0{digits}x})"
