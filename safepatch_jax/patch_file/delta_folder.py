"""The delta of a checkpoint as a folder: changed tensors as the XOR of their bytes, compressed,
with checksums; what slime, Miles, SGLang's /pull_weights and ModelExpress exchange; no JAX.

docs/hot_patch.md says where the format is written down. `weight_v000007/` is the step from version
6 to 7: model.safetensors.index.json names version, base and codecs, and which file has which
tensor; a file has for each tensor a zstd frame (U8), and in its metadata the Adler-32 of the new
bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import pathlib
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from safepatch_jax.io.folder import Checkpoint
from safepatch_jax.io.safetensors_file import INDEX, list_tensors
from safepatch_jax.io.stored import Stored
from safepatch_jax.patch_file.apply import AFTER, BEFORE, refuse_strangers, states
from safepatch_jax.patch_file.carried import manifest_text, read_manifest, write_back
from safepatch_jax.patch_file.create import Change
from safepatch_jax.patch_file.entries import sources
from safepatch_jax.patch_file.file import BITS, KEY, PatchFile, runs_of
from safepatch_jax.runtime import files
from safepatch_jax.runtime.console import progress, some

FORMAT = "disk-delta"
_FILE_BYTES = 1 << 30  # of compressed tensors a file
_LEVEL = 1  # of zstd
_FIELDS = {"delta_encoding": ("xor", "overwrite"), "compression_format": ("zstd",)}


def write(
    patch: PatchFile, model: str | pathlib.Path, out: str | pathlib.Path, reverse: bool = False
) -> None:
    """Write a patch as a delta folder, which appears whole or not at all.

    Args:
      patch: the patch file.
      model: the folder of the backbone or of the patched model; checksums are of whole tensors.
      out: a new folder; `weight_v000007` makes it version 7 on base 6, another name 1 on 0.
      reverse: write the way back, from the patched model to the backbone.

    Raises:
      ValueError: another model, or one without a tensor that changes; pyarrow, which compresses,
        is not installed.
    """
    codec = _codec()
    stored = sources(patch, model)
    with files.new_folder(out) as folder:
        shards, sums, size = [], {}, 0
        held: dict[str, np.ndarray] = {}

        def flush() -> None:
            path = folder / f"part-{len(shards)}"
            save_file(held, path, metadata=sums)
            shards.append((path, list(held)))
            held.clear()
            sums.clear()

        with progress(len(patch.changed()), "compress", "tensors") as bar:
            for name in sorted(patch.changed()):
                xor, checksum = _delta(patch, name, stored[name], model, reverse)
                frame = codec.compress(xor, asbytes=True)
                held[name] = np.frombuffer(frame, np.uint8)
                sums[name] = checksum
                size += len(frame)
                if size >= _FILE_BYTES:
                    flush()
                    size = 0
                bar.update(1)
        if held:
            flush()
        _write_index(folder, shards, patch, pathlib.Path(out).name, reverse)


def _write_index(
    folder: pathlib.Path, shards: list, patch: PatchFile, name: str, reverse: bool
) -> None:
    weight_map = {}
    for number, (path, names) in enumerate(shards):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        path.rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    match = re.fullmatch(r"weight_v(\d{6})", name)
    version = int(match[1]) if match else 1
    metadata = {
        "version": f"{version:06d}",
        "base_version": f"{max(version - 1, 0):06d}",
        "delta_encoding": "xor",
        "compression_format": "zstd",
        "checksum_format": "adler32",
        KEY: manifest_text(patch, reverse),
    }
    files.write_json(folder / INDEX, {"metadata": metadata, "weight_map": weight_map})


def _delta(
    patch: PatchFile, name: str, stored: Stored, model: str | pathlib.Path, reverse: bool
) -> tuple[np.ndarray, str]:
    """Return the XOR of a tensor's bytes, and the Adler-32 of the bytes that it leads to."""
    tensor = patch.tensors[name]
    xor = np.zeros(tensor.size, BITS[tensor.dtype])
    own, other, start = _Hashed(), _Hashed(), 0
    for bits, (positions, flips) in zip(runs_of(stored), patch.runs(name)):
        xor[start : start + len(bits)][positions] = flips
        own.update(bits)
        other.update(bits ^ xor[start : start + len(bits)])
        start += len(bits)
    state = states(patch, {name: own.sha256})
    refuse_strangers(patch, state, model)
    goal = BEFORE if reverse else AFTER
    return xor.view(np.uint8), (own if state[name] == goal else other).adler32


def read(
    folder: str | pathlib.Path, model: str | pathlib.Path, out: str | pathlib.Path
) -> PatchFile:
    """Write the patch file of a delta folder.

    Args:
      folder: the delta.
      model: the folder of the model that the delta builds on.
      out: the patch file; must not exist.

    Raises:
      ValueError: no delta folder, one of another kind, a damaged one, or another model: a tensor's
        checksum, or a hash that was carried along, differs; no file is left.
    """
    folder = pathlib.Path(folder)
    index = _read_index(folder)
    metadata, tensors = index["metadata"], Checkpoint(model).tensors
    deltas, sums = _listed(folder, index["weight_map"])
    strangers = sorted(deltas.keys() - tensors.keys())
    if strangers:
        raise ValueError(
            f"{model} is another model than that of {folder}: it lacks {some(strangers, ', ')}. "
            "Give the model that the delta builds on."
        )
    manifest = read_manifest(metadata, folder)
    changes = {}
    for name, stored in tensors.items():
        if name in deltas:
            encoding = metadata["delta_encoding"]
            runs = _changed_runs(name, stored, deltas[name], encoding, sums.get(name))
        else:
            runs = zip(runs_of(stored), runs_of(stored))
        optional = bool(manifest and manifest["tensors"].get(name, (0, 0, False))[2])
        changes[name] = Change(stored.dtype, stored.shape, runs, optional)
    origin = {"format": FORMAT, "file": folder.name, "index": files.file_sha256(folder / INDEX)}
    return write_back(out, changes, manifest, origin, model)


def _read_index(folder: pathlib.Path) -> dict[str, Any]:
    """Read the index. Raises ValueError unless it is that of a delta which can be read here."""
    path = folder / INDEX
    if not path.is_file():
        raise ValueError(f"{folder} has no {INDEX}: it is no delta folder.")
    problems = []
    try:
        index = json.loads(path.read_text("utf-8"))
        metadata, weight_map = index["metadata"], index["weight_map"]
        for field, known in _FIELDS.items():
            if metadata[field] not in known:
                problems.append(f"{field} {metadata[field]!r:.40}, known are {', '.join(known)}")
        if metadata["checksum_format"] != "adler32":
            problems.append(f"checksum_format {metadata['checksum_format']!r:.40}, known: adler32")
        for file in set(weight_map.values()):
            if not re.fullmatch(r"[\w.-]+\.safetensors", file):
                problems.append(f"a file name {file!r:.60}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no index of a delta ({error!r:.200}).") from error
    if problems or not weight_map:
        raise ValueError(f"{path} cannot be read: {some(problems) or 'no tensor in it'}.")
    return index


def _listed(
    folder: pathlib.Path, weight_map: Mapping[str, str]
) -> tuple[dict[str, Stored], dict[str, str]]:
    """Return where the compressed tensors lie, and their checksums."""
    deltas, sums = {}, {}
    for file in sorted(set(weight_map.values())):
        found = list_tensors(folder / file)
        expected = {name for name, place in weight_map.items() if place == file}
        if found.keys() != expected:
            raise ValueError(
                f"{folder / file} does not have the tensors that {INDEX} lists: copy it again."
            )
        with safe_open(folder / file, framework="np") as opened:
            sums |= opened.metadata() or {}
        deltas |= found
    return deltas, sums


def _changed_runs(
    name: str, stored: Stored, delta: Stored, encoding: str, checksum: str | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield a tensor's bits before and after. Raises ValueError at the end if they are not those of
    the checksum."""
    hashed = _Hashed()
    data = delta.read(np.empty(delta.size, np.uint8))
    patched = _xored if encoding == "xor" else _overwritten
    for before, after in patched(stored, _pieces(data, name, delta.path)):
        hashed.update(after)
        yield before, after
    if hashed.adler32 != checksum:
        raise ValueError(
            f"{name} does not become what {delta.path} says (Adler-32 {hashed.adler32}, expected "
            f"{checksum}): the delta builds on another model, or is damaged. Nothing was written."
        )


def _xored(stored: Stored, pieces) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for before in runs_of(stored):
        xor = pieces(before.nbytes).view(before.dtype)
        yield before, before ^ xor
    pieces(0)


def _overwritten(stored: Stored, pieces) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """As `_xored`, of the encoding that has a count, positions of bytes, and their new values."""
    count = int(pieces(4).view("<u4")[0])
    size = math.prod(stored.shape) * BITS[stored.dtype].itemsize
    if count > size:
        raise ValueError(f"{count:,} positions in a tensor of {size:,} bytes: the delta is damaged")
    positions, values, start = pieces(4 * count).view("<u4"), pieces(count), 0
    if np.any(positions[1:] <= positions[:-1]) or (count and positions[-1] >= size):
        raise ValueError("positions are not increasing or beyond the tensor: the delta is damaged")
    pieces(0)
    for before in runs_of(stored):
        after = before.copy()
        first, last = np.searchsorted(positions, (start, start + before.nbytes))
        after.view(np.uint8)[positions[first:last] - start] = values[first:last]
        start += before.nbytes
        yield before, after


def _pieces(data: np.ndarray, name: str, path: pathlib.Path):
    """Return a reader of a zstd frame: each call gives so many of its bytes; 0 asserts its end."""
    pyarrow = _pyarrow()
    stream = pyarrow.CompressedInputStream(pyarrow.BufferReader(pyarrow.py_buffer(data)), "zstd")

    def read(count: int) -> np.ndarray:
        with _explained(name, path):
            piece = stream.read(count or 1)
        if len(piece) != count:
            raise ValueError(f"{name} in {path} has another size than the model's: copy it again.")
        return np.frombuffer(piece, np.uint8)

    return read


@contextlib.contextmanager
def _explained(name: str, path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"{name} in {path} is no zstd frame ({error}): copy it again.") from error


def _codec():
    return _pyarrow().Codec("zstd", compression_level=_LEVEL)


def _pyarrow():
    try:
        import pyarrow
    except ImportError as error:
        raise ValueError(
            f"{FORMAT} is compressed with zstd, for which pyarrow is needed: pip install pyarrow."
        ) from error
    return pyarrow


class _Hashed:
    """SHA-256 and Adler-32 of bytes that come one after another."""

    def __init__(self):
        self._sha256, self._adler32 = hashlib.sha256(), 1

    def update(self, bits: np.ndarray) -> None:
        data = memoryview(bits.view(np.uint8))
        self._sha256.update(data)
        self._adler32 = zlib.adler32(data, self._adler32)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    @property
    def adler32(self) -> str:
        return f"{self._adler32:08x}"
