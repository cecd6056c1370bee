"""A patch and the tensors of a model in memory, whatever holds them: all is compared before
anything is written; no JAX, no torch.

`tensors` has the torch side, `api.trees` that of our own JAX tree.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from typing import Protocol

import numpy as np

from safepatch_jax.patch_file.apply import (
    AFTER,
    BEFORE,
    SAME,
    check_names,
    refuse_strangers,
    states,
)
from safepatch_jax.patch_file.file import PatchFile
from safepatch_jax.runtime.console import progress, some
from safepatch_jax.runtime.workers import Workers, wait


class View(Protocol):
    """A live tensor as a patch sees it: `dtype` by our name, `shape`, `nbytes`."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    def runs(self) -> Iterator[np.ndarray]:
        """Yield its storage bits row by row, flat, `file.RUN` elements at a time."""


def spared(patch: PatchFile, present: Collection[str]) -> set[str]:
    """Return which tensors of a patch a live model may lack: rotary frequencies, and a copy of a
    tensor that is there (a tied head that the folder has twice)."""
    seen = set()
    for name in present:
        seen.add(kind(patch, name))
    names = set()
    for name, tensor in patch.tensors.items():
        is_rotary = name.endswith("rotary_emb.inv_freq") and not tensor.entries
        if name not in present and (is_rotary or kind(patch, name) in seen):
            names.add(name)
    return names


def kind(patch: PatchFile, name: str) -> tuple:
    """Return what tensors that are copies of one another, before and after, have in common."""
    tensor = patch.tensors.get(name)
    if tensor is None:
        return (name,)
    return tensor.dtype, tensor.shape, tensor.before, tensor.after


def compare(
    patch: PatchFile, views: Mapping[str, View], where: str, goal: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Compare live tensors with a patch: names, dtypes, shapes, their SHA-256, and the SHA-256 that
    each of them would have after the patch's flips.

    Args:
      patch: the patch file.
      views: the live tensors by checkpoint name.
      where: they are, in words.
      goal: BEFORE or AFTER.

    Returns:
      (names of tensors to be flipped, of those that are at the goal already).

    Raises:
      ValueError: another model, or a damaged patch; names the tensors.
    """
    check_names(patch, views, where, spared(patch, views.keys()))
    hashes, flipped = {}, {}
    total = sum(view.nbytes for view in views.values())
    with progress(total, "hash", "B") as bar, Workers(2) as pool:
        for name, view in views.items():
            hashes[name], flipped[name] = _hashes(patch, name, view, pool)
            bar.update(view.nbytes)
    current = states(patch, hashes)
    refuse_strangers(patch, current, where)
    changed = {name: state for name, state in current.items() if state != SAME}
    other = states(patch, {name: flipped[name] for name in changed})
    damaged = [name for name, state in changed.items() if {state, other[name]} != {BEFORE, AFTER}]
    if damaged:
        raise ValueError(
            f"{some(damaged, ', ')} would not become what the manifest of {patch.path} says: the "
            "patch is damaged. Nothing was written; copy the patch file again."
        )
    moved = tuple(name for name, state in changed.items() if state != goal)
    return moved, tuple(name for name, state in changed.items() if state == goal)


def _hashes(patch: PatchFile, name: str, view: View, pool: Workers) -> tuple[str, str]:
    """Return the SHA-256 of a tensor as it is and with the patch's flips, reading it once."""
    own, other = hashlib.sha256(), hashlib.sha256()
    if not patch.tensors[name].entries:
        for bits in view.runs():
            own.update(memoryview(bits.view(np.uint8)))
        return own.hexdigest(), ""
    for bits, (positions, flips) in zip(view.runs(), patch.runs(name)):
        after = bits.copy()
        after[positions] ^= flips
        hashing = []
        for digest, x in ((own, bits), (other, after)):
            hashing.append(pool.submit(digest.update, memoryview(x.view(np.uint8))))
        for future in hashing:
            wait(future)
    return own.hexdigest(), other.hexdigest()
