"""Configs as transformers 4 and 5 write them, and what is read in them."""

import pathlib

import pytest

from safepatch_jax.models.config import (
    DecoderConfig,
    LinearScaling,
    RopeScaling,
    config_from_hf,
)
from tests.models.families import LLAMA3, without

ARCHITECTURES = pathlib.Path(__file__).parents[2] / "configs" / "architectures"
SIZES = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
BOTH = {**SIZES, "initializer_range": 0.02, "use_cache": True, "attention_dropout": 0.0}
V4 = BOTH | {"transformers_version": "4.57.6", "rope_theta": 100000.0, "dtype": "bfloat16"}
V5 = BOTH | {
    "transformers_version": "5.23.0",
    "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
    "dtype": "bfloat16",
    "pad_token_id": None,
}
READ = {
    "vocab_size": 264,
    "embed_dim": 32,
    "mlp_dim": 64,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "rope_theta": 1e5,
    "norm_eps": 1e-5,
    "max_length": 512,
    "dtype": "bfloat16",
    "eos_ids": (2,),
    "tied_head": False,
}

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "bos_token_id": 1,
    "eos_token_id": [257, 258],
    "tie_word_embeddings": False,
}
GEMMA = {
    "model_type": "gemma",
    "architectures": ["GemmaForCausalLM"],
    "num_hidden_layers": 2,
    "attention_bias": False,
    "head_dim": 16,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
MISTRAL = {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
QWEN2 = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "num_hidden_layers": 3,
    "hidden_act": "silu",
    "max_window_layers": 1,
    "tie_word_embeddings": True,
}
LAYERS = ["full_attention", "sliding_attention", "sliding_attention"]
SCALED = {**LLAMA3, "rope_theta": 100000.0}
# the same model as transformers 4 and 5 write it, perhaps as older files have it, and what it means
STYLES = {
    "llama": (
        [
            V4 | LLAMA | {"rope_scaling": None, "head_dim": 8},
            V5 | LLAMA | {"head_dim": 8},
            without(V4, "dtype")
            | without(LLAMA, "mlp_bias")
            | {"rope_scaling": None, "torch_dtype": "bfloat16"},
        ],
        DecoderConfig(family="llama", **READ | {"eos_ids": (257, 258)}),
    ),
    "llama3": (
        [
            V4 | LLAMA | {"rope_scaling": LLAMA3},
            V5 | LLAMA | {"rope_parameters": SCALED},
            V4 | LLAMA | {"rope_scaling": without(LLAMA3, "rope_type") | {"type": "llama3"}},
            V4
            | LLAMA
            | {"rope_scaling": LLAMA3, "rope_parameters": SCALED, "torch_dtype": "bfloat16"},
        ],
        DecoderConfig(
            family="llama",
            **READ | {"eos_ids": (257, 258)},
            rope_scaling=RopeScaling(4.0, 1.0, 1.5, 12),
        ),
    ),
    "gemma": (
        [
            V4 | GEMMA | {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": None},
            V5
            | GEMMA
            | {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True, "pad_token_id": 0},
            without(V4, "dtype")
            | GEMMA
            | {"hidden_act": "gelu", "rope_scaling": None, "torch_dtype": "bfloat16"},
        ],
        DecoderConfig(
            family="gemma",
            **READ | {"head_dim": 16, "eos_ids": (1,), "tied_head": True},
            activation="gelu_tanh",
            norm_offset=True,
            embed_multiplier=32**0.5,
        ),
    ),
    "mistral": (
        [
            V4 | MISTRAL | {"head_dim": None, "sliding_window": None},
            V5 | MISTRAL | {"head_dim": 8, "sliding_window": None},
        ],
        DecoderConfig(family="mistral", **READ),
    ),
    "mistral-window": (
        [
            V4 | MISTRAL | {"head_dim": None, "sliding_window": 5},
            V5 | MISTRAL | {"head_dim": 8, "sliding_window": 5},
            without(V4, "dtype") | MISTRAL | {"sliding_window": 5, "torch_dtype": "bfloat16"},
        ],
        DecoderConfig(family="mistral", **READ, windows=(5, 5)),
    ),
    "qwen2": (
        [
            V4
            | QWEN2
            | {
                "rope_scaling": None,
                "use_sliding_window": False,
                "sliding_window": None,
                "layer_types": ["full_attention"] * 3,
                "eos_token_id": 2,
            },
            V5
            | QWEN2
            | {
                "use_sliding_window": False,
                "sliding_window": None,
                "layer_types": ["full_attention"] * 3,
                "bos_token_id": None,
                "eos_token_id": 2,
            },
            without(V4, "dtype")
            | QWEN2
            | {
                "use_sliding_window": False,
                "sliding_window": 131072,
                "torch_dtype": "bfloat16",
                "eos_token_id": 2,
            },
        ],
        DecoderConfig(family="qwen2", **READ | {"num_layers": 3, "tied_head": True}, qkv_bias=True),
    ),
    "qwen2-window": (
        [
            V4 | QWEN2 | {"use_sliding_window": True, "sliding_window": 5, "layer_types": LAYERS},
            V5
            | QWEN2
            | {
                "use_sliding_window": True,
                "sliding_window": 5,
                "layer_types": LAYERS,
                "eos_token_id": None,
            },
            V4 | QWEN2 | {"use_sliding_window": True, "sliding_window": 5},
        ],
        DecoderConfig(
            family="qwen2",
            **READ | {"num_layers": 3, "tied_head": True, "eos_ids": ()},
            qkv_bias=True,
            windows=(0, 5, 5),
        ),
    ),
}


def refusal(raw):
    with pytest.raises(ValueError) as raised:
        config_from_hf(raw, "folder/config.json")
    assert str(raised.value).startswith("folder/config.json: ")
    return str(raised.value)


def meaning(hf):
    """Fields of DecoderConfig as a configuration object of transformers gives them."""
    rope = getattr(hf, "rope_parameters", None) or {
        "rope_theta": hf.rope_theta,
        **(hf.rope_scaling or {}),
    }
    rope = rope.get("full_attention", rope)  # Gemma 3 has one of each kind of layer
    scaling = None
    if rope.get("rope_type") == "llama3":
        scaling = RopeScaling(*(rope[k] for k in LLAMA3 if k != "rope_type"))
    if rope.get("rope_type") == "linear":
        scaling = LinearScaling(rope["factor"])
    window = getattr(hf, "sliding_window", None) or 0
    kinds = getattr(hf, "layer_types", None) or ["sliding_attention"] * hf.num_hidden_layers
    windows = tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    if not any(windows):
        windows = ()
    eos = [] if hf.eos_token_id is None else hf.eos_token_id
    return {
        "family": hf.model_type,
        "vocab_size": hf.vocab_size,
        "embed_dim": hf.hidden_size,
        "mlp_dim": hf.intermediate_size,
        "num_layers": hf.num_hidden_layers,
        "num_heads": hf.num_attention_heads,
        "num_kv_heads": hf.num_key_value_heads,
        "head_dim": getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        "rope_theta": rope["rope_theta"],
        "norm_eps": hf.rms_norm_eps,
        "tied_head": hf.tie_word_embeddings,
        "max_length": hf.max_position_embeddings,
        "eos_ids": tuple(eos) if isinstance(eos, list) else (eos,),
        "rope_scaling": scaling,
        "windows": windows,
    }


def assert_means(config, hf):
    expected = meaning(hf)
    assert {name: getattr(config, name) for name in expected} == expected
