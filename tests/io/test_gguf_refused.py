"""GGUF files that are refused: damaged, hostile, or of a model that we cannot represent."""

import struct

import numpy as np
import pytest

from safepatch_jax.io.gguf import convert_gguf, read_gguf
from safepatch_jax.io.gguf_config import read_model
from tests.io.gguf_files import (
    write_tiny,
)


def test_not_a_gguf_file(tiny, tmp_path):
    pytest.importorskip("gguf", reason="reading GGUF needs the gguf package: pip install gguf")
    with pytest.raises(
        ValueError, match=r"model\.safetensors cannot be read as GGUF: .*another format"
    ):
        convert_gguf(tiny / "model.safetensors", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["falcon", "gemma"])
def test_another_architecture(tmp_path, name):
    gguf = pytest.importorskip(
        "gguf", reason="reading GGUF needs the gguf package: pip install gguf"
    )
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", name)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        ValueError,
        match=rf"other\.gguf: architecture '{name}' is not supported; supported: llama, qwen2 "
        r".*Use the model's Hugging Face folder",
    ):
        convert_gguf(tmp_path / "other.gguf", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["other.gguf"]


@pytest.mark.parametrize(
    "meta, drop, message",
    [
        (
            {},
            ["block_count", "context_length"],
            r"llama\.block_count is missing .*llama\.context_length is missing",
        ),
        ({"attention.head_count": 0}, [], "head_count = 0 \\(a whole number from 1 on\\)"),
        ({"attention.head_count_kv": 3}, [], "heads must divide by key-value heads"),
        ({"attention.head_count": 3, "attention.head_count_kv": 3}, [], "width by heads"),
        ({"attention.head_count": [4, 4]}, [], "head_count = array"),
        ({"attention.head_count": "4"}, [], "head_count = '4'"),
        ({"attention.head_count": True}, [], "head_count = True"),
        (
            {"embedding_length": "x" * 10_000, "block_count": "y"},
            [],
            "block_count = 'y'.*embedding_length = 'x+ \\(a whole",
        ),
        ({"block_count": 2**31}, [], "block_count = 2147483648, but the file holds 21 tensors"),
        ({"block_count": 3}, [], r"9 missing: blk\.2\.attn_norm\.weight"),
        ({"block_count": 1}, [], r"9 unknown: 'blk\.1\.attn_norm\.weight'"),
        (
            {"embedding_length": 128, "rope.dimension_count": 32},
            [],
            r"'token_embd\.weight' has shape .* says \(266, 128\)",
        ),
        ({"attention.key_length": 63}, [], "the head size be even"),
        ({"attention.value_length": 32}, [], "value_length = 32 \\(only 64 is supported\\)"),
        ({"rope.dimension_count": 32}, [], "rope.dimension_count = 32 \\(only 64"),
        ({"rope.scaling.type": "yarn"}, [], "rope.scaling.type = 'yarn' \\(only 'none'"),
        ({"rope.scaling.factor": 2.0}, [], r"rope\.scaling\.factor = 2\.0 \(unknown\)"),
        ({"rope.freq_base": float("nan")}, [], "freq_base = nan"),
        ({"expert_count": 8}, [], "expert_count = 8"),
        ({"logit_scale": 2.0}, [], r"llama\.logit_scale = 2\.0 \(unknown\)"),
        ({"attention.sliding_window": "all"}, [], "sliding_window = 'all'"),
        (
            {"tokenizer.ggml.eot_token_id": 266},
            [],
            "eot_token_id = 266: an id is a row of the embedding, which has 266",
        ),
        ({}, ["token_embd.weight"], "token_embd.weight is missing"),
        (
            {},
            ["output_norm.weight", "blk.0.attn_v.weight"],
            r"2 missing: blk\.0\.attn_v\.weight; output_norm\.weight",
        ),
    ],
)
def test_metadata_and_tensors_that_do_not_fit(tmp_path, meta, drop, message):
    write_tiny(tmp_path / "x.gguf", meta=meta, drop=drop)
    with pytest.raises(ValueError, match=r"x\.gguf: .*" + message):
        convert_gguf(tmp_path / "x.gguf", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "blk.0.attn_q.weight/../x",
        "blk.0.attn_q.bias",
        "rope_freqs.weights",
    ],
)
def test_unknown_tensor_names(tmp_path, name):
    write_tiny(tmp_path / "x.gguf", extra={name: np.zeros(256, np.float32)})
    with pytest.raises(ValueError) as error:
        convert_gguf(tmp_path / "x.gguf", tmp_path / "out")
    assert f"1 unknown: {name!r}" in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


def test_windows_of_other_families_are_refused(tmp_path):
    write_tiny(tmp_path / "x.gguf", "qwen2", meta={"attention.sliding_window": 64})
    with pytest.raises(
        ValueError,
        match="qwen2.attention.sliding_window = 64 .not supported for this architecture",
    ):
        convert_gguf(tmp_path / "x.gguf", tmp_path / "out")


def test_types_that_cannot_be_dequantised(tmp_path):
    write_tiny(
        tmp_path / "x.gguf",
        change=lambda name, x: x.astype(np.int32) if name == "blk.1.ffn_up.weight" else x,
    )
    with pytest.raises(
        ValueError, match=r"'blk\.1\.ffn_up\.weight' has the type I32, which cannot .*Take another"
    ):
        convert_gguf(tmp_path / "x.gguf", tmp_path / "out")


def test_damaged_files_raise_nothing_but_value_errors(tmp_path):
    """Cut anywhere, or with random bytes in the header."""
    path = tmp_path / "x.gguf"
    write_tiny(path)
    good = path.read_bytes()
    end = read_gguf(path)[1]["token_embd.weight"].offset
    for size in [*range(0, end, 131), end, end + 1000, len(good) - 100_000]:
        path.write_bytes(good[:size])
        with pytest.raises(
            ValueError,
            match=r"x\.gguf cannot be read as GGUF: .*truncated, damaged or another format",
        ):
            read_gguf(path)
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(500):
        data = bytearray(good)
        for place in rng.integers(end, size=rng.integers(1, 5)):
            data[place] = rng.integers(256)
        path.write_bytes(data)
        try:
            metadata, tensors = read_gguf(path)
            assert all(0 <= x.offset and x.offset + x.size <= len(data) for x in tensors.values())
            outcomes.add("read")
            read_model(metadata, tensors, str(path))
        except ValueError as error:
            assert "x.gguf" in str(error)
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


@pytest.mark.parametrize(
    "body",
    [
        struct.pack("<IQQ", 3, 0, 2**63),
        struct.pack("<IQQ", 3, 2**63, 0),
        struct.pack("<IQQ", 1, 0, 0),
        struct.pack(">IQQ", 3, 0, 0),
        struct.pack("<IQQ", 3, 0, 1)
        + struct.pack("<Q1sIIQ", 1, b"a", 9, 4, 2**60),  # an array of 2^60 numbers
        struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"a", 9, 8, 2**60),  # of strings
        struct.pack("<IQQ", 3, 0, 1)
        + struct.pack("<Q1sI", 1, b"a", 9)
        + struct.pack("<IQ", 9, 1) * 5000,  # arrays in arrays
        struct.pack("<IQQ", 3, 0, 1)
        + struct.pack("<Q1sIQ", 1, b"a", 8, 2**63),  # a string of 2^63 bytes
        struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sI", 1, b"a", 77),
        struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q2sII", 2, b"\xff\xfe", 4, 1),
        struct.pack("<IQQ", 3, 0, 2) + struct.pack("<Q1sII", 1, b"a", 4, 1) * 2,  # a key twice
        struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q17sII", 17, b"general.alignment", 4, 0),
        struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q1sI4QIQ", 1, b"w", 4, *[2**62] * 4, 0, 0),
        struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q1sIQIQ", 1, b"w", 1, 4, 0, 2**63),
        struct.pack("<IQQ", 3, 1, 0)
        + struct.pack("<Q1sIQIQ", 1, b"w", 1, 4, 99, 0),  # an unknown type
        struct.pack("<IQQ", 3, 1, 0)
        + struct.pack("<Q1sIQIQ", 1, b"w", 1, 33, 8, 0)
        + bytes(99),  # no whole block
        struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q1sI", 1, b"w", 2**31),
    ],
)
def test_hostile_headers(tmp_path, body):
    pytest.importorskip("gguf", reason="reading GGUF needs the gguf package: pip install gguf")
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + body)
    with pytest.raises(
        ValueError, match=r"x\.gguf cannot be read as GGUF: .*truncated, damaged or another format"
    ):
        convert_gguf(tmp_path / "x.gguf", tmp_path / "out")
