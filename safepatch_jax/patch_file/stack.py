"""Several patches, one after another, as one: many links are gone through in one pass over the
weights. Needs no JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from safepatch_jax.patch_file.file import BITS, RUN, PatchFile, TensorPatch
from safepatch_jax.runtime.console import some


class Stack:
    """Patches that are applied or reverted one after another; what `apply.apply` needs of one.

    Args:
      moves: (patch, whether it is applied; else it is reverted), at least one, in order.

    Attributes:
      path: of the patches, in words.
      tensors: what all of them together say of each tensor; its `entries` are those of all.

    Raises:
      ValueError: a patch does not go on from the model to which those before it lead.
    """

    def __init__(self, moves: Sequence[tuple[PatchFile, bool]]):
        self._patches = [patch for patch, _ in moves]
        self.path = some([str(patch.path) for patch in self._patches], ", ")
        self.tensors = _ends(moves[0])
        for move in moves[1:]:
            after, breaks = _ends(move), []
            for name in sorted(self.tensors.keys() | after.keys()):
                one, other = self.tensors.get(name), after.get(name)
                if one is None or other is None or one.after != other.before:
                    breaks.append(name)
                else:
                    self.tensors[name] = _joined(one, other)
            if breaks:
                raise ValueError(
                    f"{move[0].path} does not go on from the model to which the patches before it "
                    f"lead: {some(breaks, ', ')}. Give the patches of one chain, in its order."
                )

    def runs(self, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield as `PatchFile.runs` does; one tensor's flips are held, those of one patch at a
        time."""
        total = flips_of(self._patches, name, self.tensors[name])
        for start in range(0, len(total), RUN):
            part = total[start : start + RUN]
            positions = np.flatnonzero(part)
            yield positions, part[positions]


def flips_of(patches: Sequence[PatchFile], name: str, tensor: TensorPatch) -> np.ndarray:
    """Return the flips of all patches together in each element of a tensor, flat, in its bits; 0
    where there is no patch."""
    total = np.zeros(tensor.size, BITS[tensor.dtype])
    for patch in patches:
        for positions, flips in patch.chunks(name):
            total[positions] ^= flips
    return total


def _ends(move: tuple[PatchFile, bool]) -> dict[str, TensorPatch]:
    """Return what a patch says of each tensor, in the direction in which it is taken."""
    patch, applied = move
    if applied:
        return dict(patch.tensors)
    tensors = {}
    for name, tensor in patch.tensors.items():
        tensors[name] = dataclasses.replace(tensor, before=tensor.after, after=tensor.before)
    return tensors


def _joined(one: TensorPatch, other: TensorPatch) -> TensorPatch:
    entries = one.entries + other.entries
    if one.before == other.after:  # the later ones set back what the earlier ones did
        entries = 0
    return dataclasses.replace(one, after=other.after, entries=entries)
