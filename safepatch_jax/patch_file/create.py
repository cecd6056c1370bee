"""Writing patch files: the difference of two model folders, or any changes of storage bits; no
JAX."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import pathlib
import platform
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any

import numpy as np

from safepatch_jax import __version__
from safepatch_jax.io.folder import Checkpoint
from safepatch_jax.io.stored import Stored
from safepatch_jax.patch_file import positions as coding
from safepatch_jax.patch_file.file import (
    BITS,
    BITS_SUFFIX,
    BYTES,
    CODES,
    FORMAT,
    KEY,
    POSITIONS_SUFFIX,
    PatchFile,
    runs_of,
)
from safepatch_jax.runtime import files
from safepatch_jax.runtime.console import progress, some
from safepatch_jax.runtime.workers import Workers, wait


@dataclasses.dataclass(frozen=True)
class Change:
    """A tensor to be written into a patch: `runs` yields its storage bits (before, after), RUN
    elements at a time."""

    dtype: str
    shape: tuple[int, ...]
    runs: Iterable[tuple[np.ndarray, np.ndarray]]
    optional: bool = False


def create(
    base: str | pathlib.Path,
    model: str | pathlib.Path,
    out: str | pathlib.Path,
    about: Mapping[str, Any] | None = None,
) -> PatchFile:
    """Write the patch that turns one model folder into another.

    A tensor that `model` leaves out may be missing there if it is a rotary frequency, which stays,
    or a bitwise copy of another tensor (a tied head written again), which then changes as that one
    does.

    Args:
      base: the backbone's folder.
      model: the patched model's folder.
      out: the patch file; must not exist.
      about: recorded in the manifest, JSON: settings, seed, data (hashes), versions, statistics.

    Returns:
      the patch file, opened and checked.

    Raises:
      ValueError: names, shapes or dtypes differ, the folders are equal, or `out` exists.
    """
    before, after = Checkpoint(base).tensors, Checkpoint(model).tensors
    stand_ins = {name: name for name in before if name in after}
    problems = [f"{name} is in {model} alone" for name in after if name not in before]
    for name in before:
        if name not in after:
            stand_in = _stand_in(name, before, after)
            if stand_in is None:
                problems.append(f"{name} is in {base} alone")
            else:
                stand_ins[name] = stand_in
    problems += _unlike(base, model, before, after)
    if problems:
        raise ValueError(f"No patch leads from {base} to {model}: {some(problems)}.")
    changes = {}
    for name, tensor in before.items():
        changed = after.get(stand_ins[name], before[stand_ins[name]])
        runs = zip(runs_of(tensor), runs_of(changed))
        changes[name] = Change(tensor.dtype, tensor.shape, runs, optional=name not in after)
    return write_patch(out, "difference", about or {}, changes)


def _stand_in(name: str, before: Mapping[str, Stored], after: Mapping[str, Stored]) -> str | None:
    """Return whose change a tensor shares that the patched model left out; None if there is no
    such tensor."""
    if name.endswith("rotary_emb.inv_freq"):
        return name
    tensor = before[name]
    for other, candidate in before.items():
        alike = (candidate.dtype, candidate.shape) == (tensor.dtype, tensor.shape)
        if other in after and alike and candidate.sha256() == tensor.sha256():
            return other
    return None


def _unlike(
    base: str | pathlib.Path,
    model: str | pathlib.Path,
    before: Mapping[str, Stored],
    after: Mapping[str, Stored],
) -> list[str]:
    """List the tensors that are in both folders with different shapes or dtypes, or in a dtype that
    patches do not have."""
    problems, cast = [], []
    for name, tensor in before.items():
        other = after.get(name, tensor)
        if tensor.shape != other.shape:
            problems.append(f"{name} has shape {tensor.shape} in {base}, {other.shape} in {model}")
        if tensor.dtype not in BITS:
            problems.append(f"{name} has dtype {tensor.dtype}, supported are {', '.join(BITS)}")
        if tensor.dtype != other.dtype:
            cast.append(f"{name}: {tensor.dtype}, {other.dtype}")
    if cast:
        problems.append(
            f"{len(cast)} tensors have another dtype ({cast[0]}); a patch holds differences of "
            "bits, so export with export.dtype=keep (launch.convert --dtype=keep)"
        )
    return problems


def write_patch(
    path: str | pathlib.Path,
    kind: str,
    about: Mapping[str, Any],
    changes: Mapping[str, Change],
    versions: Mapping[str, Any] | None = None,
) -> PatchFile:
    """Write a patch file; it appears whole or not at all, and the same input gives the same bytes.

    Args:
      path: must not exist.
      kind: one of KINDS.
      about: for the manifest, JSON.
      changes: every tensor of the model, changed or not, by name.
      versions: of what the patch was made with, JSON; by default what runs now.

    Raises:
      ValueError: nothing changes, `about` is not JSON, or `path` exists.
    """
    manifest = {
        "format": FORMAT,
        "kind": kind,
        "about": _json(about),
        "versions": _versions() if versions is None else dict(versions),
        "tensors": {},
    }
    total = sum(math.prod(x.shape) * BITS[x.dtype].itemsize for x in changes.values())
    with _explained(path), files.new_file(path) as out, contextlib.ExitStack() as stack:
        contents = _Contents(pathlib.Path(path).parent, stack)
        pool = stack.enter_context(Workers(2))
        bar = stack.enter_context(progress(total, "compare", "B"))
        for name in sorted(changes):
            manifest["tensors"][name] = contents.add(name, changes[name], pool, bar)
        if not contents.spans:
            raise ValueError(
                "The two models are equal, bit for bit, so there is nothing to write a patch of. "
                "If they should differ: were the changes lost in the cast to the storage dtype "
                "(export.rounding)?"
            )
        contents.write(out, manifest)
    return PatchFile(path)


class _Contents:
    """Positions and flips of all tensors, in temporary files: the header comes before them and
    needs their sizes.

    Attributes:
      spans: {name in the file: (dtype, first byte, byte after the last one)}, bytes within the
        temporary file of that dtype.
    """

    def __init__(self, folder: pathlib.Path, stack: contextlib.ExitStack):
        self.spans: dict[str, tuple[np.dtype, int, int]] = {}
        self._spools: dict[np.dtype, IO[bytes]] = {}
        for dtype in CODES:
            self._spools[dtype] = stack.enter_context(tempfile.TemporaryFile(dir=folder))

    def add(self, name: str, change: Change, pool: Workers, bar) -> dict[str, Any]:
        """Compare a tensor before and after; return its entry in the manifest."""
        bits = BITS[change.dtype]
        begins = {dtype: self._spools[dtype].tell() for dtype in (bits, BYTES)}
        digests = hashlib.sha256(), hashlib.sha256()
        entries, start, last = 0, 0, -1
        for before, after in change.runs:
            hashing = []  # in other threads, while the two are compared
            for digest, x in zip(digests, (before, after)):
                hashing.append(pool.submit(digest.update, memoryview(x.view(np.uint8))))
            flips = before ^ after
            positions = np.flatnonzero(flips)
            if len(positions):
                self._spools[bits].write(flips[positions])
                self._spools[BYTES].write(coding.encode(positions + start, last))
                entries, last = entries + len(positions), int(positions[-1]) + start
            start += len(before)
            for future in hashing:
                wait(future)
            bar.update(before.nbytes)
        if entries:
            for dtype, suffix in ((bits, BITS_SUFFIX), (BYTES, POSITIONS_SUFFIX)):
                self.spans[name + suffix] = dtype, begins[dtype], self._spools[dtype].tell()
        entry = {
            "dtype": change.dtype,
            "shape": list(change.shape),
            "entries": entries,
            "before": digests[0].hexdigest(),
            "after": digests[1].hexdigest(),
        }
        if change.optional:
            entry["optional"] = True
        return entry

    def write(self, out: IO[bytes], manifest: Mapping[str, Any]) -> None:
        """Write the header and all that was added, as a safetensors file."""
        offsets, end = {}, 0
        for dtype, spool in self._spools.items():
            offsets[dtype], end = end, end + spool.tell()
        header: dict[str, Any] = {}
        for name, (dtype, begin, stop) in self.spans.items():
            header[name] = {
                "dtype": CODES[dtype],
                "shape": [(stop - begin) // dtype.itemsize],
                "data_offsets": [offsets[dtype] + begin, offsets[dtype] + stop],
            }
        by_offset = sorted(header.items(), key=lambda item: item[1]["data_offsets"][0])
        metadata = {KEY: json.dumps(manifest, separators=(",", ":"))}
        text = json.dumps({"__metadata__": metadata, **dict(by_offset)}, separators=(",", ":"))
        data = text.encode()
        data += b" " * (-len(data) % 8)
        out.write(len(data).to_bytes(8, "little") + data)
        for spool in self._spools.values():
            spool.seek(0)
            shutil.copyfileobj(spool, out, 1 << 20)


@contextlib.contextmanager
def _explained(path: str | pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"Cannot make the patch file {path}: {error}. Free space or give another place."
        ) from error


def _json(about: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(about), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"What a patch file records must be JSON without NaN and infinities: {error}."
        ) from error


def _versions() -> dict[str, str]:
    versions = {"safepatch_jax": __version__, "python": platform.python_version()}
    for package in ("numpy", "safetensors"):
        versions[package] = importlib.metadata.version(package)
    return versions
