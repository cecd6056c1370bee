"""The programs of a run, described well enough to be compiled for devices that are not at hand:
nothing is allocated.

train (one step), score (one step), patch (one program for each distinct weight), decode (prefill
and all steps of a batch).
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
from safepatch_jax.mesh import Sharder
from safepatch_jax.models.config import DecoderConfig, config_from_hf, read_hf_config
from safepatch_jax.models.table import Param, param_table
from safepatch_jax.patching.merge import KEYED, patch_matrices
from safepatch_jax.patching.selection import ROLES
from safepatch_jax.patching.tensor import UNTRIMMED, Knobs, Method
from safepatch_jax.run.context import Context
from safepatch_jax.runtime import files
from safepatch_jax.settings import Settings
from safepatch_jax.training.step import batch_layout

PROGRAMS = ("train", "score", "patch", "decode")


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a run.

    Attributes:
      kind: one of PROGRAMS.
      name: what it works on, for a kind with several programs.
      trace: traces it; raises ValueError where settings, model and mesh do not go together.
      resident: bytes on each device of arrays that the run holds beside the program's own while it
        runs.
      while_trips: the most often its while loops run.
    """

    kind: str
    name: str
    trace: Callable[[], jax.stages.Traced]
    resident: int = 0
    while_trips: int = 1

    @property
    def title(self) -> str:
        return f"{self.kind} {self.name}".strip()


def architecture(settings: Settings) -> DecoderConfig:
    """Return the architecture: of model.source where that is a folder with a config.json, else of
    model.architecture.

    Raises:
      ValueError: neither is there, or the decoder cannot represent it.
    """
    source, stand_in = (
        pathlib.Path(settings.model.source.removeprefix("hf:")).expanduser(),
        settings.model.architecture,
    )
    if settings.model.source and (source / "config.json").is_file():
        return read_hf_config(source)
    if not stand_in:
        raise ValueError(
            f"The architecture is not known: model.source '{settings.model.source}' is no folder "
            "with a config.json, and model.architecture is not set. Give "
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
      shape: T and A of training and scoring; the largest that the settings allow, if it is not
        given.

    Raises:
      ValueError: unknown kind; a batch that does not go with the mesh; a dimension of the model
        that the mesh does not divide.
    """
    param_table(config).shardings(sharder)
    cache = jax.config.jax_compilation_cache_dir
    context = Context(settings)
    context.sharder = sharder
    context.check_batches()
    # A run has set its own by now; others shall get none.
    jax.config.update("jax_compilation_cache_dir", cache)
    shape = shape or lengths(settings)
    made = {
        "train": functools.partial(_train, shape=shape),
        "score": functools.partial(_score, shape=shape),
        "patch": _patch,
        "decode": _decode,
    }
    return [program for kind in checked_kinds(kinds) for program in made[kind](context, config)]


def checked_kinds(kinds: Sequence[str]) -> tuple[str, ...]:
    """Return these kinds of programs in the order of a run. Raises ValueError if one is unknown, or
    none is given."""
    if not kinds:
        raise ValueError(f"No program is asked for; there are {', '.join(PROGRAMS)}.")
    if unknown := [kind for kind in kinds if kind not in PROGRAMS]:
        raise ValueError(f"Unknown program '{unknown[0]}'; there are {', '.join(PROGRAMS)}.")
    return tuple(kind for kind in PROGRAMS if kind in kinds)


def device_bytes(rows: Iterable[Param], sharder: Sharder, dtype: Any) -> int:
    """Return the bytes of these parameters on each device, in a dtype."""
    shard = lambda row: math.prod(
        sharder.sharding(row.axes, row.shape, row.path).shard_shape(row.shape)
    )
    return sum(map(shard, rows)) * jnp.dtype(dtype).itemsize


def resident_bytes(
    settings: Settings, config: DecoderConfig, sharder: Sharder, rows: Sequence[Param]
) -> int:
    """Return what the patch stage holds on each device beside the arguments and temporaries of one
    weight's program.

    That is the backbone, of which the finished weights take the place. Derived models and
    sensitivities are read weight by weight, but for global top sets, whose thresholds need all of
    them.

    Args:
      rows: the weight whose arrays are the program's arguments.
    """
    table, stored, patch = param_table(config), config.dtype, settings.patch
    scope = table.scope(patch.scope)
    total = device_bytes(table, sharder, stored) - device_bytes(rows, sharder, stored)
    others = [row for row in scope if row not in rows]
    if settings.export.dtype not in ("keep", stored):  # the result takes no buffer of the backbone
        total += device_bytes(others, sharder, settings.export.dtype)
    if patch.granularity == "global" and patch.merge not in UNTRIMMED:
        total += 4 * device_bytes(others, sharder, "float32")
    return total


def abstract_batch(
    rows: int, shape: tuple[int, int], sharder: Sharder
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return a training batch of so many rows, laid out as `put_batch` does it.

    Args:
      rows: B.
      shape: T and A.
    """
    length, answers = shape
    array = functools.partial(_rows, sharder, rows)
    return {
        "tokens": array(length, jnp.int32),
        "valid": array(length, jnp.bool_),
        "predict_at": array(answers, jnp.int32),
        "targets": array(answers, jnp.int32),
        "weights": array(answers, jnp.float32),
    }


def _rows(sharder: Sharder, rows: int, length: int, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(
        (rows, length), dtype, sharding=sharder.sharding(batch_layout(rows, sharder))
    )


def _train(context: Context, config: DecoderConfig, shape: tuple[int, int]) -> list[Program]:
    settings, sharder = context.settings, context.sharder
    trace = lambda rows: context.trainer(config).trace(abstract_batch(rows, shape, sharder))
    batches = {"": settings.derive.batch_size}
    if settings.align.enabled and settings.align.batch_size > settings.derive.batch_size:
        batches["align"] = settings.align.batch_size
    return [
        Program("train", name, functools.partial(trace, rows)) for name, rows in batches.items()
    ]


def _score(context: Context, config: DecoderConfig, shape: tuple[int, int]) -> list[Program]:
    """In batched mode too, the per-sample program, which then compares the two modes on one
    weight."""
    sharder = context.sharder
    trace = lambda: context.meter(config).trace(abstract_batch(sharder.batch_ways, shape, sharder))
    return [Program("score", "", trace)]


def _patch(context: Context, config: DecoderConfig) -> list[Program]:
    alike: dict[tuple, list[Param]] = {}
    for row in param_table(config).scope(context.settings.patch.scope):
        spec = context.sharder.sharding(row.axes, row.shape, row.path).spec
        alike.setdefault((row.shape, spec, row.hf_shape), []).append(row)
    return [
        Program(
            "patch",
            " ".join(row.path.split("/")[-1] for row in rows),
            functools.partial(_trace_patch, context, rows[0], config),
            resident_bytes(context.settings, config, context.sharder, rows[:1]),
        )
        for rows in alike.values()
    ]


def _trace_patch(context: Context, row: Param, config: DecoderConfig) -> jax.stages.Traced:
    patch, export, sharder = context.settings.patch, context.settings.export, context.sharder
    sharding = sharder.sharding(row.axes, row.shape, row.path)
    array = lambda dtype: jax.ShapeDtypeStruct(row.shape, dtype, sharding=sharding)
    both = lambda x: dict.fromkeys(ROLES, x)
    small = lambda *shape_and_dtype: jax.ShapeDtypeStruct(*shape_and_dtype)
    return patch_matrices.trace(
        array(jnp.dtype(config.dtype)),
        both(array(jnp.float32)),
        both(array(jnp.float32)),
        dict.fromkeys(KEYED, small((row.num_layers, 2), jnp.uint32)),
        both(small((row.num_layers,), jnp.int32)),
        Knobs.of(patch, math.prod(row.hf_shape)).traced(),
        method=Method.of(patch),
        shape=(row.num_layers, *row.hf_shape),
        dtype=config.dtype if export.dtype == "keep" else export.dtype,
        rounding=export.rounding,
        sharding=sharding,
    )


def _decode(context: Context, config: DecoderConfig) -> list[Program]:
    """The backbone is evaluated as it is stored, derived models in the dtype of the arithmetic."""
    settings, sharder = context.settings, context.sharder
    dtype = max(
        jnp.dtype(config.dtype),
        jnp.dtype(settings.model.compute_dtype),
        key=lambda dtype: dtype.itemsize,
    )
    evaluate, length, decoder = (
        settings.evaluate,
        bucket(settings.data.max_prompt_tokens),
        context.decoder(config),
    )
    array = functools.partial(_rows, decoder.sharder, evaluate.batch_size, length)

    def trace():
        return decode.trace(
            decoder,
            param_table(config).abstract(sharder, dtype),
            array(jnp.int32),
            array(jnp.bool_),
            jax.ShapeDtypeStruct((max(1, len(config.eos_ids)),), jnp.int32),
            max_new=evaluate.max_new_tokens,
        )

    return [Program("decode", "", trace, while_trips=evaluate.max_new_tokens)]
