"""Applying a patch file to the live torch tensors of a model, and taking it off again; no JAX.

As on a folder (`patch_file.apply`), names, dtypes, shapes and the SHA-256 of every tensor are
checked before anything is written, and what is written is checked before it takes its place. If
writing is interrupted, what was written is taken back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from safepatch_jax.patch_file.apply import (
    AFTER,
    BEFORE,
    SAME,
    Outcome,
    check_names,
    refuse_strangers,
    states,
)
from safepatch_jax.patch_file.file import BITS, RUN, PatchFile
from safepatch_jax.runtime.console import progress, some

if TYPE_CHECKING:
    import pathlib

    import torch

_WHERE = "the state dict"


def apply_tensors(patch: str | pathlib.Path, tensors: Mapping[str, torch.Tensor]) -> Outcome:
    """Patch the live tensors of a model, in place.

    Args:
      patch: the patch file.
      tensors: by name, as `model.state_dict()` gives them; a name that shares its memory with
        another one (a tied head) is written once.

    Raises:
      ValueError: another model, dtype or shape, a tensor that is neither as in the backbone nor as
        patched, a value that is no torch tensor, or a damaged patch; nothing was written.
    """
    return _move(patch, tensors, AFTER)


def revert_tensors(patch: str | pathlib.Path, tensors: Mapping[str, torch.Tensor]) -> Outcome:
    """Give patched tensors the backbone's bits back, in place; see `apply_tensors`."""
    return _move(patch, tensors, BEFORE)


def _move(path: str | pathlib.Path, tensors: Mapping[str, Any], goal: str) -> Outcome:
    patch = PatchFile(path)
    _refuse_other_than_torch(tensors)
    _refuse_elsewhere(tensors)
    views = {}
    for name, tensor in _named(patch, tensors).items():
        views[name] = _View(tensor)
    check_names(patch, views, _WHERE)
    hashes = {}
    with progress(sum(view.nbytes for view in views.values()), "hash", "B") as bar:
        for name, view in views.items():
            hashes[name] = _sha256(view.bits())
            bar.update(view.nbytes)
    current = states(patch, hashes)
    refuse_strangers(patch, current, _WHERE)
    moved = tuple(name for name, state in current.items() if state not in (goal, SAME))
    already = tuple(name for name, state in current.items() if state == goal)
    _write(patch, _once(views, moved), goal)
    return Outcome(None, moved, already, ())


def _refuse_other_than_torch(tensors: Mapping[str, Any]) -> None:
    strangers = []
    for name, tensor in tensors.items():
        kinds = {f"{kind.__module__}.{kind.__name__}" for kind in type(tensor).__mro__}
        if "torch.Tensor" not in kinds:  # said without importing torch
            strangers.append(f"{name} is {type(tensor).__name__}")
    if strangers or not tensors:
        raise ValueError(
            f"A patch goes onto torch tensors, and of {_WHERE} {some(strangers) or 'all'} is "
            "none. Give model.state_dict(), or the path of a model folder."
        )


def _refuse_elsewhere(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError if a tensor has no bits here, as one that was left on the disk."""
    absent = [name for name, tensor in tensors.items() if tensor.is_meta]
    if absent:
        raise ValueError(
            f"{_WHERE} lacks the values of {len(absent)} tensors, which lie on the disk or were "
            f"never loaded: {some(absent, ', ')}. Load the model whole (no device_map that "
            "offloads), or patch its folder."
        )


def _named(patch: PatchFile, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors without the names that the patch does not know and that share their memory
    with one it knows, as a tied head does."""
    known = {_place(tensor) for name, tensor in tensors.items() if name in patch.tensors}
    result = {}
    for name, tensor in tensors.items():
        if name in patch.tensors or _place(tensor) not in known:
            result[name] = tensor
    return result


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return str(tensor.device), tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _once(views: Mapping[str, _View], names: tuple[str, ...]) -> dict[str, _View]:
    """Return the tensors of these names, each memory once: flips that come twice undo each
    other."""
    places: dict[tuple[Any, ...], str] = {}
    for name in names:
        places.setdefault(_place(views[name].tensor), name)
    return {name: views[name] for name in places.values()}


class _View:
    """A torch tensor as a patch sees it: dtype by our name, shape, bits in row-major order."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor.detach()
        self.dtype = str(tensor.dtype).removeprefix("torch.")
        self.shape = tuple(tensor.shape)
        self.nbytes = tensor.numel() * tensor.element_size()

    def bits(self) -> np.ndarray:
        """Return its storage bits, flat; where it lies row by row in the host's memory, without a
        copy."""
        import torch

        raw = self.tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return raw.view(BITS[self.dtype])

    def write(self, bits: np.ndarray) -> None:
        """Replace its storage bits."""
        import torch

        new = torch.from_numpy(bits.view(np.uint8)).view(self.tensor.dtype)
        self.tensor.copy_(new.reshape(self.shape))


def _sha256(bits: np.ndarray) -> str:
    return hashlib.sha256(memoryview(bits.view(np.uint8))).hexdigest()


def _flipped(patch: PatchFile, name: str, view: _View) -> np.ndarray:
    """Return a copy of a tensor's bits with the patch's flips."""
    bits = view.bits().copy()
    for number, (positions, flips) in enumerate(patch.runs(name)):
        bits[number * RUN : (number + 1) * RUN][positions] ^= flips
    return bits


def _write(patch: PatchFile, views: Mapping[str, _View], goal: str) -> None:
    done: list[str] = []
    try:
        for name, view in views.items():
            bits = _flipped(patch, name, view)
            if _sha256(bits) != getattr(patch.tensors[name], goal):
                raise ValueError(
                    f"{name} does not become what the manifest of {patch.path} says: the patch is "
                    "damaged, or the tensor was changed meanwhile. Nothing was changed; copy the "
                    "patch file again."
                )
            done.append(name)
            view.write(bits)
    except BaseException:
        for name in done:
            _take_back(patch, name, views[name], goal)
        raise


def _take_back(patch: PatchFile, name: str, view: _View, goal: str) -> None:
    """Undo the write of one tensor, unless it was not reached."""
    if _sha256(view.bits()) == getattr(patch.tensors[name], goal):
        view.write(_flipped(patch, name, view))
