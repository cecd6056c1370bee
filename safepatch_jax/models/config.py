"""Decoder architecture and its reading from a Hugging Face ``config.json``, by whitelist."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from safepatch_jax.models.families import FAMILIES
from safepatch_jax.runtime import files


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Stretching of the slow rotations, as LLaMA 3.1 does it (``rope_type: llama3``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_length: int


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Architecture of a decoder-only transformer; sizes in elements.

    Attributes that need a word:
      rope_scaling: None for plain RoPE.
      activation: of the gate of the feed-forward layer, silu or gelu_tanh.
      norm_offset: norms multiply by 1 + weight (Gemma), in float32.
      embed_scale: embeddings are multiplied by sqrt(embed_dim) (Gemma).
      qkv_bias: query, key and value have biases (Qwen2).
      windows: for each layer, how many positions a query sees, itself included; 0 is all. Empty:
      all layers see all. dtype: in which the weights are said to be stored.
    """

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
    rope_scaling: RopeScaling | None = None
    activation: str = "silu"
    norm_offset: bool = False
    embed_scale: bool = False
    qkv_bias: bool = False
    windows: tuple[int, ...] = ()

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads {self.num_heads} must be a multiple of "
                f"num_key_value_heads {self.num_kv_heads}."
            )


# Attributes that say nothing about the forward pass. `pretraining_tp` cuts a product into parts
# with the same sum.
_BENIGN = frozenset(
    {
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "pad_token_id",
        "unk_token_id",
        "torch_dtype",
        "dtype",
        "transformers_version",
        "use_cache",
        "initializer_range",
        "is_llama_config",
        "transformers.js_config",
        "pretraining_tp",
        "max_length",
        "do_sample",
        "temperature",
        "top_p",
        "tokenizer_class",
        "unsloth_fixed",
        "keys_to_ignore_at_inference",
        "_attn_implementation_autoset",
    }
)
# Attributes of any family that must have one of these values (or be absent): the decoder has no
# switch for another.
_FIXED = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0.0,),
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0,),
    "rope_interleaved": (False,),
}
_HANDLED = frozenset(
    {
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "rms_norm_eps",
        "tie_word_embeddings",
        "max_position_embeddings",
        "eos_token_id",
    }
)
_DTYPES = ("float32", "bfloat16", "float16")
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window")
_FLAGS = ("tie_word_embeddings", "use_sliding_window")
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor")


def _most(name: str) -> int:
    """Return the largest size that is taken for meant; a file from others must not make us build a
    table of 10^8 layers."""
    return 1000 if name == "num_hidden_layers" else 2**31 - 1


def _is_positive(x: Any) -> bool:
    return (
        type(x) in (int, float) and 0 < x < 1e18
    )  # compared as it is: a huge whole number has no float


def config_from_hf(raw: Mapping[str, Any], where: str = "config.json") -> DecoderConfig:
    """Build a DecoderConfig from the content of a Hugging Face config.json (transformers 4 or 5
    style).

    Raises:
      ValueError: unknown family, missing attribute, or attributes that are neither handled nor at a
        value the decoder supports; all offenders are listed.
    """
    name = raw.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(
            f"{where}: model_type {name!r} is not supported; supported: {', '.join(FAMILIES)}."
        )
    family = FAMILIES[name]
    fixed, handled = {**_FIXED, **family.fixed}, _HANDLED | family.handled
    offenders = [
        f"{k} = {v!r} (supported: {' or '.join(map(repr, fixed[k]))})"
        for k, v in raw.items()
        if k in fixed and v not in fixed[k]
    ]
    offenders += [
        f"{k} = {v!r} (unknown)"
        for k, v in raw.items()
        if k not in fixed and k not in handled | _BENIGN
    ]
    offenders += [f"{k} is missing" for k in _SIZES if raw.get(k) is None]
    offenders += [
        f"{k} = {raw[k]!r:.60} (a whole number from 1 to {_most(k):,} is needed)"
        for k in (*_SIZES, *(k for k in _OPTIONAL_SIZES if k in handled))
        if raw.get(k) is not None and not (type(raw[k]) is int and 1 <= raw[k] <= _most(k))
    ]
    offenders += [
        f"{k} = {raw[k]!r} (true or false is needed)"
        for k in _FLAGS
        if k in handled and raw.get(k) is not None and type(raw[k]) is not bool
    ]
    eps = raw.get("rms_norm_eps")
    if eps is not None and not _is_positive(eps):
        offenders.append(f"rms_norm_eps = {eps!r:.60} (a number above 0 is needed)")
    offenders += [
        f"dtype = {v!r} (supported: {', '.join(_DTYPES)})"
        for v in (raw.get("dtype"), raw.get("torch_dtype"))
        if v is not None and v not in _DTYPES
    ]
    theta, scaling = _read_rope(raw, offenders)
    get = lambda key: raw.get(key, family.defaults.get(key))
    eos = get("eos_token_id")
    eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(type(i) is int and 0 <= i < 2**31 for i in eos):
        offenders.append(
            f"eos_token_id = {raw['eos_token_id']!r:.60} (a whole number or a list of them is "
            "needed)"
        )
    if not offenders:
        windows = _read_windows(get, "layer_types" in family.handled, offenders)
    if offenders:
        raise ValueError(f"{where}: cannot represent this model: " + "; ".join(offenders) + ".")
    heads = raw["num_attention_heads"]
    head_dim = get("head_dim") or raw["hidden_size"] // heads
    if head_dim % 2 or (not get("head_dim") and raw["hidden_size"] % heads):
        raise ValueError(
            f"{where}: head_dim {raw.get('head_dim')}, hidden_size {raw['hidden_size']}, {heads} "
            "heads: the head "
            "size must be even (RoPE turns pairs), and be given if hidden_size does not divide by "
            "the heads."
        )
    return DecoderConfig(
        family=name,
        vocab_size=raw["vocab_size"],
        embed_dim=raw["hidden_size"],
        mlp_dim=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=get("num_key_value_heads") or heads,
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=float(eps or 1e-6),
        tied_head=bool(get("tie_word_embeddings")),
        max_length=get("max_position_embeddings") or family.defaults["max_position_embeddings"],
        eos_ids=tuple(eos),
        dtype=raw.get("dtype") or raw.get("torch_dtype") or "float32",
        windows=windows,
        **family.switches,
    )


def _read_rope(raw: Mapping[str, Any], offenders: list[str]) -> tuple[float, RopeScaling | None]:
    """Read base and scaling from either spelling: transformers 4 has `rope_theta` and
    `rope_scaling`, 5 `rope_parameters`."""
    thetas = [raw["rope_theta"]] if raw.get("rope_theta") is not None else []
    scalings: list[RopeScaling | None] = []
    for key in ("rope_parameters", "rope_scaling"):
        given = raw.get(key)
        if given is None or given == {}:
            continue
        if not isinstance(given, Mapping):
            offenders.append(f"{key} = {given!r} (an object is needed)")
            continue
        kind = given.get("rope_type", given.get("type", "default"))
        known = {"rope_type", "type", "rope_theta"}
        if kind == "llama3":
            known |= {*_LLAMA3, "original_max_position_embeddings"}
        if kind not in ("default", "llama3"):
            offenders.append(f"{key}.rope_type = {kind!r} (supported: 'default' or 'llama3')")
            continue
        offenders += [
            f"{key}.{k} = {v!r} (unknown for rope_type '{kind}')"
            for k, v in given.items()
            if k not in known and not (k == "partial_rotary_factor" and v == 1.0)
        ]
        if given.get("rope_theta") is not None:
            thetas.append(given["rope_theta"])
        if kind == "default":
            scalings.append(None)
            continue
        numbers = [given.get(k) for k in _LLAMA3]
        original = given.get("original_max_position_embeddings", raw.get("max_position_embeddings"))
        if not all(_is_positive(x) for x in (*numbers, original)):
            offenders.append(
                f"{key} = {dict(given)!r} (llama3 needs {', '.join(_LLAMA3)} and "
                "original_max_position_embeddings, numbers above 0)"
            )
        elif numbers[1] >= numbers[2]:
            offenders.append(
                f"{key}: low_freq_factor {numbers[1]} must be below high_freq_factor {numbers[2]}"
            )
        else:
            scalings.append(RopeScaling(*map(float, numbers), int(original)))
    if not all(_is_positive(t) for t in thetas):
        offenders.append(f"rope_theta = {thetas!r:.60} (a number above 0 is needed)")
    elif len(set(thetas)) > 1 or len(set(scalings)) > 1:
        offenders.append(
            "rope_parameters disagrees with rope_theta or rope_scaling: "
            + ", ".join(
                f"{k} = {raw.get(k)!r}" for k in ("rope_parameters", "rope_theta", "rope_scaling")
            )
        )
    else:
        return float(thetas[0] if thetas else 10000.0), scalings[0] if scalings else None
    return math.nan, None


def _read_windows(get, has_layer_types: bool, offenders: list[str]) -> tuple[int, ...]:
    """Return each layer's window; empty if no layer has one."""
    layers, window = get("num_hidden_layers"), get("sliding_window") or 0
    if not has_layer_types:
        return (window,) * layers if window else ()
    if not get("use_sliding_window"):
        window = 0
    first = get("max_window_layers")
    if type(first) is not int or first < 0:
        offenders.append(f"max_window_layers = {first!r} (a whole number is needed)")
        return ()
    kinds = get("layer_types") or [
        "sliding_attention" if i >= first else "full_attention" for i in range(layers)
    ]
    if (
        not isinstance(kinds, list)
        or len(kinds) != layers
        or any(kind not in ("sliding_attention", "full_attention") for kind in kinds)
    ):
        offenders.append(
            f"layer_types = {kinds!r} (needs {layers} times 'full_attention' or "
            "'sliding_attention')"
        )
        return ()
    windows = tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    return windows if any(windows) else ()


def read_raw_config(folder: str | pathlib.Path) -> dict[str, Any]:
    """Return the content of a model folder's ``config.json``. Raises ValueError if it is absent or
    not a JSON object."""
    path = pathlib.Path(folder) / "config.json"
    if not path.parent.is_dir():
        raise ValueError(
            f"No model folder '{folder}'. Give a folder in Hugging Face format "
            "(config.json, *.safetensors, tokenizer files), a .gguf file, or 'smollm2'."
        )
    if not path.is_file():
        raise ValueError(
            f"'{folder}' has no config.json, so it is not a model folder in Hugging Face format."
        )
    return files.read_json(path)


def read_hf_config(folder: str | pathlib.Path) -> DecoderConfig:
    """Read ``config.json`` of a model folder. Raises ValueError if it is absent, not JSON, or
    unsupported."""
    return config_from_hf(read_raw_config(folder), str(pathlib.Path(folder) / "config.json"))


def portable_config(raw: Mapping[str, Any], dtype: str | None = None) -> dict[str, Any]:
    """Return a config.json that transformers 4 and 5 read alike, in the style of the given one.

    Every attribute stays as it is. What transformers 5 alone would understand is said once more in
    the spelling of 4, which otherwise falls back to base 10000 and no RoPE scaling without a word.
    So Gemma's old ``hidden_act: "gelu"`` stays too, which 4.57 takes for the exact function, 5 and
    we for the tanh approximation.

    Args:
      raw: content of a config.json that `config_from_hf` accepts.
      dtype: storage dtype to name, or None to leave it.
    """
    out = dict(raw)
    if rope := out.get("rope_parameters"):
        scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
        plain = scaling.get("rope_type", scaling.get("type", "default")) == "default"
        if theta := out.get("rope_theta") or rope.get("rope_theta"):
            out["rope_theta"] = theta
        out["rope_scaling"] = out.get("rope_scaling") or (None if plain else scaling)
    if out.get("torch_dtype") is None and "dtype" in out:
        out["torch_dtype"] = out["dtype"]
    if dtype is not None:
        out |= dict.fromkeys({"dtype", "torch_dtype"} & out.keys() or {"torch_dtype"}, dtype)
    return out


def same_architecture(a: DecoderConfig, b: DecoderConfig) -> bool:
    """Return whether two models compute the same function of their weights, whatever dtype and stop
    tokens they have."""
    bare = lambda config: dataclasses.replace(config, dtype="", eos_ids=())
    return bare(a) == bare(b)


def stop_ids(folder: str | pathlib.Path, config: DecoderConfig) -> set[int]:
    """Return the ids that end an answer according to config.json and generation_config.json."""
    path = pathlib.Path(folder) / "generation_config.json"
    eos = files.read_json(path).get("eos_token_id") if path.is_file() else None
    return {*config.eos_ids, *(eos if isinstance(eos, list) else [] if eos is None else [eos])}
