"""Applying a patch file to the live torch tensors of a model, and taking it off again; no JAX.

As on a folder (`patch_file.apply`), names, dtypes, shapes and the SHA-256 of every tensor are
checked before anything is written, and so is what each would become. Only the changed entries are
then written, tensor by tensor, on the device that holds them; if that is interrupted, what was
written is taken back.
"""

from __future__ import annotations

import contextlib
import fnmatch
import pathlib
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from safepatch_jax.patch_file.apply import AFTER, BEFORE, Outcome
from safepatch_jax.patch_file.entries import gathered, opened
from safepatch_jax.patch_file.file import BITS, RUN, PatchFile
from safepatch_jax.patch_file.live import compare, kind
from safepatch_jax.patch_file.live_names import Part, places
from safepatch_jax.runtime.console import some

if TYPE_CHECKING:
    import torch

_WHERE = "the state dict"
_COMPUTED = ("*rotary_emb.*",)  # tensors that a model computes from its config


def apply_tensors(
    patch: str | pathlib.Path,
    tensors: Mapping[str, torch.Tensor],
    ignore: Collection[str] = (),
) -> Outcome:
    """Patch the live tensors of a model, in place.

    Args:
      patch: the patch file.
      tensors: by name, as `model.state_dict()` gives them, also with a prefix, in wrappers, or as
        an inference server holds them: `live_names` finds the checkpoint's tensors. What shares its
        memory with another one (a tied head) is written once.
      ignore: patterns (`*`) of live names that are not the checkpoint's and may be there; they are
        left alone.

    Raises:
      ValueError: another model, dtype or shape, a tensor that is neither as in the backbone nor as
        patched, a value that is no torch tensor, tied tensors that the patch does not change
        alike, or a damaged patch; nothing was written.
      RuntimeError: writing failed, and so did taking it back; says which tensors are patched.
    """
    return _move(patch, tensors, AFTER, ignore)


def revert_tensors(
    patch: str | pathlib.Path,
    tensors: Mapping[str, torch.Tensor],
    ignore: Collection[str] = (),
) -> Outcome:
    """Give patched tensors the backbone's bits back, in place; see `apply_tensors`."""
    return _move(patch, tensors, BEFORE, ignore)


def _move(
    path: str | pathlib.Path, tensors: Mapping[str, Any], goal: str, ignore: Collection[str]
) -> Outcome:
    patch = opened(path)
    _refuse_other_than_torch(tensors)
    views = _views(patch, tensors, ignore)
    moved, already = compare(patch, views, _WHERE, goal)
    _write(patch, _once(patch, views, moved))
    return Outcome(None, moved, already, ())


def _refuse_other_than_torch(tensors: Mapping[str, Any]) -> None:
    strangers = []
    for name, tensor in tensors.items():
        kinds = {f"{kind.__module__}.{kind.__name__}" for kind in type(tensor).__mro__}
        if "torch.Tensor" not in kinds:  # said without importing torch
            strangers.append(f"{name} is {type(tensor).__name__}")
        elif hasattr(tensor, "full_tensor"):
            strangers.append(f"{name} is a part of a tensor that several devices share")
    if strangers or not tensors:
        raise ValueError(
            f"A patch goes onto whole torch tensors, and of {_WHERE} {some(strangers) or 'all'} is "
            "none. Give model.state_dict(), or the path of a model folder."
        )


def _views(
    patch: PatchFile, tensors: Mapping[str, torch.Tensor], ignore: Collection[str]
) -> dict[str, _View]:
    """Return the tensors by checkpoint name. What the patch does not know keeps its own name, so
    that it is named as a stranger, unless it shares its memory with one that the patch knows, is
    computed, or is to be ignored. Raises ValueError if it has the name of one that is known."""
    kept = {}
    for name, tensor in tensors.items():
        if not any(fnmatch.fnmatch(name, pattern) for pattern in ignore):
            kept[name] = tensor
    found = places(patch, {name: tuple(tensor.shape) for name, tensor in kept.items()})
    used = {part.live for part in found.values()}
    known = {_place(kept[name]) for name in used}
    for name, tensor in kept.items():
        computed = any(fnmatch.fnmatch(name, pattern) for pattern in _COMPUTED)
        if name not in used and not computed and _place(tensor) not in known:
            if name in found:
                raise ValueError(
                    f"{_WHERE} has two tensors for {name} of the patch: {found[name].live}, and "
                    f"{name}, which is another one in memory. Leave the wrong one out with ignore=."
                )
            found[name] = Part(name)
    _refuse_elsewhere({part.live: kept[part.live] for part in found.values()})
    return {name: _View(kept[part.live], part) for name, part in found.items()}


def _refuse_elsewhere(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError if a tensor has no bits here, as one that was left on the disk."""
    absent = [name for name, tensor in tensors.items() if tensor.is_meta]
    if absent:
        raise ValueError(
            f"{_WHERE} lacks the values of {len(absent)} tensors, which lie on the disk or were "
            f"never loaded: {some(absent, ', ')}. Load the model whole (no device_map that "
            "offloads), or patch its folder."
        )


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    if tensor.is_meta:
        return ("meta", id(tensor))
    return str(tensor.device), tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _once(patch: PatchFile, views: Mapping[str, _View], names: tuple[str, ...]) -> dict[str, _View]:
    """Return the tensors of these names, each memory once: flips that come twice undo each other.

    Raises:
      ValueError: a memory has several names, and the patch does not change them alike.
    """
    sharing: dict[tuple[Any, ...], list[str]] = {}
    for name, view in views.items():
        sharing.setdefault(_place(view.tensor), []).append(name)
    firsts, torn = [], []
    for tied in sharing.values():
        if not set(tied).isdisjoint(names):
            firsts.append(tied[0])
            if len({kind(patch, name) for name in tied}) > 1:
                torn.append(" = ".join(tied))
    if torn:
        raise ValueError(
            f"{_WHERE} holds one tensor under several names that the patch {patch.path} does not "
            f"change alike: {some(torn)}. Nothing was written. Give each a memory of its own "
            "(tie_word_embeddings=False when the model is loaded)."
        )
    return {name: views[name] for name in firsts}


class _View:
    """A torch tensor, or some of its rows, as a patch sees it; see `live.View`."""

    def __init__(self, tensor: torch.Tensor, part: Part):
        self.tensor = tensor.detach()
        if part.stop is not None:
            self.tensor = self.tensor.narrow(0, part.start, part.stop - part.start)
        self.dtype = str(tensor.dtype).removeprefix("torch.")
        self.shape = tuple(self.tensor.shape)
        self.nbytes = self.tensor.numel() * self.tensor.element_size()

    def runs(self) -> Iterator[np.ndarray]:
        """Yield its storage bits; without a copy where it lies row by row in the host's memory."""
        import torch

        flat = self.tensor.reshape(-1)
        for start in range(0, len(flat), RUN):
            raw = flat[start : start + RUN].cpu().view(torch.uint8).numpy()
            yield raw.view(BITS[self.dtype])


class _Edit:
    """The flips of one tensor: nothing is written before `write`, and `undo` is right whether that
    was reached or not."""

    def __init__(self, view: _View, indices: np.ndarray, flips: np.ndarray):
        import torch

        whole = {2: torch.int16, 4: torch.int32}[flips.itemsize]
        place: tuple[np.ndarray, ...] = (indices,)
        if view.tensor.is_contiguous():
            self._bits = view.tensor.view(-1).view(whole)
        else:
            self._bits, place = view.tensor.view(whole), np.unravel_index(indices, view.shape)
        device = self._bits.device
        self._index = tuple(torch.from_numpy(axis).to(device) for axis in place)
        self._old = self._bits[self._index]
        signed = flips.view(flips.dtype.str.replace("u", "i"))
        self._new = self._old ^ torch.from_numpy(signed).to(device)

    def write(self) -> None:
        self._bits[self._index] = self._new
        if not self._has(self._new):
            raise RuntimeError("what was written is not what is there")

    def undo(self) -> None:
        if not self._has(self._old):
            self._bits[self._index] = self._old

    def _has(self, bits: torch.Tensor) -> bool:
        return bool((self._bits[self._index] == bits).all())


def _write(patch: PatchFile, views: Mapping[str, _View]) -> None:
    """Flip the changed entries of these tensors; all of them, or none."""
    done: list[str] = []
    edit = None
    with _writable():
        try:
            for name, view in views.items():
                edit = name, _Edit(view, *gathered(patch, name))
                edit[1].write()
                done.append(name)
        except BaseException as error:
            _take_back(patch, views, done, edit, error)
            raise


@contextlib.contextmanager
def _writable() -> Iterator[None]:
    """Allow writing to parameters, and to tensors that were made in inference mode."""
    import torch

    with torch.inference_mode():
        yield


def _take_back(
    patch: PatchFile,
    views: Mapping[str, _View],
    done: list[str],
    edit: tuple[str, _Edit] | None,
    error: BaseException,
) -> None:
    """Undo what was written. Raises RuntimeError if that fails too."""
    left = list(done)
    try:
        if edit is not None:
            edit[1].undo()
            left = [name for name in left if name != edit[0]]
        while left:
            _Edit(views[left[-1]], *gathered(patch, left[-1])).write()
            left.pop()
    except BaseException as second:
        raise RuntimeError(
            f"Writing to {_WHERE} failed ({error!r:.200}), and so did taking it back "
            f"({second!r:.200}): {some(left, ', ') or 'no tensor'} changed, the other tensors did "
            "not. Each is whole: the same call again finishes, the other one of apply and revert "
            "undoes; or load the model again."
        ) from error
