"""Dequantising GGUF tensors: MB/s for each quantisation that the gguf package knows.

  python -m benchmarks.gguf                         # prints a table; two minutes
  python -m benchmarks.gguf --kinds=Q4_1,Q8_0,Q4_K --entries=64

The sides take turns over one file of random blocks in the page cache: `ours` is
`io.gguf_blocks.dequantise`; `gguf` is the package as its own readers call it, a matrix of rows of
4,096 entries; `read` is a read of the bytes, the floor. Bits are compared. MB/s are of the file.
"""

from __future__ import annotations

import pathlib
import sys
import tempfile
import warnings

import gguf
import numpy as np
from absl import app, flags

from benchmarks.common import machine, spread, take_turns
from safepatch_jax.io.gguf_blocks import dequantise
from safepatch_jax.io.stored import Stored

_KINDS = flags.DEFINE_list("kinds", [], "Quantisations, like Q4_1; default: all.")
_ENTRIES = flags.DEFINE_integer("entries", 16, "Millions of entries of the tensor.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Times each figure is taken.", lower_bound=1)
_ROW = 4096


def dequantised_kinds() -> list[str]:
    """Return the quantisations that the package dequantises."""
    names = []
    for kind in gguf.GGMLQuantizationType:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        try:
            gguf.quants.dequantize(np.zeros((1, size), np.uint8), kind)
        except NotImplementedError:  # gguf's, of a kind that it cannot read
            continue
        if block > 1:
            names.append(kind.name)
    return names


def write_tensor(path: pathlib.Path, name: str, rows: int) -> Stored:
    """Write random blocks as a tensor of so many rows; every bit of the format is used."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    count = rows * _ROW // block * size
    path.write_bytes(np.random.default_rng(0).bytes(count))
    return Stored(path, 0, (rows, _ROW), name, count)


def measure(stored: Stored) -> str:
    """Return a line of the table."""
    kind = gguf.GGMLQuantizationType[stored.dtype]
    rows = np.fromfile(stored.path, np.uint8).reshape(stored.shape[0], -1)
    sides = {
        "ours": lambda: dequantise(stored),
        "gguf": lambda: gguf.quants.dequantize(rows, kind),
        "read": lambda: np.fromfile(stored.path, np.uint8).max(),
    }
    if not np.array_equal(sides["ours"]().view(np.uint32), sides["gguf"]().view(np.uint32)):
        sys.exit(f"{stored.dtype}: the bits differ.")
    cells = [stored.dtype]
    for seconds in take_turns(sides, _REPEATS.value).values():
        cells.append(spread([stored.size / second / 1e6 for second in seconds]))
    return f"| {' | '.join(cells)} |"


def main(argv) -> None:
    del argv
    print(
        f"{_ENTRIES.value} million entries, MB/s of the file, median of {_REPEATS.value} (least - "
        f"most); {machine()}\n\n| | ours | gguf | read |\n|---|---|---|---|"
    )
    rows = _ENTRIES.value * 1_000_000 // _ROW
    warnings.simplefilter("ignore", RuntimeWarning)  # random scales are infinite, or no number
    with tempfile.TemporaryDirectory() as folder:
        for name in _KINDS.value or dequantised_kinds():
            print(measure(write_tensor(pathlib.Path(folder) / "x", name, rows)), flush=True)


if __name__ == "__main__":
    app.run(main)
