"""A patch file that an earlier version wrote still applies and reverts."""

import pathlib

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from safepatch_jax.patch_file import apply as patch_apply

GOLDEN = pathlib.Path(__file__).parent / "goldens" / "format_1.safetensors"
SHAPES = {"a.weight": (6, 40), "b.weight": (5, 7)}


def write_model(folder, changed):
    """The two models between which the golden patch file lies."""
    folder.mkdir()
    tensors = {"c.bias": np.arange(4, dtype=np.float16)}
    for name, shape in SHAPES.items():
        x = (np.arange(np.prod(shape)) % 23 - 11).astype(np.float32) / 16
        if changed:
            x[3::17] += 0.5
        dtype = ml_dtypes.bfloat16 if name == "a.weight" else np.float32
        tensors[name] = x.reshape(shape).astype(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text("{}")
    return folder


def content(folder):
    return {k: x.tobytes() for k, x in load_file(folder / "model.safetensors").items()}


def test_an_earlier_patch_file_applies_and_reverts(tmp_path):
    base = write_model(tmp_path / "base", changed=False)
    expected = content(write_model(tmp_path / "expected", changed=True))
    patched = patch_apply.apply(GOLDEN, base, tmp_path / "patched").folder
    assert content(patched) == expected != content(base)
    reverted = patch_apply.revert(GOLDEN, patched, tmp_path / "reverted").folder
    assert content(reverted) == content(base)
