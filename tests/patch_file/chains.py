"""Hand-made chains, without training: each link changes given entries of a bfloat16 model."""

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from safepatch_jax.patch_file.create import create
from safepatch_jax.patch_file.log import (
    EXPORT,
    LINKS,
    PATCH,
    label,
)
from safepatch_jax.testing import write_tiny_model
from tests.patch_file import hand_made

UP, DOWN = "model.layers.1.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
WEIGHTS = "model.safetensors"


def arrays(folder):
    """The tensors of a model folder, as arrays that may be written."""
    return {name: x.copy() for name, x in load_file(folder / WEIGHTS).items()}


def changed(tensors, entries):
    """A copy of tensors with other values: entries is {tensor: {flat index: value to be added}}."""
    result = {name: x.copy() for name, x in tensors.items()}
    for name, values in entries.items():
        flat = result[name].reshape(-1)
        for index, value in values.items():
            flat[index] = np.float32(flat[index]) + np.float32(value)
    return result


def write_model(tensors, like, out):
    """A model folder of these tensors, with the files beside the weights of another."""
    out.mkdir(parents=True)
    for path in like.iterdir():
        if path.name != WEIGHTS:
            (out / path.name).write_bytes(path.read_bytes())
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    return out


def begin(folder):
    """A chain without links, and its starting model."""
    start = write_tiny_model(folder / "start", dtype="bfloat16")
    return hand_made.begin(folder / "work", start)


def add_link(log, name, entries):
    """Log the model that differs from the head by `entries`, see `changed`, as the next link."""
    before = log.model(log.head)
    folder = log.workdir / LINKS / label(number := hand_made.next_number(log), name)
    model = write_model(changed(arrays(before), entries), before, folder / EXPORT)
    (folder / PATCH).parent.mkdir()
    hand_made.log_link(log, name, create(before, model, folder / PATCH, {}), seed=number)


def bits(tensors):
    """Tensors as unsigned integers, by name."""
    form = {np.dtype(ml_dtypes.bfloat16): np.uint16, np.dtype(np.float32): np.uint32}
    return {name: x.view(form[x.dtype]) for name, x in tensors.items()}


def assert_bits(folder, wanted):
    """The tensors of a folder have exactly the bits of some arrays."""
    ours, theirs = bits(arrays(folder)), bits(wanted)
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        np.testing.assert_array_equal(x, theirs[name], err_msg=name)
