"""The programs of a run, for compiling them without their devices: nothing is allocated.

train (of one step), score (of one batch), patch (one program for each distinct weight), decode
(prefill and all steps of a batch).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from safepatch_jax.data.chat import bucket
from safepatch_jax.evaluation.generate import decode
from safepatch_jax.io import hub
from safepatch_jax.mesh import Sharder
from safepatch_jax.models.config import DecoderConfig, config_from_hf, read_hf_config
from safepatch_jax.models.layerwise import Part
from safepatch_jax.models.table import Param, param_table
from safepatch_jax.patching import PATCH_ROLES
from safepatch_jax.patching.ahead import Signature
from safepatch_jax.patching.merge import signature
from safepatch_jax.patching.options import scope_rows
from safepatch_jax.planning import PROGRAMS
from safepatch_jax.planning.needs import decode_flops, train_flops
from safepatch_jax.run.context import Context
from safepatch_jax.runtime import files
from safepatch_jax.settings import Settings
from safepatch_jax.training.batch import batch_layout


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a run.

    Attributes:
      kind: one of PROGRAMS.
      name: of the weights it works on, for a kind with several programs.
      trace: traces it; raises ValueError where settings, model and mesh do not go together.
      resident: bytes on each device of arrays that the run holds beside the program's own.
      runs: how often one step, or one batch, takes it.
      while_trips: the most often its while loops run.
      step: of which step or batch it is a part.
      least_flops: that this step cannot do without, all devices together, see `needs`; 0 where it
        has no products.
    """

    kind: str
    name: str
    trace: Callable[[], jax.stages.Traced]
    resident: int = 0
    runs: int = 1
    while_trips: int = 1
    step: str = ""
    least_flops: int = 0

    @property
    def title(self) -> str:
        return f"{self.kind} {self.name}".strip()


def architecture(settings: Settings) -> DecoderConfig:
    """Return the architecture: of model.source if that is a folder with a config.json, else of
    model.architecture.

    Raises:
      ValueError: neither is there, or the decoder cannot represent it.
    """
    source = pathlib.Path(settings.model.source.removeprefix("hf:"))
    stand_in = settings.model.architecture
    if settings.model.source and (source / "config.json").is_file():
        return read_hf_config(source)
    parts = hub.named(settings.model.source.removeprefix("hf:"))
    if parts and (not stand_in or hub.at_hand(settings.model.source)):
        return read_hf_config(hub.snapshot(*parts, weights=False).folder)
    if not stand_in:
        raise ValueError(
            f"The architecture is not known: model.source '{settings.model.source}' is not a "
            "folder with a config.json, and model.architecture is not set. Give "
            "--model.architecture=FILE, such as one of configs/architectures, or "
            "--model.source=DIR."
        )
    if not pathlib.Path(stand_in).is_file():
        raise ValueError(
            f"No file '{stand_in}' (model.architecture). Give a config.json, as in "
            "configs/architectures."
        )
    return config_from_hf(files.read_json(pathlib.Path(stand_in)), stand_in)


def lengths(settings: Settings) -> tuple[int, int]:
    """Return the largest (T, A) of training and scoring that the data settings allow: padded
    sequence and answer length."""
    data = settings.data
    return bucket(data.max_prompt_tokens + data.max_answer_tokens), bucket(data.max_answer_tokens)


def programs(
    settings: Settings,
    config: DecoderConfig,
    sharder: Sharder,
    kinds: Sequence[str] = PROGRAMS,
    shape: tuple[int, int] | None = None,
) -> list[Program]:
    """Return the programs of a run on a mesh.

    Args:
      settings: of the run.
      config: the architecture.
      sharder: the mesh.
      kinds: which.
      shape: T and A of training and scoring; by default the largest that the settings allow.

    Raises:
      ValueError: unknown kind; a batch or a dimension of the model that the mesh does not divide.
    """
    param_table(config).shardings(sharder)
    context = Context(settings)
    context.sharder = sharder
    context.check_batches()
    shape = shape or lengths(settings)
    makers = {
        "train": functools.partial(_train, shape=shape),
        "score": functools.partial(_score, shape=shape),
        "patch": _patch,
        "decode": _decode,
    }
    result = []
    for kind in checked_kinds(kinds):
        result += makers[kind](context, config)
    return result


def checked_kinds(kinds: Sequence[str]) -> tuple[str, ...]:
    """Return these kinds of programs in the order of a run.

    Raises:
      ValueError: one is unknown, or there is none.
    """
    if not kinds:
        raise ValueError(f"No program is named; there are {', '.join(PROGRAMS)}.")
    for kind in kinds:
        if kind not in PROGRAMS:
            raise ValueError(f"Unknown program '{kind}'; there are {', '.join(PROGRAMS)}.")
    return tuple(kind for kind in PROGRAMS if kind in kinds)


def in_blocks(settings: Settings, config: DecoderConfig) -> bool:
    """Return whether all weights of the patch scope are the blocks'."""
    return all(row.stacked for row in param_table(config).scope(settings.patch.scope))


def device_bytes(rows: Iterable[Param], sharder: Sharder, dtype: Any) -> int:
    """Return the bytes of these parameters on each device, in a dtype."""
    size = 0
    for row in rows:
        sharding = sharder.sharding(row.axes, row.shape, row.path)
        size += math.prod(sharding.shard_shape(row.shape))
    return size * jnp.dtype(dtype).itemsize


def resident_bytes(
    settings: Settings, config: DecoderConfig, sharder: Sharder, rows: Sequence[Param]
) -> int:
    """Return the bytes that the patch stage holds on each device beside one weight's program.

    They are those of the backbone, whose buffers the finished weights take. Derived models and
    sensitivities are read weight by weight, except for global top sets, whose thresholds need all
    of them. (One CPU device also holds those of the weight before, if small: `merge.SMALL`.)

    Args:
      rows: the weight whose arrays are the program's arguments.
    """
    table, stored, patch = param_table(config), config.dtype, settings.patch
    scope = scope_rows(table, patch)
    total = device_bytes(table, sharder, stored) - device_bytes(rows, sharder, stored)
    others = [row for row in scope if row not in rows]
    if settings.export.dtype not in ("keep", stored):
        # The result cannot take the buffers of the backbone.
        total += device_bytes(others, sharder, settings.export.dtype)
    if patch.ranks_whole_scope:
        arrays = len(PATCH_ROLES) * (1 + patch.needs_sensitivity)
        total += arrays * device_bytes(others, sharder, "float32")
    return total


def holdings(
    settings: Settings, config: DecoderConfig, sharder: Sharder
) -> dict[str, dict[str, int]]:
    """Return the bytes that training and scoring hold on each device, {kind: {purpose: bytes}}; by
    arithmetic, so without what the compiler needs beside them."""
    context, shape = Context(settings), lengths(settings)
    context.sharder = sharder
    scope, score = settings.derive.train == "scope", settings.score
    batch = abstract_batch(settings.derive.batch_size, shape, sharder)
    result = {"train": context.trainer(config, None, scope).holds(batch)}
    if score.mode == "per_sample":
        meter = context.meter(config)
        batch = abstract_batch(meter.in_flight, shape, sharder)
        result["score"] = meter.holds(batch, score.samples)
    return result


def abstract_batch(
    rows: int, shape: tuple[int, int], sharder: Sharder
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return a training batch of so many rows, laid out as by `put_batch`.

    Args:
      rows: B.
      shape: T and A.
    """
    length, answers = shape
    array = functools.partial(_rows, sharder)
    return {
        "tokens": array((rows, length), jnp.int32),
        "valid": array((rows, length), jnp.bool_),
        "predict_at": array((rows, answers), jnp.int32),
        "targets": array((rows, answers), jnp.int32),
        "weights": array((rows, answers), jnp.float32),
    }


def _rows(sharder: Sharder, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    axes = batch_layout(shape[0], sharder)[: len(shape)]
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharder.sharding(axes))


def _train(context: Context, config: DecoderConfig, shape: tuple[int, int]) -> list[Program]:
    align, derive = context.settings.align, context.settings.derive
    scope, blocks = derive.train == "scope", in_blocks(context.settings, config)

    def step(name, rows, scope):
        batch = abstract_batch(rows, shape, context.sharder)
        least = train_flops(config, rows, *shape, head=not (scope and blocks))
        return _of_parts("train", name, context.trainer(config, None, scope).parts(batch), least)

    result = step("", derive.batch_size, scope)
    if align.enabled and (align.batch_size > derive.batch_size or scope):
        result += step("align", align.batch_size, False)
    return result


def _score(context: Context, config: DecoderConfig, shape: tuple[int, int]) -> list[Program]:
    """Return the programs of the score mode; the batched mode also runs the other one, on one
    weight."""
    meter, score = context.meter(config), context.settings.score
    batched = score.mode == "batched"
    rows = score.batch_size if batched else meter.in_flight
    batch = abstract_batch(rows, shape, context.sharder)
    least = train_flops(config, rows, *shape, head=not in_blocks(context.settings, config))
    return _of_parts("score", "", meter.parts(batch, score.samples, batched), least)


def _of_parts(kind: str, name: str, parts: Iterable[Part], least: int) -> list[Program]:
    """Return the programs of a step, or of a batch, that needs so many FLOPs at least."""
    make = functools.partial(Program, kind, step=f"{kind} {name}".strip(), least_flops=least)
    result = []
    for part in parts:
        title = f"{name} {part.name}".strip()
        result.append(make(title, part.trace, part.resident, part.runs))
    return result


def _patch(context: Context, config: DecoderConfig) -> list[Program]:
    alike: dict[Signature, list[Param]] = {}
    for row in param_table(config).scope(context.settings.patch.scope):
        alike.setdefault(_patch_signature(context, row, config), []).append(row)
    result = []
    for of_rows, rows in alike.items():
        name = " ".join(row.path.split("/")[-1] for row in rows)
        resident = resident_bytes(context.settings, config, context.sharder, rows[:1])
        result.append(Program("patch", name, of_rows.trace_merge, resident))
    return result


def _patch_signature(context: Context, row: Param, config: DecoderConfig) -> Signature:
    patch, export, sharder = context.settings.patch, context.settings.export, context.sharder
    sharding = sharder.sharding(row.axes, row.shape, row.path)
    stored = jax.ShapeDtypeStruct(row.shape, jnp.dtype(config.dtype), sharding=sharding)
    return signature(row, stored, sharder, patch, export.dtype, export.rounding)


def _decode(context: Context, config: DecoderConfig) -> list[Program]:
    """Return the program with the larger weights: those of the backbone as stored, or those of
    derived models in the dtype of the arithmetic. It reads all prompts at once, where an engine
    reads a part of the rows at a time; the steps are the same."""
    settings, sharder, decoder = context.settings, context.sharder, context.decoder(config)
    dtypes = jnp.dtype(config.dtype), jnp.dtype(settings.model.compute_dtype)
    dtype = max(dtypes, key=lambda dtype: dtype.itemsize)
    evaluate = settings.evaluate
    # What follows a thought that has a limit is read behind it.
    length = bucket(settings.data.max_prompt_tokens + evaluate.think_tokens)
    array = functools.partial(_rows, decoder.sharder)

    def trace():
        return decode.trace(
            decoder,
            param_table(config).abstract(sharder, dtype),
            array((evaluate.batch_size, length), jnp.int32),
            array((evaluate.batch_size,), jnp.int32),
            jax.ShapeDtypeStruct((max(1, len(config.eos_ids)),), jnp.int32),
            max_new=evaluate.max_new_tokens,
        )

    new = evaluate.max_new_tokens
    least = decode_flops(config, evaluate.batch_size, length, new)
    return [Program("decode", "", trace, while_trips=new, step="decode", least_flops=least)]
