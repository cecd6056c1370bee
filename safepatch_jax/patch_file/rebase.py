"""A patch taken out of the middle of a line: the later patches written anew for the models without
it; no JAX.

In a line each patch goes onto the model that the one before it has left. An entry that the removed
patch alone changes gets the bits back that it had before. Where a later patch changes an entry of
the removed one too, these differ in what they keep of it (`OVERLAPS`):

  refuse  nothing is removed
  later   the entry has the value that the later patch has given it
  change  the entry is changed by as much as the later patch has changed it: a float32 difference,
          added to the value without the removed patch, and rounded once to the storage dtype
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from safepatch_jax.io.folder import Checkpoint
from safepatch_jax.patch_file.apply import check_names
from safepatch_jax.patch_file.arithmetic import floats, rounded
from safepatch_jax.patch_file.create import Change, write_patch
from safepatch_jax.patch_file.file import REBASED, PatchFile, TensorPatch, runs_of
from safepatch_jax.runtime import files
from safepatch_jax.runtime.console import some
from safepatch_jax.runtime.reading import Refused

REFUSE, LATER, CHANGE = OVERLAPS = ("refuse", "later", "change")


class Base:
    """The model that some patches make of a folder's.

    Args:
      folder: of a model, safetensors weights.
      patches: those that are applied to it or taken off it, in any order: each is its flips.
    """

    def __init__(self, folder: str | pathlib.Path, patches: Sequence[PatchFile] = ()):
        self.folder, self._patches = folder, patches
        self.tensors = Checkpoint(folder).tensors

    def runs(self, name: str) -> Iterator[np.ndarray]:
        """Yield the storage bits of a tensor, RUN elements at a time."""
        parts = [patch.runs(name) for patch in self._patches if name in patch.tensors]
        for bits, *flips in zip(runs_of(self.tensors[name]), *parts):
            for positions, values in flips:
                bits[positions] ^= values
            yield bits


def shared_entries(removed: PatchFile, later: PatchFile) -> dict[str, int]:
    """Count the entries that two patches both change, by the name of the tensor; tensors without
    such are left out."""
    counts = {}
    for name in removed.changed():
        if name in later.tensors and later.tensors[name].entries:
            count = 0
            for (ours, _), (theirs, _) in zip(removed.runs(name), later.runs(name)):
                count += len(np.intersect1d(ours, theirs, assume_unique=True))
            if count:
                counts[name] = count
    return counts


def refuse_overlap(
    label: str, shared: Mapping[str, Mapping[str, int]], overlap: str, anew: str
) -> int:
    """Return how many entries of a removed patch later ones change too, each patch counted.

    Args:
      label: of the removed patch.
      shared: by the label of a later patch, see `shared_entries`.
      overlap: one of OVERLAPS.
      anew: a sentence: how the later patches are derived anew.

    Raises:
      ValueError: there are some, and `overlap` is 'refuse': says how many, of which patches and
        tensors.
    """
    total, lines = 0, []
    for later, counts in shared.items():
        if counts:
            total += sum(counts.values())
            tensors = some([f"{name} {count:,}" for name, count in counts.items()], ", ", 3)
            lines.append(f"{later} {sum(counts.values()):,} ({tensors})")
    if lines and overlap == REFUSE:
        raise Refused(
            f"{label} cannot be removed exactly: later patches change {total:,} entries that it "
            f"changed: {some(lines, most=4)}. Nothing was written. --overlap=later keeps the "
            "values that the later ones gave them, --overlap=change their differences, rounded; "
            f"or derive the later ones anew: {anew}"
        )
    return total


def rebase(
    base: Base,
    line: Sequence[PatchFile],
    out: str | pathlib.Path,
    overlap: str,
    labels: tuple[str, str],
) -> PatchFile:
    """Write the last patch of a line for the model that the line makes without its first patch.

    Args:
      base: the model that the first patch goes onto.
      line: two patches or more, each for the model that the one before it leaves.
      out: the new patch file; must not exist.
      overlap: one of OVERLAPS; with 'refuse' no later patch may share an entry with the first one.
      labels: of the first patch and of the last one.

    Raises:
      ValueError: patches that do not list the same tensors, another base, or a patch that is left
        without effect.
    """
    removed, last = line[0], line[-1]
    _refuse_other_tensors(line)
    check_names(removed, base.tensors, base.folder)
    if overlap != REFUSE:
        _refuse_without_effect(base, line, overlap, labels)
    changes = {}
    for name, tensor in last.tensors.items():
        runs = _runs(base, line, _source(name, base, line), overlap)
        changes[name] = Change(tensor.dtype, tensor.shape, runs, tensor.optional)
    about = {
        "without": {"name": labels[0], **_origin(removed)},
        "overlap": overlap,
        "of": _origin(last) | {"kind": last.kind, "about": last.about},
    }
    with np.errstate(over="ignore", invalid="ignore"):
        return write_patch(out, REBASED, about, changes)


def _refuse_without_effect(
    base: Base, line: Sequence[PatchFile], overlap: str, labels: tuple[str, str]
) -> None:
    for name in line[-1].changed():
        for before, after in _runs(base, line, _source(name, base, line), overlap):
            if np.any(before != after):
                return
    raise Refused(
        f"{labels[1]} changes nothing without {labels[0]}: it gives the entries that both change "
        f"the values that they had before (--overlap={overlap}). Nothing was written. Remove "
        f"{labels[1]} first."
    )


def _origin(patch: PatchFile) -> dict[str, Any]:
    return {"file": patch.path.name, "sha256": files.file_sha256(patch.path)}


def _refuse_other_tensors(line: Sequence[PatchFile]) -> None:
    first = {name: (tensor.dtype, tensor.shape) for name, tensor in line[0].tensors.items()}
    for patch in line[1:]:
        other = {name: (tensor.dtype, tensor.shape) for name, tensor in patch.tensors.items()}
        if other != first:
            names = [name for name in first.keys() | other if first.get(name) != other.get(name)]
            raise Refused(
                f"{line[0].path} and {patch.path} do not list the same tensors: "
                f"{some(sorted(names), ', ')}. A copy of a tensor that one of the models left out "
                "cannot be followed. Derive the later patches anew."
            )


def _source(name: str, base: Base, line: Sequence[PatchFile]) -> str:
    """Return the tensor of the base whose bits a tensor has all along the line: itself, or of one
    that the base left out that which it copies."""
    if name in base.tensors:
        return name
    for other in base.tensors:
        if all(_alike(patch.tensors[name], patch.tensors[other]) for patch in line):
            return other
    raise Refused(
        f"{base.folder} has no {name}, and no tensor of the same bits. Give the folder that has it."
    )


def _alike(one: TensorPatch, other: TensorPatch) -> bool:
    form = one.dtype, one.shape, one.before, one.after
    return form == (other.dtype, other.shape, other.before, other.after)


def _runs(
    base: Base, line: Sequence[PatchFile], name: str, overlap: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield a tensor's bits before and after the last patch of a line without the first one."""
    dtype = base.tensors[name].dtype
    for bits, first, *later in zip(base.runs(name), *(patch.runs(name) for patch in line)):
        old, new = bits.copy(), bits  # with the first patch, and without it
        old[first[0]] ^= first[1]
        before = new
        for positions, flips in later:
            after = old.copy()
            after[positions] ^= flips
            before, new = new, new.copy()
            new[positions] = after[positions]
            if overlap == CHANGE:
                apart = positions[old[positions] != before[positions]]
                change = floats(after[apart], dtype) - floats(old[apart], dtype)
                new[apart] = rounded(floats(before[apart], dtype) + change, name, dtype)
            old = after
        yield before, new
