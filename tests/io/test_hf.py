"""Model folders: HF -> here -> HF is bitwise, transformers loads what we write, and bad folders are
explained."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from safepatch_jax.io.folder import Checkpoint, stored_dtypes
from safepatch_jax.io.hf import load_params, save_model
from safepatch_jax.io.safetensors_file import INDEX, SINGLE
from safepatch_jax.io.stored import Stored
from safepatch_jax.models.decoder import Decoder
from safepatch_jax.models.families import FAMILIES
from safepatch_jax.models.table import param_table, unnest
from safepatch_jax.runtime import files
from safepatch_jax.testing import tiny_config, write_tiny_model
from tests.conftest import sharder_of

MESHES = {"1 device": (1, 1), "8 devices": (8, 1), "8 devices, tensor 2": (8, 2)}
COMPANIONS = {
    "tokenizer.model": b"\x00\xffsentencepiece",
    "merges.txt": "a b\r\nü\n".encode(),
    "special_tokens_map.json": b'{ "a" :1}',
    "chat_template.jinja": b"{{ messages }}\r\n",
}


def tensors_of(folder):
    """All tensors as raw bits, and the file in which each stands."""
    bits, home = {}, {}
    for path in sorted(pathlib.Path(folder).glob("*.safetensors")):
        for name, x in load_file(path).items():
            assert name not in home
            bits[name], home[name] = (
                (x.dtype, x.view(np.uint16 if x.itemsize == 2 else np.uint32)),
                path.name,
            )
    return bits, home


def assert_same_tensors(folder, other):
    ours, theirs = tensors_of(folder)[0], tensors_of(other)[0]
    assert ours.keys() == theirs.keys()
    for name, (dtype, bits) in ours.items():
        assert dtype == theirs[name][0]
        np.testing.assert_array_equal(bits, theirs[name][1], err_msg=name)


def rewrite(folder, change):
    """Apply a change to the tensors of a folder with one weight file."""
    save_file(change(load_file(folder / SINGLE)), folder / SINGLE, metadata={"format": "pt"})


def noise(tensors):
    """Replace all values by random bits: NaN with payloads, infinities, subnormal numbers, -0.0."""
    rng = np.random.default_rng(0)
    return {
        name: np.frombuffer(rng.bytes(x.nbytes), x.dtype).reshape(x.shape)
        for name, x in tensors.items()
    }


def failure(folder, sharder):
    with pytest.raises(ValueError) as raised:
        load_params(folder, sharder)
    return str(raised.value)


@pytest.fixture
def model(tmp_path):
    return write_tiny_model(tmp_path / "model")


@pytest.fixture
def sharded(tmp_path):
    return write_tiny_model(tmp_path / "sharded", shard_bytes=40_000)


def written_by_transformers(folder, family, dtype, layout):
    """Random bits in the tensors of a tiny model, written by save_pretrained, or by torch.save as
    older versions did."""
    torch = pytest.importorskip(
        "torch", reason="the folders are written by transformers: pip install torch"
    )
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = tiny_config(model_type=family)
    config = AutoConfig.for_model(
        **{k: v for k, v in raw.items() if k not in ("torch_dtype", "architectures")}
    )
    model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
    rng = np.random.default_rng(0)
    bits, limit = (torch.int32, 2**31) if dtype == "float32" else (torch.int16, 2**15)
    with torch.no_grad():
        for x in model.parameters():
            x.view(bits).copy_(torch.tensor(rng.integers(-limit, limit, x.shape)))
    model.save_pretrained(folder, max_shard_size="20KB" if "sharded" in layout else "1GB")
    return as_torch_files(folder, model.state_dict()) if "torch" in layout else folder


def as_torch_files(folder, state):
    """Replace safetensors files by torch files of the same cut; return the folder of the former."""
    import torch

    reference = folder.with_name("reference")
    reference.mkdir()
    for path in [*folder.glob("*.safetensors"), *folder.glob(INDEX)]:
        path.rename(reference / path.name)
    weight_map = {}
    for path in sorted(reference.glob("*.safetensors")):
        name = path.name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")
        tensors = {tensor: state[tensor] for tensor in load_file(path)}
        torch.save(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    if (reference / INDEX).is_file():
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / "pytorch_model.bin.index.json").write_text(text)
    return reference


@pytest.mark.parametrize(
    "layout", ["one safetensors", "sharded safetensors", "one torch", "sharded torch"]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_bitwise(tmp_path, family, dtype, layout):
    source = tmp_path / "source"
    reference = written_by_transformers(source, family, dtype, layout)
    assert ("sharded" in layout) == (len(list(reference.glob("*.safetensors"))) > 1)
    for name, mesh in MESHES.items():
        config, params = load_params(source, sharder_of(*mesh))
        assert {str(x.dtype) for x in jax.tree.leaves(params)} == {dtype}
        assert {len(x.sharding.device_set) for x in jax.tree.leaves(params)} == {mesh[0]}
        out = tmp_path / name
        written = save_model(
            out,
            params,
            config,
            source,
            stored=stored_dtypes(source),
            shard_bytes=20_000 if mesh[0] == 1 else 10**9,
        )
        assert (out / INDEX).exists() == (mesh[0] == 1)
        assert_same_tensors(out, reference)
        assert written == {name: x.sha256() for name, x in Checkpoint(source).tensors.items()}


def test_only_the_bytes_of_a_part_are_read(sharded):
    """A row range of one tensor reads as many bytes as it holds; the rest of the file may be
    missing."""
    tensor = Checkpoint(sharded).tensors["model.layers.1.mlp.down_proj.weight"]
    whole = tensor.read()
    rows = np.empty((8, 64), np.float32)
    np.testing.assert_array_equal(tensor.read(rows, 16 * 64), whole[16:24])
    os.truncate(tensor.path, tensor.offset + 24 * 64 * 4)
    np.testing.assert_array_equal(tensor.read(rows, 16 * 64), whole[16:24])
    for read in (
        lambda: tensor.read(rows, 17 * 64),
        lambda: tensor.read_box((slice(0, 4), slice(0, 4)), (32, 64)),
    ):
        with pytest.raises(
            ValueError,
            match="truncated or was changed while it was read. Copy or download it again",
        ):
            read()


@pytest.mark.parametrize("mesh", [(1, 1), (8, 1), (8, 2)])
def test_every_byte_is_read_once_however_many_devices_share_it(model, monkeypatch, mesh):
    read = []
    preadv, read_box = os.preadv, Stored.read_box

    def counted_preadv(*args):
        read.append(preadv(*args))
        return read[-1]

    def counted(tensor, index, split):
        part = read_box(tensor, index, split)
        read.append(part.nbytes)
        return part

    monkeypatch.setattr(os, "preadv", counted_preadv)
    monkeypatch.setattr(Stored, "read_box", counted)
    _, params = load_params(model, sharder_of(*mesh))
    assert (
        sum(read)
        == sum(x.nbytes for x in jax.tree.leaves(params))
        == sum(x.size for x in Checkpoint(model).tensors.values())
    )


def test_index_of_a_sharded_export(sharded):
    index = json.loads((sharded / INDEX).read_text())
    bits, home = tensors_of(sharded)
    assert len(set(home.values())) > 2 and index["weight_map"] == home
    assert index["metadata"]["total_size"] == sum(x.nbytes for _, x in bits.values())
    assert index["metadata"]["total_parameters"] == sum(x.size for _, x in bits.values())
    for name in set(home.values()):
        total = sum(bits[tensor][1].nbytes for tensor, file in home.items() if file == name)
        assert total <= 40_000 or list(home.values()).count(name) == 1
        with safe_open(sharded / name, "np") as f:
            assert f.metadata() == {"format": "pt"}


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_and_we_read_each_other(tmp_path, sharder, tied):
    torch = pytest.importorskip("torch", reason="loads the folder with torch: pip install torch")
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    start = write_tiny_model(tmp_path / "start", tie_word_embeddings=tied)
    torch.manual_seed(0)
    written = LlamaForCausalLM(LlamaConfig.from_pretrained(start)).to(torch.float32)
    written.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    config, params = load_params(tmp_path / "theirs", sharder)
    save_model(tmp_path / "ours", params, config, tmp_path / "theirs", shard_bytes=30_000)
    assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens_BT = np.random.default_rng(0).integers(0, 264, (2, 16))
    reference = model.eval()(torch.tensor(tokens_BT)).logits.detach().numpy()
    logits_BTV, _ = jax.jit(Decoder(config, jnp.float32, None).apply)(
        {"params": params}, tokens_BT, np.arange(16)[None].repeat(2, 0), np.ones((2, 16), bool)
    )
    assert np.max(np.abs(logits_BTV - reference)) <= 1e-5 * np.max(np.abs(reference))


def test_companions_are_copied_byte_for_byte_and_code_is_not(model, tmp_path, sharder):
    for name, content in COMPANIONS.items():
        (model / name).write_bytes(content)
    for name in ("modeling_llama.py", "pytorch_model.bin", "run.sh"):
        (model / name).write_text("raise SystemExit")
    config, params = load_params(model, sharder)
    save_model(tmp_path / "out", params, config, model)
    wanted = {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        SINGLE,
        *COMPANIONS,
    }
    assert {p.name for p in (tmp_path / "out").iterdir()} == wanted
    for name in wanted - {SINGLE}:
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes(), name
    assert not list((tmp_path / "out").rglob("*.py"))


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_export_in_another_dtype_says_so(model, tmp_path, sharder, key):
    raw = json.loads((model / "config.json").read_text())
    raw[key] = raw.pop("torch_dtype")  # as transformers writes it now, and as it did
    files.write_json(model / "config.json", raw)
    config, params = load_params(model, sharder)
    save_model(tmp_path / "out", params, config, model, dtype="bfloat16")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        **raw,
        key: "bfloat16",
        "torch_dtype": "bfloat16",
    }
    out = load_file(tmp_path / "out" / SINGLE)
    for name, x in load_file(model / SINGLE).items():
        np.testing.assert_array_equal(out[name], x.astype(jnp.bfloat16))
        assert out[name].dtype == jnp.bfloat16
    assert load_params(tmp_path / "out", sharder)[0].dtype == "bfloat16"


def test_a_second_head_that_differs_from_the_tied_embedding(model, sharder):
    rewrite(model, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] + 1})
    assert "lm_head.weight differs from the embedding, though config.json ties the two" in failure(
        model, sharder
    )


def test_a_missing_head(tmp_path, sharder):
    model = write_tiny_model(tmp_path / "model")
    files.write_json(model / "config.json", tiny_config(tie_word_embeddings=False))
    assert (
        "1 missing: lm_head.weight (if the head is the embedding, set tie_word_embeddings"
        in failure(model, sharder)
    )


def test_harmless_extra_tensors_are_ignored(model, sharder):
    rewrite(
        model,
        lambda t: (
            t
            | {
                "lm_head.weight": t["model.embed_tokens.weight"],
                "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
            }
        ),
    )
    config, params = load_params(model, sharder)
    assert unnest(params).keys() == {row.path for row in param_table(config)}


def test_truncated_weights(model, sharder):
    os.truncate(model / SINGLE, 50_000)
    message = failure(model, sharder)
    assert f"{SINGLE} cannot be read as safetensors" in message
    assert "truncated or damaged (50000 bytes): copy or download it again" in message


def test_missing_shard(sharded, sharder):
    name = tensors_of(sharded)[1]["model.norm.weight"]
    (sharded / name).unlink()
    assert (
        f"{INDEX} names weight files that are not there: {name}. Copy them into {sharded}"
        in failure(sharded, sharder)
    )


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "..", "sub/x.safetensors", "c:x", "..\\x", ""]
)
def test_index_that_leaves_the_folder(sharded, sharder, name):
    edit_index(sharded, lambda index: index["weight_map"].update({"model.norm.weight": name}))
    assert f"refusing the file name {name!r}: it must be a plain name" in failure(sharded, sharder)


def test_index_that_places_a_tensor_in_another_file(sharded, sharder):
    home = tensors_of(sharded)[1]
    other = next(name for name in home.values() if name != home["model.norm.weight"])
    edit_index(sharded, lambda index: index["weight_map"].update({"model.norm.weight": other}))
    assert f"{INDEX} places 1 tensors in files that do not hold them: model.norm.weight" in failure(
        sharded, sharder
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"weight_map": {',
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": null}',
        '{"weight_map": {"x": 3}}',
    ],
)
def test_broken_index(sharded, sharder, text):
    (sharded / INDEX).write_text(text)
    assert str(sharded / INDEX) in failure(sharded, sharder)


NO_WEIGHTS = f"holds no weights: none of {SINGLE}, {INDEX}, pytorch_model.bin"


@pytest.mark.parametrize(
    "other, part",
    [
        ("README.md", NO_WEIGHTS),
        (
            "pytorch_model-00001-of-00002.bin",
            "Found pytorch_model-00001-of-00002.bin. If they are parts of a model",
        ),
        ("consolidated.00.pth", "holds consolidated.00.pth, weights in the original format"),
        ("model.gguf", "holds model.gguf: give the file, gguf:"),
        ("adapter_model.safetensors", "merge_and_unload"),
    ],
)
def test_no_weights(model, sharder, other, part):
    (model / SINGLE).rename(model / other)
    message = failure(model, sharder)
    assert part in message and ("Found" in message) == ("Found" in part)


def test_a_tensor_that_the_index_does_not_list(sharded, sharder):
    path = sharded / tensors_of(sharded)[1]["model.norm.weight"]
    save_file(load_file(path) | {"stray": np.ones(3, np.float32)}, path, metadata={"format": "pt"})
    assert "1 unexpected: stray" in failure(sharded, sharder)


@pytest.mark.parametrize("name", [SINGLE, "tokenizer.json", "config.json"])
def test_links_that_leave_the_folder_are_refused_and_those_of_the_cache_are_not(
    tmp_path, sharder, name
):
    """The cache of Hugging Face has snapshots/REVISION/NAME -> ../../blobs/HASH."""
    for place, target, good in (
        ("snapshots/abc", "blobs/0f", True),
        ("models/abc", "elsewhere", False),
    ):
        folder = write_tiny_model(tmp_path / place)
        (tmp_path / target).parent.mkdir(exist_ok=True)
        (folder / name).rename(tmp_path / target)
        (folder / name).symlink_to(os.path.relpath(tmp_path / target, folder))
        out = tmp_path / f"out_{target.replace('/', '_')}"
        if good:
            config, params = load_params(folder, sharder)
            save_model(out, params, config, folder)
            assert not (out / name).is_symlink() and (out / name).is_file()
        else:
            with pytest.raises(
                ValueError,
                match="is a link that leaves its folder .* copy the file itself into the folder",
            ):
                config, params = load_params(folder, sharder)
                save_model(out, params, config, folder)
            assert not out.exists()


def test_numbers_beyond_the_range_of_the_dtype(model, tmp_path, sharder):
    rewrite(model, lambda t: t | {"model.norm.weight": np.full(32, 1e5, np.float32)})
    config, params = load_params(model, sharder)
    with pytest.raises(
        ValueError,
        match="model.norm.weight holds numbers beyond the range of float16. Use bfloat16, float32",
    ):
        save_model(tmp_path / "out", params, config, model, dtype="float16")
    assert not (tmp_path / "out").exists()


def test_all_that_does_not_fit_is_collected(model, sharder):
    def spoil(t):
        del t["model.norm.weight"], t["model.layers.1.mlp.up_proj.weight"]
        t["model.layers.0.mlp.gate_proj.weight"] = np.ascontiguousarray(
            t["model.layers.0.mlp.gate_proj.weight"].T
        )
        t["model.layers.0.mlp.down_proj.weight"] = t["model.layers.0.mlp.down_proj.weight"].astype(
            np.int32
        )
        return t | {
            "model.layers.2.mlp.up_proj.weight": np.ones((64, 32), np.float32),
            "v_head.weight": np.ones(3, np.float32),
        }

    rewrite(model, spoil)
    message = failure(model, sharder)
    for part in (
        f"{model}: the weights do not fit config.json",
        "2 missing: model.layers.1.mlp.up_proj.weight, model.norm.weight",
        "2 unexpected: model.layers.2.mlp.up_proj.weight, v_head.weight",
        "model.layers.0.mlp.gate_proj.weight has shape (32, 64), config.json says (64, 32)",
        "model.layers.0.mlp.down_proj.weight has dtype I32, supported are float32, bfloat16, "
        "float16",
    ):
        assert part in message, part


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_each_tensor_is_stored_in_its_own_dtype_again(model, tmp_path, mesh):
    kinds = {
        "model.layers.1.mlp.up_proj.weight": np.float16,
        "model.norm.weight": jnp.bfloat16,
        "model.layers.0.self_attn.q_proj.weight": jnp.bfloat16,
        "model.layers.1.self_attn.q_proj.weight": np.float16,
    }
    rewrite(model, lambda t: {name: x.astype(kinds.get(name, x.dtype)) for name, x in t.items()})
    config, params = load_params(model, sharder_of(*mesh))
    assert {path: str(x.dtype) for path, x in unnest(params).items() if x.dtype != jnp.float32} == {
        "final_norm/scale": "bfloat16"
    }  # layers of different dtypes are held as float32, which holds both
    save_model(tmp_path / "out", params, config, model, stored=stored_dtypes(model))
    assert_same_tensors(tmp_path / "out", model)


def test_export_does_not_overwrite_unless_told(model, tmp_path, sharder):
    config, params = load_params(model, sharder)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="out' exists and is not empty; nothing was written"):
        save_model(tmp_path / "out", params, config, model)
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    save_model(tmp_path / "out", params, config, model, replace=True)
    assert_same_tensors(tmp_path / "out", model)
    assert not (tmp_path / "out" / "mine.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


FULL_DISK = """
import resource, sys
from safepatch_jax.io.hf import load_params, save_model
from safepatch_jax.mesh import Sharder, make_mesh

config, params = load_params(sys.argv[1], Sharder(make_mesh("data:1")))
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
for target in sys.argv[2:]:
    try:
        save_model(target, params, config, sys.argv[1], shard_bytes=int(5e4), replace=True)
    except OSError as error:
        print(error)
"""


def test_interrupted_export_leaves_nothing_and_keeps_the_old_folder(tmp_path, sharder):
    """The limit is hit by a feed-forward matrix of 131 kB, when companions and a first shard of 50
    kB are written."""
    model = write_tiny_model(tmp_path / "model", intermediate_size=1024)
    old = write_tiny_model(tmp_path / "old", seed=1)
    before = files.folder_hashes(old)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(model), str(old), str(tmp_path / "new")],
        text=True,
        capture_output=True,
        env=environment,
        cwd=pathlib.Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.count("Cannot write")
        == done.stdout.count("free space or use another folder")
        == 2
    ), done.stdout
    assert files.folder_hashes(old) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "old"]
