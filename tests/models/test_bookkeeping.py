"""What config.json may hold besides the architecture, and what changes the forward pass."""

import json

import pytest

from safepatch_jax.models.config import config_from_hf, portable_config, read_hf_config, stop_ids
from safepatch_jax.models.families import FAMILIES
from safepatch_jax.testing import tiny_config
from tests.models.families import without

HARMLESS = {
    "unsloth": {"unsloth_version": "2025.3.1", "unsloth_fixed": True, "unsloth_x": [1]},
    "generation": {"repetition_penalty": 1.1, "top_k": 50, "num_beams": 1, "min_p": 0.1},
    "transformers 3": {"use_bfloat16": False, "xla_device": None, "gradient_checkpointing": True},
    "transformers 4": {
        "return_dict": True,
        "output_attentions": False,
        "torchscript": False,
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "is_decoder": True,
        "is_encoder_decoder": False,
        "add_cross_attention": False,
        "chunk_size_feed_forward": 0,
        "pruned_heads": {},
        "tie_encoder_decoder": False,
        "task_specific_params": {"x": {}},
        "problem_type": None,
        "sep_token_id": 3,
    },
    "transformers 5": {"tie_last_hidden_states": True, "per_layer_config": None},
    "trainers": {
        "model_max_length": 2048,
        "tokenizer_padding_side": "left",
        "tokenizer_model_max_length": 8,
        "neftune_noise_alpha": 5.0,
        "_attn_implementation": "sdpa",
    },
    "code": {"auto_map": {"AutoModelForCausalLM": "modeling_x.Model"}},
    "nulls": {"mlp_bias": None, "hidden_activation": None, "layer_types": None, "nobody": None},
    "not quantised": {"quantization_config": {}},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", HARMLESS)
def test_bookkeeping_changes_nothing(family, kind):
    raw = tiny_config(model_type=family)
    assert config_from_hf(HARMLESS[kind] | raw) == config_from_hf(raw)


@pytest.mark.parametrize(
    "key, value",
    [
        ("is_encoder_decoder", True),
        ("add_cross_attention", True),
        ("chunk_size_feed_forward", 8),
        ("pruned_heads", {"0": [1]}),
        ("tie_encoder_decoder", True),
        ("per_layer_config", {"0": {"num_attention_heads": 2}}),
        ("transformers_weights", "other.safetensors"),
        ("logit_scale", 0.5),
    ],
)
def test_what_changes_the_forward_pass_is_refused(key, value):
    with pytest.raises(ValueError, match=f"{key} = "):
        config_from_hf(tiny_config(**{key: value}))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised (gptq"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised (fp8"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantised (bitsandbytes"),
        ({"quantization_config": [1]}, "quantised (an unnamed method"),
        ({"quantization": {"bits": 4, "group_size": 64}}, "quantised (MLX"),
    ],
)
def test_quantised_weights_are_named_with_the_way_out(changes, words):
    with pytest.raises(ValueError) as raised:
        config_from_hf(tiny_config(**changes))
    assert words in str(raised.value) and "dequantise this one first" in str(raised.value)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_dtype_of_torch_is_read_and_written_as_transformers_reads_it(key):
    raw = without(tiny_config(), "torch_dtype") | {key: "torch.bfloat16"}
    assert config_from_hf(raw).dtype == "bfloat16"
    assert portable_config(raw)["torch_dtype"] == portable_config(raw)[key] == "bfloat16"


def test_a_byte_order_mark_before_config_json(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(tiny_config()).encode())
    assert read_hf_config(tmp_path) == config_from_hf(tiny_config())


@pytest.mark.parametrize(
    "changes",
    [
        {"x" * 10**7: 1},
        {"x": "y" * 10**7},
        {f"key{i}": i for i in range(10_000)},
        {"layer_types": ["full_attention"] * 10**6},
        {"model_type": "z" * 10**7},
        {"rope_scaling": {"rope_type": "default", "k" * 10**7: 1}},
        {"quantization_config": {"quant_method": "q" * 10**7}},
        {"vocab_size": 10**4000},
        {"rope_theta": 10**4000, "x": "\x1b[2J"},
    ],
)
def test_what_is_large_makes_no_large_message(changes):
    with pytest.raises(ValueError) as raised:
        config_from_hf(tiny_config(model_type="qwen2") | changes)
    assert len(str(raised.value)) < 2000


def test_a_config_of_megabytes_is_refused_by_its_size(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(x="y" * 11_000_000)))
    with pytest.raises(ValueError, match="more than 10,000,000 bytes"):
        read_hf_config(tmp_path)


@pytest.mark.parametrize("value", ["</s>", -1, [[1]], {"id": 1}, True, 1.5, float("nan")])
def test_stop_ids_that_are_none_name_the_file(tmp_path, value):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id = .*Correct"):
        stop_ids(tmp_path, config_from_hf(tiny_config()))
