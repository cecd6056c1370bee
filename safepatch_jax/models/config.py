"""Decoder architecture and its reading from a Hugging Face ``config.json``, by whitelist."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any, Mapping


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Architecture of a decoder-only transformer; sizes in elements."""

    family: str
    vocab_size: int
    embed_dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float
    tied_head: bool
    max_length: int
    eos_ids: tuple[int, ...]
    dtype: str

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_attention_heads {self.num_heads} must be a multiple of "
                             f"num_key_value_heads {self.num_kv_heads}.")


# Attributes that say nothing about the forward pass of inference or tuning.
_BENIGN = frozenset({
    "_name_or_path", "architectures", "bos_token_id", "pad_token_id", "torch_dtype", "dtype", "transformers_version",
    "use_cache", "initializer_range", "is_llama_config", "transformers.js_config", "rope_interleaved",
})
# Attributes that must be at this value (or absent), because the decoder has no switch for anything else.
_FIXED = {
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0, "pretraining_tp": 1,
    "rope_scaling": None, "quantization_config": None, "partial_rotary_factor": 1.0,
}
_HANDLED = frozenset({
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rope_theta", "rope_parameters", "rms_norm_eps", "tie_word_embeddings",
    "max_position_embeddings", "eos_token_id",
})
_FAMILIES = ("llama",)
_DTYPES = ("float32", "bfloat16", "float16")
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings")


def config_from_hf(raw: Mapping[str, Any], where: str = "config.json") -> DecoderConfig:
    """Build a DecoderConfig from the content of a Hugging Face config.json (transformers 4 or 5 style).

    Raises:
      ValueError: unknown family, missing attribute, or attributes that are neither handled nor at the only value
        the decoder supports; all offenders are listed.
    """
    family = raw.get("model_type")
    if family not in _FAMILIES:
        raise ValueError(f"{where}: model_type {family!r} is not supported; supported: {', '.join(_FAMILIES)}.")
    rope = raw.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"{where}: rope_parameters must be an object, got {rope!r}.")
    offenders = [f"{k} = {v!r} (only {_FIXED[k]!r} is supported)" for k, v in raw.items()
                 if k in _FIXED and v != _FIXED[k]]
    offenders += [f"{k} = {v!r} (unknown)" for k, v in raw.items()
                  if k not in _FIXED and k not in _HANDLED and k not in _BENIGN]
    if raw.get("rope_interleaved"):
        offenders.append("rope_interleaved = True (only False is supported)")
    offenders += [f"rope_parameters.{k} = {v!r} (only unscaled RoPE is supported)" for k, v in rope.items()
                  if k != "rope_theta" and not (k in ("rope_type", "type") and v == "default")]
    offenders += [f"{k} is missing" for k in _SIZES if raw.get(k) is None]
    offenders += [f"{k} = {raw[k]!r} (a whole number above 0 is needed)" for k in (*_SIZES, *_OPTIONAL_SIZES)
                  if raw.get(k) is not None and (type(raw[k]) is not int or raw[k] < 1)]
    offenders += [f"dtype = {v!r} (supported: {', '.join(_DTYPES)})" for v in (raw.get("dtype"), raw.get("torch_dtype"))
                  if v is not None and v not in _DTYPES]
    if offenders:
        raise ValueError(f"{where}: cannot represent this model: " + "; ".join(offenders) + ".")
    heads = raw["num_attention_heads"]
    head_dim = raw.get("head_dim") or raw["hidden_size"] // heads
    if head_dim % 2 or (not raw.get("head_dim") and raw["hidden_size"] % heads):
        raise ValueError(f"{where}: head_dim {raw.get('head_dim')}, hidden_size {raw['hidden_size']}, {heads} heads: the head "
                         "size must be even (RoPE turns pairs), and be given if hidden_size does not divide by the heads.")
    eos = raw.get("eos_token_id")
    return DecoderConfig(
        family=family,
        vocab_size=raw["vocab_size"],
        embed_dim=raw["hidden_size"],
        mlp_dim=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0),
        norm_eps=float(raw.get("rms_norm_eps") or 1e-6),
        tied_head=bool(raw.get("tie_word_embeddings", False)),
        max_length=raw.get("max_position_embeddings") or 2048,
        eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        dtype=raw.get("dtype") or raw.get("torch_dtype") or "float32",
    )


def read_hf_config(folder: str | pathlib.Path) -> DecoderConfig:
    """Read ``config.json`` of a model folder. Raises ValueError if it is absent, not JSON, or unsupported."""
    path = pathlib.Path(folder) / "config.json"
    if not path.parent.is_dir():
        raise ValueError(f"No model folder '{folder}'. Give a folder in Hugging Face format "
                         "(config.json, *.safetensors, tokenizer files), a .gguf file, or 'smollm2'.")
    if not path.is_file():
        raise ValueError(f"'{folder}' has no config.json, so it is not a model folder in Hugging Face format.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); fetch or copy the file again.") from error
    if not isinstance(raw, Mapping):
        raise ValueError(f"{path} holds {type(raw).__name__}, not an object; fetch or copy the file again.")
    return config_from_hf(raw, str(path))
