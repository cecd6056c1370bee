"""Dequantising in long rows and on several cores, against the package's own matrices."""

import numpy as np
import pytest

from safepatch_jax.io.gguf_blocks import dequantise
from safepatch_jax.io.stored import Stored

gguf = pytest.importorskip("gguf", reason="reading GGUF needs the gguf package: pip install gguf")

ROWS, COLUMNS = 700, 1024  # more entries than are taken at a time, and no multiple of them


def write(path, kind):
    """Write random blocks, so that every bit of the format is used; return them as rows."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(256, size=(ROWS, COLUMNS // block * size), dtype="u1")
    path.write_bytes(b"header" + raw.tobytes())
    return raw, Stored(path, 6, (ROWS, COLUMNS), kind.name, raw.size)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # random scales are infinite, or no number
@pytest.mark.parametrize(
    "name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
    + ["TQ1_0", "TQ2_0", "MXFP4", "IQ2_XXS", "IQ3_S", "IQ1_M", "IQ4_NL", "IQ4_XS"]
)  # fmt: skip
def test_bits_are_those_of_the_package(tmp_path, name):
    raw, stored = write(tmp_path / "x", gguf.GGMLQuantizationType[name])
    ours = dequantise(stored)
    theirs = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
    assert ours.shape == (ROWS, COLUMNS) and ours.dtype == np.float32
    assert np.array_equal(ours.view(np.uint32), theirs.view(np.uint32))


def test_a_file_that_was_cut_meanwhile(tmp_path):
    raw, stored = write(tmp_path / "x", gguf.GGMLQuantizationType.Q4_1)
    with open(tmp_path / "x", "rb+") as file:
        file.truncate(raw.size - 7)
    with pytest.raises(ValueError, match=r"x ends within a tensor: it was changed .*Copy it again"):
        dequantise(stored)
