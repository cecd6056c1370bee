"""A GGUF model in several files, as llama-gguf-split cuts it."""

import struct

import numpy as np
import pytest
from safetensors.numpy import load_file

from safepatch_jax.io.gguf import convert_gguf, parts_of, read_gguf
from safepatch_jax.run.place import Place
from safepatch_jax.run.state import source_hashes
from tests.io.gguf_files import write_tiny

pytest.importorskip("gguf", reason="reading GGUF needs the gguf package: pip install gguf")


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


def number(key, value):
    return text(key) + struct.pack("<II", 4, value)


def cut(path, sizes, *, change=lambda part, places: places):
    """Write a file's tensors into parts of so many tensors; the metadata goes into the first."""
    data, tensors = path.read_bytes(), read_gguf(path)[1]
    pairs = struct.unpack("<Q", data[16:24])[0]
    metadata = data[24 : data.index(text(next(iter(tensors))))]
    paths, names = [], iter(tensors)
    for part, size in enumerate(sizes):
        places = change(part, [part, len(sizes), sum(sizes)])
        keys = ("split.no", "split.count", "split.tensors.count")
        header = b"".join(number(key, value) for key, value in zip(keys, places))
        chosen = [next(names) for _ in range(size)]
        infos, blob = b"", b""
        for name in chosen:
            x = tensors[name].read()
            shape = x.shape[::-1]
            infos += text(name) + struct.pack(
                f"<I{len(shape)}QIQ", len(shape), *shape, 0, len(blob)
            )
            blob += x.tobytes() + b"\0" * (-x.nbytes % 32)
        begin = b"GGUF" + struct.pack("<IQQ", 3, size, 3 + (pairs if part == 0 else 0))
        begin += (metadata if part == 0 else b"") + header + infos
        begin += b"\0" * (-len(begin) % 32)
        paths.append(path.with_name(f"x-{part + 1:05d}-of-{len(sizes):05d}.gguf"))
        paths[-1].write_bytes(begin + blob)
    return paths


@pytest.fixture
def whole(tmp_path):
    write_tiny(tmp_path / "whole.gguf", "llama", "F32", tied=False)
    return tmp_path / "whole.gguf"


@pytest.mark.parametrize("given", [0, 1, 2])
def test_any_part_gives_the_whole_model(whole, tmp_path, given):
    count = len(read_gguf(whole)[1])
    paths = cut(whole, [2, 0, count - 2])
    convert_gguf(whole, tmp_path / "one")
    convert_gguf(paths[given], tmp_path / "parts")
    one, parts = (load_file(tmp_path / x / "model.safetensors") for x in ("one", "parts"))
    assert one.keys() == parts.keys() and all(np.array_equal(one[k], parts[k]) for k in one)
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_a_change_of_any_part_is_another_source(whole):
    count = len(read_gguf(whole)[1])
    paths = cut(whole, [5, count - 5])
    before = source_hashes(Place("gguf", paths[0]))
    assert parts_of(paths[1]) == paths and len(before) == 2
    data = bytearray(paths[1].read_bytes())
    data[-1] ^= 1
    paths[1].write_bytes(data)
    assert source_hashes(Place("gguf", paths[0])) != before


def missing(paths):
    paths[1].unlink()
    return paths[0]


def renamed(paths):
    return paths[0].rename(paths[0].with_name("model.gguf"))


def swapped(paths):
    first, second = (path.read_bytes() for path in paths)
    paths[0].write_bytes(second)
    paths[1].write_bytes(first)
    return paths[0]


@pytest.mark.parametrize(
    "spoil, words",
    [
        (missing, ["part 1 of 2", "not beside it: x-00002-of-00002.gguf", "llama-gguf-split"]),
        (renamed, ["part 1 of 2", "its name does not say where the others are", "--merge"]),
        (swapped, ["is not part 1 of 2 of the model", "Copy all parts"]),
    ],
)
def test_parts_that_do_not_fit_say_so(whole, spoil, words):
    path = spoil(cut(whole, [5, len(read_gguf(whole)[1]) - 5]))
    with pytest.raises(ValueError) as raised:
        read_gguf(path)
    assert all(part in str(raised.value) for part in words), raised.value


def test_a_number_of_tensors_that_is_wrong(whole):
    count = len(read_gguf(whole)[1])
    paths = cut(whole, [5, count - 5], change=lambda part, places: [*places[:2], count + 1])
    with pytest.raises(ValueError, match=f"hold {count} tensors, their metadata says {count + 1}"):
        read_gguf(paths[0])
