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
      fixed: attributes of the family and the values they may have.
      handled: attributes of the family that the reader makes use of.
    """

    architecture: str
    defaults: Mapping[str, Any]
    switches: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
    handled: frozenset[str] = frozenset()


_SILU = {"hidden_act": ("silu",)}

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
        {"activation": "gelu_tanh", "norm_offset": True, "embed_scale": True},
        # "gelu" is a slip of the first releases: the models were trained with, and mean, the tanh
        # approximation.
        {
            "hidden_act": ("gelu", "gelu_pytorch_tanh"),
            "hidden_activation": (None, "gelu_pytorch_tanh"),
            "use_bidirectional_attention": (None, False),
        },
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
        frozenset({"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}),
    ),
}
