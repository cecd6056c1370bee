"""Where two patches change the same entries, whether the order in which they come matters, and how
alike their changes are there; no JAX."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from safepatch_jax.io.folder import Checkpoint, tensor_hashes
from safepatch_jax.io.stored import Stored
from safepatch_jax.patch_file.arithmetic import change_of
from safepatch_jax.patch_file.file import PatchFile, runs_of
from safepatch_jax.patch_file.log import patch_hash
from safepatch_jax.runtime.console import some
from safepatch_jax.runtime.reading import Refused

ONE, LINE, OTHER = "one backbone", "one comes after the other", "different backbones"


@dataclasses.dataclass
class Sums:
    """Sums over the changes of two patches, float64.

    Attributes:
      first, second: of squares, over all entries of each patch.
      product: over the entries that both change; first_there, second_there: of squares there.
      agree: of these entries, how many change in one direction.
      odd: entries whose change is NaN or infinite, which are left out of all sums.
    """

    first: float = 0.0
    second: float = 0.0
    product: float = 0.0
    first_there: float = 0.0
    second_there: float = 0.0
    agree: int = 0
    odd: int = 0

    @property
    def cosine(self) -> float:
        """Of the two changes as vectors over all entries."""
        return _cosine(self.product, self.first, self.second)

    @property
    def cosine_there(self) -> float:
        """Of the two changes over the entries that both change."""
        return _cosine(self.product, self.first_there, self.second_there)


def _cosine(product: float, first: float, second: float) -> float:
    return product / math.sqrt(first * second) if first and second else 0.0


@dataclasses.dataclass(frozen=True)
class Conflicts:
    """How two patches meet.

    Attributes:
      tensors: {name: {first, second, both, same}} of each tensor that both change: entries that
        each changes, that both do, and of these to which both do the same to the bits.
      relation: one of ONE, LINE, OTHER.
      commute: whether both orders of setting entries leave the same bits; None if unknown.
      sums: None where no model was given.
    """

    tensors: dict[str, dict[str, int]]
    relation: str
    commute: bool | None
    sums: Sums | None

    @property
    def both(self) -> int:
        """How many entries both patches change."""
        return sum(counts["both"] for counts in self.tensors.values())


def conflicts(
    first: PatchFile,
    second: PatchFile,
    folder: str | pathlib.Path | None = None,
    others: Sequence[PatchFile] = (),
) -> Conflicts:
    """Compare two patches.

    Args:
      first, second: patches of models with tensors of the same shapes and dtypes.
      folder: a model from which the values before each patch follow: what one of the patches goes
        onto, or leaves. Without it there are counts alone.
      others: patches that may lie between the two, and between them and the model.

    Raises:
      ValueError: tensors of other shapes or dtypes, or another model.
    """
    _refuse_other_forms(first, second)
    tensors = {}
    for name in first.changed():
        if name in second.tensors and second.tensors[name].entries:
            tensors[name] = _counts(first, second, name)
    relation = _relation(first, second, others)
    both = sum(counts["both"] for counts in tensors.values())
    same = sum(counts["same"] for counts in tensors.values())
    commute = not both
    if both and relation == ONE:
        commute = both == same
    elif both and relation == OTHER:
        commute = None
    sums = None if folder is None else _sums([first, second, *others], folder)
    return Conflicts(tensors, relation, commute, sums)


def _refuse_other_forms(first: PatchFile, second: PatchFile) -> None:
    other = []
    for name in first.tensors.keys() & second.tensors.keys():
        one, two = first.tensors[name], second.tensors[name]
        if (one.dtype, one.shape) != (two.dtype, two.shape):
            other.append(f"{name}: {one.dtype} {one.shape}, {two.dtype} {two.shape}")
    if other or not first.tensors.keys() & second.tensors.keys():
        raise Refused(
            f"{first.path} and {second.path} are patches of models that have "
            f"{some(sorted(other)) or 'no tensor in common'}. Give patches of one model."
        )


def _relation(first: PatchFile, second: PatchFile, others: Sequence[PatchFile]) -> str:
    if patch_hash(first, "before") == patch_hash(second, "before"):
        return ONE
    if _leads(first, second, others) or _leads(second, first, others):
        return LINE
    return OTHER


def _leads(one: PatchFile, other: PatchFile, between: Sequence[PatchFile]) -> bool:
    """Return whether a patch goes onto what another one leaves, by way of some more."""
    moves = [(patch_hash(patch, "before"), patch_hash(patch, "after")) for patch in between]
    reached, target = [patch_hash(one, "after")], patch_hash(other, "before")
    for model in reached:
        reached += [after for before, after in moves if before == model and after not in reached]
    return target in reached


def _counts(first: PatchFile, second: PatchFile, name: str) -> dict[str, int]:
    both = same = 0
    for (ours, flips), (theirs, others) in zip(first.runs(name), second.runs(name)):
        _, a, b = np.intersect1d(ours, theirs, assume_unique=True, return_indices=True)
        both, same = both + len(a), same + int(np.count_nonzero(flips[a] == others[b]))
    counts = {"first": first.tensors[name].entries, "second": second.tensors[name].entries}
    return counts | {"both": both, "same": same}


def _sums(patches: Sequence[PatchFile], folder: str | pathlib.Path) -> Sums:
    """Sum up over the changes of the first two of some patches."""
    tensors, sums = Checkpoint(folder).tensors, Sums()
    changed = dict.fromkeys(patches[0].changed() + patches[1].changed())
    names = [name for name in changed if name in tensors]
    for patch in patches[:2]:
        _refuse_other_model(patch, folder, tensors)
    hashes = tensor_hashes({name: tensors[name] for name in names})
    strangers, ways = [], {}
    for name in names:
        ways[name] = _ways(patches, name, hashes[name])
        if None in ways[name]:
            strangers.append(name)
    if strangers:
        raise Refused(
            f"{folder} is no model from which the values before both patches follow: "
            f"{len(strangers)} of {len(names)} tensors: {some(strangers, ', ')}. Give a model that "
            "one of them goes onto, or leaves."
        )
    with np.errstate(over="ignore", invalid="ignore"):
        for name in names:
            for run in _runs(patches, tensors[name], name, ways[name]):
                _add(sums, tensors[name].dtype, *run)
    return sums


def _refuse_other_model(
    patch: PatchFile, folder: str | pathlib.Path, tensors: Mapping[str, Stored]
) -> None:
    for name in patch.changed():
        expected, tensor = patch.tensors[name], tensors.get(name)
        fits = tensor and (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape)
        if not fits and not (tensor is None and expected.optional):
            raise Refused(
                f"{folder} has no tensor {name} of {expected.dtype} {list(expected.shape)}, as "
                f"{patch.path} has. Give the model that it is for."
            )


def _ways(
    patches: Sequence[PatchFile], name: str, digest: str
) -> tuple[frozenset[int] | None, frozenset[int] | None]:
    """Return the places of the patches whose flips lead from a tensor to what the first and the
    second patch go onto; None where that is unknown."""
    known = {digest: frozenset()}
    for here in (reached := [digest]):
        for i, patch in enumerate(patches):
            tensor = patch.tensors.get(name)
            ends = () if tensor is None else (tensor.before, tensor.after)
            if here in ends:
                for there in ends:
                    if there not in known:
                        known[there] = known[here] ^ {i}
                        reached.append(there)
    targets = []
    for patch in patches[:2]:
        tensor = patch.tensors.get(name)
        targets.append(frozenset() if tensor is None else known.get(tensor.before))
    return tuple(targets)


def _runs(
    patches: Sequence[PatchFile],
    tensor: Stored,
    name: str,
    ways: tuple[frozenset[int], frozenset[int]],
) -> Iterator[tuple[Any, ...]]:
    """Yield for each run of a tensor, of the first and the second patch: positions, bits before it
    there, flips."""
    needed = sorted(ways[0] | ways[1] | {0, 1})
    parts = [_runs_of(patches[i], name) for i in needed]
    for bits, *found in zip(runs_of(tensor), *parts):
        moves, run = dict(zip(needed, found)), []
        for way, (positions, flips) in zip(ways, (moves[0], moves[1])):
            before = bits.copy()
            for i in way:
                before[moves[i][0]] ^= moves[i][1]
            run += [positions, before[positions], flips]
        yield tuple(run)


def _runs_of(patch: PatchFile, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the runs of a tensor that a patch may not list."""
    if name in patch.tensors:
        yield from patch.runs(name)
    while True:
        yield np.empty(0, np.int64), np.empty(0, np.uint8)


def _add(
    sums: Sums,
    dtype: str,
    ours: np.ndarray,
    bits: np.ndarray,
    flips: np.ndarray,
    theirs: np.ndarray,
    other_bits: np.ndarray,
    other_flips: np.ndarray,
) -> None:
    """Add a run of a tensor: positions, bits before and flips of each patch."""
    a, odd_a = _changes(bits, flips, dtype)
    b, odd_b = _changes(other_bits, other_flips, dtype)
    _, i, j = np.intersect1d(ours, theirs, assume_unique=True, return_indices=True)
    sums.odd += odd_a + odd_b
    sums.first += float(a @ a)
    sums.second += float(b @ b)
    sums.product += float(a[i] @ b[j])
    sums.first_there += float(a[i] @ a[i])
    sums.second_there += float(b[j] @ b[j])
    sums.agree += int(np.count_nonzero(np.sign(a[i]) * np.sign(b[j]) > 0))


def _changes(bits: np.ndarray, flips: np.ndarray, dtype: str) -> tuple[np.ndarray, int]:
    """Return changes as float64, 0 for those that are not finite, and how many these are."""
    change = change_of(bits, flips.astype(bits.dtype, copy=False), dtype)
    wrong = ~np.isfinite(change)
    return np.where(wrong, 0, change).astype(np.float64), int(np.count_nonzero(wrong))


def lines(found: Conflicts, first: str, second: str) -> list[str]:
    """Return lines that describe how two patches meet.

    Args:
      found: see `conflicts`.
      first, second: their names.
    """
    both = found.both
    text = [f"{first} and {second}: {found.relation}; {both:,} entries are changed by both."]
    width = max(map(len, found.tensors), default=0)
    for name, counts in sorted(found.tensors.items(), key=lambda item: -item[1]["both"]):
        if counts["both"]:
            text.append(
                f"  {name:{width}}  {counts['both']:,} of {counts['first']:,} and "
                f"{counts['second']:,}"
            )
    text.append(_commute_text(found))
    if found.sums is None:
        text.append("Cosine and signs need the values: give --model.")
        return text
    text.append(
        f"Cosine of the changes {found.sums.cosine:+.3f}, at the shared entries "
        f"{found.sums.cosine_there:+.3f}; {found.sums.agree:,} of {both:,} shared entries change "
        "in one direction."
    )
    if found.sums.odd:
        text.append(f"{found.sums.odd:,} changes are NaN or infinite, and not counted.")
    return text


def _commute_text(found: Conflicts) -> str:
    if not found.both:
        return "They commute, exactly: no entry is changed by both, and each can be removed alone."
    if found.commute:
        return "They commute: both give every shared entry the same bits."
    if found.commute is None:
        return "Whether they commute is unknown: they are patches of different backbones."
    if found.relation == LINE:
        return "They do not commute: the earlier one cannot be removed exactly under the later."
    return "They do not commute: a shared entry keeps what the last one gives it."
