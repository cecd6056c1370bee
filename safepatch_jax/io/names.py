"""The names of a folder's tensors as transformers has them: what a wrapper put before all of them
is taken off, and what tells that they are no model's own weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from safepatch_jax.io.stored import DTYPES, Stored
from safepatch_jax.io.torch_file import TorchTensor
from safepatch_jax.models.bookkeeping import DEQUANTISE
from safepatch_jax.models.strays import MERGE
from safepatch_jax.runtime.console import some
from safepatch_jax.runtime.reading import Refused
from safepatch_jax.runtime.text import printable

_EMBEDDING, _HEAD, _INNER = "embed_tokens.weight", "lm_head.weight", "model."
_MOST = 100  # characters of a name in a message
_ADAPTER_PARTS = {
    "lora_A",
    "lora_B",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    "base_layer",
    "modules_to_save",
    "original_module",
    "prompt_embeddings",
}
# By the end of a name: who packs weights so.
_PACKED = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".weight_packed": "compressed-tensors",
    ".weight_scale_inv": "FP8",
    ".weight_scale": "FP8 or INT8",
}


def short(name: str) -> str:
    """Return a tensor's name for a message."""
    return printable(name, _MOST)


def listed(names: Iterable[str], most: int = 6) -> str:
    """Return the first few of many names for a message."""
    names = list(names)
    return some([short(name) for name in names[:most]] + names[most:], ", ", most)


def standard_names(names: Iterable[str]) -> tuple[dict[str, str], str]:
    """Give tensors the names that transformers has for them.

    The embedding's name says what stands before the others: ``_orig_mod.`` of torch.compile,
    ``module.`` of DDP, ``language_model.`` of a model with vision, ``base_model.model.`` of PEFT;
    or that ``model.`` is missing, as AutoModel leaves it out.

    Returns:
      standard name by the name in the file, and what was done, in words; '' if nothing.
    """
    same = {name: name for name in names}
    anchors = [name for name in same if f".{name}".endswith(f".{_EMBEDDING}")]
    if len(anchors) != 1 or anchors[0] == _INNER + _EMBEDDING:
        return same, ""
    inner = anchors[0].removesuffix(_EMBEDDING)
    is_base = not f".{inner}".endswith(f".{_INNER}")
    outer = inner if is_base else inner.removesuffix(_INNER)
    renamed = {}
    for name in same:
        rest = name.removeprefix(outer)
        if not name.startswith(outer):
            renamed[name] = name
        elif is_base and rest != _HEAD:
            renamed[name] = _INNER + rest
        else:
            renamed[name] = rest
    if len(set(renamed.values())) < len(renamed):
        return same, ""
    done = []
    if outer:
        done.append(f"the prefix '{short(outer)}' of the tensors' names is taken off")
    if is_base:
        done.append("'model.' is put before the names (AutoModel saved them without)")
    return renamed, " and ".join(done)


def refuse_adapter(names: Iterable[str], where: object) -> None:
    """Raise Refused if tensors are those of an adapter, alone or within a model."""
    parts = [name for name in names if _ADAPTER_PARTS & set(name.split("."))]
    if parts:
        raise Refused(
            f"{where} holds {len(parts)} tensors of an adapter (LoRA, PEFT), such as "
            f"{short(parts[0])}, which is not merged: {MERGE}, and give DIR."
        )


def refuse_unusable(tensors: Mapping[str, Stored | TorchTensor], where: object) -> None:
    """Raise Refused if tensors are placeholders without values, or quantised."""
    empty = [name for name, x in tensors.items() if 0 in x.shape]
    if empty:
        raise Refused(
            f"{where}: {len(empty)} of {len(tensors)} tensors are empty (0 elements), such as "
            f"{listed(empty, 2)}: placeholders for weights that ZeRO-3 or FSDP holds elsewhere. "
            "Gather the weights (zero_to_fp32.py in the training checkpoint, or accelerate "
            "merge-weights for FSDP) and give that folder."
        )
    packed = {}
    for name, x in tensors.items():
        for end, method in _PACKED.items():
            if name.endswith(end):
                packed[name] = method
        if x.dtype.upper().startswith(("F8_", "F4", "F6_", "FLOAT8_", "FLOAT4_")):
            packed[name] = f"FP8 or less: {short(x.dtype)}"
    if packed:
        name, method = next(iter(packed.items()))
        raise Refused(
            f"{where}: the weights are quantised ({method}); {len(packed)} of {len(tensors)} "
            f"tensors say so, such as {short(name)}. {DEQUANTISE}."
        )


def dtype_problems(tensors: Mapping[str, Stored | TorchTensor]) -> list[str]:
    """Return what is wrong with the dtypes of tensors, one sentence for all that have the same."""
    names: dict[str, list[str]] = {}
    for name, x in tensors.items():
        if x.dtype not in DTYPES:
            names.setdefault(x.dtype, []).append(name)
    problems = []
    for dtype, those in names.items():
        verb = "has" if len(those) == 1 else "have"
        problems.append(
            f"{listed(those, 2)} {verb} dtype {short(dtype)}, supported are {', '.join(DTYPES)}"
        )
    return problems
