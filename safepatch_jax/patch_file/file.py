"""The patch file: where a patched model differs from its backbone, bit for bit, in one small
safetensors file.

For each changed tensor the file holds the positions of its changed entries and the exclusive or
(XOR) of their storage bits before and after, so one operation goes both ways and is exact for every
bit pattern. The manifest in its header has the SHA-256 of every tensor before and after.
docs/patch_file.md has the format byte by byte. Needs no JAX.
"""

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
from typing import Any

import numpy as np
from safetensors import safe_open

from safepatch_jax import __version__
from safepatch_jax.io.folder import Checkpoint
from safepatch_jax.io.safetensors_file import list_tensors
from safepatch_jax.io.stored import Stored
from safepatch_jax.patch_file import positions as coding
from safepatch_jax.runtime import files
from safepatch_jax.runtime.console import progress, some
from safepatch_jax.runtime.workers import Workers, wait

FORMAT = 1
KINDS = ("difference", "scaled", "combined")
BITS = {"float32": np.dtype("<u4"), "bfloat16": np.dtype("<u2"), "float16": np.dtype("<u2")}
RUN = 1 << 18  # elements of a tensor that are held at a time
_CODES = {
    np.dtype("<u4"): "U32",
    np.dtype("<u2"): "U16",
    np.dtype("u1"): "U8",
}  # in the order of the file: all are aligned
_KEY = "safepatch"
_POSITIONS, _BITS = ".positions", ".bits"


@dataclasses.dataclass(frozen=True)
class TensorPatch:
    """What a patch says of one tensor.

    Attributes:
      dtype, shape: as stored in the model folder.
      entries: how many change; 0 if the tensor stays as it is.
      before, after: SHA-256 of its bytes in the backbone and in the patched model.
      optional: a folder may lack it (a copy or a buffer that exports leave out).
      positions, bits: where the patch file holds them; None without entries.
    """

    dtype: str
    shape: tuple[int, ...]
    entries: int
    before: str
    after: str
    optional: bool = False
    positions: Stored | None = None
    bits: Stored | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class PatchFile:
    """A patch file, opened: `tensors` by name, `kind`, `about` (what its maker recorded) and
    `versions`.

    Raises:
      ValueError: not a patch file, another format, truncated, damaged, or content that contradicts
        itself. All of it is checked here, before anything is done with it.
    """

    def __init__(self, path: str | pathlib.Path):
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise ValueError(f"No patch file '{path}'.")
        stored = list_tensors(self.path)
        with safe_open(self.path, framework="np") as file:
            text = (file.metadata() or {}).get(_KEY)
        if text is None:
            raise ValueError(
                f"{path} is a safetensors file but no patch: its header has no '{_KEY}'. Make one "
                "with "
                "python -m launch.patch create."
            )
        try:
            manifest = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._damaged(f"its manifest is not valid JSON ({error})") from error
        if (
            not isinstance(manifest, dict)
            or manifest.get("format") != FORMAT
            or manifest.get("kind") not in KINDS
        ):
            raise self._damaged(
                f"it is not of format {FORMAT} and one of the kinds {', '.join(KINDS)}, known here"
            )
        self.kind: str = manifest["kind"]
        self.about: dict[str, Any] = manifest.get("about")
        self.versions: dict[str, Any] = manifest.get("versions")
        listed = manifest.get("tensors")
        if not all(isinstance(x, dict) for x in (self.about, self.versions, listed)):
            raise self._damaged("its manifest lacks about, versions or tensors")
        self.tensors = {
            name: self._read_tensor(name, entry, stored) for name, entry in listed.items()
        }
        if stored:
            raise self._damaged(
                "it holds more than its manifest lists: "
                f"{some([ascii(name) for name in stored], ', ')}"
            )
        if not self.changed():
            raise self._damaged("it changes nothing")
        for name in self.changed():
            for _ in self._chunks(name):
                pass

    def changed(self) -> list[str]:
        """Return the names of the tensors that the patch changes."""
        return [name for name, x in self.tensors.items() if x.entries]

    def entries(self) -> int:
        """Return how many entries the patch changes."""
        return sum(x.entries for x in self.tensors.values())

    def runs(self, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield, for each RUN elements of a tensor in turn, the positions within them and the XOR
        of the bits there."""
        tensor, chunks, bits = (
            self.tensors[name],
            self._chunks(name),
            BITS[self.tensors[name].dtype],
        )
        where, what = np.empty(0, np.int64), np.empty(0, bits)
        for start in range(0, tensor.size, RUN):
            while not len(where) or where[-1] < start + RUN:
                if (chunk := next(chunks, None)) is None:
                    break
                where, what = np.append(where, chunk[0]), np.append(what, chunk[1])
            count = np.searchsorted(where, start + RUN)
            yield where[:count] - start, what[:count]
            where, what = where[count:], what[count:]

    def _chunks(self, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield positions in the tensor and XOR bits, checked, in the order and sizes in which they
        are read."""
        tensor = self.tensors[name]
        read, count, last = 0, 0, -1
        while tensor.entries and read < tensor.positions.size:
            data = tensor.positions.read(
                np.empty(min(RUN, tensor.positions.size - read), np.uint8), read
            )
            try:
                where, used = coding.decode(data, last)
            except ValueError as error:
                raise self._damaged(f"{name}: {error}") from error
            if not used:
                raise self._damaged(f"{name}: its positions end within a position")
            read, last = read + used, int(where[-1])
            if last >= tensor.size or count + len(where) > tensor.entries:
                raise self._damaged(
                    f"{name}: a position is outside the tensor, or there are more than "
                    f"{tensor.entries:,}"
                )
            what = tensor.bits.read(np.empty(len(where), BITS[tensor.dtype]), count)
            count += len(where)
            if not np.all(what):
                raise self._damaged(f"{name}: an entry changes no bit")
            yield where, what
        if count != tensor.entries:
            raise self._damaged(f"{name}: {count:,} positions for {tensor.entries:,} entries")

    def _read_tensor(self, name: str, entry: Any, stored: dict[str, Stored]) -> TensorPatch:
        """Check what the manifest says of a tensor, and take what belongs to it out of `stored`."""
        entry = entry if isinstance(entry, dict) else {}
        try:
            x = TensorPatch(**entry | {"shape": tuple(entry["shape"])})
        except (KeyError, TypeError) as error:
            raise self._damaged(
                f"its manifest describes {ascii(name)} in an unknown way ({error!r})"
            ) from error
        whole = [*x.shape, x.entries]
        sound = (
            name.isprintable()
            and x.positions is None
            and x.bits is None
            and isinstance(x.dtype, str)
            and x.dtype in BITS
            and all(type(n) is int and 0 <= n <= coding.LIMIT for n in whole)
            and len(x.shape) <= 8
            and x.entries <= x.size <= coding.LIMIT
            and type(x.optional) is bool
            and all(
                isinstance(h, str) and len(h) == 64 and set(h) <= set("0123456789abcdef")
                for h in (x.before, x.after)
            )
            and (x.before == x.after) == (not x.entries)
        )
        if not sound:
            raise self._damaged(
                f"its manifest describes {ascii(name)} in a way that cannot be: {entry!r:.300}"
            )
        if not x.entries:
            return x
        positions, bits = stored.pop(name + _POSITIONS, None), stored.pop(name + _BITS, None)
        code = _CODES[BITS[x.dtype]]
        if (
            positions is None
            or bits is None
            or (positions.dtype, bits.dtype, bits.shape) != ("U8", code, (x.entries,))
            or (len(positions.shape) != 1)
        ):
            raise self._damaged(
                f"{name}: positions as U8 and {x.entries:,} bits as {code} are not both there"
            )
        return dataclasses.replace(x, positions=positions, bits=bits)

    def _damaged(self, what: str) -> ValueError:
        return ValueError(
            f"The patch file {self.path} cannot be used: {what}. It is damaged or of another "
            "version; copy it "
            "again or make it anew."
        )


@dataclasses.dataclass(frozen=True)
class Change:
    """A tensor to be written into a patch: `runs` yields its storage bits (before, after), RUN
    elements at a time."""

    dtype: str
    shape: tuple[int, ...]
    runs: Iterable[tuple[np.ndarray, np.ndarray]]
    optional: bool = False


def write_patch(
    path: str | pathlib.Path, kind: str, about: Mapping[str, Any], changes: Mapping[str, Change]
) -> PatchFile:
    """Write a patch file; it appears whole or not at all, and the same input gives the same bytes.

    Args:
      path: must not exist.
      kind: one of KINDS.
      about: for the manifest, JSON.
      changes: every tensor of the model, changed or not, by name.

    Raises:
      ValueError: nothing changes, `about` is not JSON, or `path` exists.
    """
    about, listed, header = _json(about), {}, {}
    total = sum(math.prod(x.shape) * BITS[x.dtype].itemsize for x in changes.values())
    with _explained(path), files.new_file(path) as out, contextlib.ExitStack() as stack:
        pool, bar = (
            stack.enter_context(Workers(2)),
            stack.enter_context(progress(total, "compare", "B")),
        )
        # The header comes first and needs the sizes of what follows.
        spools = {
            bits: stack.enter_context(tempfile.TemporaryFile(dir=pathlib.Path(path).parent))
            for bits in _CODES
        }
        for name in sorted(changes):
            change, bits = changes[name], BITS[changes[name].dtype]
            begins = {x: spools[x].tell() for x in (bits, np.dtype("u1"))}
            digests = hashlib.sha256(), hashlib.sha256()
            entries, start, last = 0, 0, -1
            for run in change.runs:
                hashing = [
                    pool.submit(digest.update, memoryview(x.view(np.uint8)))
                    for digest, x in zip(digests, run)
                ]
                different = run[0] ^ run[1]
                where = np.flatnonzero(different)
                if len(where):
                    spools[bits].write(different[where])
                    spools[np.dtype("u1")].write(coding.encode(where + start, last))
                    entries, last = entries + len(where), int(where[-1]) + start
                start += len(run[0])
                for future in hashing:
                    wait(future)
                bar.update(run[0].nbytes)
            listed[name] = {
                "dtype": change.dtype,
                "shape": list(change.shape),
                "entries": entries,
                "before": digests[0].hexdigest(),
                "after": digests[1].hexdigest(),
            }
            listed[name] |= {"optional": True} if change.optional else {}
            if entries:
                for dtype, suffix in ((bits, _BITS), (np.dtype("u1"), _POSITIONS)):
                    header[name + suffix] = (dtype, begins[dtype], spools[dtype].tell())
        if not header:
            raise ValueError(
                "The two models are equal, bit for bit, so there is nothing to write a patch of. "
                "If they "
                "should differ: were the changes lost in the cast to the storage dtype "
                "(export.rounding)?"
            )
        _write_whole(
            out,
            header,
            spools,
            {
                "format": FORMAT,
                "kind": kind,
                "about": about,
                "versions": _versions(),
                "tensors": listed,
            },
        )
    return PatchFile(path)


@contextlib.contextmanager
def _explained(path: str | pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"Cannot make the patch file {path}: {error}. Free space or give another place."
        ) from error


def _write_whole(
    out, header: Mapping[str, tuple], spools: Mapping[np.dtype, Any], manifest: Mapping[str, Any]
) -> None:
    offsets, end = {}, 0
    for dtype, spool in spools.items():
        offsets[dtype], end = end, end + spool.tell()
    text = {"__metadata__": {_KEY: json.dumps(manifest, separators=(",", ":"))}}
    for name, (dtype, begin, stop) in sorted(
        header.items(), key=lambda item: offsets[item[1][0]] + item[1][1]
    ):
        text[name] = {
            "dtype": _CODES[dtype],
            "shape": [(stop - begin) // dtype.itemsize],
            "data_offsets": [offsets[dtype] + begin, offsets[dtype] + stop],
        }
    data = json.dumps(text, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 8)
    out.write(len(data).to_bytes(8, "little") + data)
    for spool in spools.values():
        spool.seek(0)
        shutil.copyfileobj(spool, out, 1 << 20)


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
    stands_for = {name: name for name in before if name in after}
    problems = [f"{name} is in {model} alone" for name in after if name not in before]
    for name in before:
        if name not in after and (stand_in := _stand_in(name, before, after)) is None:
            problems.append(f"{name} is in {base} alone")
        elif name not in after:
            stands_for[name] = stand_in
    for name in stands_for.keys() & after.keys():
        if before[name].shape != after[name].shape:
            problems.append(
                f"{name} has shape {before[name].shape} in {base}, {after[name].shape} in {model}"
            )
    problems += [
        f"{name} has dtype {x.dtype}, supported are {', '.join(BITS)}"
        for name, x in before.items()
        if x.dtype not in BITS
    ]
    cast = [
        name for name in stands_for.keys() & after.keys() if before[name].dtype != after[name].dtype
    ]
    if cast:
        problems.append(
            f"{len(cast)} tensors have another dtype ({cast[0]}: {before[cast[0]].dtype}, "
            f"{after[cast[0]].dtype}); a patch holds differences of bits, so export with "
            "export.dtype=keep "
            "(launch.convert --dtype=keep)"
        )
    if problems:
        raise ValueError(f"No patch leads from {base} to {model}: {some(problems)}.")

    def runs(name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        other = stands_for[name]
        return zip(
            runs_of(before[name]), runs_of(after[other] if other in after else before[other])
        )

    return write_patch(
        out,
        "difference",
        about or {},
        {
            name: Change(x.dtype, x.shape, runs(name), optional=name not in after)
            for name, x in before.items()
        },
    )


def _stand_in(name: str, before: Mapping[str, Stored], after: Mapping[str, Stored]) -> str | None:
    """Return whose change a tensor shares that the patched model left out; None if there is no
    saying."""
    if name.endswith("rotary_emb.inv_freq"):
        return name
    x = before[name]
    alike = [
        n for n, y in before.items() if n in after and (y.dtype, y.shape) == (x.dtype, x.shape)
    ]
    return next((n for n in alike if before[n].sha256() == x.sha256()), None)


def runs_of(tensor: Stored) -> Iterator[np.ndarray]:
    """Yield the storage bits of a tensor, RUN elements at a time."""
    size = math.prod(tensor.shape)
    for start in range(0, size, RUN):
        yield tensor.read(np.empty(min(RUN, size - start), BITS[tensor.dtype]), start)


def inspect(path: str | pathlib.Path) -> list[str]:
    """Return lines that describe a patch file: what it changes, what it was made from, and each
    changed tensor.

    Raises:
      ValueError: see PatchFile.
    """
    patch = PatchFile(path)
    size, entries, total = (
        patch.path.stat().st_size,
        patch.entries(),
        sum(x.size for x in patch.tensors.values()),
    )
    lines = [
        f"{path}: {patch.kind}, format {FORMAT}, SHA-256 {files.file_sha256(path)}",
        f"changes {entries:,} of {total:,} entries ({entries / total:.3%}) in "
        f"{len(patch.changed())} of "
        f"{len(patch.tensors)} tensors",
        f"{size:,} bytes: {size / entries:.2f} a changed entry",
        *(
            f"{ascii(key)[1:-1]}: {text if len(text) <= 400 else text[:400] + ' ...'}"
            for key, text in (
                (key, json.dumps(value))
                for key, value in {**patch.about, "versions": patch.versions}.items()
            )
        ),
    ]
    width = max(map(len, patch.changed()))
    for name in patch.changed():
        x = patch.tensors[name]
        lines.append(
            f"  {name:{width}}  {x.dtype:8}  {str(list(x.shape)):16}  {x.entries:>12,}  "
            f"{x.entries / x.size:8.3%}"
        )
    return lines


def _json(about: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(about), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"What a patch file records must be JSON without NaN and infinities: {error}."
        ) from error


def _versions() -> dict[str, str]:
    return {"safepatch_jax": __version__, "python": platform.python_version()} | {
        package: importlib.metadata.version(package) for package in ("numpy", "safetensors")
    }
