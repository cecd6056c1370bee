"""torch's weight files (`.bin`): torch reads them, weights alone, mapped and not loaded.

Such a file is a pickle, which is a program; torch's own reader of weights runs nothing in it. torch
is an optional dependency and is imported here alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import re
import types
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np

from safepatch_jax.io.stored import DTYPES, aligned_empty
from safepatch_jax.runtime.console import some
from safepatch_jax.runtime.reading import reading

if TYPE_CHECKING:
    import torch

# Before it, a hostile file could run code or corrupt memory in spite of weights_only=True
# (CVE-2025-32434, CVE-2026-24747).
_OLDEST_TORCH = (2, 10)
_CONVERT = (
    "convert the folder to safetensors once, on a machine with torch: python -m launch.convert "
    "--source=hf:DIR --target=hf:DIR2, or save_pretrained(DIR2, safe_serialization=True) of "
    "transformers"
)


@dataclasses.dataclass(frozen=True, eq=False)
class TorchTensor:
    """A tensor of a torch file, which is read as a `Stored` is.

    The file stays mapped while one of its tensors is held, so a run of elements is read from the
    disk when it is asked for.
    """

    path: pathlib.Path
    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> str:
        """Name of the dtype; `DTYPES` has those that we can use."""
        return str(self.tensor.dtype).removeprefix("torch.")

    @property
    def size(self) -> int:
        """Bytes of the values."""
        return self.tensor.numel() * self.tensor.element_size()

    def read(self, out: np.ndarray | None = None, start: int = 0) -> np.ndarray:
        """Read a run of elements, see `Stored.read`."""
        if out is None:
            out = aligned_empty(self.shape, DTYPES[self.dtype])
        run = out.reshape(-1).view(np.uint8)
        offset = start * out.itemsize
        run[...] = self._bytes()[offset : offset + run.size]
        return out

    def read_box(self, index: tuple[slice, ...], split: tuple[int, ...]) -> np.ndarray:
        """Read a part that is no run of elements, see `Stored.read_box`."""
        whole = self._bytes().view(DTYPES[self.dtype])
        return whole.reshape(split)[index].copy()

    def sha256(self) -> str:
        """Return the SHA-256 of the tensor's row-major bytes, in hex."""
        return hashlib.sha256(self._bytes()).hexdigest()

    def _bytes(self) -> np.ndarray:
        """Return the row-major bytes: a view of the map, or a copy where strides demand one."""
        import torch

        # A tensor may be flagged as negated, which its bytes do not show.
        values = self.tensor.detach().resolve_neg().contiguous()
        # NumPy takes no bfloat16 from torch, so only bytes cross over.
        return values.reshape(-1).view(torch.uint8).numpy()


def list_tensors(path: str | pathlib.Path) -> dict[str, TorchTensor]:
    """Return the tensors of a file of torch.save; no code in the file is run.

    Files from before torch 1.6 are no zip files, cannot be mapped, and are held in memory.

    Raises:
      ValueError: torch is absent or too old; not a file of torch, truncated or damaged; it holds
        anything but a dictionary of dense tensors. Problems of values are raised together.
    """
    path = pathlib.Path(path)
    values = _load(path)
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} holds a value of type {type(values).__name__}. Expected: a dictionary of "
            f"tensors. Save the model's state_dict, or {_CONVERT}."
        )
    problems = [
        f"{name!r:.100} is a value of type {type(value).__name__}, not a dense tensor"
        for name, value in values.items()
        if not (isinstance(name, str) and _is_dense(value))
    ]
    if not problems:
        problems = [
            f"{name!r:.100} repeats its values: it is a view that was not stored whole"
            for name, value in values.items()
            if value.numel() * value.element_size() > value.untyped_storage().nbytes()
        ]
    if problems:
        raise ValueError(
            f"{path}: {some(problems)}. Expected: a dictionary of tensors. Save the model's "
            f"state_dict, or {_CONVERT}."
        )
    return {name: TorchTensor(path, value) for name, value in values.items()}


def _load(path: pathlib.Path) -> Any:
    torch = _import_torch(path)
    fix = (
        "It holds more than tensors, which is never run, or is truncated, damaged or no file of "
        f"torch. Copy or download it again, or, if you trust it, {_CONVERT}."
    )
    with reading(path, "weights alone by torch", fix):
        mapped = zipfile.is_zipfile(path)
        if mapped:
            _refuse_packed(path)
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # damaged bytes may raise anything in torch's reader
            raise ValueError(_reason(error)) from error


def _refuse_packed(path: pathlib.Path) -> None:
    """Raise ValueError for a zip file that unpacks to more than it holds: torch packs nothing."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > path.stat().st_size:
        raise ValueError(f"its parts unpack to {unpacked:,} bytes, more than the file holds")


def _import_torch(path: pathlib.Path) -> types.ModuleType:
    try:
        import torch
    except ImportError:
        raise ValueError(
            f"{path} holds torch weights, and torch is not installed. Install it (pip install "
            f"torch), or {_CONVERT}."
        )
    numbers = re.findall(r"\d+", torch.__version__)[:2]
    if tuple(map(int, numbers)) < _OLDEST_TORCH:
        oldest = ".".join(map(str, _OLDEST_TORCH))
        raise ValueError(
            f"{path} holds torch weights, and torch {torch.__version__} does not read such files "
            f"safely. Install torch {oldest} or later, or {_CONVERT}."
        )
    return torch


def _is_dense(value: Any) -> bool:
    import torch

    return (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )


def _reason(error: Exception) -> str:
    """Return the line that says what was wrong; torch wraps it in advice to trust the file."""
    lines = str(error).splitlines() or [""]
    for line in lines:
        if "unsupported" in line.lower():
            return line.strip()[:200]
    return f"{type(error).__name__}: {lines[0]:.200}"
