"""Every reader of models is fed damaged files: what comes of it is a model, or one short line.

The seeds are fixed and the time is bounded. Memory is the peak of the process, which Linux resets.
"""

import contextlib
import json
import pathlib
import random
import shutil
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from safepatch_jax.data.tokenizer import load_tokenizer
from safepatch_jax.io.folder import Checkpoint
from safepatch_jax.io.gguf import read_gguf
from safepatch_jax.io.gguf_config import read_model
from safepatch_jax.io.gguf_tokenizer import write_tokenizer
from safepatch_jax.io.hf import check_keys
from safepatch_jax.io.safetensors_file import INDEX
from safepatch_jax.models.config import config_from_hf, read_hf_config, stop_ids
from safepatch_jax.models.table import param_table
from safepatch_jax.testing import tiny_config, write_tiny_model
from tests.io.gguf_files import write_tiny

SECONDS = 1.0  # for each reader
LEAST = 30  # tries, however slow the machine
MEMORY = 150_000  # kB that a file of some kB may cost
STATUS, REFS = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")
DEEP = "@deep@"  # stands for a list of 5,000 levels
NASTY = [
    None,
    True,
    -1,
    0,
    1.5,
    2**63,
    10**400,
    10**4000,
    float("nan"),
    float("inf"),
    "",
    "x" * 100_000,
    "\x1b[2J\nerror: all is well",
    "../../etc/passwd",
    "\ud800",
    [],
    [[]],
    {},
    {"a": 1},
    DEEP,
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_tiny_model(tmp_path_factory.mktemp("fuzz") / "model", shard_bytes=40_000)
    (folder / "special_tokens_map.json").write_text('{"bos_token": "<|im_start|>"}')
    return folder


def damaged_bytes(data, rng):
    """Flip, cut, repeat or insert, mostly near the beginning, where headers are."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        end = len(data) if rng.random() < 0.3 else min(len(data), 600)
        at = rng.randrange(end + 1) if data else 0
        kind = rng.randrange(5)
        if kind < 2 and at < len(data):
            data[at] = rng.randrange(256)
        elif kind == 2:
            data[at : at + 8] = rng.choice([b"\xff" * 8, b"\0" * 8, b"\0\0\0\0\0\0\0\x10"])
        elif kind == 3:
            del data[at : at + rng.choice([1, 9, 500])]
        else:
            data[at:at] = rng.choice([b"\xef\xbb\xbf", b'{"', b"[" * 3000, b"9" * 5000, b"\n"])
    return bytes(data)


def damaged_json(data, rng):
    """Put something else in the place of a value or a key."""
    value = json.loads(data)
    node = value
    while True:
        if not isinstance(node, (dict, list)) or not node:
            break
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if rng.random() < 0.5 or not isinstance(node[key], (dict, list)) or not node[key]:
            node[key] = rng.choice(NASTY)
            if isinstance(node, dict) and rng.random() < 0.1:
                node["k" * rng.choice([1, 100_000])] = rng.choice(NASTY)
            break
        node = node[key]
    return json.dumps(value).replace(f'"{DEEP}"', "[" * 5000 + "]" * 5000).encode()


def damaged(data, rng, is_json):
    return damaged_json(data, rng) if is_json and rng.random() < 0.6 else damaged_bytes(data, rng)


def peak():
    for line in STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    return 0


@contextlib.contextmanager
def bounded_memory():
    try:
        REFS.write_text("5")  # the peak becomes what is held now
    except OSError:
        yield
        return
    before = peak()
    yield
    assert peak() - before < MEMORY


def feed(path, read, seed, seconds=SECONDS):
    """Damage a file again and again; return how many were read and how many refused."""
    good, rng, counts = path.read_bytes(), random.Random(seed), {"read": 0, "refused": 0}
    read()  # imports what it needs, outside of the time
    end, tries = time.monotonic() + seconds, 0
    with bounded_memory():
        while tries < LEAST or time.monotonic() < end:
            tries += 1
            path.write_bytes(damaged(good, rng, path.suffix == ".json"))
            try:
                read()
                counts["read"] += 1
            except ValueError as error:
                counts["refused"] += 1
                assert len(str(error)) < 2500 and "\n" not in str(error), str(error)[:3000]
    path.write_bytes(good)
    assert counts["refused"] > 3, counts
    return counts


def copied(model, tmp_path):
    return pathlib.Path(shutil.copytree(model, tmp_path / "model"))


def test_config(model, tmp_path):
    feed(copied(model, tmp_path) / "config.json", lambda: read_hf_config(tmp_path / "model"), 1)


def test_generation_config(model, tmp_path):
    folder, config = copied(model, tmp_path), read_hf_config(model)
    feed(folder / "generation_config.json", lambda: stop_ids(folder, config), 2, 0.5)


def check(folder, config):
    checkpoint = Checkpoint(folder)
    assert checkpoint.notes is not None
    check_keys(checkpoint, param_table(config), config)


@pytest.mark.parametrize("name", [INDEX, "adapter_config.json"])
def test_index_and_adapter(model, tmp_path, name):
    folder, config = copied(model, tmp_path), read_hf_config(model)
    path = folder / name
    if name == INDEX:
        feed(path, lambda: check(folder, config), 3)
        return
    rng = random.Random(3)
    for _ in range(50):  # what cannot be read is an adapter's all the same
        path.write_bytes(damaged(b'{"peft_type": "LORA", "base_model_name_or_path": 3}', rng, True))
        (note,) = Checkpoint(folder).notes
        assert "merge_and_unload" in note and len(note) < 1000


def test_safetensors(model, tmp_path):
    folder, config = copied(model, tmp_path), read_hf_config(model)
    feed(sorted(folder.glob("*.safetensors"))[0], lambda: check(folder, config), 4)


def test_torch(model, tmp_path):
    torch = pytest.importorskip("torch", reason="the files are torch's: pip install torch")
    folder, config, tensors = copied(model, tmp_path), read_hf_config(model), {}
    for path in folder.glob("*.safetensors"):
        tensors |= {name: torch.tensor(x) for name, x in load_file(path).items()}
        path.unlink()
    (folder / INDEX).unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    feed(folder / "pytorch_model.bin", lambda: check(folder, config), 5)


def test_gguf(tmp_path):
    pytest.importorskip("gguf", reason="reading GGUF needs the gguf package: pip install gguf")
    path, out = tmp_path / "x.gguf", tmp_path / "out"
    write_tiny(path)
    out.mkdir()

    def read():
        metadata, tensors = read_gguf(path)
        read_model(metadata, tensors, str(path))
        write_tokenizer(metadata, out, str(path))

    feed(path, read, 6)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
)
def test_tokenizer(model, tmp_path, name):
    folder = copied(model, tmp_path)
    feed(folder / name, lambda: load_tokenizer(folder, 264), 7)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, "NaN", "[1]", "", "\x00", "\ud83d{}", "null"],
)
@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", INDEX, "tokenizer_config.json", "tokenizer.json"],
)
def test_files_of_other_contents_name_the_file_or_the_folder(model, tmp_path, name, text):
    folder, config = copied(model, tmp_path), config_from_hf(tiny_config())
    (folder / name).write_text(text, errors="replace")
    with pytest.raises(ValueError) as raised:
        read_hf_config(folder)
        stop_ids(folder, config)
        Checkpoint(folder)
        load_tokenizer(folder, 264)
    message = str(raised.value)
    assert name in message or name == "tokenizer.json" and str(folder) in message, message
    assert len(message) < 700 and "\n" not in message


def test_a_zip_that_unpacks_to_more_than_it_holds(model, tmp_path):
    pytest.importorskip("torch", reason="the files are torch's: pip install torch")
    import zipfile

    folder = copied(model, tmp_path)
    for path in folder.glob("model*"):
        path.unlink()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(np.zeros(30_000_000, np.uint8)))
    with bounded_memory(), pytest.raises(ValueError, match="unpack to 30,000,000 bytes, more than"):
        Checkpoint(folder)
