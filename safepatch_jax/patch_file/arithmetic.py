"""New patch files from old ones: a patch scaled, and several patches of one backbone combined; no
JAX.

A patch's change of an entry is the difference of the stored floats after and before, in float32.
Sums and products are float32, and the result is cast to the storage dtype once.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from safepatch_jax.io.folder import Checkpoint, tensor_hashes
from safepatch_jax.io.stored import DTYPES, Stored
from safepatch_jax.patch_file.apply import (
    AFTER,
    BEFORE,
    SAME,
    check_names,
    refuse_strangers,
    states,
)
from safepatch_jax.patch_file.create import Change, write_patch
from safepatch_jax.patch_file.file import BITS, PatchFile, runs_of
from safepatch_jax.runtime import files
from safepatch_jax.runtime.console import some


def scale(
    patch: str | pathlib.Path, folder: str | pathlib.Path, factor: float, out: str | pathlib.Path
) -> PatchFile:
    """Write the patch that changes each entry by `factor` times what another does; entries left
    unchanged are dropped.

    Args:
      patch: the patch file.
      folder: the backbone or the patched model.
      factor: a finite number; below 0 it turns the change around.
      out: the new patch file, for the same backbone; must not exist.

    Raises:
      ValueError: another backbone, a result that is not finite in the storage dtype, or that
        changes nothing.
    """
    if not math.isfinite(factor):
        raise ValueError(f"factor must be a finite number, got {factor}.")
    patch, tensors = PatchFile(patch), Checkpoint(folder).tensors
    check_names(patch, tensors, folder)
    current = states(patch, tensor_hashes(tensors))
    refuse_strangers(patch, current, folder)

    def runs(name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        dtype = tensors[name].dtype
        for base, (positions, flips) in zip(runs_of(tensors[name]), patch.runs(name)):
            if current[name] == AFTER:
                base[positions] ^= flips
            before = floats(base[positions], dtype)
            change = change_of(base[positions], flips, dtype)
            new = base.copy()
            new[positions] = rounded(before + np.float32(factor) * change, name, dtype)
            yield base, new

    about = {"factor": factor, "of": _origin(patch)}
    with np.errstate(over="ignore", invalid="ignore"):
        return write_patch(out, "scaled", about, _changes(patch, tensors, runs))


def combine(
    patches: Sequence[str | pathlib.Path], folder: str | pathlib.Path, out: str | pathlib.Path
) -> PatchFile:
    """Write the patch that does what several patches of one backbone do together.

    An entry that one patch alone changes gets the bits that this patch gives it. Where several
    change an entry, their changes are added up in the order given.

    Args:
      patches: two patch files or more.
      folder: the backbone, not patched.
      out: the new patch file; must not exist.

    Raises:
      ValueError: patches of different backbones, another folder than their backbone, or a result
        that is not finite in the storage dtype, or that changes nothing.
    """
    if len(patches) < 2:
        raise ValueError("combine needs two patch files or more.")
    opened, tensors = [PatchFile(path) for path in patches], Checkpoint(folder).tensors
    for other in opened[1:]:
        _check_one_backbone(opened[0], other)
    hashes = tensor_hashes(tensors)
    for patch in opened:
        check_names(patch, tensors, folder)
        current = states(patch, hashes)
        refuse_strangers(patch, current, folder)
        patched = [name for name, state in current.items() if state not in (BEFORE, SAME)]
        if patched:
            raise ValueError(
                f"{folder} is patched with {patch.path} ({len(patched)} tensors), and combine "
                "needs the backbone. Revert the patch first: python -m launch.patch revert."
            )

    def runs(name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        dtype = tensors[name].dtype
        for base, *parts in zip(runs_of(tensors[name]), *(patch.runs(name) for patch in opened)):
            new, count = base.copy(), np.zeros(len(base), np.int32)
            total = np.zeros(len(base), np.float32)
            for positions, flips in parts:
                new[positions] = base[positions] ^ flips
                total[positions] += change_of(base[positions], flips, dtype)
                count[positions] += 1
            shared = np.flatnonzero(count > 1)
            new[shared] = rounded(floats(base[shared], dtype) + total[shared], name, dtype)
            yield base, new

    about = {"of": [_origin(patch) for patch in opened]}
    with np.errstate(over="ignore", invalid="ignore"):
        return write_patch(out, "combined", about, _changes(opened[0], tensors, runs))


def _changes(
    patch: PatchFile,
    tensors: Mapping[str, Stored],
    runs: Callable[[str], Iterator[tuple[np.ndarray, np.ndarray]]],
) -> dict[str, Change]:
    """Return what `write_patch` takes, for tensors of which `runs` yields bits before and after."""
    result = {}
    for name, tensor in tensors.items():
        optional = patch.tensors[name].optional
        result[name] = Change(tensor.dtype, tensor.shape, runs(name), optional)
    return result


def floats(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Return what storage bits stand for, as float32."""
    return bits.view(DTYPES[dtype]).astype(np.float32)


def change_of(base: np.ndarray, flips: np.ndarray, dtype: str) -> np.ndarray:
    """Return by how much flips change what bits stand for, as float32."""
    return floats(base ^ flips, dtype) - floats(base, dtype)


def rounded(x: np.ndarray, name: str, dtype: str) -> np.ndarray:
    """Cast float32 to the storage dtype, rounding to nearest, and return its bits. Raises
    ValueError, which names the tensor, if one is not finite."""
    stored = x.astype(DTYPES[dtype])
    if not np.all(np.isfinite(stored)):
        raise ValueError(
            f"{name}: the new patch would set entries to NaN or infinity in {dtype}. Nothing was "
            "written. Use a smaller factor, or patches of finite weights."
        )
    return stored.view(BITS[dtype])


def _check_one_backbone(first: PatchFile, other: PatchFile) -> None:
    names = first.tensors.keys() | other.tensors.keys()
    different = sorted(name for name in names if _before(first, name) != _before(other, name))
    if different:
        raise ValueError(
            f"{first.path} and {other.path} are patches of different backbones: {len(different)} "
            f"of {len(names)} tensors differ: {some(different, ', ')}. A patch made on top of "
            "another is applied after it."
        )


def _before(patch: PatchFile, name: str) -> tuple | None:
    """Return what identifies a tensor of a patch's backbone."""
    tensor = patch.tensors.get(name)
    return tensor and (tensor.dtype, tensor.shape, tensor.before)


def _origin(patch: PatchFile) -> dict:
    return {
        "file": patch.path.name,
        "sha256": files.file_sha256(patch.path),
        "kind": patch.kind,
        "about": patch.about,
    }
