"""Merging model folders on a small host: tensor by tensor, with the bits that the main job's patch
operation gives."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from safepatch_jax.io import hub
from safepatch_jax.io.beside import say_notes
from safepatch_jax.io.companions import COMPANIONS, copy_companions, write_config
from safepatch_jax.io.folder import Checkpoint, tensor_hashes
from safepatch_jax.io.hf import check_keys
from safepatch_jax.io.names import refuse_unusable
from safepatch_jax.io.safetensors_file import Planned, write_shards
from safepatch_jax.io.stored import DTYPES, Stored
from safepatch_jax.models.config import read_hf_config
from safepatch_jax.models.table import ParamTable, param_table
from safepatch_jax.patch_file.apply import AFTER, check_names, refuse_strangers, states
from safepatch_jax.patch_file.file import BITS, RUN, PatchFile, runs_of
from safepatch_jax.patching import PATCH_ROLES
from safepatch_jax.patching.agreement import describe_agreement
from safepatch_jax.patching.out_of_core import Merger
from safepatch_jax.patching.source import Readable, Source
from safepatch_jax.patching.statistics import (
    describe_totals,
    one_sided,
    refuse_broken,
    refuse_no_op,
    totals,
)
from safepatch_jax.reporting import charts
from safepatch_jax.run.figures import PATCH, draw_patch
from safepatch_jax.run.manifests import DIFFERENCES, MANIFEST, SCORES, WEIGHTS
from safepatch_jax.run.stages import versions
from safepatch_jax.runtime import files, paths
from safepatch_jax.runtime.console import say, some
from safepatch_jax.runtime.paths import readable
from safepatch_jax.runtime.workers import Workers, wait
from safepatch_jax.settings import Settings

RECORD = "merge.json"
# By what is read: the arrays in the stages of a run with run.keep_scratch.
_STAGES = {"derived model": (WEIGHTS, DIFFERENCES), "scores": (SCORES,)}


def merge_folders(
    base: str,
    patches: Mapping[str, str],
    scores: Mapping[str, str],
    out: str,
    settings: Settings,
) -> dict[str, Any]:
    """Merge two derived models into their backbone and write a model folder, which appears whole or
    not at all.

    Args:
      base: the backbone, a folder in Hugging Face format.
      patches: {'se', 'osm'}: each a folder of a derived model in that format, a patch file that
        turns `base` into one, or the derive_* stage of a run that kept its scratch and had `base`
        as its backbone.
      scores: {'se', 'osm'}: each a folder of float32 safetensors, sums of |gradient| by HF name, or
        the score_* stage of such a run; may be empty where entries are not ranked by SNIP.
      out: the new folder.
      settings: its groups patch and export, and run.seed, are used.

    Returns:
      totals of the statistics; the folder's merge.json has them by tensor, and patch.png draws
      them.

    Raises:
      ValueError: folders that do not fit each other, scores that are missing or not finite, an
        empty kept set, a result that equals the backbone.
      OSError: the disk is full or not writable.
    """
    out = paths.local(out)
    files.refuse_full_folder(out)
    charts.check()
    base = hub.folder_of(paths.plain(base))
    config, checkpoint = read_hf_config(base), Checkpoint(base)
    table = param_table(config)
    check_keys(checkpoint, table, config)
    say_notes(checkpoint.folder, checkpoint.notes)
    scope = ParamTable(table.scope(settings.patch.scope))
    merger = _open_merger(patches, scores, checkpoint, scope, settings)
    dtype = settings.export.dtype
    with files.new_folder(out) as folder, merger, Workers(1) as beside:
        loading = beside.submit(charts.load)
        copy_companions(base, folder, COMPANIONS[1:])
        write_config(base, folder, None if dtype == "keep" else dtype)
        _write(folder, checkpoint, table, scope, merger, settings)
        refuse_broken(merger.statistics)
        refuse_no_op(merger.statistics, settings.patch)
        total = totals(merger.statistics)
        record = {
            "settings": {group: settings.to_dict()[group] for group in ("patch", "export")},
            "seed": settings.run.seed,
            "versions": versions(),
            "notes": list(checkpoint.notes),
            "total": total,
            "tensors": merger.statistics,
        }
        files.write_json(folder / RECORD, record)
        wait(loading)
        draw_patch(merger.statistics, folder / PATCH)
    say(describe_agreement(total))
    say(f"{out}: {describe_totals(total)}")
    if warning := one_sided(total, settings.patch):
        say(warning)
    return total


def _open_merger(
    patches: Mapping[str, str],
    scores: Mapping[str, str],
    checkpoint: Checkpoint,
    scope: ParamTable,
    settings: Settings,
) -> Merger:
    """Open all that is merged, see `merge_folders`; nothing large is read."""
    patch, export = settings.patch, settings.export
    if not patch.needs_sensitivity:
        scores = {}
    elif missing := [f"--scores_{role}" for role in PATCH_ROLES if not scores.get(role)]:
        raise ValueError(
            f"patch.merge={patch.merge} ranks entries by SNIP and needs {' and '.join(missing)}: "
            "the stages score_se and score_osm of a run with --run.keep_scratch. Or choose a "
            "method that needs no scores, such as --merge=dare_ties."
        )
    derived, sensitivity = {}, {}
    for role in PATCH_ROLES:
        flag = f"--patch_{role}"
        derived[role] = _open(patches[role], "derived model", flag, scope, checkpoint)
    for role in scores:
        sensitivity[role] = _open(scores[role], "scores", f"--scores_{role}", scope, checkpoint)
    sources = []
    for name in scope.hf_names():
        models = {role: tensors[name] for role, tensors in derived.items()}
        sums = {role: tensors[name] for role, tensors in sensitivity.items()}
        sources.append(Source(name, checkpoint.tensors[name], models, sums))
    return Merger(sources, patch, settings.run.seed, export.dtype, export.rounding)


def _write(
    folder: pathlib.Path,
    checkpoint: Checkpoint,
    table: ParamTable,
    scope: ParamTable,
    merger: Merger,
    settings: Settings,
) -> None:
    """Write all tensors: those in the scope of the patch merged, the others copied."""
    plan = {}
    for name, (row, _) in table.hf_names().items():
        dtype = settings.export.dtype
        if dtype == "keep":
            dtype = checkpoint.tensors[name].dtype
        plan[name] = Planned(row.hf_shape, dtype)
    patched = scope.hf_names()

    def parts(name: str) -> Iterator[np.ndarray]:
        if name in patched:
            return merger.parts(name)
        return _copied(name, checkpoint.tensors[name], DTYPES[plan[name].dtype])

    shard_bytes, title = settings.export.shard_bytes, settings.patch.merge
    write_shards(folder, plan, parts, shard_bytes, title, hashed=False)


def _copied(name: str, stored: Stored, dtype: np.dtype) -> Iterator[np.ndarray]:
    """Yield a tensor run by run, cast. Raises ValueError if finite numbers overflow."""
    for bits in runs_of(stored):
        run = bits.view(DTYPES[stored.dtype])
        if run.dtype == dtype:
            yield run
            continue
        with np.errstate(over="ignore"):
            x = run.astype(dtype)
        if not np.all(np.isfinite(x)) and np.all(np.isfinite(run)):
            raise ValueError(
                f"{name} holds numbers beyond the range of {dtype}. Use bfloat16, float32 or keep."
            )
        yield x


def _open(
    path: str, content: str, flag: str, scope: ParamTable, backbone: Checkpoint
) -> Mapping[str, Readable]:
    """Return the tensors of a derived model or of its scores, by HF name.

    Args:
      path: as the user gave it.
      content: 'derived model' or 'scores'.
      flag: with which it was given.
      scope: the parameters that are patched.
      backbone: of which the tensors must be.

    Raises:
      ValueError: nothing of the kind is there, or its tensors are not those of `scope`.
    """
    place = pathlib.Path(readable(path))
    if place.is_file():
        if content == "scores":
            raise ValueError(
                f"{flag}={path} is a file; scores are a folder of safetensors or a stage of a run."
            )
        return _open_patch(place, backbone)
    for name in _STAGES[content]:
        if (place / name).is_dir():
            from safepatch_jax.run.stage_tensors import StageTensors  # Orbax takes a second

            added_to = backbone.tensors if name == DIFFERENCES else None
            return StageTensors(place / name, scope, added_to)
    if not place.is_dir() or (place / MANIFEST).is_file():
        raise ValueError(f"{flag}={path}: no {content} is there. {_advice(place, content)}")
    checkpoint = Checkpoint(place)
    tensors = checkpoint.tensors
    refuse_unusable(tensors, place)
    say_notes(place, checkpoint.notes)
    problems = _mismatches(tensors, scope, ("float32",) if content == "scores" else tuple(DTYPES))
    if problems:
        raise ValueError(
            f"{flag}={path} holds no {content} of this backbone: {some(problems)}. Give one that "
            f"was made from {backbone.folder}."
        )
    return tensors


def _advice(place: pathlib.Path, content: str) -> str:
    if place.is_dir():
        return "The run deleted it after success, as it does unless it is given --run.keep_scratch."
    if content == "scores":
        return "Give a stage such as WORKDIR/stages/score_se."
    return "Give a model folder, a patch file, or a stage such as WORKDIR/stages/derive_se."


def _mismatches(
    tensors: Mapping[str, Stored], scope: ParamTable, dtypes: Sequence[str]
) -> list[str]:
    """Say which tensors of the scope are missing, or of another shape or dtype."""
    problems = []
    for name, (row, _) in scope.hf_names().items():
        if name not in tensors:
            problems.append(f"{name} is missing")
        elif tensors[name].shape != row.hf_shape:
            shape = tensors[name].shape
            problems.append(f"{name} has shape {shape}, the backbone's is {row.hf_shape}")
        elif tensors[name].dtype not in dtypes:
            problems.append(f"{name} has dtype {tensors[name].dtype}")
    return problems


def _open_patch(path: pathlib.Path, backbone: Checkpoint) -> dict[str, Readable]:
    """Return the tensors of the model that a patch file turns the backbone into."""
    patch = PatchFile(path)
    check_names(patch, backbone.tensors, backbone.folder)
    state = states(patch, tensor_hashes(backbone.tensors))
    refuse_strangers(patch, state, backbone.folder)
    if AFTER in state.values():
        raise ValueError(
            f"{backbone.folder} is patched with {path} already, at least in part; give the "
            "backbone."
        )
    return {name: PatchedTensor(patch, name, stored) for name, stored in backbone.tensors.items()}


class PatchedTensor:
    """A tensor of the backbone with a patch file's changes; read from its beginning to its end, as
    often as wanted."""

    def __init__(self, patch: PatchFile, name: str, backbone: Stored):
        self.dtype, self.shape = backbone.dtype, backbone.shape
        self._patch, self._name, self._backbone = patch, name, backbone
        self._begin()

    def _begin(self) -> None:
        self._runs = self._patch.runs(self._name)
        self._passed = self._known = 0  # elements that were read, and whose changes are known
        self._positions = np.empty(0, np.int64)
        self._changes = np.empty(0, BITS[self.dtype])

    def read(self, out: np.ndarray, start: int) -> np.ndarray:
        """Fill `out` with the elements from `start`; where they lie before those read last, the
        patch file is read anew."""
        if start < self._passed:
            self._begin()
        self._backbone.read(out, start)
        self._passed = start + len(out)
        while self._known < self._passed:
            positions, changes = next(self._runs)
            self._positions = np.append(self._positions, positions + self._known)
            self._changes = np.append(self._changes, changes)
            self._known += RUN
        first, last = np.searchsorted(self._positions, (start, self._passed))
        out.view(BITS[self.dtype])[self._positions[first:last] - start] ^= self._changes[first:last]
        self._positions, self._changes = self._positions[last:], self._changes[last:]
        return out
