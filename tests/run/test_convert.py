"""Conversions and their certificates: bit for bit through every format, and honest about what does
not fit."""

import hashlib
import importlib.util
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from safepatch_jax.data.chat import Chat
from safepatch_jax.data.records import load_records
from safepatch_jax.evaluation.engine import Engine
from safepatch_jax.io.gguf import convert_gguf, find_smollm2
from safepatch_jax.models.families import FAMILIES
from safepatch_jax.numerics import tensor_keys
from safepatch_jax.run import certificate
from safepatch_jax.run.convert import convert, inspect_model
from safepatch_jax.run.place import Place
from safepatch_jax.testing import write_tiny_model
from tests.conftest import sharder_of
from tests.padding import hf_greedy
from tests.patching import oracle

WEIGHTS = "model.safetensors"


def hashes(folder):
    """Return (dtype, shape, SHA-256) of each tensor of a model folder."""
    result = {}
    for name, x in load_file(folder / WEIGHTS).items():
        result[name] = (x.dtype, x.shape, hashlib.sha256(x.tobytes()).hexdigest())
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_through_orbax_and_back(tmp_path, family):
    model = write_tiny_model(tmp_path / "model", dtype="bfloat16", model_type=family)
    checkpoint, back = f"orbax:{tmp_path / 'checkpoint'}", tmp_path / "back"
    convert(f"hf:{model}", checkpoint, mesh="fsdp:8")
    path = convert(checkpoint, f"hf:{back}", mesh="data:1,fsdp:4,tensor:2")
    tensors = hashes(model)
    assert hashes(back) == tensors
    for file in model.iterdir():
        if file.name != WEIGHTS:
            assert (back / file.name).read_bytes() == file.read_bytes(), file.name
    content = json.loads(path.read_text())
    assert content["kind"] == "export"
    assert content["changed"] == [] and content["unchanged"] == len(tensors)
    digests = {name: x["sha256"] for name, x in content["tensors"].items()}
    assert digests == {name: digest for name, (_, _, digest) in tensors.items()}
    if importlib.util.find_spec("torch"):
        torch = content["logits"]["torch"]
        assert torch["max_abs_error"] <= 1e-5 * content["logits"]["largest"]
        assert torch["kl"] < 1e-9 and torch["top1_agreement"] == 1
    assert {p.name for p in tmp_path.iterdir()} == {"model", "checkpoint", "back"}


def test_what_an_import_leaves_out_is_accounted_for(tmp_path):
    model = write_tiny_model(tmp_path / "model")
    tensors = load_file(model / WEIGHTS)
    extra = {
        "lm_head.weight": tensors["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    }
    save_file(tensors | extra, model / WEIGHTS, metadata={"format": "pt"})
    checkpoint, back = f"orbax:{tmp_path / 'checkpoint'}", tmp_path / "back"
    path = convert(f"hf:{model}", checkpoint, certify="hashes", mesh="fsdp:8")
    assert json.loads(path.read_text())["keys"]["left_out"].keys() == extra.keys()
    convert(checkpoint, f"hf:{back}", certify="hashes", mesh="fsdp:8")
    assert hashes(back) == {n: x for n, x in hashes(model).items() if n not in extra}


def test_another_dtype_with_either_rounding(tmp_path):
    model = write_tiny_model(tmp_path / "model")
    before = load_file(model / WEIGHTS)
    for rounding in ("nearest", "stochastic"):
        out = tmp_path / rounding
        convert(
            f"hf:{model}",
            f"hf:{out}",
            dtype="bfloat16",
            rounding=rounding,
            seed=3,
            certify="hashes",
            mesh="fsdp:8",
        )
        for name, x in load_file(out / WEIGHTS).items():
            wanted = before[name].astype(jnp.bfloat16)
            if rounding == "stochastic" and "norm" not in name:
                key = tensor_keys(3, "rounding", (name,))[0]
                wanted = oracle.stochastic(before[name], np.dtype(jnp.bfloat16), key)
            assert x.tobytes() == wanted.tobytes(), name
        assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
        content = json.loads((out / "certificate.json").read_text())
        assert content["unchanged"] == 0 and content["logits"] == {"skipped": "not asked for"}


@pytest.mark.parametrize(
    "source, target, options, message",
    [
        ("hf:{model}", "hf:{model}", {}, "exists and is not empty; nothing was written"),
        ("hf:{model}", "gguf:{tmp}/x.gguf", {}, "only hf:DIR and orbax:DIR can be written"),
        ("hf:{model}", "orbax:{tmp}/x", {"dtype": "bfloat16"}, "dtype is for a target hf:DIR"),
        (
            "hf:{model}",
            "hf:{tmp}/x",
            {"tokenizer": "x"},
            "a tokenizer folder goes with GGUF sources",
        ),
        ("hf:{model}", "hf:{tmp}/x", {"mesh": "fsdp:3"}, "needs 3 devices, but there are 8"),
        ("hf:{tmp}/absent", "hf:{tmp}/x", {}, "No model folder"),
        ("orbax:{model}", "hf:{tmp}/x", {}, "is no model checkpoint"),
        ("gguf:{tmp}/absent.gguf", "hf:{tmp}/x", {}, "No model file"),
        (
            "what:absent",
            "hf:{tmp}/x",
            {},
            "names no model: use hf:DIR, orbax:DIR, gguf:FILE or smollm2",
        ),
        ("", "hf:{tmp}/x", {}, "A path is empty"),
        ("hf:ftp://bucket/x", "hf:{tmp}/x", {}, "ftp:// is not supported"),
        ("hf:{model}", "hf:ftp://bucket/x", {}, "ftp:// is not supported"),
    ],
)
def test_mistakes(tiny, tmp_path, source, target, options, message):
    place = {"model": tiny, "tmp": tmp_path}
    with pytest.raises(ValueError, match=message):
        convert(
            source.format(**place),
            target.format(**place),
            **{"certify": "hashes", "mesh": "fsdp:8"} | options,
        )
    assert not list(tmp_path.iterdir())


def test_where_a_bare_path_leads(tiny, tmp_path):
    (tmp_path / "model.json").write_text("{}")
    assert Place.parse(str(tiny)) == Place("hf", tiny)
    assert Place.parse(str(tmp_path)) == Place("orbax", tmp_path)
    assert Place.parse("a/b.gguf").kind == "gguf"
    assert Place.parse(f"orbax:{tiny}") == Place("orbax", tiny)


def test_inspect(tmp_path):
    model = write_tiny_model(tmp_path / "model", dtype="bfloat16", model_type="qwen2")
    lines = inspect_model(str(model), "block_linear")
    total = sum(x.size for x in load_file(model / WEIGHTS).values())
    assert f"qwen2: {total:,} parameters in" in lines[0] and "biases on q, k, v" in lines[1]
    row = next(line for line in lines if line.startswith("layers/attention/q "))
    for part in (
        "2 x 4 x 8 x 32",
        "layers heads head_dim embed",
        "model.layers.*.self_attn.q_proj.weight",
        "bfloat16",
        "2,048",
        "yes",
    ):
        assert part in row, part
    assert next(line for line in lines if line.startswith("layers/attention/q_bias")).endswith("no")
    (model / WEIGHTS).unlink()
    assert len(inspect_model(f"hf:{model}", "all")) == len(lines)  # config.json is enough
    with pytest.raises(ValueError, match="convert the file first"):
        inspect_model("x.gguf", "all")


def test_a_certificate_without_a_tokenizer_uses_random_tokens(tmp_path):
    model = write_tiny_model(tmp_path / "model")
    for path in model.glob("tokenizer*"):
        path.unlink()
    content = certificate.certify(model, sharder_of(1), kind="import")
    assert content["logits"]["probes"] == "random" and content["logits"]["finite"]
    assert content["tokenizer"].startswith("no usable tokenizer")
    assert str(tmp_path) not in json.dumps(content)  # it is published
    assert "random tokens" in certificate.summary(content)


def test_weights_that_are_not_finite_get_no_certificate(tmp_path):
    model = write_tiny_model(tmp_path / "model")
    tensors = load_file(model / WEIGHTS)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.nan
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match="the logits are not finite. The weights hold NaN or overflow"
    ):
        certificate.certify(model, sharder_of(1), kind="import")


def test_logits_further_from_torch_than_the_limit_get_no_certificate(tiny, monkeypatch):
    pytest.importorskip("torch", reason="the witness is torch: pip install torch")
    monkeypatch.setattr(certificate, "LIMIT", 1e-12)  # less than float32 rounding
    with pytest.raises(
        ValueError,
        match="our logits differ from those of Hugging Face torch by .* --certify=hashes",
    ):
        certificate.certify(tiny, sharder_of(1), kind="import")
    without = certificate.certify(tiny, sharder_of(1), logits=False, kind="import")
    assert "torch" not in without["logits"]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    try:
        package = find_smollm2()
    except ValueError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    convert_gguf(package, folder)
    return folder


def test_smollm2_both_ways_gives_the_text_of_torch(smollm2, tmp_path):
    """Import on one device, export from eight; torch reads the export, we read the import."""
    torch = pytest.importorskip("torch", reason="the reference is torch: pip install torch")
    from transformers import AutoModelForCausalLM

    checkpoint, export = f"orbax:{tmp_path / 'checkpoint'}", tmp_path / "export"
    options = {"mesh": "fsdp:8", "certify": "hashes"}
    convert(f"hf:{smollm2}", checkpoint, **options)
    convert(checkpoint, f"hf:{export}", shard_bytes=10**8, **options)
    chat = Chat(smollm2, 49152)
    records = [*load_records("ordinary", "builtin")[:4], *load_records("lookalike", "builtin")[:2]]
    prompts = [chat.encode(record.prompt, "x").prompt_ids for record in records]
    reference = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    theirs = hf_greedy(reference, prompts, 10)
    engine = Engine.open(smollm2, mesh="fsdp:8")
    texts = [engine.decode(ids) for ids in engine.complete_ids(prompts, 10)]
    assert len(set(texts)) == len(texts) == 6
    assert texts == [chat.decode(row.tolist()) for row in theirs]
