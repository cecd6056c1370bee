"""Tensors that stay on disk, and what is read of them at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from safepatch_jax.io.stored import DTYPES

_SAMPLE = 1 << 18  # entries of a sample, at most
_TOGETHER = 1 << 12  # neighbouring entries of a sample


class Readable(Protocol):
    """A tensor of which runs can be read; `Stored` is one. Others are read by one thread, from
    their beginning to their end."""

    dtype: str
    shape: tuple[int, ...]

    def read(self, out: np.ndarray, start: int) -> np.ndarray:
        """Fill `out`, of `dtype`, with the elements that begin at the flat index `start`."""


@dataclasses.dataclass(frozen=True)
class Source:
    """One HF tensor before the merge.

    Attributes:
      name: of the HF tensor.
      backbone: in its stored dtype, of the HF shape.
      derived: {'se', 'osm'}: of the derived models, any float dtype.
      sensitivity: {'se', 'osm'}: sums of |gradient|, float32; may be empty for an importance that
        needs none.
    """

    name: str
    backbone: Readable
    derived: Mapping[str, Readable]
    sensitivity: Mapping[str, Readable]

    @property
    def size(self) -> int:
        return math.prod(self.backbone.shape)


@dataclasses.dataclass(frozen=True)
class Run:
    """A piece of a tensor: its number, its first entry, and how many it has."""

    number: int
    start: int
    count: int


def tensors_of(source: Source) -> list[Readable]:
    return [source.backbone, *source.derived.values(), *source.sensitivity.values()]


def _mapped(source: Source, function: Callable[[Readable], Any]) -> dict[str, Any]:
    return {
        "backbone": function(source.backbone),
        "derived": {role: function(x) for role, x in source.derived.items()},
        "sensitivity": {role: function(x) for role, x in source.sensitivity.items()},
    }


def read_run(
    source: Source, run: Run, shape: tuple[int, ...], block: int, memory: np.ndarray
) -> dict[str, Any]:
    """Read a piece of all arrays of a tensor into `memory`, with zeros behind it up to the end of a
    block; nothing looks at what lies beyond."""
    offset = 0

    def one(tensor: Readable) -> np.ndarray:
        nonlocal offset
        dtype = DTYPES[tensor.dtype]
        size = math.prod(shape) * dtype.itemsize
        out = memory[offset : offset + size].view(dtype)
        offset += -(-size // 64) * 64
        tensor.read(out[: run.count], run.start)
        out[run.count : -(-run.count // block) * block] = 0
        return out.reshape(shape)

    # Looks at the memory; jnp.asarray, or a jitted function that is given NumPy's, would copy it.
    return jax.device_put(_mapped(source, one))


def read_sample(source: Source, shape: tuple[int, ...]) -> tuple[int, dict[str, Any]]:
    """Read parts from all over a tensor, or all of it, as the beginning of a piece; return how many
    entries, and the arrays."""
    step = math.prod(shape)
    unit = shape[-1] if len(shape) > 1 else min(_TOGETHER, step)
    if source.size <= min(step, _SAMPLE):
        unit = source.size
    count = max(1, min(step, _SAMPLE, source.size) // unit)
    places = np.linspace(0, source.size - count * unit, count, dtype=np.int64) // unit * unit
    places += np.arange(count) * unit

    def run(tensor: Readable) -> np.ndarray:
        out = np.zeros(step, DTYPES[tensor.dtype])
        for i, place in enumerate(places.tolist()):
            tensor.read(out[i * unit : (i + 1) * unit], place)
        return out.reshape(shape)

    return count * unit, jax.device_put(_mapped(source, run))
