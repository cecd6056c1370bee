"""GGUF's quantised tensors as float32, with the bits that the gguf package gives."""

from __future__ import annotations

import math
import os

import numpy as np

from safepatch_jax.io.stored import Stored, aligned_empty
from safepatch_jax.runtime.workers import Workers

_PIECE = 1 << 19  # entries at a time: 2 MiB of float32, which a core's cache holds


def dequantise(stored: Stored) -> np.ndarray:
    """Return a quantised tensor as float32, of the tensor's shape.

    The package computes 16 rows at a time, so its speed lies in their length: a piece of the tensor
    is handed over as one row, whatever the shape. Pieces are read and computed on several cores.

    Args:
      stored: its dtype is the name of a quantisation that the gguf package knows, like Q4_K.

    Raises:
      ValueError: the file ends within the tensor.
    """
    import gguf  # imported here: only quantised files need it

    kind = gguf.GGMLQuantizationType[stored.dtype]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    out = aligned_empty((math.prod(stored.shape),), np.dtype(np.float32))
    count = _PIECE // block  # blocks of a piece

    def fill(start: int, file) -> None:
        part = out[start * block : (start + count) * block]
        raw = os.pread(file.fileno(), part.size // block * size, stored.offset + start * size)
        if len(raw) < part.size // block * size:
            raise ValueError(
                f"{stored.path} ends within a tensor: it was changed while it was read. Copy it "
                "again."
            )
        part[:] = gguf.quants.dequantize(np.frombuffer(raw, np.uint8)[None], kind)[0]

    threads = min(os.cpu_count() or 1, 8)
    with open(stored.path, "rb", buffering=0) as file, Workers(threads) as pool:
        starts = range(0, out.size // block, count)
        for _ in pool.map(fill, starts, [file] * len(starts)):
            pass
    return out.reshape(stored.shape)
