"""GGUF metadata and tensor names to a Hugging Face config.json and tensor names, by whitelist, one
entry a family."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from safepatch_jax.io.stored import DTYPES, Stored
from safepatch_jax.models.config import DecoderConfig, RopeScaling, config_from_hf
from safepatch_jax.models.decoder import rotary_frequencies
from safepatch_jax.models.table import param_table
from safepatch_jax.runtime.console import some

_BENIGN = (
    "vocab_size",
    "tensor_data_layout",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
)


@dataclasses.dataclass(frozen=True)
class _Family:
    """What differs between architectures.

    Attributes:
      name: of the class in transformers, without ForCausalLM.
      extra: what the config has besides.
      permuted: Q and K rows are stored with the rotary halves interleaved.
      norm_offset: added to norm weights in GGUF.
      always_tied: there is no output matrix.
    """

    name: str
    extra: Mapping[str, Any]
    permuted: bool = False
    norm_offset: int = 0
    always_tied: bool = False


_FAMILIES = {
    "llama": _Family("Llama", {"hidden_act": "silu"}, permuted=True),
    "gemma": _Family("Gemma", {"hidden_act": "gelu_pytorch_tanh"}, norm_offset=1, always_tied=True),
    "qwen2": _Family("Qwen2", {"hidden_act": "silu", "use_sliding_window": False}),
}


@dataclasses.dataclass(frozen=True)
class Model:
    """What a GGUF file holds, in Hugging Face terms.

    Attributes:
      config: content of config.json, without dtypes.
      sources: Hugging Face tensor name -> name in the GGUF file.
      permuted_heads: for tensors whose rows GGUF permutes, their number of heads.
      norm_offset: what GGUF has added to norm weights.
    """

    config: dict[str, Any]
    sources: dict[str, str]
    permuted_heads: dict[str, int]
    norm_offset: int


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
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in _FAMILIES:
        raise ValueError(
            f"{where}: architecture {name!r:.60} is not supported; supported: "
            f"{', '.join(_FAMILIES)} "
            "(Mistral is stored as llama)."
        )
    family, fields = _FAMILIES[name], _Fields(metadata, f"{name}.")
    layers, width, mlp = (
        fields.size(k) for k in ("block_count", "embedding_length", "feed_forward_length")
    )
    length, heads = fields.size("context_length"), fields.size("attention.head_count")
    kv_heads = fields.size("attention.head_count_kv", heads)
    head_dim = fields.size("attention.key_length", width // heads)
    eps = fields.number("attention.layer_norm_rms_epsilon")
    theta = fields.number("rope.freq_base", 10000.0)
    window = fields.size("attention.sliding_window", 0, least=0)
    tied = family.always_tied or "output.weight" not in tensors
    fields.require("attention.value_length", head_dim)
    fields.require("rope.dimension_count", head_dim)
    fields.require("rope.scaling.type", "none")
    for key in ("expert_count", "expert_used_count"):
        fields.require(key, 0)
    if heads % kv_heads or head_dim % 2 or "attention.key_length" not in fields and width % heads:
        fields.problems.append(
            f"{heads} heads, {kv_heads} key-value heads, width {width}, head size {head_dim}: "
            "heads must "
            "divide by key-value heads, width by heads, and the head size be even"
        )
    if window >= length or not window:
        window = None  # every position sees all before it
    elif name != "llama":
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
        raise ValueError(
            f"{where}: the embedding token_embd.weight is missing or no matrix; the file holds no "
            "whole model."
        )
    vocab = embedding.shape[0]
    config = {
        "architectures": [f"{'Mistral' if window else family.name}ForCausalLM"],
        "model_type": "mistral" if window else name,
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": length,
        "rms_norm_eps": float(f"{eps:.6g}"),  # stored as float32
        **family.extra,
        **({"sliding_window": window} if window else {}),
        "rope_theta": theta,
        "tie_word_embeddings": tied,
        **_token_ids(metadata, vocab, where),
    }
    divisors = tensors.get("rope_freqs.weight") if name == "llama" else None
    config |= _rope(config_from_hf(config, where), divisors, where)
    sources, shapes, permuted = _tensor_table(family, config_from_hf(config, where))
    _check_tensors(
        shapes,
        {k: v for k, v in tensors.items() if k != "rope_freqs.weight" or name != "llama"},
        where,
    )
    return Model(config, sources, permuted, family.norm_offset)


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
            lambda x: x == only if type(x) is type(only) else False,
            f"only {only!r} is supported",
        )

    def _read(self, key: str, default: Any, good: Callable[[Any], bool], wanted: str) -> Any:
        self.handled.add(key)
        if key not in self.values and default is not None:
            return default
        value = self.values.get(key)
        if good(value):
            return value
        said = f"= {value!r:.60}" if key in self.values else "is missing"
        self.problems.append(f"{self.prefix}{key} {said} ({wanted})")
        return 1

    def raise_problems(self, where: str) -> None:
        self.problems += [
            f"{self.prefix}{k} = {v!r:.60} (unknown)"
            for k, v in self.values.items()
            if k not in self.handled
        ]
        if self.problems:
            raise ValueError(f"{where}: its metadata cannot be represented: {some(self.problems)}.")


def _token_ids(metadata: Mapping[str, Any], vocab: int, where: str) -> dict[str, Any]:
    """Return the ids of special tokens that are there; eos is a list where the end of a turn is
    another token."""
    ids = {
        k: metadata[f"tokenizer.ggml.{k}_token_id"]
        for k in ("bos", "eos", "eot", "eom", "padding")
        if f"tokenizer.ggml.{k}_token_id" in metadata
    }
    wrong = [
        f"tokenizer.ggml.{k}_token_id = {v!r:.60}"
        for k, v in ids.items()
        if type(v) is not int or not 0 <= v < vocab
    ]
    if wrong:
        raise ValueError(
            f"{where}: {some(wrong)}: an id is a row of the embedding, which has {vocab}."
        )
    ends = list(dict.fromkeys(ids[k] for k in ("eos", "eot", "eom") if k in ids))
    return {
        "bos_token_id": ids.get("bos"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": ids.get("padding", ids.get("eos")),
    }


def _rope(plain: DecoderConfig, divisors: Stored | None, where: str) -> dict[str, Any]:
    """Return base and scaling in the spelling of transformers 4 and that of 5; the file has what
    divides each frequency."""
    scaling = None
    if divisors is not None:
        if divisors.dtype != "float32" or divisors.shape != (plain.head_dim // 2,):
            raise ValueError(
                f"{where}: rope_freqs.weight is {divisors.dtype} {divisors.shape}, expected "
                "float32 "
                f"({plain.head_dim // 2},). Convert the model from its Hugging Face folder instead."
            )
        given = divisors.read()
        slowest = float(given[-1])
        # Every LLaMA 3.x has these numbers; the factor is that of the slowest rotation.
        scaling = {
            "rope_type": "llama3",
            "factor": slowest,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        scaled = dataclasses.replace(plain, rope_scaling=RopeScaling(slowest, 1.0, 4.0, 8192))
        if not (
            1 <= slowest < math.inf
            and np.allclose(
                given, rotary_frequencies(plain) / rotary_frequencies(scaled), rtol=1e-5, atol=0
            )
        ):
            raise ValueError(
                f"{where}: rope_freqs.weight does not follow from LLaMA 3's RoPE scaling "
                "(low_freq_factor 1, "
                "high_freq_factor 4, original length 8192), and nothing else can be written into "
                "config.json. "
                "Convert the model from its Hugging Face folder instead."
            )
    return {
        "rope_theta": plain.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {
            **(scaling or {"rope_type": "default"}),
            "rope_theta": plain.rope_theta,
        },
    }


def _tensor_table(
    family: _Family, decoder: DecoderConfig
) -> tuple[dict[str, str], dict[str, tuple], dict[str, int]]:
    """Return Hugging Face name -> GGUF name, -> shape, and -> number of heads where rows are
    permuted."""
    heads = (
        {"layers/attention/q": decoder.num_heads, "layers/attention/k": decoder.num_kv_heads}
        if family.permuted
        else {}
    )
    sources, shapes, permuted = {}, {}, {}
    for hf_name, (row, layer) in param_table(decoder).hf_names().items():
        ours = _GGUF_NAMES[row.path].format(layer=layer)
        sources[hf_name], shapes[ours] = ours, row.hf_shape
        if row.path in heads:
            permuted[hf_name] = heads[row.path]
    return sources, shapes, permuted


def _check_tensors(shapes: Mapping[str, tuple], tensors: Mapping[str, Stored], where: str) -> None:
    """Check names, shapes and types; collect every mismatch and raise ValueError once."""
    problems = []
    if missing := [name for name in shapes if name not in tensors]:
        problems.append(f"{len(missing)} missing: {some(missing)}")
    if unknown := [f"{name!r:.100}" for name in tensors if name not in shapes]:
        problems.append(f"{len(unknown)} unknown: {some(unknown)}")
    unreadable = {dtype for dtype in {x.dtype for x in tensors.values()} if not _is_readable(dtype)}
    for name, x in tensors.items():
        if name in shapes and x.shape != shapes[name]:
            problems.append(f"'{name}' has shape {x.shape}, the metadata says {shapes[name]}")
        if name in shapes and x.dtype in unreadable:
            problems.append(f"'{name}' has the type {x.dtype}, which cannot be dequantised")
    if problems:
        raise ValueError(
            f"{where}: its tensors cannot be represented: {some(problems)}. Take another file of "
            "the model "
            "(Q8_0, Q4_K_M, F16, BF16), or its Hugging Face folder."
        )


def _is_readable(dtype: str) -> bool:
    import gguf

    if dtype in DTYPES:
        return True
    kind = gguf.GGMLQuantizationType[dtype]
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
