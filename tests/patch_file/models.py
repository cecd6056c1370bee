"""Small model folders and pairs of them, for the tests of patch files."""

import pathlib
import subprocess
import sys

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from safepatch_jax.io.folder import Checkpoint
from safepatch_jax.io.safetensors_file import SINGLE
from safepatch_jax.runtime import files

ROOT = pathlib.Path(__file__).parents[2]


DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


BITS = {"float32": np.uint32, "bfloat16": np.uint16, "float16": np.uint16}


PATCHED = "model.layers.1.mlp.up_proj.weight"


def folder_of(path, tensors, dtype):
    """A folder of weights given as bits."""
    path.mkdir(parents=True)
    save_file(
        {name: x.view(DTYPES[dtype]) for name, x in tensors.items()},
        path / SINGLE,
        metadata={"format": "pt"},
    )
    return path


def bits_of(folder):
    """Every tensor as bits, by name, and the file that holds it."""
    return {
        name: (x.path.name, x.dtype, x.read().view(BITS[x.dtype]))
        for name, x in Checkpoint(folder).tensors.items()
    }


def assert_same(folder, other, files_too=True):
    ours, theirs = bits_of(folder), bits_of(other)
    assert ours.keys() == theirs.keys()
    for name, (file, dtype, bits) in ours.items():
        assert (file if files_too else "", dtype) == (
            theirs[name][0] if files_too else "",
            theirs[name][1],
        )
        np.testing.assert_array_equal(bits, theirs[name][2], err_msg=name)


def python(code, *args):
    """Run a program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], cwd=ROOT, capture_output=True, text=True
    )


def copied(folder, out):
    out.mkdir()
    for path in folder.iterdir():
        files.copy(path, out / path.name)
    return out


def patched_copy(folder, out, density=0.05, seed=0, only="proj"):
    """A model that differs in some entries of the block's linear layers, by random bits."""
    rng = np.random.default_rng(seed)
    copied(folder, out)
    for path in out.glob("*.safetensors"):
        tensors = load_file(path)
        for name, x in tensors.items():
            if only in name:
                bits = x.view(BITS[str(x.dtype)])
                bits ^= np.where(
                    rng.random(x.shape) < density, rng.integers(1, 2**12, x.shape), 0
                ).astype(bits.dtype)
        save_file(tensors, path, metadata={"format": "pt"})
    return out
