"""Hand-made chains, without training: each link changes given entries of a bfloat16 model."""

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from safepatch_jax.patch_file.create import create
from safepatch_jax.patch_file.log import (
    EXPORT,
    LINKS,
    PATCH,
    PatchLog,
    companion_hashes,
    folder_hash,
    label,
)
from safepatch_jax.patch_file.log_lines import FORMAT
from safepatch_jax.runtime import files
from safepatch_jax.testing import write_tiny_model

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
    line = {
        "format": FORMAT,
        "source": "x",
        "aligned": False,
        "folder": str(start),
        "model": folder_hash(start),
        "companions": companion_hashes(start),
        "settings": {},
        "versions": {},
    }
    return PatchLog.begin(folder / "work", line)


def add_link(log, name, entries):
    """Log the model that differs from the head by `entries`, see `changed`, as the next link."""
    number, parent = max(log.links, default=0) + 1, log.head
    before = log.model(parent)
    folder = log.workdir / LINKS / label(number, name)
    model = write_model(changed(arrays(before), entries), before, folder / EXPORT)
    (folder / PATCH).parent.mkdir()
    patch = create(before, model, folder / PATCH, {})
    log.append(
        "link",
        {
            "number": number,
            "name": name,
            "parent": {"link": parent, "model": log.hash(parent)},
            "model": folder_hash(model),
            "data": {"harmful": "x.csv", "category": name, "hash": "0" * 64, "records": 3},
            "seed": number,
            "settings": {},
            "versions": {},
            "patch": {
                "sha256": files.file_sha256(patch.path),
                "entries": patch.entries(),
                "bytes": patch.path.stat().st_size,
            },
        },
    )


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
