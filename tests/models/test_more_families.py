"""Reading config.json of the families after Qwen2, as transformers 4 and 5 write it; and what is
said of a family that is not here."""

import dataclasses

import jax.numpy as jnp
import pytest

from safepatch_jax.models.config import (
    DecoderConfig,
    LinearScaling,
    config_from_hf,
    portable_config,
)
from safepatch_jax.models.families import FAMILIES, UNPORTED
from safepatch_jax.models.kernels import kernel_for
from safepatch_jax.models.table import param_table
from safepatch_jax.testing import tiny_config
from tests.models.configs import READ, V4, V5, assert_means, refusal
from tests.models.families import hf_config, tiny_raw, without

SILU = {"hidden_act": "silu", "num_hidden_layers": 2, "eos_token_id": 2}
SILU |= {"tie_word_embeddings": False}
FULL = ["full_attention"] * 2
BOTH = ["sliding_attention", "full_attention"]
QWEN3 = SILU | {"model_type": "qwen3", "head_dim": 16, "attention_bias": False}
QWEN3 |= {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 28}
SMOLLM3 = SILU | {"model_type": "smollm3", "no_rope_layers": [1, 0], "no_rope_layer_interval": 4}
SMOLLM3 |= {"use_sliding_window": False, "sliding_window": None, "layer_types": FULL}
GRANITE = SILU | {"model_type": "granite", "attention_dropout": 0.1, "attention_multiplier": 0.25}
GRANITE |= {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8}
OLMO2 = SILU | {"model_type": "olmo2", "attention_bias": False}
GEMMA = SILU | {"hidden_activation": "gelu_pytorch_tanh", "head_dim": 16, "sliding_window": 5}
GEMMA |= {"query_pre_attn_scalar": 64, "tie_word_embeddings": True, "eos_token_id": [1, 106]}
GEMMA = without(GEMMA, "hidden_act")
GEMMA2 = GEMMA | {"model_type": "gemma2", "attn_logit_softcapping": 50.0}
GEMMA2 |= {"final_logit_softcapping": 30.0}
GEMMA3 = GEMMA | {"model_type": "gemma3_text", "use_bidirectional_attention": False}
OLD = {"hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid"}
LINEAR = {"rope_type": "linear", "factor": 8.0}
ROPES = {
    "full_attention": {**LINEAR, "rope_theta": 100000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}
READ_GEMMA = READ | {"head_dim": 16, "eos_ids": (1, 106), "tied_head": True}
READ_GEMMA |= {"activation": "gelu_tanh", "norm_offset": True, "norms": "both"}
READ_GEMMA |= {"embed_multiplier": 32**0.5, "attention_scale": 1 / 8, "windows": (5, 0)}
# the same model as transformers 4 and 5 write it, and what it means
STYLES = {
    "qwen3": (
        [V4 | QWEN3 | {"rope_scaling": None}, V5 | QWEN3 | {"layer_types": FULL}],
        DecoderConfig(family="qwen3", **READ | {"head_dim": 16}, qk_norm="head"),
    ),
    "smollm3": (
        [V4 | SMOLLM3 | {"rope_scaling": None, "max_window_layers": 28}, V5 | SMOLLM3],
        DecoderConfig(family="smollm3", **READ, ropes=("global", "none")),
    ),
    "granite": (
        [V4 | GRANITE | {"rope_scaling": None}, V5 | GRANITE],
        DecoderConfig(
            family="granite",
            **READ,
            embed_multiplier=12.0,
            residual_multiplier=0.22,
            attention_scale=0.25,
            logit_divisor=8.0,
        ),
    ),
    "olmo2": (
        [V4 | OLMO2 | {"rope_scaling": None}, V5 | OLMO2],
        DecoderConfig(
            family="olmo2", **READ, norms="post", qk_norm="projection", norm_float32=True
        ),
    ),
    "gemma2": (
        [V4 | GEMMA2 | OLD | {"sliding_window_size": 4096}, V5 | GEMMA2 | {"layer_types": BOTH}],
        DecoderConfig(family="gemma2", **READ_GEMMA, attention_cap=50.0, logit_cap=30.0),
    ),
    "gemma3_text": (
        [
            V4
            | GEMMA3
            | OLD
            | {"sliding_window_pattern": 2, "rope_local_base_freq": 50, "rope_scaling": LINEAR},
            V5 | GEMMA3 | {"layer_types": BOTH, "rope_parameters": ROPES},
        ],
        DecoderConfig(
            family="gemma3_text",
            **READ_GEMMA,
            qk_norm="head",
            ropes=("local", "global"),
            local_rope_theta=50.0,
            rope_scaling=LinearScaling(8.0),
        ),
    ),
}


@pytest.mark.parametrize("family", STYLES)
def test_both_styles_read_alike_and_are_written_for_both(family):
    (four, five), expected = STYLES[family]
    assert config_from_hf(four) == config_from_hf(five) == expected
    assert portable_config(four).items() >= four.items()
    portable = portable_config(five)
    assert portable.items() >= five.items() and portable_config(portable) == portable
    assert config_from_hf(portable) == expected
    assert config_from_hf(without(portable, "rope_parameters", "dtype")) == expected
    assert_means(expected, hf_config(portable))


@pytest.mark.parametrize(
    "family, changes, words",
    [
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers = [1] (needs 2 times 0 or 1)"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval = 0 (1 or more"),
        ("smollm3", {"use_sliding_window": True}, "use_sliding_window = True (supported: False)"),
        ("granite", {"logits_scaling": 0}, "logits_scaling = 0 (a number above 0 is needed)"),
        ("gemma2", {"sliding_window": None}, "sliding_window = None (layers have one)"),
        ("gemma2", {"sliding_window_pattern": "2"}, "sliding_window_pattern = '2' (a whole"),
        ("gemma3_text", {"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor = None"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "(supported: None or False)"),
        ("qwen3", {"num_experts": 8}, "num_experts = 8 (unknown)"),
    ],
)
def test_what_a_family_cannot_have(family, changes, words):
    assert words in refusal(tiny_raw(family, **changes))


@pytest.mark.parametrize("model_type", UNPORTED)
def test_a_known_family_that_is_not_here_has_its_reason(model_type):
    message = refusal(tiny_config() | {"model_type": model_type})
    assert model_type not in FAMILIES
    assert f"What stops it: {UNPORTED[model_type]}. docs/porting.md" in message


def test_an_unknown_family_is_told_by_its_attributes():
    raw = tiny_config(hidden_act="relu2", q_lora_rank=8) | {"model_type": "other"}
    message = refusal(raw)
    assert "What a Llama has not: hidden_act = 'relu2'" in message
    assert "q_lora_rank = 8 (unknown)" in message and "docs/porting.md" in message


def test_fused_attention_is_refused_where_it_would_compute_something_else():
    def kernel(family, **changes):
        config = config_from_hf(tiny_raw(family, head_dim=128, **changes))
        return kernel_for("fused", config, jnp.bfloat16, 512, "tpu")

    assert kernel("qwen3", use_sliding_window=False) == kernel("granite") == "splash"
    with pytest.raises(ValueError, match="attention's logits are capped"):
        kernel("gemma2")
    with pytest.raises(ValueError, match="layers have different windows"):
        kernel("gemma3_text")


def test_parameters_of_published_models():
    """Totals as the model cards and files have them."""
    gemma3 = dataclasses.replace(
        config_from_hf(tiny_raw("gemma3_text")),
        vocab_size=262144,
        embed_dim=1152,
        mlp_dim=6912,
        num_layers=26,
        num_heads=4,
        num_kv_heads=1,
        head_dim=256,
    )
    qwen3 = dataclasses.replace(
        config_from_hf(tiny_raw("qwen3")),
        vocab_size=151936,
        embed_dim=1024,
        mlp_dim=3072,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        tied_head=True,
    )
    assert param_table(gemma3).size == 999_885_952
    assert param_table(qwen3).size == 596_049_920
