"""The tensors of a merge before it: what is read of them, run by run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from safepatch_jax.io.stored import DTYPES, aligned_empty

_SAMPLED = 1 << 12  # neighbouring entries of a sample


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

    @property
    def tensors(self) -> list[Readable]:
        return [self.backbone, *self.derived.values(), *self.sensitivity.values()]

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Return the memory that `read` needs."""
        return sum(_padded(math.prod(shape) * DTYPES[x.dtype].itemsize) for x in self.tensors)

    def read(
        self, start: int, count: int, shape: tuple[int, ...], memory: np.ndarray
    ) -> dict[str, Any]:
        """Read a run of all arrays into `memory`, uint8 that begins at a multiple of 64, with zeros
        behind it up to `shape`; return them by attribute, as JAX arrays that look at it."""
        offset = 0

        def run(tensor: Readable) -> np.ndarray:
            nonlocal offset
            dtype = DTYPES[tensor.dtype]
            size = math.prod(shape) * dtype.itemsize
            out = memory[offset : offset + size].view(dtype)
            offset += _padded(size)
            tensor.read(out[:count], start)
            out[count:] = 0
            return out.reshape(shape)

        # jnp.asarray, or a jitted function that is given NumPy's, would copy it.
        return jax.device_put(self._mapped(run))

    def sample(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """Read parts from all over the tensor, or all of it, as a run of `shape`."""
        step = math.prod(shape)
        if self.size <= step:
            memory = aligned_empty((self.nbytes(shape),), np.dtype(np.uint8))
            return self.read(0, self.size, shape, memory)
        unit = shape[-1] if len(shape) > 1 else min(_SAMPLED, step)
        places = np.linspace(0, self.size - step, step // unit, dtype=np.int64) // unit * unit
        places += np.arange(len(places)) * unit

        def run(tensor: Readable) -> np.ndarray:
            out = np.zeros(step, DTYPES[tensor.dtype])
            for i, place in enumerate(places.tolist()):
                tensor.read(out[i * unit : (i + 1) * unit], place)
            return out.reshape(shape)

        return jax.device_put(self._mapped(run))

    def _mapped(self, function: Callable[[Readable], Any]) -> dict[str, Any]:
        return {
            "backbone": function(self.backbone),
            "derived": {role: function(x) for role, x in self.derived.items()},
            "sensitivity": {role: function(x) for role, x in self.sensitivity.items()},
        }


def _padded(size: int) -> int:
    return -(-size // 64) * 64
