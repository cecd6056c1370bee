"""safetensors files: where their tensors lie, and writing them one tensor at a time.

The safetensors library checks every header that we read, and reads what we write; it offers no
streaming in either direction, and holding a whole file in memory is what we must not do.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future
from typing import BinaryIO

import numpy as np
from safetensors import safe_open

from safepatch_jax.io.stored import DTYPES, Stored
from safepatch_jax.runtime import files
from safepatch_jax.runtime.console import progress
from safepatch_jax.runtime.reading import reading
from safepatch_jax.runtime.workers import Workers, wait

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5_000_000_000  # at which weight files are cut
_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_PIECE = 1 << 20  # bytes a write; a whole tensor in one call is several times slower on Linux
_SYNCED = 1 << 26  # bytes after which the disk is asked to write them
TensorOf = Callable[[str], np.ndarray | Iterator[np.ndarray]]
_CODES = {name: code for code, name in _NAMES.items()}


@dataclasses.dataclass(frozen=True)
class Planned:
    """A tensor to be written: shape, and dtype by name."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def list_tensors(path: str | pathlib.Path) -> dict[str, Stored]:
    """Return where each tensor of a file lies.

    Raises:
      ValueError: not a safetensors file, truncated or damaged.
    """
    path = pathlib.Path(path)
    held = path.stat().st_size if path.is_file() else 0
    fix = f"It is truncated or damaged ({held} bytes): copy or download it again."
    with reading(path, "safetensors", fix):
        # Checks the header against the file's size, and that it has 100 MB at most.
        with safe_open(path, framework="np"):
            pass
        return _list_header(path)


def _list_header(path: pathlib.Path) -> dict[str, Stored]:
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        dtype = _NAMES.get(entry["dtype"], entry["dtype"])
        tensors[name] = Stored(path, 8 + size + start, tuple(entry["shape"]), dtype, end - start)
    return tensors


def write_shards(
    folder: pathlib.Path,
    plan: Mapping[str, Planned],
    tensor_of: TensorOf,
    shard_bytes: int,
    title: str = "write",
    hashed: bool = True,
) -> dict[str, str]:
    """Write tensors as one or several safetensors files with an index, in the order given.

    Args:
      folder: where to; the caller makes it appear whole or not at all (`files.new_folder`).
      plan: name, shape and dtype of each tensor.
      tensor_of: makes a tensor when it is written, or an iterator of its runs, flat; one or two
        are held at a time.
      shard_bytes: files are cut at this size.
      title: shown at the progress bar.
      hashed: whether hashes are wanted.

    Returns:
      SHA-256 of each tensor's bytes, nothing if they are not wanted.

    Raises:
      OSError: the disk is full or not writable; says what to do.
    """
    shards = _cut(plan, shard_bytes)
    total = sum(planned.size for planned in plan.values())
    # Hashing, and waiting for the disk at the end of a file, run beside the writing of what comes
    # next.
    with progress(total, title, "B") as bar, Workers(2) as pool:
        hashes, ends = {}, {}
        for name, shard in shards.items():
            path = folder / name
            wanted = hashes if hashed else None
            ends[path] = _write_file(path, shard, tensor_of, pool, wanted, bar.update)
        for path, end in ends.items():
            with _explained(path, total):
                wait(end)
    if len(shards) > 1:
        parameters = sum(math.prod(planned.shape) for planned in plan.values())
        weight_map = {}
        for name, shard in shards.items():
            weight_map |= dict.fromkeys(shard, name)
        files.write_json(
            folder / INDEX,
            {
                "metadata": {"total_size": total, "total_parameters": parameters},
                "weight_map": weight_map,
            },
        )
    return hashes


def _cut(plan: Mapping[str, Planned], shard_bytes: int) -> dict[str, dict[str, Planned]]:
    """Return the tensors of each weight file, by file name."""
    shards: list[dict[str, Planned]] = [{}]
    room = shard_bytes
    for name, planned in plan.items():
        if shards[-1] and planned.size > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = planned
        room -= planned.size
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    names = (f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1))
    return dict(zip(names, shards))


@contextlib.contextmanager
def _explained(path: pathlib.Path, size: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"Cannot write {path}: {error.strerror or error}. It needs {size:,} bytes; free space "
            "or use another folder, then give the same command again."
        ) from error


def _write_file(
    path: pathlib.Path,
    plan: Mapping[str, Planned],
    tensor_of: TensorOf,
    pool: Executor,
    hashes: dict[str, str] | None,
    written: Callable[[int], object],
) -> Future:
    """Write one file tensor by tensor, add their hashes to `hashes` if there is one; return what
    waits for the disk and closes the file."""
    total = sum(planned.size for planned in plan.values())
    with _explained(path, total):
        file = open(path, "wb")
    syncing = _Syncing(file, pool)
    try:
        with _explained(path, total):
            file.write(_header(plan))
        before, digests = None, {}
        for name, planned in plan.items():
            digest, size = hashlib.sha256(), 0
            for data in _bytes_of(tensor_of(name), planned, name):
                hashing = None if hashes is None else pool.submit(_update, digest, data, before)
                with _explained(path, total):
                    for start in range(0, len(data), _PIECE):
                        file.write(data[start : start + _PIECE])
                    syncing.written(len(data))
                if before is not None:
                    wait(before)  # so that no more than two tensors, or runs of one, are held
                before = hashing
                size += len(data)
                written(len(data))
            assert size == planned.size, (name, size, planned)
            digests[name] = digest
        if hashes is not None:
            wait(before)
            hashes |= {name: digest.hexdigest() for name, digest in digests.items()}
        with _explained(path, total):
            file.flush()
    except BaseException:
        syncing.abandon()
        file.close()
        raise
    return pool.submit(syncing.finish)


class _Syncing:
    """Brings a file to the disk while it is written, so that its end has little to wait for."""

    def __init__(self, file: BinaryIO, pool: Executor):
        self._file, self._pool = file, pool
        self._size, self._running = 0, None

    def written(self, size: int) -> None:
        """Count bytes; raises what became of those before."""
        self._size += size
        if self._size < _SYNCED or (self._running and not self._running.done()):
            return
        if self._running:
            wait(self._running)  # the kernel reports an error once
        self._size, self._running = 0, self._pool.submit(os.fdatasync, self._file.fileno())

    def abandon(self) -> None:
        """Wait for what uses the file's number."""
        if self._running and not self._running.cancel():
            concurrent.futures.wait([self._running])

    def finish(self) -> None:
        """Bring the rest to the disk and close the file."""
        with self._file:
            if self._running:
                self._running.result()
            os.fsync(self._file.fileno())


def _header(plan: Mapping[str, Planned]) -> bytes:
    """Return what a file begins with: the length of a JSON text, and the text, padded."""
    entries, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, planned in plan.items():
        entries[name] = {
            "dtype": _CODES[planned.dtype],
            "shape": planned.shape,
            "data_offsets": [offset, offset + planned.size],
        }
        offset += planned.size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(
    tensor: np.ndarray | Iterator[np.ndarray], planned: Planned, name: str
) -> Iterator[memoryview]:
    """Yield the bytes of a tensor, or of its runs in turn."""
    for x in [tensor] if isinstance(tensor, np.ndarray) else tensor:
        x = np.ascontiguousarray(x)
        expected = planned.shape if x is tensor else x.shape
        assert (x.shape, x.dtype) == (expected, DTYPES[planned.dtype]), (
            name,
            x.shape,
            x.dtype,
            planned,
        )
        yield memoryview(x.reshape(-1).view(np.uint8))


def _update(digest, data: memoryview, before: Future | None) -> None:
    if before is not None:
        before.result()
    digest.update(data)
