"""LoRA adapters (PEFT's folders): merged into a copy of their base, tensor by tensor; no JAX."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from safepatch_jax.io import safetensors_file
from safepatch_jax.io.companions import copy_companions, write_config
from safepatch_jax.io.folder import Checkpoint
from safepatch_jax.io.names import listed
from safepatch_jax.io.safetensors_file import Planned, write_shards
from safepatch_jax.io.stored import DTYPES, Stored
from safepatch_jax.runtime import files
from safepatch_jax.runtime.reading import Refused, reading

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# Settings of PEFT that change what is added, and the values at which it is scaling * B A.
_PLAIN: Mapping[str, tuple] = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    "fan_in_fan_out": (None, False),
    "use_dora": (None, False),
    "use_qalora": (None, False),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None, []),
    "megatron_config": (None,),
    "lora_bias": (None, False),
}
_PEFT = "Merge it by PEFT: PeftModel.from_pretrained(base, adapter).merge_and_unload()."


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
      folder: as given.
      factors: A [r, in] and B [out, r] of each weight, by its name in the base.
      scaling: of their product.
    """

    folder: pathlib.Path
    factors: Mapping[str, tuple[Stored, Stored]]
    scaling: float

    @classmethod
    def open(cls, folder: str | pathlib.Path) -> Adapter:
        """Read what an adapter folder holds.

        Raises:
          ValueError: no adapter, another kind than plain LoRA, or tensors without their partner.
        """
        folder = pathlib.Path(folder)
        for name in (SETTINGS, WEIGHTS):
            if not (folder / name).is_file():
                raise Refused(
                    f"{folder} holds no {name}: give the folder that PEFT's save_pretrained wrote."
                )
        settings = files.read_json(folder / SETTINGS)
        with reading(folder / SETTINGS, "the settings of an adapter", "Copy the file again."):
            scaling = _scaling(settings, folder)
        tensors = safetensors_file.list_tensors(files.own_file(folder / WEIGHTS))
        parts: dict[str, dict[str, Stored]] = {}
        strangers = []
        for name, tensor in tensors.items():
            if (match := _NAME.fullmatch(name)) and tensor.dtype in DTYPES:
                parts.setdefault(f"{match[1]}.weight", {})[match[2]] = tensor
            else:
                strangers.append(name)
        strangers += [name for name, pair in parts.items() if len(pair) < 2]
        if strangers:
            raise Refused(f"{folder / WEIGHTS}: not plain LoRA: {listed(strangers, 3)}. {_PEFT}")
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
    shard_bytes: int = 5_000_000_000,
) -> int:
    """Write a base model with an adapter merged into it; return how many tensors it changed.

    Args:
      base: Hugging Face folder, safetensors.
      adapter: PEFT's folder, see `Adapter`.
      out: an existing folder.
      shard_bytes: weight files are cut at this size.

    Raises:
      ValueError: the two do not go together (names, shapes), or as `Adapter.open`.
    """
    lora, tensors = Adapter.open(adapter), Checkpoint(base).tensors
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

    def tensor_of(name: str) -> np.ndarray:
        return lora.added(name, tensors[name].read())

    plan = {name: Planned(tuple(x.shape), x.dtype) for name, x in tensors.items()}
    write_shards(out, plan, tensor_of, shard_bytes, hashed=False)
    copy_companions(base, out)
    write_config(base, out, None)
    return len(lora.factors)


def _scaling(settings: Mapping[str, Any], folder: pathlib.Path) -> float:
    """Return lora_alpha / r, or / sqrt(r) (rsLoRA)."""
    wrong = [
        f"{name} = {settings.get(name)!r:.60}"
        for name, plain in _PLAIN.items()
        if settings.get(name) not in plain
    ]
    if wrong:
        raise Refused(f"{folder / SETTINGS}: not plain LoRA: {listed(wrong, 4)}. {_PEFT}")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
        raise Refused(
            f"{folder / SETTINGS}: r = {rank!r:.40}, lora_alpha = {alpha!r:.40}: numbers "
            "above 0 are needed. Copy the file again."
        )
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank
