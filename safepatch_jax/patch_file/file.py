"""The patch file: where a patched model differs from its backbone, bit for bit, in one small
safetensors file.

For each changed tensor the file holds the positions of its changed entries and their flips: the
exclusive or (XOR) of the storage bits before and after, so one operation goes both ways and is
exact for every bit pattern. The manifest in its header has the SHA-256 of every tensor before and
after. docs/patch_file.md has the format byte by byte; create.py writes it. Needs no JAX.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from safetensors import safe_open

from safepatch_jax.io.safetensors_file import list_tensors
from safepatch_jax.io.stored import Stored
from safepatch_jax.patch_file import positions as coding
from safepatch_jax.runtime import files
from safepatch_jax.runtime.console import some
from safepatch_jax.runtime.paths import readable

FORMAT = 1
REBASED = "rebased"  # kind of a patch that was written for another model, see `rebase`
KINDS = ("difference", "scaled", "combined", REBASED)
BITS = {"float32": np.dtype("<u4"), "bfloat16": np.dtype("<u2"), "float16": np.dtype("<u2")}
BYTES = np.dtype("u1")
# How safetensors calls the dtypes of flips and of coded positions, in the order in which the file
# holds them: all are aligned then.
CODES = {np.dtype("<u4"): "U32", np.dtype("<u2"): "U16", BYTES: "U8"}
KEY = "safepatch"  # of the manifest in the header
POSITIONS_SUFFIX, BITS_SUFFIX = ".positions", ".bits"
RUN = 1 << 18  # elements of a tensor that are held at a time
_HEX = set("0123456789abcdef")


@dataclasses.dataclass(frozen=True)
class TensorPatch:
    """What a patch says of one tensor.

    Attributes:
      dtype, shape: as stored in the model folder.
      entries: how many change; 0 if the tensor stays as it is.
      before, after: SHA-256 of its bytes in the backbone and in the patched model.
      optional: a folder may lack it (a copy or a buffer that exports leave out).
      positions, bits: where the patch file holds positions and flips; None without entries.
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

    Args:
      path: of the file.
      known: its bytes are those of a file that was checked before, as its hash says: positions and
        flips are then checked as they are read.

    Raises:
      ValueError: not a patch file, another format, truncated, damaged, or content that contradicts
        itself. All of it is checked here, before anything is done with it.
    """

    def __init__(self, path: str | pathlib.Path, known: bool = False):
        self.path = pathlib.Path(readable(path))
        if not self.path.is_file():
            raise ValueError(f"No patch file '{path}'.")
        stored = list_tensors(self.path)
        manifest = self._manifest()
        self.kind: str = manifest["kind"]
        self.about: dict[str, Any] = manifest.get("about")
        self.versions: dict[str, Any] = manifest.get("versions")
        entries = manifest.get("tensors")
        if not all(isinstance(x, dict) for x in (self.about, self.versions, entries)):
            raise self._damaged("its manifest lacks about, versions or tensors")
        self.tensors: dict[str, TensorPatch] = {}
        for name, entry in entries.items():
            self.tensors[name] = self._tensor(name, entry, stored)
        if stored:
            extra = some([ascii(name) for name in stored], ", ")
            raise self._damaged(f"it holds more than its manifest lists: {extra}")
        if not self.changed():
            raise self._damaged("it changes nothing")
        for name in () if known else self.changed():
            for _ in self.chunks(name):
                pass  # reading is what checks them

    def changed(self) -> list[str]:
        """Return the names of the tensors that the patch changes."""
        return [name for name, tensor in self.tensors.items() if tensor.entries]

    def entries(self) -> int:
        """Return how many entries the patch changes."""
        return sum(tensor.entries for tensor in self.tensors.values())

    def runs(self, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield, for each RUN elements of a tensor in turn, the changed positions within them and
        the flips there."""
        tensor, chunks = self.tensors[name], self.chunks(name)
        positions, flips = np.empty(0, np.int64), np.empty(0, BITS[tensor.dtype])
        for start in range(0, tensor.size, RUN):
            stop = start + RUN
            while not len(positions) or positions[-1] < stop:
                chunk = next(chunks, None)
                if chunk is None:
                    break
                positions, flips = np.append(positions, chunk[0]), np.append(flips, chunk[1])
            count = np.searchsorted(positions, stop)
            yield positions[:count] - start, flips[:count]
            positions, flips = positions[count:], flips[count:]

    def chunks(self, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield positions in the tensor and flips, checked, in the order and sizes in which they
        are read."""
        tensor = self.tensors[name]
        offset, count, last = 0, 0, -1
        while tensor.entries and offset < tensor.positions.size:
            size = min(RUN, tensor.positions.size - offset)
            data = tensor.positions.read(np.empty(size, np.uint8), offset)
            try:
                positions, used = coding.decode(data, last)
            except ValueError as error:
                raise self._damaged(f"{name}: {error}") from error
            if not used:
                raise self._damaged(f"{name}: its positions end within a position")
            offset, last = offset + used, int(positions[-1])
            if last >= tensor.size or count + len(positions) > tensor.entries:
                raise self._damaged(
                    f"{name}: a position is outside the tensor, or there are more than "
                    f"{tensor.entries:,}"
                )
            flips = tensor.bits.read(np.empty(len(positions), BITS[tensor.dtype]), count)
            count += len(positions)
            if not np.all(flips):
                raise self._damaged(f"{name}: an entry changes no bit")
            yield positions, flips
        if count != tensor.entries:
            raise self._damaged(f"{name}: {count:,} positions for {tensor.entries:,} entries")

    def _manifest(self) -> dict[str, Any]:
        """Read the manifest; of its values only format and kind are checked."""
        with safe_open(self.path, framework="np") as file:
            text = (file.metadata() or {}).get(KEY)
        if text is None:
            raise ValueError(
                f"{self.path} is a safetensors file but no patch: its header has no '{KEY}'. Make "
                "one with python -m launch.patch create."
            )
        try:
            manifest = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._damaged(f"its manifest is not valid JSON ({error})") from error
        known = isinstance(manifest, dict) and manifest.get("format") == FORMAT
        if not known or manifest.get("kind") not in KINDS:
            raise self._damaged(
                f"it is not of format {FORMAT} and one of the kinds {', '.join(KINDS)}, known here"
            )
        return manifest

    def _tensor(self, name: str, entry: Any, stored: dict[str, Stored]) -> TensorPatch:
        """Check what the manifest says of a tensor, and move what belongs to it out of `stored`."""
        entry = entry if isinstance(entry, dict) else {}
        try:
            tensor = TensorPatch(**entry | {"shape": tuple(entry["shape"])})
        except (KeyError, TypeError) as error:
            raise self._damaged(
                f"its manifest describes {ascii(name)} in an unknown way ({error!r})"
            ) from error
        if not name.isprintable() or not _possible(tensor):
            raise self._damaged(
                f"its manifest describes {ascii(name)} in a way that cannot be: {entry!r:.300}"
            )
        if not tensor.entries:
            return tensor
        positions = stored.pop(name + POSITIONS_SUFFIX, None)
        bits = stored.pop(name + BITS_SUFFIX, None)
        code = CODES[BITS[tensor.dtype]]
        if not _is_vector(positions, "U8") or not _is_vector(bits, code, tensor.entries):
            raise self._damaged(
                f"{name}: positions as U8 and {tensor.entries:,} bits as {code} are not both there"
            )
        return dataclasses.replace(tensor, positions=positions, bits=bits)

    def _damaged(self, reason: str) -> ValueError:
        return ValueError(
            f"The patch file {self.path} cannot be used: {reason}. It is damaged or of another "
            "version; copy it again or make it anew."
        )


def _possible(tensor: TensorPatch) -> bool:
    """Return whether a manifest's values, which may be anything that JSON holds, can be those of a
    tensor."""
    if tensor.positions is not None or tensor.bits is not None:
        return False  # they are found in the file, not named by the manifest
    if not isinstance(tensor.dtype, str) or tensor.dtype not in BITS:
        return False
    for number in (*tensor.shape, tensor.entries):
        if type(number) is not int or not 0 <= number <= coding.LIMIT:
            return False
    if len(tensor.shape) > 8 or not tensor.entries <= tensor.size <= coding.LIMIT:
        return False
    for digest in (tensor.before, tensor.after):
        if not isinstance(digest, str) or len(digest) != 64 or not set(digest) <= _HEX:
            return False
    unchanged = tensor.before == tensor.after
    return type(tensor.optional) is bool and unchanged == (not tensor.entries)


def _is_vector(stored: Stored | None, code: str, size: int | None = None) -> bool:
    """Return whether there is a tensor of one axis with this dtype (and size)."""
    if stored is None or stored.dtype != code or len(stored.shape) != 1:
        return False
    return size is None or stored.shape == (size,)


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
    changed, entries = patch.changed(), patch.entries()
    size = patch.path.stat().st_size
    total = sum(tensor.size for tensor in patch.tensors.values())
    lines = [
        f"{path}: {patch.kind}, format {FORMAT}, SHA-256 {files.file_sha256(path)}",
        f"changes {entries:,} of {total:,} entries ({entries / total:.3%}) in {len(changed)} of "
        f"{len(patch.tensors)} tensors",
        f"{size:,} bytes: {size / entries:.2f} a changed entry",
    ]
    for key, value in {**patch.about, "versions": patch.versions}.items():
        text = json.dumps(value)
        shown = text if len(text) <= 400 else f"{text[:400]} ..."
        lines.append(f"{ascii(key)[1:-1]}: {shown}")
    width = max(map(len, changed))
    for name in changed:
        tensor = patch.tensors[name]
        lines.append(
            f"  {name:{width}}  {tensor.dtype:8}  {list(tensor.shape)!s:16}  "
            f"{tensor.entries:>12,}  {tensor.entries / tensor.size:8.3%}"
        )
    return lines
