"""What a patch file changes, tensor by tensor: names, flat indices, bits, values and hashes.

The form in which inference servers take sparse weight updates; no JAX.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator

import numpy as np

from safepatch_jax.io.folder import Checkpoint
from safepatch_jax.io.stored import DTYPES, Stored
from safepatch_jax.patch_file.apply import AFTER, BEFORE, check_names, refuse_strangers, states
from safepatch_jax.patch_file.file import BITS, RUN, PatchFile, runs_of
from safepatch_jax.patch_file.live import kind
from safepatch_jax.runtime.console import some


@dataclasses.dataclass(frozen=True)
class Entries:
    """The changed entries of one tensor.

    Attributes:
      name: in the checkpoint.
      dtype, shape: of the whole tensor.
      indices: int64 [n], increasing: positions in the tensor flattened row by row.
      bits: uint16 or uint32 [n], storage bits before XOR after, never 0.
      hash_before, hash_after: SHA-256 of the whole tensor's bytes.
      before, after: values [n] in the tensor's dtype; None where no model was given.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    indices: np.ndarray
    bits: np.ndarray
    hash_before: str
    hash_after: str
    before: np.ndarray | None = None
    after: np.ndarray | None = None


def entries(
    patch: PatchFile | str | pathlib.Path, model: str | pathlib.Path | None = None
) -> Iterator[Entries]:
    """Yield the changed entries of each tensor that a patch changes, by name; those of one tensor
    are held at a time.

    Args:
      patch: the patch file.
      model: a folder that has the values: the backbone or the patched model.

    Raises:
      ValueError: a damaged patch; `model` is another one (a tensor's hash is compared before its
        entries are yielded), or leaves out a tensor that changes and is no copy of another one.
    """
    patch = opened(patch)
    stored = {} if model is None else sources(patch, model)
    for name in sorted(patch.changed()):
        tensor = patch.tensors[name]
        indices, bits = gathered(patch, name)
        before = after = None
        if name in stored:
            before, after = _values(patch, name, stored[name], indices, model)
        yield Entries(
            name,
            tensor.dtype,
            tensor.shape,
            indices,
            bits,
            tensor.before,
            tensor.after,
            before,
            after,
        )


def sources(patch: PatchFile, model: str | pathlib.Path) -> dict[str, Stored]:
    """Return where a folder has the bits of each tensor that a patch changes, by name: of one that
    it leaves out (a tied head), where it has another one that is the same before and after.

    Raises:
      ValueError: another model, or a tensor that is left out and no copy of another one.
    """
    tensors = Checkpoint(model).tensors
    check_names(patch, tensors, model)
    copies = {kind(patch, name): tensor for name, tensor in tensors.items()}
    found = {}
    for name in patch.changed():
        found[name] = tensors.get(name) or copies.get(kind(patch, name))
    absent = [name for name, tensor in found.items() if tensor is None]
    if absent:
        raise ValueError(
            f"{model} has neither {some(absent, ', ')}, which {patch.path} changes, nor a copy of "
            "it. Nothing was written. Give the backbone that the patch was made from."
        )
    return found


def opened(patch: PatchFile | str | pathlib.Path) -> PatchFile:
    """Open a patch file, unless that was done."""
    return patch if isinstance(patch, PatchFile) else PatchFile(patch)


def gathered(patch: PatchFile, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return all flat indices, int64 [n], and flips, uint16 or uint32 [n], of a tensor."""
    indices, bits = [np.empty(0, np.int64)], [np.empty(0, BITS[patch.tensors[name].dtype])]
    start = 0
    for positions, flips in patch.runs(name):
        indices.append(positions + start)
        bits.append(flips)
        start += RUN
    return np.concatenate(indices), np.concatenate(bits)


def _values(
    patch: PatchFile, name: str, stored: Stored, indices: np.ndarray, model: str | pathlib.Path
) -> tuple[np.ndarray, np.ndarray]:
    """Return the values at the entries before and after, read from a tensor in either state."""
    digest, here, there = hashlib.sha256(), [], []
    for bits, (positions, flips) in zip(runs_of(stored), patch.runs(name)):
        digest.update(memoryview(bits.view(np.uint8)))
        here.append(bits[positions])
        there.append(bits[positions] ^ flips)
    state = states(patch, {name: digest.hexdigest()})
    refuse_strangers(patch, state, model)
    dtype = DTYPES[stored.dtype]
    values = [np.concatenate(parts).view(dtype) for parts in (here, there)]
    if state[name] == AFTER:
        values.reverse()
    assert state[name] in (BEFORE, AFTER) and len(values[0]) == len(indices)
    return values[0], values[1]
