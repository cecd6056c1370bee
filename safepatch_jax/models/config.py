"""Decoder architecture and its reading from a Hugging Face ``config.json``, by whitelist."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from safepatch_jax.models.bookkeeping import DEQUANTISE, FIXED, QUANTISED, is_benign, quantised_by
from safepatch_jax.models.families import FAMILIES, UNPORTED, Family
from safepatch_jax.models.positions import (
    LinearScaling,
    RopeScaling,
    is_positive,
    one_rope,
    read_rope,
    read_ropes,
    read_windows,
)
from safepatch_jax.models.strays import refuse_no_model
from safepatch_jax.runtime import files, unfinished
from safepatch_jax.runtime.console import some
from safepatch_jax.runtime.limits import limit, too_much
from safepatch_jax.runtime.reading import Refused, reading
from safepatch_jax.runtime.text import printable


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Architecture of a decoder-only transformer; sizes in elements.

    Attributes that need a word:
      rope_scaling: None for plain RoPE.
      local_rope_theta, ropes: for each layer, which rotations it has: global (rope_theta and its
        scaling), local (the other base), or none. Empty: all are global.
      activation: of the gate of the feed-forward layer, silu or gelu_tanh.
      norm_offset: norms multiply by 1 + weight (Gemma), in float32.
      norm_float32: norms multiply by the weight in float32 (OLMo-2).
      norms: pre: before attention and feed-forward layer; post: after them; both (Gemma 2, 3).
      qk_norm: queries and keys are normed before they are rotated: each head, or the whole
        projection at once (OLMo-2).
      embed_multiplier, residual_multiplier: of embeddings, and of what is added to the stream.
      attention_scale: of attention's logits; None is 1 / sqrt(head_dim).
      attention_cap, logit_cap: logits are drawn into -cap .. cap by tanh (Gemma 2); 0 is none.
      logit_divisor: of the head's logits (Granite).
      qkv_bias: query, key and value have biases (Qwen2).
      windows: for each layer, how many positions a query sees, itself included; 0 is all. Empty:
        all layers see all.
      dtype: of the stored weights, according to config.json.
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
    rope_scaling: RopeScaling | LinearScaling | None = None
    local_rope_theta: float = 10000.0
    ropes: tuple[str, ...] = ()
    activation: str = "silu"
    norm_offset: bool = False
    norm_float32: bool = False
    norms: str = "pre"
    qk_norm: str = ""
    embed_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    attention_scale: float | None = None
    attention_cap: float = 0.0
    logit_cap: float = 0.0
    logit_divisor: float = 1.0
    qkv_bias: bool = False
    windows: tuple[int, ...] = ()

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise Refused(
                f"num_attention_heads {self.num_heads} must be a multiple of "
                f"num_key_value_heads {self.num_kv_heads}."
            )

    @property
    def rounds_embed_multiplier(self) -> bool:
        """Return whether the family's models round embed_multiplier to their arithmetic's dtype
        before they multiply by it."""
        return FAMILIES[self.family].embed_scale


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
_UNKNOWN = " (unknown)"
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


_FIX = "Copy config.json of the model again."
_MOST_LAYERS = 1000  # a file from others must not make us build a table of 10^8 layers
_MOST = 2**31 - 1


def config_from_hf(raw: Mapping[str, Any], where: str = "config.json") -> DecoderConfig:
    """Build a DecoderConfig from the content of a Hugging Face config.json (transformers 4 or 5
    style).

    Raises:
      ValueError: unknown family, quantised weights, missing attribute, or attributes that are
        neither handled nor at a value the decoder supports; all offenders are counted.
    """
    with reading(where, "the config of a model", _FIX):
        return _config_from_hf(raw, where)


def _config_from_hf(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    name = raw.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise Refused(
            f"{where}: model_type {name!r:.60} is not supported; supported: {', '.join(FAMILIES)}. "
            f"{_what_stops(name, raw)}docs/porting.md tells how a family is added."
        )
    if method := quantised_by(raw):
        raise Refused(f"{where}: the weights are quantised ({method}). {DEQUANTISE}.")
    family, raw = FAMILIES[name], one_rope(raw)
    values = {**family.defaults, **raw}
    offenders = _unsupported(raw, family) + _malformed(raw, family)
    theta, scaling = read_rope(raw, family, offenders)
    eos_ids = _read_eos(values, offenders)
    windows = () if offenders else read_windows(values, family, offenders)
    ropes = () if offenders else read_ropes(values, family, windows, offenders)
    numbers = _read_numbers(values, family, offenders)
    if offenders:
        advice = ""
        if any(offender.endswith(_UNKNOWN) for offender in offenders):
            advice = (
                " An unknown key that means nothing for the forward pass may be deleted from "
                "config.json; for another docs/porting.md (steps 2 to 5) tells how a switch is "
                "added."
            )
        raise Refused(f"{where}: cannot represent this model: {some(offenders, most=12)}.{advice}")
    heads = raw["num_attention_heads"]
    head_dim = values.get("head_dim")
    if not head_dim and raw["hidden_size"] % heads == 0:
        head_dim = raw["hidden_size"] // heads
    if not head_dim or head_dim % 2:
        raise Refused(
            f"{where}: head_dim {raw.get('head_dim')}, hidden_size {raw['hidden_size']}, {heads} "
            "heads: the head size must be even (RoPE turns pairs), and be given if hidden_size "
            "does not divide by the heads."
        )
    max_length = values.get("max_position_embeddings")
    return DecoderConfig(
        family=name,
        vocab_size=raw["vocab_size"],
        embed_dim=raw["hidden_size"],
        mlp_dim=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=float(values.get("rms_norm_eps") or 1e-6),
        tied_head=bool(values.get("tie_word_embeddings")),
        max_length=max_length or family.defaults["max_position_embeddings"],
        eos_ids=eos_ids,
        dtype=_dtype(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
        windows=windows,
        ropes=ropes,
        **numbers,
        **family.switches,
    )


def _what_stops(name: Any, raw: Mapping[str, Any]) -> str:
    """Say what of an unknown family the decoder has not, as far as it is known or seen."""
    if isinstance(name, str) and name in UNPORTED:
        return f"What stops it: {UNPORTED[name]}. "
    strange = _unsupported(raw, FAMILIES["llama"])
    return f"What a Llama has not: {some(strange, most=6)}. " if strange else ""


def _read_numbers(
    values: Mapping[str, Any], family: Family, offenders: list[str]
) -> dict[str, float]:
    """Return the fields of DecoderConfig that are numbers of config.json."""
    fields = {}
    for field, attribute in family.numbers.items():
        value = values.get(attribute)
        if value is None:
            continue
        if not is_positive(value):
            offenders.append(f"{attribute} = {value!r:.60} (a number above 0 is needed)")
            continue
        fields[field] = float(value)
    if "query_scalar" in fields:
        fields["attention_scale"] = fields.pop("query_scalar") ** -0.5
    if family.embed_scale and is_positive(values.get("hidden_size")):
        fields["embed_multiplier"] = values["hidden_size"] ** 0.5
    return fields


def _unsupported(raw: Mapping[str, Any], family: Family) -> list[str]:
    """Return the attributes that are unknown or at a value for which the decoder has no switch."""
    fixed = {**FIXED, **family.fixed}
    handled = _HANDLED | family.handled | set(family.numbers.values())
    wrong, unknown = [], []
    for key, value in raw.items():
        if value is None or key in QUANTISED:
            continue  # null is the same as absent
        if key in fixed and value not in fixed[key]:
            wrong.append(f"{key} = {value!r:.60} (supported: {' or '.join(map(repr, fixed[key]))})")
        if key not in fixed and key not in handled and not is_benign(key):
            unknown.append(f"{printable(key, 60)} = {value!r:.60}{_UNKNOWN}")
    return wrong + unknown


def _malformed(raw: Mapping[str, Any], family: Family) -> list[str]:
    """Return the attributes that are missing or of a wrong type or size."""
    handled = _HANDLED | family.handled
    offenders = [f"{key} is missing" for key in _SIZES if raw.get(key) is None]
    for key in (*_SIZES, *_OPTIONAL_SIZES):
        value, most = raw.get(key), _MOST_LAYERS if key == "num_hidden_layers" else _MOST
        if key not in handled or value is None:
            continue
        if type(value) is not int or not 1 <= value <= most:
            offenders.append(f"{key} = {value!r:.60} (a whole number from 1 to {most:,} is needed)")
    for key in _FLAGS:
        if key in handled and type(raw.get(key, False)) not in (bool, type(None)):
            offenders.append(f"{key} = {raw[key]!r:.60} (true or false is needed)")
    eps = raw.get("rms_norm_eps")
    if eps is not None and not is_positive(eps):
        offenders.append(f"rms_norm_eps = {eps!r:.60} (a number above 0 is needed)")
    for key in ("dtype", "torch_dtype"):
        if raw.get(key) is not None and _dtype(raw[key]) not in _DTYPES:
            offenders.append(f"dtype = {raw[key]!r:.60} (supported: {', '.join(_DTYPES)})")
    return offenders


def _dtype(value: Any) -> Any:
    """Return the name of a dtype as NumPy has it; some trainers write that of torch."""
    return value.removeprefix("torch.") if isinstance(value, str) else value


def _read_eos(values: Mapping[str, Any], offenders: list[str]) -> tuple[int, ...]:
    """Return the ids that end a text."""
    ids = _as_list(values.get("eos_token_id"))
    if not _are_ids(ids):
        offenders.append(
            f"eos_token_id = {values['eos_token_id']!r:.60} (a whole number or a list of them is "
            "needed)"
        )
    return tuple(ids)


def _are_ids(ids: list[Any]) -> bool:
    return all(type(i) is int and 0 <= i <= _MOST for i in ids)


def _as_list(x: Any) -> list[Any]:
    """Return what may be absent, one value or a list, as a list."""
    if x is None:
        return []
    return x if isinstance(x, list) else [x]


def read_raw_config(folder: str | pathlib.Path) -> dict[str, Any]:
    """Return the content of a model folder's ``config.json``.

    Raises:
      ValueError: it is absent (says what the folder is, if that is known) or not a JSON object, or
        the folder is half patched.
    """
    path = pathlib.Path(folder) / "config.json"
    if not path.is_file():
        refuse_no_model(path.parent)
    if path.stat().st_size > limit("CONFIG_BYTES"):
        raise Refused(f"{path} has {too_much('CONFIG_BYTES')}. {_FIX}")
    unfinished.refuse(folder)
    return files.read_json(path)


def read_hf_config(folder: str | pathlib.Path) -> DecoderConfig:
    """Read ``config.json`` of a model folder. Raises ValueError if it is absent, not JSON, or
    unsupported."""
    return config_from_hf(read_raw_config(folder), str(pathlib.Path(folder) / "config.json"))


def portable_config(raw: Mapping[str, Any], dtype: str | None = None) -> dict[str, Any]:
    """Return a config.json that transformers 4 and 5 read alike, in the style of the given one.

    Every attribute stays as it is. What transformers 5 alone would understand is repeated in the
    spelling of 4, which otherwise falls back to base 10000 and no RoPE scaling without a warning.
    So Gemma's old ``hidden_act: "gelu"`` stays too: 4.57 reads it as the exact function, 5 and we
    as the tanh approximation.

    Args:
      raw: content of a config.json that `config_from_hf` accepts.
      dtype: storage dtype to name, or None to leave it.
    """
    out = dict(raw)
    plain = one_rope(raw)
    for key in {"dtype", "torch_dtype"} & out.keys():
        out[key] = _dtype(out[key])  # transformers does not read 'torch.float32'
    rope = plain.get("rope_parameters")
    if plain is not raw and "rope_local_base_freq" in plain:
        out["rope_local_base_freq"] = plain["rope_local_base_freq"]
    if rope:
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        if scaling.get("rope_type", scaling.get("type", "default")) == "default":
            scaling = None
        theta = out.get("rope_theta") or rope.get("rope_theta")
        if theta:
            out["rope_theta"] = theta
        out["rope_scaling"] = out.get("rope_scaling") or scaling
    if out.get("torch_dtype") is None and "dtype" in out:
        out["torch_dtype"] = out["dtype"]
    if dtype is not None:
        names = {"dtype", "torch_dtype"} & out.keys()
        out |= dict.fromkeys(names or {"torch_dtype"}, dtype)
    return out


def same_architecture(a: DecoderConfig, b: DecoderConfig) -> bool:
    """Return whether two models compute the same function of their weights, whatever dtype and stop
    tokens they have."""
    return dataclasses.replace(a, dtype=b.dtype, eos_ids=b.eos_ids) == b


def stop_ids(folder: str | pathlib.Path, config: DecoderConfig) -> set[int]:
    """Return the ids that end an answer according to config.json and generation_config.json."""
    path = pathlib.Path(folder) / "generation_config.json"
    generation = files.read_json(path) if path.is_file() else {}
    ids = _as_list(generation.get("eos_token_id"))
    if not _are_ids(ids):
        raise Refused(
            f"{path}: eos_token_id = {generation['eos_token_id']!r:.60} (a whole number or a list "
            "of them is needed). Correct or delete it."
        )
    return {*config.eos_ids, *ids}
