"""A tiny random chat model with a byte tokenizer, for tests and for trying the tools in seconds."""

from __future__ import annotations

import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp

from safepatch_jax.io.hf import save_model
from safepatch_jax.models.config import config_from_hf
from safepatch_jax.models.families import FAMILIES
from safepatch_jax.models.table import param_table
from safepatch_jax.runtime import files, libraries

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SPECIALS = ("<|im_start|>", "<|im_end|>", "<|pad|>")
_GEMMA = {
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": 512,
}
# What a family's config.json has besides the attributes that all share.
_FAMILY_ATTRIBUTES = {
    "llama": {},
    "gemma": {"hidden_act": "gelu_pytorch_tanh", "head_dim": 16},
    "mistral": {"sliding_window": 8, "tie_word_embeddings": False},
    "qwen2": {"use_sliding_window": False, "sliding_window": 512, "max_window_layers": 2},
    "qwen3": {"head_dim": 16, "use_sliding_window": False, "max_window_layers": 2},
    "smollm3": {"no_rope_layer_interval": 2},
    "granite": {
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.22,
        "logits_scaling": 8.0,
    },
    "olmo2": {},
    "gemma2": _GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": _GEMMA | {"sliding_window_pattern": 2, "rope_local_base_freq": 50.0},
}


def tiny_config(**changes: Any) -> dict[str, Any]:
    """Return a config.json of a two-layer model over bytes, a Llama or the `model_type` among the
    changes.

    `changes` replace attributes.
    """
    family = changes.get("model_type", "llama")
    raw = {
        "architectures": [FAMILIES[family].architecture if family in FAMILIES else "Unknown"],
        "model_type": family,
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
        "torch_dtype": "float32",
    }
    return raw | _FAMILY_ATTRIBUTES.get(family, {}) | changes


def write_tokenizer(folder: pathlib.Path) -> None:
    """Write a byte-level tokenizer with a ChatML template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    PreTrainedTokenizerFast = libraries.transformers().PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in _SPECIALS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_SPECIALS[0],
        eos_token=_SPECIALS[1],
        pad_token=_SPECIALS[2],
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def write_tiny_model(
    folder: str | pathlib.Path,
    *,
    seed: int = 0,
    dtype: str = "float32",
    shard_bytes: int = 10**9,
    **changes: Any,
) -> pathlib.Path:
    """Write a tiny random model as a Hugging Face folder.

    Args:
      folder: where to.
      seed: of the weights.
      dtype: storage dtype.
      shard_bytes: a small number gives several weight files with an index.
      **changes: attributes of config.json, see `tiny_config`.
    """
    raw = tiny_config(torch_dtype=dtype, **changes)
    config = config_from_hf(raw)
    with tempfile.TemporaryDirectory() as scratch:
        source = pathlib.Path(scratch)
        files.write_json(source / "config.json", raw)
        files.write_json(source / "generation_config.json", {"eos_token_id": raw["eos_token_id"]})
        write_tokenizer(source)
        params = param_table(config).init(jax.random.key(seed), jnp.dtype(dtype))
        save_model(folder, params, config, source, shard_bytes=shard_bytes)
    return pathlib.Path(folder)
