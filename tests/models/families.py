"""A tiny config.json of each family, with windows that count."""

import copy
from typing import Any

from transformers import AutoConfig

from safepatch_jax.testing import tiny_config

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.5,
    "original_max_position_embeddings": 12,
}
FAMILIES: dict[
    str, dict[str, Any]
] = {  # windows shorter than the sequences of the tests, and not in every layer
    "llama": {},
    "gemma": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1},
    "smollm3": {},
    "granite": {},
    "olmo2": {},
    "gemma2": {"sliding_window": 5},
    "gemma3_text": {"sliding_window": 5},
}


def tiny_raw(family: str, **changes: Any) -> dict[str, Any]:
    """Return the config.json of a two-layer model of a family; `changes` replace attributes."""
    return tiny_config(**{"model_type": family, **FAMILIES[family], **changes})


def without(raw: dict[str, Any], *names: str) -> dict[str, Any]:
    return {k: v for k, v in raw.items() if k not in names}


def hf_config(raw: dict[str, Any]):
    """Return the configuration object of transformers, which else writes into the dictionaries that
    it is given."""
    return AutoConfig.for_model(**copy.deepcopy(raw))
