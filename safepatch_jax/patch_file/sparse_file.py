"""Sparse weights as one safetensors file: flat indices and new values of each changed tensor, as
TRL drafted them for vLLM's sparse weight patches; no JAX.

For each tensor NAME it has `NAME.idx`, int32 positions in the tensor flattened row by row, and
`NAME.val`, the values there. docs/hot_patch.md says where the format is written down. It has no
values from before: the way back needs the model.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from safepatch_jax.io.folder import Checkpoint
from safepatch_jax.io.safetensors_file import list_tensors
from safepatch_jax.io.stored import DTYPES, Stored
from safepatch_jax.patch_file.carried import manifest_text, read_manifest, write_back
from safepatch_jax.patch_file.create import Change
from safepatch_jax.patch_file.entries import entries
from safepatch_jax.patch_file.file import BITS, KEY, PatchFile, runs_of
from safepatch_jax.runtime import files
from safepatch_jax.runtime.console import some

FORMAT = "sparse-safetensors"
_KIND, _VERSION = "sparse_weight_patch", "1"
_INDICES, _VALUES = ".idx", ".val"
_LIMIT = 1 << 31  # of an int32 index
# How positions are written, and the dtypes that they have then.
_ENCODINGS = {"raw": {"I32": "<i4"}, "gap_delta": {"U16": "<u2", "U32": "<u4"}}


def write(
    patch: PatchFile, model: str | pathlib.Path, out: str | pathlib.Path, reverse: bool = False
) -> None:
    """Write a patch as sparse weights.

    Args:
      patch: the patch file.
      model: the folder of the backbone or of the patched model, which has the values.
      out: a new file.
      reverse: write the way back, from the patched model to the backbone.

    Raises:
      ValueError: another model, one without a tensor that changes, or a tensor of 2^31 entries or
        more.
    """
    large = [name for name in patch.changed() if patch.tensors[name].size >= _LIMIT]
    if large:
        raise ValueError(f"{some(large, ', ')} has 2^31 entries or more: {FORMAT} ends there.")
    tensors = {}
    for changed in entries(patch, model):
        tensors[changed.name + _INDICES] = changed.indices.astype(np.int32)
        tensors[changed.name + _VALUES] = changed.before if reverse else changed.after
    total = sum(tensor.size for tensor in patch.tensors.values())
    metadata = {
        "format": _KIND,
        "version": _VERSION,
        "sparse": "True",
        "model_version": "1",
        "num_changed_params": str(len(patch.changed())),
        "total_changed_elements": str(patch.entries()),
        "total_elements": str(total),
        "sparsity": str(1 - patch.entries() / total),
        "encoding": "raw",
        KEY: manifest_text(patch, reverse),
    }
    with files.new_file(out) as file:
        file.write(save(tensors, metadata=metadata))


def read(path: str | pathlib.Path, model: str | pathlib.Path, out: str | pathlib.Path) -> PatchFile:
    """Write the patch file of sparse weights.

    Args:
      path: the file.
      model: the folder of the model that it is for. Without hashes carried along nothing in the
        file says which that is: any with such tensors is taken.
      out: the patch file; must not exist.

    Raises:
      ValueError: no such file, a damaged one, or another model; no file is left.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"No file '{path}'.")
    stored = list_tensors(path)
    with safe_open(path, framework="np") as file:
        metadata = file.metadata() or {}
    encoding = metadata.get("encoding", "gap_delta")
    known = (metadata.get("format"), metadata.get("version")) == (_KIND, _VERSION)
    if not known or metadata.get("sparse") != "True" or encoding not in _ENCODINGS:
        raise ValueError(
            f"{path} is no sparse weights that can be read here: its header must have format "
            f"{_KIND}, version {_VERSION}, sparse True and encoding {' or '.join(_ENCODINGS)}."
        )
    tensors = Checkpoint(model).tensors
    manifest = read_manifest(metadata, path)
    _check(path, stored, tensors, encoding, model)
    changes = {}
    for name, tensor in tensors.items():
        indices, values = stored.get(name + _INDICES), stored.get(name + _VALUES)
        runs = _runs(name, tensor, indices, values, encoding)
        optional = bool(manifest and manifest["tensors"].get(name, (0, 0, False))[2])
        changes[name] = Change(tensor.dtype, tensor.shape, runs, optional)
    origin = {"format": FORMAT, "file": path.name, "sha256": files.file_sha256(path)}
    return write_back(out, changes, manifest, origin, model)


def _check(
    path: pathlib.Path,
    stored: Mapping[str, Stored],
    tensors: Mapping[str, Any],
    encoding: str,
    model: str | pathlib.Path,
) -> None:
    """Raise ValueError unless each tensor of the file belongs to one of the model's."""
    problems = []
    for name, entry in stored.items():
        base, suffix = name[: -len(_INDICES)], name[-len(_INDICES) :]
        tensor = tensors.get(base)
        pair = stored.get(base + _INDICES), stored.get(base + _VALUES)
        if suffix not in (_INDICES, _VALUES) or tensor is None:
            problems.append(f"{ascii(name)[1:-1]} belongs to no tensor of {model}")
        elif None in pair or pair[0].shape != pair[1].shape or len(entry.shape) != 1:
            problems.append(f"{base} has not as many indices as values")
        elif suffix == _INDICES and entry.dtype not in _ENCODINGS[encoding]:
            problems.append(f"{name} is {entry.dtype}, expected {list(_ENCODINGS[encoding])}")
        elif suffix == _VALUES and entry.dtype != tensor.dtype:
            problems.append(f"{name} is {entry.dtype}, in the model {tensor.dtype}")
    if problems or not stored:
        raise ValueError(
            f"{path} does not fit {model}: {some(problems) or 'it is empty'}. Nothing was written. "
            "Give the model that it is for, in the dtype that it had."
        )


def _runs(
    name: str, tensor: Stored, indices: Stored | None, values: Stored | None, encoding: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield a tensor's bits before and after."""
    if indices is None or values is None:
        yield from zip(runs_of(tensor), runs_of(tensor))
        return
    positions = _positions(name, indices, tensor, encoding)
    new = values.read(np.empty(values.shape, DTYPES[values.dtype])).view(BITS[values.dtype])
    start = 0
    for before in runs_of(tensor):
        after = before.copy()
        first, last = np.searchsorted(positions, (start, start + len(before)))
        after[positions[first:last] - start] = new[first:last]
        start += len(before)
        yield before, after


def _positions(name: str, indices: Stored, tensor: Stored, encoding: str) -> np.ndarray:
    """Return flat indices, int64, checked: increasing and within the tensor."""
    raw = indices.read(np.empty(indices.shape, _ENCODINGS[encoding][indices.dtype]))
    positions = raw.astype(np.int64)
    if encoding == "gap_delta":
        positions = np.cumsum(positions + 1) - 1
    size = tensor.size // BITS[tensor.dtype].itemsize
    inside = not len(positions) or (positions[0] >= 0 and positions[-1] < size)
    if not inside or np.any(np.diff(positions) <= 0):
        raise ValueError(
            f"{name}: the indices in {indices.path} are not increasing or beyond the tensor: the "
            "file is damaged or of another version. Nothing was written; copy it again."
        )
    return positions
