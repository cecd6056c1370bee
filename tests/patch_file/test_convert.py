"""Patches in the formats of inference servers, and back: the same bytes, or refused."""

import json
import platform
import zlib

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from safepatch_jax.io.safetensors_file import INDEX, SINGLE
from safepatch_jax.patch_file.apply import apply
from safepatch_jax.patch_file.convert import FORMATS, read_format, write_format
from safepatch_jax.patch_file.create import Change, create, write_patch
from safepatch_jax.patch_file.file import PatchFile
from safepatch_jax.testing import write_tiny_model
from tests.patch_file.models import BITS, assert_same, bits_of, folder_of, patched_copy

pyarrow = pytest.importorskip("pyarrow")

DELTA, SPARSE = "disk-delta", "sparse-safetensors"
NAME = "model.layers.0.mlp.up_proj.weight"
TIED = "model.embed_tokens.weight", "lm_head.weight"


def without_manifest(path):
    """Take out what only our own files carry."""
    if path.is_dir():
        index = json.loads((path / INDEX).read_text())
        del index["metadata"]["safepatch"]
        (path / INDEX).write_text(json.dumps(index))
        return path
    with safe_open(path, framework="np") as file:
        metadata = {key: text for key, text in file.metadata().items() if key != "safepatch"}
    save_file(load_file(path), path, metadata=metadata)
    return path


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("given", ["base", "model"])
def test_there_and_back_is_the_same_file(pair, tmp_path, kind, given):
    base, model, patch = pair
    write_format(patch, kind, base if given == "base" else model, tmp_path / "update")
    read_format(tmp_path / "update", kind, base, tmp_path / "again.patch")
    assert (tmp_path / "again.patch").read_bytes() == patch.read_bytes()


@pytest.mark.parametrize("kind", FORMATS)
def test_the_versions_that_made_the_patch_come_back_too(pair, tmp_path, kind):
    base, _, patch = pair
    own = platform.python_version()
    other = f"9{own[1:]}"
    patch.write_bytes(patch.read_bytes().replace(own.encode(), other.encode()))
    assert PatchFile(patch).versions["python"] == other
    write_format(patch, kind, base, tmp_path / "update")
    read_format(tmp_path / "update", kind, base, tmp_path / "again.patch")
    assert (tmp_path / "again.patch").read_bytes() == patch.read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", FORMATS)
def test_an_update_of_another_maker_becomes_a_patch(tmp_path, kind, dtype):
    base = write_tiny_model(tmp_path / "base", dtype=dtype)
    model = patched_copy(base, tmp_path / "model")
    create(base, model, tmp_path / "x.patch")
    write_format(tmp_path / "x.patch", kind, base, tmp_path / "update")
    update = without_manifest(tmp_path / "update")
    again = read_format(update, kind, base, tmp_path / "again.patch")
    assert again.about["converted"]["format"] == kind
    apply(tmp_path / "again.patch", base, tmp_path / "out")
    assert_same(tmp_path / "out", model)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_way_back_is_an_update_too(pair, tmp_path, kind):
    base, model, patch = pair
    write_format(patch, kind, base, tmp_path / "update", reverse=True)
    with pytest.raises(ValueError, match="Adler-32|hashes of|equal, bit for bit"):
        read_format(tmp_path / "update", kind, base, tmp_path / "no.patch")
    assert not (tmp_path / "no.patch").exists()
    read_format(tmp_path / "update", kind, model, tmp_path / "back.patch")
    apply(tmp_path / "back.patch", model, tmp_path / "out")
    assert_same(tmp_path / "out", base)


def test_another_model_than_the_carried_hashes_name_is_refused(pair, tmp_path):
    """A sparse file has no checksum of its own."""
    base, _, patch = pair
    write_format(patch, SPARSE, base, tmp_path / "update")
    other = patched_copy(base, tmp_path / "other", seed=9)
    with pytest.raises(ValueError, match="is not the model that") as info:
        read_format(tmp_path / "update", SPARSE, other, tmp_path / "no.patch")
    assert "\n" not in str(info.value) and not (tmp_path / "no.patch").exists()


def test_a_delta_folder_is_as_its_readers_expect(pair, tmp_path):
    """Read here as SGLang's receiver does, without our code."""
    base, model, patch = pair
    write_format(patch, DELTA, base, tmp_path / "weight_v000007")
    index = json.loads((tmp_path / "weight_v000007" / INDEX).read_text())
    meta = index["metadata"]
    assert (meta["version"], meta["base_version"]) == ("000007", "000006")
    assert (meta["delta_encoding"], meta["checksum_format"]) == ("xor", "adler32")
    assert set(index["weight_map"]) == set(PatchFile(patch).changed())
    before, after = bits_of(base), bits_of(model)
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "weight_v000007" / file, framework="np") as opened:
            frame, checksum = opened.get_tensor(name), opened.metadata()[name]
        old = before[name][2].reshape(-1).view(np.uint8)
        xor = pyarrow.decompress(frame.tobytes(), old.nbytes, codec="zstd", asbytes=True)
        new = old ^ np.frombuffer(xor, np.uint8)
        np.testing.assert_array_equal(new, after[name][2].reshape(-1).view(np.uint8))
        assert f"{zlib.adler32(new):08x}" == checksum


def test_byte_positions_are_read_too(pair, tmp_path):
    """The encoding 'overwrite': a count, positions of bytes, their values."""
    base, model, patch = pair
    folder = tmp_path / "update"
    write_format(patch, DELTA, base, folder)
    index = json.loads((without_manifest(folder) / INDEX).read_text())
    index["metadata"]["delta_encoding"] = "overwrite"
    (folder / INDEX).write_text(json.dumps(index))
    frames, sums, (file,) = {}, {}, set(index["weight_map"].values())
    for name in index["weight_map"]:
        old, new = (bits_of(x)[name][2].reshape(-1).view(np.uint8) for x in (base, model))
        places = np.flatnonzero(old != new).astype("<u4")
        head = np.array([len(places)], "<u4").view(np.uint8)
        data = np.concatenate([head, places.view(np.uint8), new[places]]).tobytes()
        frame = pyarrow.compress(data, codec="zstd", asbytes=True)
        frames[name], sums[name] = np.frombuffer(frame, np.uint8), f"{zlib.adler32(new):08x}"
    save_file(frames, folder / file, metadata=sums)
    read_format(folder, DELTA, base, tmp_path / "again.patch")
    apply(tmp_path / "again.patch", base, tmp_path / "out")
    assert_same(tmp_path / "out", model)


def test_gaps_are_read_too(pair, tmp_path):
    base, model, patch = pair
    path = tmp_path / "update"
    write_format(patch, SPARSE, base, path)
    with safe_open(without_manifest(path), framework="np") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    for name in list(tensors):
        if name.endswith(".idx"):
            tensors[name] = (np.diff(tensors[name], prepend=-1) - 1).astype(np.uint16)
    save_file(tensors, path, metadata=metadata | {"encoding": "gap_delta"})
    read_format(path, SPARSE, base, tmp_path / "again.patch")
    apply(tmp_path / "again.patch", base, tmp_path / "out")
    assert_same(tmp_path / "out", model)


def test_sparse_values_are_those_of_the_patched_model(pair, tmp_path):
    base, model, patch = pair
    write_format(patch, SPARSE, base, tmp_path / "update")
    tensors, after = load_file(tmp_path / "update"), bits_of(model)
    for name in PatchFile(patch).changed():
        _, dtype, bits = after[name]
        values = bits.reshape(-1)[tensors[f"{name}.idx"]]
        np.testing.assert_array_equal(tensors[f"{name}.val"].view(BITS[dtype]), values)


def damaged_index(folder, **metadata):
    index = json.loads((folder / INDEX).read_text())
    index["metadata"] |= metadata
    (folder / INDEX).write_text(json.dumps(index))


def elsewhere(folder):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../base/model.safetensors")
    (folder / INDEX).write_text(json.dumps(index))


def broken_frame(folder):
    (file,) = folder.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-40:] = bytes(40)
    file.write_bytes(data)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: damaged_index(folder, delta_encoding="sum"), "delta_encoding 'sum'"),
        (lambda folder: damaged_index(folder, checksum_format="blake3"), "'blake3'"),
        (lambda folder: damaged_index(folder, safepatch="{"), "cannot be read"),
        (elsewhere, "a file name '../base"),
        (broken_frame, "copy it again|Adler-32"),
        (lambda folder: (folder / INDEX).unlink(), "no delta folder"),
    ],
)
def test_a_damaged_delta_leaves_no_file(pair, tmp_path, damage, message):
    base, _, patch = pair
    write_format(patch, DELTA, base, tmp_path / "update")
    damage(tmp_path / "update")
    with pytest.raises(ValueError, match=message):
        read_format(tmp_path / "update", DELTA, base, tmp_path / "no.patch")
    assert not (tmp_path / "no.patch").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({f"{NAME}.idx": np.array([2, 1], np.int32)}, "not as many indices"),
        ({f"{NAME}.val": None}, "not as many indices"),
        ({"else.val": np.zeros(3, np.float16)}, "belongs to no tensor"),
        ({f"{NAME}.val": "float32"}, "is float32, in the model bfloat16"),
        ({f"{NAME}.idx": "backwards"}, "not increasing"),
    ],
)
def test_damaged_sparse_weights_leave_no_file(pair, tmp_path, change, message):
    base, _, patch = pair
    write_format(patch, SPARSE, base, tmp_path / "update")
    with safe_open(tmp_path / "update", framework="np") as file:
        metadata = file.metadata()
    tensors = load_file(tmp_path / "update")
    ((name, value),) = change.items()
    if value is None:
        del tensors[name]
    elif isinstance(value, str):
        old = tensors[name]
        tensors[name] = old[::-1].copy() if value == "backwards" else old.astype(value)
    else:
        tensors[name] = value
    save_file(tensors, tmp_path / "update", metadata=metadata)
    with pytest.raises(ValueError, match=message):
        read_format(tmp_path / "update", SPARSE, base, tmp_path / "no.patch")
    assert not (tmp_path / "no.patch").exists()


def test_another_model_and_an_unknown_format_are_refused(pair, tmp_path):
    base, _, patch = pair
    stranger = patched_copy(base, tmp_path / "stranger", seed=9)
    for kind in FORMATS:
        with pytest.raises(ValueError, match="neither as in the backbone"):
            write_format(patch, kind, stranger, tmp_path / "no")
        assert not (tmp_path / "no").exists()
    with pytest.raises(ValueError, match="Unknown format 'zip'. There are disk-delta"):
        write_format(patch, "zip", base, tmp_path / "no")


@pytest.mark.parametrize("kind", FORMATS)
def test_tensors_in_other_dtypes_are_all_named_and_nothing_is_written(tmp_path, kind):
    bits = np.arange(6, dtype=np.uint16)
    base = folder_of(tmp_path / "base", {"x.proj": bits}, "bfloat16")
    create(base, patched_copy(base, tmp_path / "model", density=1), tmp_path / "x.patch")
    write_format(tmp_path / "x.patch", kind, base, tmp_path / "update")
    others = {"ids": np.arange(4), "mask": np.ones(4, np.bool_)}
    others["y.proj"] = np.ones(4, ml_dtypes.float8_e4m3fn)
    save_file(load_file(base / SINGLE) | others, base / SINGLE)
    update = without_manifest(tmp_path / "update")
    with pytest.raises(ValueError, match="and 3 tensors of .* are in other dtypes") as info:
        read_format(update, kind, base, tmp_path / "no.patch")
    for text in ("ids is I64", "mask is BOOL", "y.proj is F8_E4M3"):
        assert text in str(info.value)
    assert not (tmp_path / "no.patch").exists()


@pytest.mark.parametrize("kind", FORMATS)
def test_a_tied_head_that_the_patched_model_leaves_out_is_read_from_the_embedding(tmp_path, kind):
    bits = np.arange(6, dtype=np.uint16)
    base = folder_of(tmp_path / "base", dict.fromkeys(TIED, bits), "bfloat16")
    model = folder_of(tmp_path / "model", {TIED[0]: bits ^ np.uint16(3)}, "bfloat16")
    patch = create(base, model, tmp_path / "x.patch").path
    assert set(PatchFile(patch).changed()) == set(TIED)
    write_format(patch, kind, model, tmp_path / "update")
    read_format(tmp_path / "update", kind, base, tmp_path / "again.patch")
    assert (tmp_path / "again.patch").read_bytes() == patch.read_bytes()


@pytest.mark.parametrize("kind", FORMATS)
def test_a_head_that_is_left_out_and_changes_by_itself_is_refused(tmp_path, kind):
    bits, changes = np.arange(6, dtype=np.uint16), {}
    for name, flip in zip(TIED, (3, 5)):
        run = bits, bits ^ np.uint16(flip)
        changes[name] = Change("bfloat16", (6,), [run], optional=name == TIED[1])
    patch = write_patch(tmp_path / "x.patch", "difference", {}, changes)
    model = folder_of(tmp_path / "model", {TIED[0]: bits ^ np.uint16(3)}, "bfloat16")
    with pytest.raises(ValueError, match=f"has neither {TIED[1]}, .* Give the backbone"):
        write_format(patch, kind, model, tmp_path / "no")
    assert not (tmp_path / "no").exists()
