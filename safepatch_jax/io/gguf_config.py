"""GGUF metadata and tensor names to a Hugging Face config.json and tensor names, by whitelist."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from safepatch_jax.io.stored import DTYPES, Stored
from safepatch_jax.models.config import DecoderConfig, RopeScaling, config_from_hf
from safepatch_jax.models.families import FAMILIES
from safepatch_jax.runtime.console import some
from safepatch_jax.runtime.reading import Refused, reading

_BENIGN = (
    "vocab_size",
    "tensor_data_layout",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
)
# The architectures, and what config.json has for them besides what GGUF says.
_ARCHITECTURES = {
    "llama": {"hidden_act": "silu"},
    "qwen2": {"hidden_act": "silu", "use_sliding_window": False},
}
_DIVISORS = "rope_freqs.weight"  # what divides each frequency of LLaMA 3.x
_FOLDER = "Use the model's Hugging Face folder instead"


@dataclasses.dataclass(frozen=True)
class Model:
    """What a GGUF file holds, in Hugging Face terms.

    Attributes:
      config: content of config.json, without dtypes.
      sources: Hugging Face tensor name -> name in the GGUF file.
      permuted_heads: for tensors whose rows GGUF permutes, their number of heads.
    """

    config: dict[str, Any]
    sources: dict[str, str]
    permuted_heads: dict[str, int]


# The name of each row of the parameter table in GGUF.
_GGUF_NAMES = {
    "embedder/embedding": "token_embd.weight",
    "layers/attention_norm/scale": "blk.{layer}.attn_norm.weight",
    "layers/attention/q": "blk.{layer}.attn_q.weight",
    "layers/attention/k": "blk.{layer}.attn_k.weight",
    "layers/attention/v": "blk.{layer}.attn_v.weight",
    "layers/attention/o": "blk.{layer}.attn_output.weight",
    "layers/attention/q_bias": "blk.{layer}.attn_q.bias",
    "layers/attention/k_bias": "blk.{layer}.attn_k.bias",
    "layers/attention/v_bias": "blk.{layer}.attn_v.bias",
    "layers/mlp_norm/scale": "blk.{layer}.ffn_norm.weight",
    "layers/mlp/gate": "blk.{layer}.ffn_gate.weight",
    "layers/mlp/up": "blk.{layer}.ffn_up.weight",
    "layers/mlp/down": "blk.{layer}.ffn_down.weight",
    "final_norm/scale": "output_norm.weight",
    "head/kernel": "output.weight",
}


def read_model(metadata: Mapping[str, Any], tensors: Mapping[str, Stored], where: str) -> Model:
    """Translate the metadata and the list of tensors.

    Raises:
      ValueError: an unknown architecture; metadata missing, wrong or not representable; tensors
        missing, unknown, of another shape or of a type that cannot be dequantised. All offenders of
        metadata, then all of tensors, are listed.
    """
    with reading(where, "a GGUF model", f"{_FOLDER}."):
        return _read_model(metadata, tensors, where)


def _read_model(metadata: Mapping[str, Any], tensors: Mapping[str, Stored], where: str) -> Model:
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in _ARCHITECTURES:
        raise Refused(
            f"{where}: architecture {name!r:.60} is not supported; supported: "
            f"{', '.join(_ARCHITECTURES)} (Mistral is stored as llama). {_FOLDER}."
        )
    from safepatch_jax.models.table import param_table

    config = _read_config(name, metadata, tensors, where)
    divisors = tensors.get(_DIVISORS) if name == "llama" else None
    config |= _rope(config_from_hf(config, where), divisors, where)
    sources, shapes, permuted = {}, {}, {}
    decoder = config_from_hf(config, where)
    # LLaMA's Q and K are stored with the halves that RoPE turns interleaved.
    heads = {"layers/attention/q": decoder.num_heads, "layers/attention/k": decoder.num_kv_heads}
    for hf_name, (row, layer) in param_table(decoder).hf_names().items():
        source = _GGUF_NAMES[row.path].format(layer=layer)
        sources[hf_name], shapes[source] = source, row.hf_shape
        if name == "llama" and row.path in heads:
            permuted[hf_name] = heads[row.path]
    if divisors is not None:
        shapes[_DIVISORS] = divisors.shape
    _check_tensors(shapes, tensors, where)
    return Model(config, sources, permuted)


def _read_config(
    name: str, metadata: Mapping[str, Any], tensors: Mapping[str, Stored], where: str
) -> dict[str, Any]:
    """Return config.json without RoPE's scaling."""
    fields = _Fields(metadata, f"{name}.")
    layers = fields.size("block_count")
    width = fields.size("embedding_length")
    mlp = fields.size("feed_forward_length")
    length = fields.size("context_length")
    heads = fields.size("attention.head_count")
    kv_heads = fields.size("attention.head_count_kv", heads)
    head_dim = fields.size("attention.key_length", width // heads)
    eps = fields.number("attention.layer_norm_rms_epsilon")
    theta = fields.number("rope.freq_base", 10000.0)
    window = fields.size("attention.sliding_window", 0, least=0)
    fields.require("attention.value_length", head_dim)
    fields.require("rope.dimension_count", head_dim)
    fields.require("rope.scaling.type", "none")
    fields.require("expert_count", 0)
    fields.require("expert_used_count", 0)
    if heads % kv_heads or head_dim % 2 or "attention.key_length" not in fields and width % heads:
        fields.problems.append(
            f"{heads} heads, {kv_heads} key-value heads, width {width}, head size {head_dim}: "
            "heads must divide by key-value heads, width by heads, and the head size be even"
        )
    if window >= length:
        window = 0  # every position sees all before it
    if window and name != "llama":
        fields.problems.append(
            f"{name}.attention.sliding_window = {window} (not supported for this architecture)"
        )
    if layers > len(tensors):  # before a table of that many layers is made
        fields.problems.append(
            f"{name}.block_count = {layers}, but the file holds {len(tensors)} tensors"
        )
    fields.raise_problems(where)
    embedding = tensors.get("token_embd.weight")
    if not embedding or len(embedding.shape) != 2:
        raise Refused(
            f"{where}: the embedding token_embd.weight is missing or no matrix; the file holds no "
            "whole model."
        )
    vocab = embedding.shape[0]
    family = "mistral" if window else name
    config = {
        "architectures": [FAMILIES[family].architecture],
        "model_type": family,
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": length,
        "rms_norm_eps": float(f"{eps:.6g}"),  # stored as float32
        **_ARCHITECTURES[name],
        "rope_theta": theta,
        "tie_word_embeddings": "output.weight" not in tensors,
        **_token_ids(metadata, vocab, where),
    }
    if window:
        config["sliding_window"] = window
    return config


class _Fields:
    """The metadata of one architecture, read with checks; problems are collected."""

    def __init__(self, metadata: Mapping[str, Any], prefix: str):
        self.prefix, self.problems = prefix, []
        self.values = {
            k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)
        }
        self.handled = set(_BENIGN)

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def size(self, key: str, default: int | None = None, least: int = 1) -> int:
        """Return a whole number; 1, with a problem noted, if there is none."""
        return self._read(
            key, default, lambda x: type(x) is int and x >= least, f"a whole number from {least} on"
        )

    def number(self, key: str, default: float | None = None) -> float:
        """Return a positive number; 1, with a problem noted, if there is none."""
        return self._read(
            key, default, lambda x: type(x) in (int, float) and 0 < x < math.inf, "a number above 0"
        )

    def require(self, key: str, only: Any) -> None:
        """Note a problem if a value is there and is another one."""
        self._read(
            key,
            only,
            lambda x: type(x) is type(only) and x == only,
            f"only {only!r} is supported",
        )

    def _read(self, key: str, default: Any, good: Callable[[Any], bool], expected: str) -> Any:
        self.handled.add(key)
        if key not in self.values and default is not None:
            return default
        value = self.values.get(key)
        if good(value):
            return value
        got = f"= {value!r:.60}" if key in self.values else "is missing"
        self.problems.append(f"{self.prefix}{key} {got} ({expected})")
        return 1

    def raise_problems(self, where: str) -> None:
        for key, value in self.values.items():
            if key not in self.handled:
                self.problems.append(f"{self.prefix}{key:.60} = {value!r:.60} (unknown)")
        if self.problems:
            raise Refused(f"{where}: its metadata cannot be represented: {some(self.problems)}.")


def _token_ids(metadata: Mapping[str, Any], vocab: int, where: str) -> dict[str, Any]:
    """Return the ids of special tokens that are there; eos is a list where the end of a turn is
    another token."""
    ids, wrong = {}, []
    for role in ("bos", "eos", "eot", "eom", "padding"):
        key = f"tokenizer.ggml.{role}_token_id"
        if key not in metadata:
            continue
        ids[role] = metadata[key]
        if type(ids[role]) is not int or not 0 <= ids[role] < vocab:
            wrong.append(f"{key} = {ids[role]!r:.60}")
    if wrong:
        raise Refused(
            f"{where}: {some(wrong)}: an id is a row of the embedding, which has {vocab}."
        )
    ends = list(dict.fromkeys(ids[k] for k in ("eos", "eot", "eom") if k in ids))
    return {
        "bos_token_id": ids.get("bos"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": ids.get("padding", ids.get("eos")),
    }


def _rope(plain: DecoderConfig, divisors: Stored | None, where: str) -> dict[str, Any]:
    """Return base and scaling in the spelling of transformers 4 and that of 5."""
    scaling = None if divisors is None else _llama3_scaling(plain, divisors, where)
    parameters = scaling or {"rope_type": "default"}
    return {
        "rope_theta": plain.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {**parameters, "rope_theta": plain.rope_theta},
    }


def _llama3_scaling(plain: DecoderConfig, divisors: Stored, where: str) -> dict[str, Any]:
    """Return the scaling that gives these divisors of the frequencies."""
    shape = (plain.head_dim // 2,)
    if divisors.dtype != "float32" or divisors.shape != shape:
        raise Refused(
            f"{where}: {_DIVISORS} is {divisors.dtype} {divisors.shape}, expected float32 "
            f"{shape}. {_FOLDER}."
        )
    # Here: who only looks for a file needs no JAX.
    from safepatch_jax.models.rope import rotary_frequencies

    values = divisors.read()
    # Every LLaMA 3.x has these numbers; the factor is that of the slowest rotation.
    scaling = RopeScaling(float(values[-1]), 1.0, 4.0, 8192)
    scaled = dataclasses.replace(plain, rope_scaling=scaling)
    is_factor = 1 <= scaling.factor < math.inf
    if not is_factor or not np.allclose(
        values, rotary_frequencies(plain) / rotary_frequencies(scaled), rtol=1e-5, atol=0
    ):
        raise Refused(
            f"{where}: {_DIVISORS} does not follow from LLaMA 3's RoPE scaling "
            f"(low_freq_factor {scaling.low_freq_factor:g}, high_freq_factor "
            f"{scaling.high_freq_factor:g}, original length {scaling.original_max_length}), and "
            f"nothing else can be written into config.json. {_FOLDER}."
        )
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_length,
    }


def _check_tensors(shapes: Mapping[str, tuple], tensors: Mapping[str, Stored], where: str) -> None:
    """Check names, shapes and types; collect every mismatch and raise ValueError once."""
    problems = []
    missing = [name for name in shapes if name not in tensors]
    if missing:
        problems.append(f"{len(missing)} missing: {some(missing)}")
    unknown = [f"{name!r:.100}" for name in tensors if name not in shapes]
    if unknown:
        problems.append(f"{len(unknown)} unknown: {some(unknown)}")
    dtypes = {x.dtype for x in tensors.values()}
    readable = {dtype for dtype in dtypes if _is_readable(dtype)}
    for name, x in tensors.items():
        if name in shapes and x.shape != shapes[name]:
            problems.append(f"'{name}' has shape {x.shape}, the metadata says {shapes[name]}")
        if name in shapes and x.dtype not in readable:
            problems.append(f"'{name}' has the type {x.dtype}, which cannot be dequantised")
    if problems:
        raise Refused(
            f"{where}: its tensors cannot be represented: {some(problems)}. Take another file of "
            "the model (Q8_0, Q4_K_M, F16, BF16), or its Hugging Face folder."
        )


def _is_readable(dtype: str) -> bool:
    import gguf

    if dtype in DTYPES:
        return True
    kind = gguf.GGMLQuantizationType[dtype]
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:  # gguf's, of a kind that it cannot read
        return False
    return True
