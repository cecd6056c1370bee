"""LoRA adapters (PEFT's folders): merged into a copy of their base, tensor by tensor; no JAX."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from safepatch_jax.io import safetensors_file, torch_file
from safepatch_jax.io.companions import (
    TOKENIZER,
    UNTOKENIZED,
    VOCABULARY,
    copy_companions,
    write_config,
)
from safepatch_jax.io.folder import Checkpoint
from safepatch_jax.io.names import dtype_problems, listed, refuse_unusable
from safepatch_jax.io.safetensors_file import SHARD_BYTES, Planned, write_shards
from safepatch_jax.io.stored import DTYPES, Stored
from safepatch_jax.io.torch_file import TorchTensor
from safepatch_jax.runtime import files
from safepatch_jax.runtime.reading import Refused, reading

SETTINGS, WEIGHTS, TORCH = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
FILES = (SETTINGS, WEIGHTS, TORCH)  # what an adapter is
_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# Settings of PEFT that change what is added, and the values at which it is scaling * B A.
_PLAIN: Mapping[str, tuple] = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    "megatron_core": (None, "megatron.core"),
    # The other ways to begin change the base too.
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}
# Settings that change nothing of it, where they are more than off.
_NEUTRAL = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "peft_version",
        "qalora_group_size",
        "r",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)
_PEFT = "Merge it by PEFT: PeftModel.from_pretrained(base, adapter).merge_and_unload()."


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
      folder: as given.
      factors: A [r, in] and B [out, r] of each weight, by its name in the base; at least one.
      scaling: of their product.
    """

    folder: pathlib.Path
    factors: Mapping[str, tuple[Stored | TorchTensor, Stored | TorchTensor]]
    scaling: float

    @classmethod
    def open(cls, folder: str | pathlib.Path) -> Adapter:
        """Read what an adapter folder holds.

        Raises:
          ValueError: no adapter, another kind than plain LoRA, tensors without their partner or
            without values, or none.
        """
        folder = pathlib.Path(folder)
        weights = folder / WEIGHTS
        if not weights.is_file() and (folder / TORCH).is_file():
            weights = folder / TORCH
        for path in (folder / SETTINGS, weights):
            if not path.is_file():
                raise Refused(
                    f"{folder} holds no {path.name}: give the folder that PEFT's save_pretrained "
                    "wrote."
                )
        settings = files.read_json(folder / SETTINGS)
        with reading(folder / SETTINGS, "the settings of an adapter", "Copy the file again."):
            scaling = _scaling(settings, folder)
        read = torch_file if weights.name == TORCH else safetensors_file
        tensors = read.list_tensors(files.own_file(weights))
        refuse_unusable(tensors, weights)
        parts: dict[str, dict[str, Stored]] = {}
        strangers = []
        for name, tensor in tensors.items():
            usable = tensor.dtype in DTYPES and len(tensor.shape) == 2
            if usable and (match := _NAME.fullmatch(name)):
                parts.setdefault(f"{match[1]}.weight", {})[match[2]] = tensor
            else:
                strangers.append(name)
        strangers += [name for name, pair in parts.items() if len(pair) < 2]
        if strangers:
            raise Refused(f"{weights}: not plain LoRA: {listed(strangers, 3)}. {_PEFT}")
        if not parts:
            raise Refused(f"{weights} holds no tensors: nothing was trained, or saved. Save again.")
        factors = {name: (pair["A"], pair["B"]) for name, pair in parts.items()}
        return cls(folder, factors, scaling)

    def added(self, name: str, weight: np.ndarray) -> np.ndarray:
        """Return a weight of the base [out, in] with its share of the adapter, in its dtype: the
        product and sum in float32, rounded once, as PEFT does it with adapters in float32."""
        if name not in self.factors:
            return weight
        a, b = (tensor.read().astype(np.float32) for tensor in self.factors[name])
        delta = (b @ a) * np.float32(self.scaling)
        return (weight.astype(np.float32) + delta).astype(weight.dtype)


def merge_adapter(
    base: str | pathlib.Path,
    adapter: str | pathlib.Path,
    out: pathlib.Path,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write a base model with an adapter merged into it; return how many tensors it changed.

    Args:
      base: Hugging Face folder, safetensors.
      adapter: PEFT's folder, see `Adapter`. If a tokenizer lies there, it goes with the model in
        place of the base's: it is the one that was trained with.
      out: an existing folder.
      shard_bytes: weight files are cut at this size.

    Raises:
      ValueError: the two do not go together (names, shapes), the base is quantised, nothing is
        changed, or as `Adapter.open`.
    """
    lora, tensors = Adapter.open(adapter), Checkpoint(base).tensors
    tokenized = has_tokenizer(adapter)
    refuse_unusable(tensors, base)
    if problems := dtype_problems(tensors):
        raise Refused(f"{base}: {listed(problems, 3)}. Give the base in one of these.")
    absent = sorted(lora.factors.keys() - tensors.keys())
    if absent:
        raise Refused(
            f"{adapter} changes tensors that {base} lacks: {listed(absent, 3)}. Give the base that "
            f"{SETTINGS} names."
        )
    wrong = []
    for name, (a, b) in lora.factors.items():
        shape = (b.shape[0], a.shape[1])
        if shape != tuple(tensors[name].shape) or a.shape[0] != b.shape[1]:
            wrong.append(f"{name} {tuple(tensors[name].shape)} by {b.shape} x {a.shape}")
    if wrong:
        raise Refused(f"{adapter} does not fit {base}: {listed(wrong, 3)}. Is it another base?")

    changed = set()

    def tensor_of(name: str) -> np.ndarray:
        before = tensors[name].read()
        after = lora.added(name, before)
        if after is not before and not np.array_equal(_bits(after), _bits(before)):
            changed.add(name)
        return after

    plan = {name: Planned(tuple(x.shape), x.dtype) for name, x in tensors.items()}
    write_shards(out, plan, tensor_of, shard_bytes, hashed=False)
    if not changed:
        raise Refused(
            f"{adapter} changes no weight of {base}: its products are 0, or lost in the rounding "
            "to the base's dtype. Was it trained?"
        )
    if tokenized:
        copy_companions(base, out, UNTOKENIZED)
        copy_companions(lora.folder, out, TOKENIZER)
    else:
        copy_companions(base, out)
    write_config(base, out, None)
    return len(changed)


def has_tokenizer(adapter: str | pathlib.Path) -> bool:
    """Tell whether a tokenizer lies beside an adapter, which then goes with the merged model.

    Raises:
      ValueError: a part of one lies there.
    """
    there = [name for name in TOKENIZER if (pathlib.Path(adapter) / name).is_file()]
    whole = any(name in VOCABULARY for name in there)
    if there and not whole:
        raise Refused(
            f"{adapter} holds {listed(there, 3)} and no vocabulary (tokenizer.json). Copy the rest "
            "of the tokenizer that was trained with there, or delete this part to keep the base's."
        )
    return whole


def _bits(x: np.ndarray) -> np.ndarray:
    return x.view(f"u{x.itemsize}")


def _scaling(settings: Mapping[str, Any], folder: pathlib.Path) -> float:
    """Return lora_alpha / r, or / sqrt(r) (rsLoRA)."""
    wrong = []
    for name, value in ({"peft_type": None} | settings).items():
        plain = value in _PLAIN[name] if name in _PLAIN else not value
        if not plain and name not in _NEUTRAL:
            wrong.append(f"{name} = {value!r:.60}")
    if wrong:
        raise Refused(f"{folder / SETTINGS}: not plain LoRA: {listed(wrong, 4)}. {_PEFT}")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
        raise Refused(
            f"{folder / SETTINGS}: r = {rank!r:.40}, lora_alpha = {alpha!r:.40}: numbers "
            "above 0 are needed. Copy the file again."
        )
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank
