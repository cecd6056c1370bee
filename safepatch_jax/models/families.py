"""The model families: what sets one apart from the others, as data.

A family says which switches of the one decoder it sets, what Hugging Face assumes for attributes
that config.json leaves out, and which attributes must be at a value because the decoder has no
switch for another. Source of defaults: the configuration classes of transformers 4.57 and 5.23
(``LlamaConfig`` and so on).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
      architecture: the class in ``transformers``.
      defaults: values of attributes that may be absent from config.json.
      switches: fields of DecoderConfig that hold for every model of the family.
      numbers: fields of DecoderConfig (query_scalar: of attention_scale ** -2) and the attribute
        that holds each, a number above 0.
      embed_scale: embeddings are multiplied by the square root of their width, which is rounded to
        their dtype first.
      fixed: attributes of the family and the values they may have.
      handled: attributes of the family that the reader makes use of.
    """

    architecture: str
    defaults: Mapping[str, Any]
    switches: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
    handled: frozenset[str] = frozenset()
    numbers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    embed_scale: bool = False


_SILU = {"hidden_act": ("silu",)}
_WINDOWS = frozenset({"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"})
_PATTERN = frozenset(
    {"sliding_window", "layer_types", "sliding_window_pattern", "_sliding_window_pattern"}
)
_GEMMA = {
    "hidden_act": (None, "gelu_pytorch_tanh"),
    "hidden_activation": (None, "gelu_pytorch_tanh"),
    "use_bidirectional_attention": (None, False),
}

FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM", {"max_position_embeddings": 2048, "eos_token_id": 2}, fixed=_SILU
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        {
            "num_key_value_heads": 16,
            "head_dim": 256,
            "tie_word_embeddings": True,
            "max_position_embeddings": 8192,
            "eos_token_id": 1,
        },
        {"activation": "gelu_tanh", "norm_offset": True},
        # "gelu" is a slip of the first releases: the models were trained with, and mean, the tanh
        # approximation.
        {
            "hidden_act": ("gelu", "gelu_pytorch_tanh"),
            "hidden_activation": (None, "gelu_pytorch_tanh"),
            "use_bidirectional_attention": (None, False),
        },
        embed_scale=True,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        {
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "eos_token_id": 2,
            "sliding_window": 4096,
        },
        fixed=_SILU,
        handled=frozenset({"sliding_window"}),
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        {
            "num_key_value_heads": 32,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "use_sliding_window": False,
            "max_window_layers": 28,
        },
        {"qkv_bias": True},
        {**_SILU, "use_mrope": (False,)},
        _WINDOWS,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {
            "num_key_value_heads": 32,
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "use_sliding_window": False,
            "max_window_layers": 28,
        },
        {"qk_norm": "head"},
        _SILU,
        _WINDOWS,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        {
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rope_theta": 2000000.0,
            "tie_word_embeddings": True,
            "eos_token_id": 128001,
            "use_sliding_window": False,
            "max_window_layers": 28,
            "no_rope_layer_interval": 4,
        },
        fixed={**_SILU, "use_sliding_window": (False,)},
        handled=_WINDOWS | {"no_rope_layers", "no_rope_layer_interval"},
    ),
    "granite": Family(
        "GraniteForCausalLM",
        {
            "max_position_embeddings": 2048,
            "eos_token_id": 2,
            "attention_multiplier": 1.0,
        },
        # Dropout acts in training alone, and training here has none.
        fixed={**_SILU, "attention_dropout": (0.0, 0.1)},
        numbers={
            "embed_multiplier": "embedding_multiplier",
            "residual_multiplier": "residual_multiplier",
            "attention_scale": "attention_multiplier",
            "logit_divisor": "logits_scaling",
        },
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        {"max_position_embeddings": 2048, "eos_token_id": 50279, "rms_norm_eps": 1e-5},
        {"norms": "post", "qk_norm": "projection", "norm_float32": True},
        _SILU,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        {
            "num_key_value_heads": 4,
            "head_dim": 256,
            "tie_word_embeddings": True,
            "max_position_embeddings": 8192,
            "eos_token_id": 1,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "sliding_window_pattern": 2,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        {"activation": "gelu_tanh", "norm_offset": True, "norms": "both"},
        {**_GEMMA, "sliding_window_size": (4096,)},  # in the first releases, and read by nobody
        _PATTERN,
        {
            "query_scalar": "query_pre_attn_scalar",
            "attention_cap": "attn_logit_softcapping",
            "logit_cap": "final_logit_softcapping",
        },
        embed_scale=True,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        {
            "num_key_value_heads": 4,
            "head_dim": 256,
            "tie_word_embeddings": True,
            "max_position_embeddings": 131072,
            "eos_token_id": 1,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
        },
        {"activation": "gelu_tanh", "norm_offset": True, "norms": "both", "qk_norm": "head"},
        _GEMMA,
        _PATTERN,
        {
            "query_scalar": "query_pre_attn_scalar",
            "attention_cap": "attn_logit_softcapping",
            "logit_cap": "final_logit_softcapping",
            "local_rope_theta": "rope_local_base_freq",
        },
        embed_scale=True,
    ),
}

_EXPERTS = "its feed-forward layers are mixtures of experts, for which the table has no rows"
_PICTURES = "it reads pictures beside text"
# What stops a family that people try; docs/porting.md says which step would treat it.
UNPORTED = {
    "phi3": (
        "q, k and v are one tensor (qkv_proj), as are gate and up (gate_up_proj), and a row of the "
        "table is one tensor (step 4)"
    ),
    "gemma3": f"{_PICTURES}; its text model alone (model_type gemma3_text) is supported",
    "qwen2_vl": _PICTURES,
    "qwen2_5_vl": _PICTURES,
    "qwen3_vl": _PICTURES,
    "mllama": _PICTURES,
    "mistral3": _PICTURES,
    "gemma3n": f"{_PICTURES}, and hears",
    "llama4": f"{_PICTURES}, and {_EXPERTS}",
    "mixtral": _EXPERTS,
    "qwen2_moe": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "granitemoe": _EXPERTS,
    "gpt_oss": _EXPERTS,
    "deepseek_v3": f"{_EXPERTS}, and its keys and values are compressed (MLA)",
}
