"""Tensors whose names or contents are not those of a plain model: wrappers, adapters, placeholders,
quantised weights."""

import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from safepatch_jax.io.folder import Checkpoint, stored_dtypes
from safepatch_jax.io.hf import load_params, save_model
from safepatch_jax.io.names import standard_names
from safepatch_jax.io.safetensors_file import SINGLE
from safepatch_jax.patch_file.apply import apply, revert
from safepatch_jax.patch_file.create import create
from safepatch_jax.testing import write_tiny_model


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def plain(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "model"
    return write_tiny_model(folder, tie_word_embeddings=request.param)


def renamed(folder, out, rename):
    shutil.copytree(folder, out)
    tensors = {rename(name): x for name, x in load_file(folder / SINGLE).items()}
    save_file(tensors, out / SINGLE, metadata={"format": "pt"})
    return out


def vision(name):
    return name.replace("model.", "model.language_model.", 1)


@pytest.mark.parametrize(
    "rename, note",
    [
        (lambda name: "_orig_mod." + name, "prefix '_orig_mod.'"),
        (lambda name: "module." + name, "prefix 'module.'"),
        (lambda name: "language_model." + name, "prefix 'language_model.'"),
        (lambda name: "base_model.model." + name, "prefix 'base_model.model.'"),
        (lambda name: "model." + name, "prefix 'model.'"),
        (lambda name: "_orig_mod.module." + name, "prefix '_orig_mod.module.'"),
        (vision, "prefix 'model.language_model.'"),
        (lambda name: name.removeprefix("model."), "'model.' is put before"),
        (lambda name: "module." + name.removeprefix("model."), "prefix 'module.'"),
    ],
)
def test_a_wrapper_is_taken_off(plain, tmp_path, sharder, rename, note):
    wrapped = renamed(plain, tmp_path / "wrapped", rename)
    checkpoint = Checkpoint(wrapped)
    assert note in checkpoint.renamed and checkpoint.notes[0] == checkpoint.renamed
    config, params = load_params(wrapped, sharder)
    save_model(tmp_path / "out", params, config, wrapped, stored=stored_dtypes(wrapped))
    ours, theirs = load_file(tmp_path / "out" / SINGLE), load_file(plain / SINGLE)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_names_that_are_standard_stay(plain):
    names = load_file(plain / SINGLE).keys()
    assert standard_names(names) == ({name: name for name in names}, "")
    assert Checkpoint(plain).renamed == "" and Checkpoint(plain).notes == ()


@pytest.mark.parametrize(
    "names",
    [
        ["a.embed_tokens.weight", "b.embed_tokens.weight"],
        ["module.model.norm.weight"],
        ["m.embed_tokens.weight", "model.embed_tokens.weight"],
        ["x.model.embed_tokens.weight", "x.lm_head.weight", "lm_head.weight"],
        [],
    ],
)
def test_names_that_leave_a_doubt_stay(names):
    assert standard_names(names) == ({name: name for name in names}, "")


def test_a_base_model_without_its_head_says_how_to_save_it(tmp_path, sharder):
    model = write_tiny_model(tmp_path / "model", tie_word_embeddings=False)
    tensors = load_file(model / SINGLE)
    del tensors["lm_head.weight"]
    bare = {name.removeprefix("model."): x for name, x in tensors.items()}
    save_file(bare, model / SINGLE, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 missing: lm_head.weight .*AutoModelForCausalLM"):
        load_params(model, sharder)


def test_patch_files_go_onto_wrapped_models(plain, tmp_path):
    patched = shutil.copytree(plain, tmp_path / "patched")
    tensors = load_file(plain / SINGLE)
    tensors["model.layers.1.mlp.up_proj.weight"][3] += 1
    save_file(tensors, patched / SINGLE, metadata={"format": "pt"})
    wrapped = renamed(plain, tmp_path / "wrapped", lambda name: "module." + name)
    before = (wrapped / SINGLE).read_bytes()
    create(wrapped, patched, tmp_path / "x.safetensors")
    apply(tmp_path / "x.safetensors", wrapped)
    changed = load_file(wrapped / SINGLE)
    assert all(np.array_equal(changed["module." + name], x) for name, x in tensors.items())
    revert(tmp_path / "x.safetensors", wrapped)
    assert (wrapped / SINGLE).read_bytes() == before


def spoiled(folder, sharder, change):
    tensors = load_file(folder / SINGLE)
    save_file(change(tensors), folder / SINGLE, metadata={"format": "pt"})
    with pytest.raises(ValueError) as raised:
        load_params(folder, sharder)
    message = str(raised.value)
    assert len(message) < 1300 and "\n" not in message
    return message


def hollow(tensors):
    return {n: x if x.ndim == 1 else np.zeros(0, np.float32) for n, x in tensors.items()}


def packed(tensors):
    name = "model.layers.0.mlp.up_proj.weight"
    del tensors[name]
    return tensors | {name.replace("weight", "qweight"): np.zeros((4, 4), np.int32)}


@pytest.mark.parametrize(
    "change, words",
    [
        (hollow, ["tensors are empty (0 elements)", "zero_to_fp32.py"]),
        (packed, ["quantised (GPTQ or AWQ)", "model.dequantize()"]),
        (lambda t: t | {"a.weight.absmax": np.zeros(3, np.uint8)}, ["quantised (bitsandbytes)"]),
        (lambda t: t | {"a.weight_scale_inv": np.ones(3, np.float32)}, ["quantised (FP8)"]),
        (
            lambda t: t | {"a.q_proj.lora_A.default.weight": np.ones(3, np.float32)},
            ["1 tensors of an adapter", "merge_and_unload"],
        ),
        (
            lambda t: {f"{name}{'x' * 3000}": x for name, x in t.items()},
            ["20 missing", "and 14 more", "more characters"],
        ),
        (
            lambda t: {n: x if x.ndim == 1 else x[:-1].copy() for n, x in t.items()},
            ["has shape", "and 12 more"],
        ),
        (lambda t: {n: x.astype(np.float64) for n, x in t.items()}, ["have dtype F64"]),
    ],
)
def test_weights_that_are_no_models_own(tmp_path, sharder, change, words):
    message = spoiled(write_tiny_model(tmp_path / "model"), sharder, change)
    for part in words:
        assert part in message, message
