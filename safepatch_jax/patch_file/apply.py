"""Applying a patch file to a model folder in Hugging Face format, and taking it off again; no JAX.

Applying and reverting are one operation: the folder's bits, exclusive or (XOR) those of the patch.
What is written is checked against the manifest's SHA-256 before it takes the place of anything. In
place, one weight file after another is written beside the old one and renamed over it, so each
tensor is at any moment as before or as after, and the hashes tell which: the same command again
finishes what was interrupted, the other one undoes it. Until then a mark in the folder keeps all
other readers out (`runtime.unfinished`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from safepatch_jax.io import hub
from safepatch_jax.io.companions import copy_companions
from safepatch_jax.io.folder import Checkpoint, tensor_hashes
from safepatch_jax.io.safetensors_file import INDEX, SINGLE
from safepatch_jax.io.stored import Stored
from safepatch_jax.patch_file.file import PatchFile, runs_of
from safepatch_jax.patch_file.stack import Stack
from safepatch_jax.runtime import files, locks, unfinished
from safepatch_jax.runtime.console import progress, some
from safepatch_jax.runtime.reading import Refused
from safepatch_jax.runtime.workers import Workers, wait

BEFORE, AFTER, SAME, NEITHER = "before", "after", "same", "neither"  # states of a tensor
_VERBS = {AFTER: "apply", BEFORE: "revert"}
LOCK = ".patching"
CERTIFICATE = "certificate.json"
Shards = dict[pathlib.Path, dict[str, Stored]]  # tensors to be changed, by weight file
_PIECE = 1 << 20  # bytes a write
_BEGINNING = 1 << 10  # bytes by which a half-written copy is known


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What applying or reverting did: `moved` tensors, those that were `already` there, and
    `removed` files; `folder` is None where it was done to tensors in memory."""

    folder: pathlib.Path | None
    moved: tuple[str, ...]
    already: tuple[str, ...]
    removed: tuple[str, ...]


def verify(patch: str | pathlib.Path, folder: str | pathlib.Path) -> dict[str, str]:
    """Return the state of each tensor of a model folder: before, after, same (the patch leaves it
    alone), or neither.

    Raises:
      ValueError: the patch file or the folder is damaged, or names, shapes or dtypes are another
        model's.
    """
    patch, tensors = PatchFile(patch), Checkpoint(folder, unfinished=True).tensors
    check_names(patch, tensors, folder)
    return states(patch, tensor_hashes(tensors))


def apply(
    patch: str | pathlib.Path | Stack,
    folder: str | pathlib.Path,
    out: str | pathlib.Path | None = None,
) -> Outcome:
    """Patch a model folder.

    Args:
      patch: the patch file, or several patches as one.
      folder: the backbone, or where applying or reverting this patch in place was interrupted;
        safetensors weights.
      out: a new folder, which appears whole or not at all, with the same weight files and index and
        the config, tokenizer and licence of `folder`; None patches `folder` in place. There the
        certificate, which is about other bits, is removed first; the model card and other files are
        left as they are.

    Raises:
      ValueError: another backbone (names the tensors), a damaged patch or folder, a full `out`, or
        the folder is being patched by another process; nothing was written.
      OSError: the disk is full or not writable.
    """
    return _move(patch, folder, out, AFTER)


def revert(
    patch: str | pathlib.Path, folder: str | pathlib.Path, out: str | pathlib.Path | None = None
) -> Outcome:
    """Give a patched model folder the backbone's bits back; see `apply`."""
    return _move(patch, folder, out, BEFORE)


def check_names(
    patch: PatchFile | Stack,
    tensors: Mapping[str, Any],
    folder: str | pathlib.Path,
    spared: Collection[str] = (),
) -> None:
    """Raise ValueError unless names, shapes and dtypes are those of the patch; all that differ are
    collected.

    Args:
      tensors: by name, of whatever kind has `dtype` (our name of it) and `shape` as `Stored`.
      folder: where they are, in words.
      spared: names that may be missing, beside those that the patch calls optional.
    """
    problems = []
    for name, expected in patch.tensors.items():
        if name not in tensors and name not in spared and not expected.optional:
            problems.append(f"{name} is missing")
    for name in tensors:
        if name not in patch.tensors:
            problems.append(f"{ascii(name)[1:-1]} is not in the patch")
    for name in sorted(patch.tensors.keys() & tensors.keys()):
        expected, tensor = patch.tensors[name], tensors[name]
        if (expected.dtype, expected.shape) != (tensor.dtype, tensor.shape):
            problems.append(
                f"{name} is {tensor.dtype} {list(tensor.shape)}, in the patch {expected.dtype} "
                f"{list(expected.shape)}"
            )
    if problems:
        raise ValueError(
            f"{folder} is another model than the one {patch.path} is for: {some(problems)}. "
            "Nothing was written. Give the backbone that the patch was made from, in the dtype it "
            "had."
        )


def states(patch: PatchFile | Stack, hashes: Mapping[str, str]) -> dict[str, str]:
    """Return the state of each tensor, see `verify`, from the SHA-256 of its bytes."""
    result = {}
    for name, digest in hashes.items():
        tensor = patch.tensors[name]
        if tensor.entries:
            names = {tensor.before: BEFORE, tensor.after: AFTER}
        else:
            names = {tensor.before: SAME}
        result[name] = names.get(digest, NEITHER)
    return result


def refuse_strangers(
    patch: PatchFile | Stack, states: Mapping[str, str], folder: str | pathlib.Path
) -> None:
    """Raise ValueError if a tensor is neither as in the patch's backbone nor as in its patched
    model."""
    strangers = sorted(name for name, state in states.items() if state == NEITHER)
    if strangers:
        raise ValueError(
            f"{folder}: {len(strangers)} of {len(states)} tensors are neither as in the backbone "
            f"of {patch.path} nor as patched: {some(strangers, ', ')}. It is another backbone, or "
            "was changed since. Nothing was written. Give the backbone that the patch was made "
            "from."
        )


def _move(
    patch: str | pathlib.Path | Stack,
    folder: str | pathlib.Path,
    out: str | pathlib.Path | None,
    goal: str,
) -> Outcome:
    """Bring every tensor of a folder to the state `goal`, BEFORE or AFTER."""
    patch = patch if isinstance(patch, Stack) else PatchFile(patch)
    folder = pathlib.Path(folder)
    if out is not None:
        files.refuse_full_folder(out)
    elif origin := hub.origin_of(folder):
        raise ValueError(
            f"{folder} is {origin} in the cache of the Hub, which is kept: give another folder for "
            "the result (--out)."
        )
    checkpoint = Checkpoint(folder, unfinished=True)
    if checkpoint.layout not in (SINGLE, INDEX):
        raise ValueError(
            f"{folder} has torch weights ({checkpoint.layout}), and patches go onto safetensors. "
            f"Convert it first: python -m launch.convert --source=hf:{folder} --target=hf:DIR."
        )
    if out is None:
        checkpoint.refuse_second_set()
    with contextlib.nullcontext() if out is not None else _alone(folder):
        check_names(patch, checkpoint.tensors, folder)
        current = states(patch, tensor_hashes(checkpoint.tensors))
        refuse_strangers(patch, current, folder)
        moved = tuple(name for name, state in current.items() if state not in (goal, SAME))
        already = tuple(name for name, state in current.items() if state == goal)
        shards: Shards = {tensor.path: {} for tensor in checkpoint.tensors.values()}
        for name in moved:
            tensor = checkpoint.tensors[name]
            shards[tensor.path][name] = tensor
        if out is None:
            begun = bool(moved and already) or unfinished.is_marked(folder)
            removed = _in_place(folder, shards, patch, goal, begun)
            return Outcome(folder, moved, already, removed)
        with files.new_folder(out) as new:
            copy_companions(folder, new)
            if checkpoint.layout == INDEX:
                files.copy(files.own_file(folder / INDEX), new / INDEX)
            with _bar(shards) as bar:
                for path, tensors in shards.items():
                    with _explained(new / path.name, path, "Nothing was kept."):
                        _write_shard(path, new / path.name, tensors, patch, goal, bar)
        return Outcome(pathlib.Path(out), moved, already, ())


def _in_place(
    folder: pathlib.Path, shards: Shards, patch: PatchFile | Stack, goal: str, begun: bool
) -> tuple[str, ...]:
    """Rewrite the weight files that hold what is to be moved, one by one; return the names of files
    removed. `begun`: some tensors are at the goal already, or were when this was interrupted."""
    for path in shards:
        _clear_beside(path)
    shards = {path: tensors for path, tensors in sorted(shards.items()) if tensors}
    removed = ()
    if shards:
        unfinished.write(folder, patch.path, _VERBS[goal])
        if (folder / CERTIFICATE).is_file():  # it certifies other bits
            (folder / CERTIFICATE).unlink()
            removed = (CERTIFICATE,)
    done, before = 0, _inodes(shards)
    try:
        with _bar(shards) as bar:
            for path, tensors in shards.items():
                state = (
                    f"{done} of {len(shards)} weight files are done and every tensor is whole: the "
                    "same command again finishes, the other one of apply and revert undoes."
                )
                with _explained(path, path, state):
                    _replace_shard(path, tensors, patch, goal, bar)
                done += 1
    except BaseException:
        # Not by what is done: it may have been interrupted right after a file was put in place.
        if not begun and _inodes(shards) == before:
            unfinished.remove(folder)
        raise
    unfinished.remove(folder)
    return removed


def _inodes(paths: Iterable[pathlib.Path]) -> list[int]:
    """Return which files lie at paths: one that is put in place of another is another."""
    return [path.stat().st_ino for path in paths]


def _replace_shard(
    path: pathlib.Path, tensors: Mapping[str, Stored], patch: PatchFile | Stack, goal: str, bar
) -> None:
    beside = _beside(path)
    try:
        _write_shard(path, beside, tensors, patch, goal, bar)
        shutil.copymode(path, beside)
        os.replace(beside, path)
        files.sync_folder(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def _clear_beside(path: pathlib.Path) -> None:
    """Delete the half-written copy of a weight file that an interrupted run left. Raises ValueError
    if its name is taken by something else."""
    beside = _beside(path)
    if not os.path.lexists(beside):
        return
    is_ours = not beside.is_symlink() and beside.is_file()
    if is_ours:
        with open(beside, "rb") as copied, open(path, "rb") as original:
            header = original.read(_BEGINNING)
            header = header[: 8 + int.from_bytes(header[:8], "little")]  # what no patch changes
            is_ours = header.startswith(copied.read(len(header)))
    if not is_ours:
        raise Refused(
            f"{beside} is no half-written copy of {path.name}, and that name is needed for one. It "
            "was left as it is, and nothing was patched; move it away."
        )
    beside.unlink()


def _write_shard(
    source: pathlib.Path,
    target: pathlib.Path,
    tensors: Mapping[str, Stored],
    patch: PatchFile | Stack,
    goal: str,
    bar,
) -> None:
    """Copy a weight file, changing the given tensors on the way; on return it is on the disk and
    has the right hashes."""
    with (
        open(source, "rb", buffering=0) as reader,
        files.new_alone(target) as writer,
        Workers(1) as pool,
    ):
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
            _copy(reader, writer, tensor.offset, bar)
            digest, hashing = hashlib.sha256(), None
            for bits, (positions, flips) in zip(runs_of(tensor), patch.runs(name)):
                bits[positions] ^= flips
                data = memoryview(bits.view(np.uint8))
                if hashing:
                    wait(hashing)
                hashing = pool.submit(digest.update, data)
                for start in range(0, len(data), _PIECE):
                    writer.write(data[start : start + _PIECE])
                bar.update(len(data))
            wait(hashing)
            if digest.hexdigest() != getattr(patch.tensors[name], goal):
                raise ValueError(
                    f"{name} does not become what the manifest of {patch.path} says: the patch is "
                    f"damaged, or {source} was changed meanwhile. It was left as it is; copy the "
                    "patch file again."
                )
            reader.seek(tensor.offset + tensor.size)
        _copy(reader, writer, os.fstat(reader.fileno()).st_size, bar)
        writer.flush()
        os.fsync(writer.fileno())


def _copy(reader: BinaryIO, writer: BinaryIO, stop: int, bar) -> None:
    """Copy the bytes from where the reader stands to `stop`."""
    while (remaining := stop - reader.tell()) > 0:
        data = reader.read(min(remaining, _PIECE))
        if not data:
            raise ValueError(
                f"{reader.name} ends too early: it was truncated while it was read. Copy or "
                "download it again."
            )
        writer.write(data)
        bar.update(len(data))


@contextlib.contextmanager
def _alone(folder: pathlib.Path) -> Iterator[None]:
    """Keep other processes from patching a folder while the block runs; a dead process keeps nobody
    out."""
    path = folder / LOCK
    with contextlib.ExitStack() as stack:
        try:
            handle = stack.enter_context(locks.held(path, wait=False))
            if not path.exists() or path.stat().st_ino != os.fstat(handle).st_ino:
                raise locks.Held  # its holder has just finished and removed the file
        except locks.Held as error:
            raise ValueError(
                f"{folder} is being patched by another process. Wait for it, then try again."
            ) from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _beside(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f".{path.name}{LOCK}")


def _bar(shards: Shards):
    return progress(sum(path.stat().st_size for path in shards), "write", "B")


@contextlib.contextmanager
def _explained(target: pathlib.Path, source: pathlib.Path, state: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"Cannot write {target}: {error.strerror or error}. It needs "
            f"{source.stat().st_size:,} bytes of free space. {state}"
        ) from error
