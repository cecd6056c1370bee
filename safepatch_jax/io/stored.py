"""A tensor as it lies in a file: row-major bytes at an offset.

A run of elements is read by itself; a part that is no run is copied out of a map of the tensor,
which is closed when the part is there. safetensors and GGUF differ only in where they write the
offset down; for torch's files, see `torch_file`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import mmap
import os
import pathlib

# JAX depends on it; it gives NumPy bfloat16, so that files are read and written without JAX
import ml_dtypes
import numpy as np

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
_PIECE_BYTES = 1 << 24  # read at a time for a hash


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor lies.

    Attributes:
      path: the file.
      offset: of its first byte in the file.
      shape: sizes, row-major.
      dtype: float32, bfloat16 or float16; or, for what we cannot use, the name that the file gives
        it.
      size: bytes in the file.
    """

    path: pathlib.Path
    offset: int
    shape: tuple[int, ...]
    dtype: str
    size: int

    def read(self, out: np.ndarray | None = None, start: int = 0) -> np.ndarray:
        """Read a run of elements, those bytes alone.

        Args:
          out: C-contiguous array of the tensor's dtype to fill; by default a new one for the whole
            tensor.
          start: flat index of the first element.

        Raises:
          ValueError: the file ends too early (it was changed or truncated meanwhile).
        """
        out = aligned_empty(self.shape, DTYPES[self.dtype]) if out is None else out
        self._fill(memoryview(out.reshape(-1).view(np.uint8)), self.offset + start * out.itemsize)
        return out

    def read_box(self, index: tuple[slice, ...], split: tuple[int, ...]) -> np.ndarray:
        """Read a part that is no run of elements, copying that part alone out of a map of the file.

        Args:
          index: one slice for each dimension of `split`.
          split: the shape under which the tensor is cut, with as many elements.
        """
        page = self.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        with open(self.path, "rb") as file:
            # A map beyond the end of the file would kill the process.
            if os.fstat(file.fileno()).st_size < self.offset + self.size:
                raise self._truncated()
            length = self.offset + self.size - page
            with mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=page) as view:
                count = math.prod(self.shape)
                whole = np.frombuffer(view, DTYPES[self.dtype], count, self.offset - page)
                part = whole.reshape(split)[index].copy()
                del whole  # the map cannot be closed while an array looks at it
        return part

    def sha256(self) -> str:
        """Return the SHA-256 of the tensor's bytes, in hex; reads the file in pieces."""
        digest = hashlib.sha256()
        piece = np.empty(min(self.size, _PIECE_BYTES), np.uint8)
        for start in range(0, self.size, _PIECE_BYTES):
            part = memoryview(piece)[: self.size - start]
            self._fill(part, self.offset + start)
            digest.update(part)
        return digest.hexdigest()

    def _fill(self, buffer: memoryview, offset: int) -> None:
        with open(self.path, "rb", buffering=0) as file:
            done = 0
            while done < len(buffer):
                count = os.preadv(file.fileno(), [buffer[done:]], offset + done)
                if not count:
                    raise self._truncated()
                done += count

    def _truncated(self) -> ValueError:
        return ValueError(
            f"{self.path} ends before byte {self.offset + self.size:,}, where a tensor of its "
            "list ends: it is truncated or was changed while it was read. Copy or download it "
            "again."
        )


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype, alignment: int = 64) -> np.ndarray:
    """Return an uninitialised array whose first byte is aligned, so that JAX on CPU takes it over
    without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + size].view(dtype).reshape(shape)
