"""Controllable patching of a model in memory: the sizes of its top sets, then weight by weight."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from safepatch_jax.mesh import Sharder
from safepatch_jax.models.table import Param
from safepatch_jax.numerics import tensor_keys
from safepatch_jax.patching import PATCH_ROLES
from safepatch_jax.patching.agreement import agreement
from safepatch_jax.patching.ahead import PatchPrograms, Signature
from safepatch_jax.patching.options import Knobs, program_options, top_rates
from safepatch_jax.patching.programs import KEYED, count_at_least, stack, tall_stack
from safepatch_jax.patching.selection import NOT_FINITE, PASSES, share_out, top_count
from safepatch_jax.patching.settings import PatchSettings
from safepatch_jax.patching.statistics import overlap, refuse_broken, refuse_broken_importance
from safepatch_jax.patching.tensor import ProgramOptions
from safepatch_jax.runtime import processes
from safepatch_jax.runtime.console import progress

SMALL = 1 << 28  # bytes of a float32 weight in all blocks; of smaller ones a CPU may hold two


def matrix_counts(rows: Sequence[Param], patch: PatchSettings) -> dict[str, dict[str, np.ndarray]]:
    """Return the sizes of the top sets of each row or matrix, {role: {path: int32 [L]}}."""
    result: dict[str, dict[str, np.ndarray]] = {}
    for role, rate in top_rates(patch).items():
        result[role] = {}
        for row in rows:
            by_row = patch.granularity == "row"
            size = row.hf_shape[-1] if by_row else math.prod(row.hf_shape)
            result[role][row.path] = np.full(row.num_layers, top_count(rate, size), np.int32)
    return result


def _scope_counts(
    backbone, derived, sensitivity, rows: Sequence[Param], patch: PatchSettings, seed: int
) -> dict[str, dict[str, np.ndarray]]:
    """Return the size of each matrix's part in the top sets of the whole scope, {role: {path: int32
    [L]}}.

    Ties are broken in the order of the table: rows, then layers. Raises ValueError as
    `refuse_broken`.
    """
    scope_size = sum(math.prod(row.shape) for row in rows)
    names = list(itertools.chain.from_iterable(row.hf_names for row in rows))
    result: dict[str, dict[str, np.ndarray]] = {}
    with progress(len(PATCH_ROLES) * (PASSES + 1), "global top sets", "count") as bar:

        def count_at(role: str, threshold: int) -> list[int]:
            parts = []
            for row in rows:  # all are started before the first is waited for
                part = count_at_least(
                    backbone[row.path],
                    derived[role][row.path],
                    sensitivity[role][row.path],
                    tensor_keys(seed, f"top_{role}", row.hf_names),
                    np.int32(threshold),
                    kind=patch.ranking,
                    shape=stack(row),
                )
                parts.append(part)
            bar.update()
            counts: list[int] = []
            for part in parts:
                counts += map(int, processes.fetch(part))
            return counts

        for role, rate in top_rates(patch).items():
            broken = itertools.compress(names, count_at(role, NOT_FINITE))
            refuse_broken_importance(list(broken))
            number = top_count(rate, scope_size)
            shares = iter(share_out(functools.partial(count_at, role), number))
            result[role] = {}
            for row in rows:
                values = [next(shares) for _ in row.hf_names]
                result[role][row.path] = np.array(values, np.int32)
    return result


def row_keys(row: Param, seed: int) -> dict[str, np.ndarray]:
    """Return the keys of all that is drawn at random in a row's tensors, uint32 [L, 2] each."""
    return {user: tensor_keys(seed, user, row.hf_names) for user in KEYED}


def by_role(trees: Mapping[str, Mapping[str, Any]], path: str) -> dict[str, Any]:
    """Return {role: what a tree of that role holds at the path}."""
    return {role: trees[role][path] for role in PATCH_ROLES}


def _held(
    trees: Mapping[str, Mapping[str, jax.Array]], rows: Sequence[Param]
) -> dict[str, dict[str, jax.Array]]:
    """Read the scope's arrays of mappings that read one when asked for it."""
    result = {}
    for role, tree in trees.items():
        result[role] = {row.path: tree[row.path] for row in rows}
    return result


def apply_patching(
    backbone: Mapping[str, jax.Array],
    derived: Mapping[str, Mapping[str, jax.Array]],
    sensitivity: Mapping[str, Mapping[str, jax.Array]],
    rows: Sequence[Param],
    patch: PatchSettings,
    seed: int,
    sharder: Sharder,
    title: str,
    dtype: str = "keep",
    rounding: str = "nearest",
    compare: bool = True,
) -> tuple[dict[str, jax.Array], dict[str, dict[str, Any]]]:
    """Patch the backbone.

    Args:
      backbone: flat ``{path: array}``; the patched entries are donated and must not be used again.
      derived: {'se', 'osm'}: flat parameters of the two derived models, float32, on the mesh as the
        backbone is. Each is asked for once, so a mapping may read them when they are; for global
        granularity all are held.
      sensitivity: {'se', 'osm'}: see `SensitivityMeter.measure`; likewise, and not asked for where
        `patch.needs_sensitivity` is False.
      rows: the scope.
      patch: settings.
      seed: of all random bits.
      sharder: the mesh.
      title: shown at the progress bar.
      dtype: storage dtype of the result; 'keep' is the backbone's.
      rounding: see `patch_matrices`.
      compare: whether the statistics say how the two patches stand to each other (`agreement`).

    Returns:
      (flat ``{path: array}`` over the scope, statistics ``{HF name: {name: number}}``; see also
      `refuse_no_op`).

    Raises:
      ValueError: unknown method or importance, NaN or infinite importance or merged weights (names
        the tensors).
    """
    merged, statistics = {}, {}
    if not patch.needs_sensitivity:
        sensitivity = dict.fromkeys(PATCH_ROLES, dict.fromkeys(row.path for row in rows))
    if patch.ranks_whole_scope:  # every count needs all of them
        derived, sensitivity = _held(derived, rows), _held(sensitivity, rows)
        counts = _scope_counts(backbone, derived, sensitivity, rows, patch, seed)
    else:
        counts = matrix_counts(rows, patch)
    signatures, viewed = {}, _viewed(sharder, program_options(patch))
    for row in rows:
        stored = _abstract(backbone[row.path])
        signatures[row.path] = signature(row, stored, sharder, patch, dtype, rounding)
    bar = progress(len(rows), title, "weight")
    pending: tuple[Param, Any, Any] | None = None  # a weight whose statistics are not read yet

    def read_pending():
        if pending is not None:
            statistics.update(_by_tensor(*pending))
            bar.update()

    with bar, PatchPrograms(signatures.values(), compare) as programs:
        for row in rows:
            # On a CPU a small weight is read from disk while the one before runs.
            held = [row] if pending is None else [row, pending[0]]
            together = sharder.one_cpu and all(4 * math.prod(x.shape) <= SMALL for x in held)
            if not together:
                read_pending()
                pending = None
            of_row = signatures[row.path]
            stored, models = backbone[row.path], by_role(derived, row.path)
            measured = by_role(sensitivity, row.path)
            if viewed:
                stored = _reshaper(of_row.shape, of_row.sharding)(stored)
                models, measured = _views((models, measured), of_row)
            compared = {}
            if compare:  # now, as the backbone's buffer is given away below
                compared = programs.comparison(of_row)(stored, models, np.int32(0))
            result, counted = programs.merge(of_row)(
                stored,
                models,
                measured,
                row_keys(row, seed),
                by_role(counts, row.path),
                Knobs.of(patch, math.prod(row.hf_shape)).traced(),
            )
            if viewed:
                sharding = sharder.sharding(row.axes, row.shape, row.path)
                result = _reshaper(row.shape, sharding)(result)
            merged[row.path] = result
            del models, measured  # the next weight's are read before these names are taken again
            read_pending()
            pending = row, counted, compared
        read_pending()
    refuse_broken(statistics)
    return merged, statistics


def signature(
    row: Param,
    stored: jax.ShapeDtypeStruct,
    sharder: Sharder,
    patch: PatchSettings,
    dtype: str,
    rounding: str,
) -> Signature:
    """Return what the programs of a row are compiled for: on one CPU device, where any shape is a
    view, with the larger side of its matrices first.

    Args:
      stored: the backbone's array.
      sharder: the mesh.
      patch, dtype, rounding: see `apply_patching`.
    """
    shape, options = stack(row), program_options(patch)
    sharding = sharder.sharding(row.axes, row.shape, row.path)
    if _viewed(sharder, options):
        shape, sharding = tall_stack(row), sharder.replicated()
        stored = jax.ShapeDtypeStruct(shape, stored.dtype, sharding=sharding)
    return Signature(
        stored=stored,
        shape=shape,
        options=options,
        sensitivity=patch.needs_sensitivity,
        dtype=str(stored.dtype) if dtype == "keep" else dtype,
        rounding=rounding,
        sharding=sharding,
    )


def _viewed(sharder: Sharder, options: ProgramOptions) -> bool:
    """Whether weights are patched in views of a shape that others have too."""
    return sharder.one_cpu and not options.by_row


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


@functools.lru_cache(maxsize=64)
def _reshaper(shape: tuple[int, ...], sharding: Any) -> Callable[[jax.Array], jax.Array]:
    """Return what gives an array on one device another shape, in its own buffer."""
    return jax.jit(lambda x: x.reshape(shape), donate_argnums=0, out_shardings=sharding)


def _views(trees: Any, of_row: Signature) -> Any:
    """Look at arrays of one CPU device in the shape of a signature, without a copy. Neither they
    nor the views may be donated."""
    return jax.tree.map(
        lambda x: jax.device_put(np.asarray(x).reshape(of_row.shape), of_row.sharding), trees
    )


def _by_tensor(
    row: Param, counted: Mapping[str, jax.Array], compared: Mapping[str, jax.Array]
) -> dict[str, dict[str, Any]]:
    """Return the statistics of a weight, {name: [L]}, and its sums of both patches, if there are
    any, by HF tensor and as Python's numbers."""
    counts, sums = _layers(row, counted), _layers(row, compared)
    statistics = {}
    for hf_name, numbers, of_both in zip(row.hf_names, counts, sums):
        numbers = {"size": math.prod(row.hf_shape)} | numbers
        statistics[hf_name] = numbers | {"overlap": overlap(numbers)}
        if compared:
            statistics[hf_name] |= agreement([of_both])
    return statistics


def _layers(row: Param, arrays: Mapping[str, jax.Array]) -> list[dict[str, Any]]:
    """Return arrays, {name: [L, ...]}, layer by layer as Python's numbers."""
    result: list[dict[str, Any]] = [{} for _ in row.hf_names]
    for name, array in arrays.items():
        for numbers, value in zip(result, processes.fetch(array).tolist()):
            numbers[name] = value
    return result
