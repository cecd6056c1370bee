"""Reading config.json: both styles of transformers, defaults, and every refusal."""

import json

import pytest

from safepatch_jax.models.config import DecoderConfig, config_from_hf, read_hf_config
from safepatch_jax.testing import tiny_config


def without(raw, *names):
    return {k: v for k, v in raw.items() if k not in names}


# One model with the attributes that transformers 4 writes, then 5.
OLD = tiny_config(
    rope_theta=100000.0, rope_scaling=None, attention_bias=False, attention_dropout=0.0, mlp_bias=False, pretraining_tp=1,
    initializer_range=0.04, is_llama_config=True, rope_interleaved=False, torch_dtype="bfloat16", use_cache=True,
    transformers_version="4.46.0", **{"_name_or_path": "x", "transformers.js_config": {"dtype": "q4"}})
NEW = without(tiny_config(
    rope_parameters={"rope_theta": 100000.0, "rope_type": "default"}, head_dim=8, dtype="bfloat16",
    attention_bias=False, attention_dropout=0.0, mlp_bias=False, pretraining_tp=1, initializer_range=0.02, use_cache=True,
    transformers_version="5.23.0"), "rope_theta", "torch_dtype")
EXPECTED = DecoderConfig(
    family="llama", vocab_size=264, embed_dim=32, mlp_dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    rope_theta=100000.0, norm_eps=1e-5, tied_head=True, max_length=512, eos_ids=(257,), dtype="bfloat16")


@pytest.mark.parametrize("raw", [OLD, NEW], ids=["transformers 4", "transformers 5"])
def test_both_styles_read_alike(raw):
    assert config_from_hf(raw) == EXPECTED


def test_what_transformers_writes_is_read(tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(**tiny_config(rope_theta=12345.0, head_dim=12, tie_word_embeddings=False)).save_pretrained(tmp_path)
    config = read_hf_config(tmp_path)
    assert (config.rope_theta, config.head_dim, config.tied_head, config.num_kv_heads) == (12345.0, 12, False, 2)


@pytest.mark.parametrize("changes, attribute, value", [
    ({}, "head_dim", 8), ({"head_dim": None}, "head_dim", 8), ({"head_dim": 12}, "head_dim", 12),
    ({"num_key_value_heads": None}, "num_kv_heads", 4), ({"num_key_value_heads": 1}, "num_kv_heads", 1),
    ({"eos_token_id": 257}, "eos_ids", (257,)), ({"eos_token_id": 0}, "eos_ids", (0,)),
    ({"eos_token_id": [257, 3]}, "eos_ids", (257, 3)), ({"eos_token_id": None}, "eos_ids", ()),
    ({"rope_parameters": None}, "rope_theta", 10000.0), ({"dtype": "float16"}, "dtype", "float16"),
])
def test_values(changes, attribute, value):
    assert getattr(config_from_hf(tiny_config(**changes)), attribute) == value


@pytest.mark.parametrize("absent, attribute, value", [
    ("num_key_value_heads", "num_kv_heads", 4), ("rope_theta", "rope_theta", 10000.0), ("rms_norm_eps", "norm_eps", 1e-6),
    ("tie_word_embeddings", "tied_head", False), ("max_position_embeddings", "max_length", 2048),
    ("torch_dtype", "dtype", "float32"),
])
def test_defaults_of_hugging_face(absent, attribute, value):
    assert getattr(config_from_hf(without(tiny_config(), absent)), attribute) == value


def test_all_offenders_are_listed():
    raw = without(tiny_config(
        hidden_act="gelu", attention_bias=True, mlp_bias=True, attention_dropout=0.1, pretraining_tp=2,
        rope_scaling={"type": "linear"}, quantization_config={"bits": 4}, partial_rotary_factor=0.5, rope_interleaved=True,
        rope_parameters={"rope_type": "yarn", "factor": 4.0}, sliding_window=8, logit_scale=2.0), "vocab_size", "hidden_size")
    with pytest.raises(ValueError) as raised:
        config_from_hf(raw, "folder/config.json")
    message = str(raised.value)
    assert message.startswith("folder/config.json: cannot represent this model: ")
    for part in (
            "hidden_act = 'gelu' (only 'silu' is supported)", "attention_bias = True (only False", "mlp_bias = True (only False",
            "attention_dropout = 0.1 (only 0.0", "pretraining_tp = 2 (only 1", "rope_scaling = {'type': 'linear'} (only None",
            "quantization_config = {'bits': 4} (only None", "partial_rotary_factor = 0.5 (only 1.0",
            "rope_interleaved = True (only False", "rope_parameters.rope_type = 'yarn' (only unscaled RoPE is supported)",
            "sliding_window = 8 (unknown)", "logit_scale = 2.0 (unknown)", "vocab_size is missing", "hidden_size is missing"):
        assert part in message, part


@pytest.mark.parametrize("rope", [{"type": "linear", "factor": 2.0}, {"rope_type": "llama3", "factor": 8.0}])
def test_scaled_rope_is_refused_in_either_spelling(rope):
    with pytest.raises(ValueError, match="rope_parameters"):
        config_from_hf(tiny_config(rope_parameters={"rope_theta": 10000.0, **rope}))


@pytest.mark.parametrize("name", [
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"])
def test_missing_attribute(name):
    with pytest.raises(ValueError, match=f"{name} is missing"):
        config_from_hf(without(tiny_config(), name))


@pytest.mark.parametrize("model_type", ["gemma3", None])
def test_unknown_family(model_type):
    with pytest.raises(ValueError, match=f"model_type {model_type!r} is not supported; supported: llama"):
        config_from_hf(tiny_config(model_type=model_type))


def test_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="num_attention_heads 4 must be a multiple of num_key_value_heads 3"):
        config_from_hf(tiny_config(num_key_value_heads=3))


def test_no_such_folder(tmp_path):
    with pytest.raises(ValueError, match="No model folder '.*absent'. Give a folder in Hugging Face format"):
        read_hf_config(tmp_path / "absent")


def test_folder_without_config(tmp_path):
    with pytest.raises(ValueError, match="has no config.json"):
        read_hf_config(tmp_path)


def test_an_error_names_the_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(sliding_window=8)))
    with pytest.raises(ValueError, match=r"config\.json: .*sliding_window = 8 \(unknown\)") as raised:
        read_hf_config(tmp_path)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("content", [b"", b'{"model_type": "llama",'])
def test_broken_json(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        read_hf_config(tmp_path)


@pytest.mark.parametrize("content", [b'["llama"]', b"null", b"\xff\xfe{}"], ids=["list", "null", "not UTF-8"])
def test_json_that_is_no_object_names_the_file(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        read_hf_config(tmp_path)
