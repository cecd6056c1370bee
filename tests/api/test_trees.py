"""Patches on live JAX trees: the bits of the exported folder, in the sharding they had."""

import jax
import numpy as np
import pytest

import safepatch_jax as sp
from safepatch_jax.io.hf import load_params
from safepatch_jax.models.table import unnest
from safepatch_jax.patch_file.create import create
from safepatch_jax.testing import write_tiny_model
from tests.conftest import sharder_of
from tests.patch_file.models import patched_copy


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("trees")
    base = write_tiny_model(place / "base", dtype="bfloat16")
    model = patched_copy(base, place / "model", only="")
    create(base, model, place / "x.patch")
    return base, model, sp.read_patch(place / "x.patch")


def bits(tree):
    return {path: np.asarray(x).view(np.uint16) for path, x in unnest(tree).items()}


def assert_same(tree, other):
    ours, theirs = bits(tree), bits(other)
    assert ours.keys() == theirs.keys()
    for path, x in ours.items():
        np.testing.assert_array_equal(x, theirs[path], err_msg=path)


@pytest.mark.parametrize("devices, tensor", [(1, 1), (4, 2)])
def test_a_sharded_tree_there_and_back(made, devices, tensor):
    base, model, patch = made
    sharder = sharder_of(devices, tensor)
    config, params = load_params(base, sharder)
    before = bits(params)
    patched = patch.apply_tree(params, config)
    assert_same(patched, load_params(model, sharder)[1])
    for path, x in unnest(patched).items():
        assert x.sharding == unnest(params)[path].sharding, path
        np.testing.assert_array_equal(bits(params)[path], before[path])
    assert_same(patch.apply_tree(patched, config), patched)
    assert_same(patch.revert_tree(patched, config), params)


def test_a_donated_tree_is_changed_itself(made):
    base, model, patch = made
    config, params = load_params(base, sharder_of(2))
    old = dict(unnest(params))
    assert patch.apply_tree(params, config, donate=True) is params
    assert_same(params, load_params(model, sharder_of(2))[1])
    assert old["layers/mlp/up"].is_deleted()
    patch.revert_tree(params, config, donate=True)
    assert_same(params, load_params(base, sharder_of(2))[1])


def test_an_array_on_one_device_without_a_mesh(made):
    base, model, patch = made
    config, params = load_params(base, sharder_of(1))
    plain = jax.tree.map(lambda x: jax.device_put(np.asarray(x), jax.devices()[1]), params)
    patched = patch.apply_tree(plain, config)
    assert_same(patched, load_params(model, sharder_of(1))[1])
    assert {x.device for x in unnest(patched).values()} == {jax.devices()[1]}


def test_another_tree_is_refused_with_its_names(made):
    base, _, patch = made
    config, params = load_params(base, sharder_of(1))
    up = params["layers"]["mlp"]["up"]
    params["layers"]["mlp"]["up"] = up.at[1, 0, 0].add(1)
    with pytest.raises(ValueError, match=r"1 of \d+ tensors .*: model.layers.1.mlp.up_proj.weight"):
        patch.apply_tree(params, config)
    params["layers"]["mlp"]["up"] = up.astype("float32")
    with pytest.raises(ValueError, match="up_proj.weight is float32 .* in the patch bfloat16"):
        patch.apply_tree(params, config)
    params["layers"]["mlp"]["up"] = up[:1]
    with pytest.raises(ValueError, match="layers/mlp/up has shape"):
        patch.apply_tree(params, config)
    del params["layers"]["mlp"]["up"]
    with pytest.raises(ValueError, match="layers/mlp/up is missing"):
        patch.apply_tree(params, config)


def test_entries_and_formats(made, tmp_path):
    base, model, patch = made
    changed = {x.name: x for x in patch.entries(model)}
    for x in changed.values():
        flipped = x.before.view(x.bits.dtype) ^ x.bits
        np.testing.assert_array_equal(flipped, x.after.view(x.bits.dtype))
    assert sum(len(x.indices) for x in changed.values()) > 0
    text = patch.convert("sparse-safetensors", base, tmp_path / "update")
    assert text.startswith(f"{tmp_path / 'update'}: sparse-safetensors")
    with pytest.raises(ValueError, match="ignore= is about live tensors"):
        patch.apply(base, out=tmp_path / "out", ignore=["a"])
