"""Model checkpoints: bitwise onto any mesh, and refused when damaged or of another architecture."""

import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safepatch_jax.io import checksums
from safepatch_jax.io.checkpoint import (
    StoredTree,
    load_checkpoint,
    load_tree,
    save_checkpoint,
    save_tree,
)
from safepatch_jax.io.folder import stored_dtypes
from safepatch_jax.io.hf import load_params
from safepatch_jax.models.table import unnest
from safepatch_jax.testing import write_tiny_model
from tests.conftest import sharder_of


def make(folder, sharder, **changes):
    model = write_tiny_model(folder / "model", **changes)
    params = load_params(model, sharder)[1]
    save_checkpoint(folder / "checkpoint", params, model, stored_dtypes(model))
    return model, params, folder / "checkpoint"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("meshes", [((1, 1), (8, 2)), ((8, 1), (4, 2)), ((8, 2), (1, 1))])
def test_restored_onto_another_mesh(tmp_path, meshes, dtype):
    written, read = (sharder_of(*mesh) for mesh in meshes)
    model, params, checkpoint = make(tmp_path, written, dtype=dtype)
    config, restored, stored = load_checkpoint(checkpoint, read)
    assert config == load_params(model, written)[0] and stored == stored_dtypes(model)
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(restored), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(
            y
        ).tobytes() and x.dtype == y.dtype == jnp.dtype(dtype)
        assert len(y.sharding.device_set) == read.mesh.size


def test_another_architecture(tmp_path, sharder):
    _, _, checkpoint = make(tmp_path, sharder)
    path = checkpoint / "hf" / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"intermediate_size": 48, "hidden_size": 40}))
    with pytest.raises(ValueError) as raised:
        load_checkpoint(checkpoint, sharder)
    for part in (
        "the arrays are of another architecture than hf/config.json",
        "layers/attention/q has shape (2, 4, 8, 32), the architecture needs (2, 4, 10, 40)",
        "; and 5 more",
        "Convert the right model again",
    ):
        assert part in str(raised.value), part
    for change in (
        {"model_type": "qwen2"},
        {"num_hidden_layers": 3},
        {"tie_word_embeddings": False},
    ):
        path.write_text(json.dumps(raw | change))
        with pytest.raises(
            ValueError,
            match=r"model\.json lists other tensors than the architecture of hf/config\.json has",
        ):
            load_checkpoint(checkpoint, sharder)


def test_no_checkpoint(tmp_path, tiny, sharder):
    for folder in (tmp_path / "absent", tiny):
        with pytest.raises(
            ValueError,
            match="is no model checkpoint: model.json is not there. Make one with python -m launch",
        ):
            load_checkpoint(folder, sharder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        '{"format": 1, "stored": 3}',
        '{"format": 99, "stored": {}}',
        '{"format": 1, "stored": {"x": "int7"}}',
        "[" * 100_000,
    ],
)
def test_damaged_description(tmp_path, sharder, text):
    _, _, checkpoint = make(tmp_path, sharder)
    (checkpoint / "model.json").write_text(text)
    with pytest.raises(
        ValueError,
        match=r"model\.json (is damaged or of another version|cannot be read as JSON|holds list)",
    ):
        load_checkpoint(checkpoint, sharder)


def test_arrays_that_are_gone_or_cut(tmp_path, sharder):
    _, _, checkpoint = make(tmp_path, sharder)
    for path in (checkpoint / "params").rglob("*"):
        if path.is_file() and path.stat().st_size > 10_000:
            path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="Cannot restore the checkpoint .* has 5,000 bytes, not "):
        load_checkpoint(checkpoint, sharder)
    shutil.rmtree(checkpoint / "params")
    with pytest.raises(ValueError, match="params is no orbax checkpoint: it is not there"):
        load_checkpoint(checkpoint, sharder)


def test_a_full_folder_is_left_alone(tmp_path, sharder):
    model, params, _ = make(tmp_path, sharder)
    with pytest.raises(ValueError, match="exists and is not empty; nothing was written"):
        save_checkpoint(model, params, model, {})


def damaged(path, rng):
    """Flip a bit of a file."""
    data = bytearray(path.read_bytes())
    place = int(rng.integers(8 * len(data)))
    data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)


def test_a_flipped_bit_in_any_file_is_refused_by_its_name(tmp_path, sharder):
    _, params, checkpoint = make(tmp_path, sharder, num_hidden_layers=1)
    rng = np.random.default_rng(0)
    paths = sorted(path for path in checkpoint.rglob("*") if path.stat().st_size and path.is_file())
    lists = [path for path in paths if path.name == checksums.NAME]
    assert len(lists) == 2
    for path in [*paths, *rng.choice(paths, 40 - len(paths))]:
        kept = path.read_bytes()
        damaged(path, rng)
        try:
            restored = load_checkpoint(checkpoint, sharder)[1]
        except ValueError as error:
            named = str(path) in str(error) or path in lists or path.parent.name == "hf"
            assert named and len(str(error)) < 1000, error
        else:
            assert path in lists  # a flipped bit in the space between two entries
            for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(restored), strict=True):
                np.testing.assert_array_equal(x, y)
        path.write_bytes(kept)
    load_checkpoint(checkpoint, sharder)


def test_arrays_are_compared_before_a_part_of_them_is_read(tmp_path, capsys):
    tree = {"a": {"b": jnp.arange(1000.0)}, "c": jnp.ones(3)}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    abstract = jax.tree.map(
        lambda x, y: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=y.sharding), abstract, tree
    )
    save_tree(tmp_path / "tree", tree)
    np.testing.assert_array_equal(StoredTree(tmp_path / "tree", abstract)["c"], tree["c"])
    assert "checksums" not in capsys.readouterr().out
    path = max((tmp_path / "tree").rglob("*"), key=lambda path: path.stat().st_size)
    damaged(path, np.random.default_rng(1))
    with pytest.raises(ValueError, match=f"damaged: .*{path.name} has other bytes than were .*"):
        StoredTree(tmp_path / "tree", abstract)["c"]


@pytest.mark.parametrize("devices, tensor", [(1, 1), (8, 1), (8, 2)])
def test_arrays_one_by_one_are_those_of_the_whole(tmp_path, devices, tensor):
    """Cut, whole everywhere, and cast, as they are read into."""
    rng, place = np.random.default_rng(0), sharder_of(devices, tensor)
    arrays = {"a": {"b": rng.normal(size=(16, 8))}, "c": rng.normal(size=24)}
    tree = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), arrays)
    (tmp_path / "run [2]*").mkdir()
    path = tmp_path / "run [2]*" / "tree"
    save_tree(path, tree)
    layouts = [("embed", "mlp"), ("layers", "mlp"), ("layers", "layers")]
    for axes, dtype in itertools.product(layouts, (jnp.float32, jnp.bfloat16)):

        def described(x, axes=axes, dtype=dtype):
            sharding = place.sharding(axes[: x.ndim])
            return jax.ShapeDtypeStruct(x.shape, dtype, sharding=sharding)

        abstract = jax.tree.map(described, tree)
        whole, stored = unnest(load_tree(path, abstract)), StoredTree(path, abstract)
        assert stored.keys() == whole.keys()
        for name, x in whole.items():
            assert stored[name].sharding == x.sharding and stored[name].dtype == x.dtype
            np.testing.assert_array_equal(stored[name], x)


def test_an_array_that_is_not_there_or_of_another_shape_is_named(tmp_path, sharder):
    save_tree(tmp_path / "tree", {"a": jnp.ones((4, 2))})

    def stored(name, shape, folder="tree"):
        x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharder.replicated())
        return StoredTree(tmp_path / folder, {name: x})[name]

    fix = "Delete the stage's folder"
    with pytest.raises(ValueError, match=f"Cannot restore b of .*tree, which .*{fix}"):
        stored("b", (4, 2))
    with pytest.raises(ValueError, match=rf"its shape is \(4, 2\), not \(2, 4\)\. {fix}"):
        stored("a", (2, 4))
    with pytest.raises(ValueError, match=f"Cannot restore a of .*nowhere, .*{fix}"):
        stored("a", (4, 2), "nowhere")


def test_a_checkpoint_of_an_earlier_version_is_read_and_reported_once(tmp_path, capsys):
    checksums._unchecked.clear()
    x = jnp.arange(4.0)
    abstract = {"a": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)}
    for name in ("one", "two"):
        save_tree(tmp_path / name, {"a": x})
        (tmp_path / name / checksums.NAME).unlink()
        np.testing.assert_array_equal(load_tree(tmp_path / name, abstract)["a"], x)
    assert capsys.readouterr().out.count("has no checksums, as an earlier version made it") == 1


def test_a_folder_whose_name_is_a_pattern(tmp_path, sharder):
    (tmp_path / "run [2]*").mkdir()
    _, params, checkpoint = make(tmp_path / "run [2]*", sharder)
    restored = load_checkpoint(checkpoint, sharder)[1]
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(restored), strict=True):
        np.testing.assert_array_equal(x, y)
