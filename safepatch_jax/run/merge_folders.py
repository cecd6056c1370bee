"""Merging model folders on a small host: tensor by tensor, with the bits that the main job's patch
operation gives."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from safepatch_jax.io.checkpoint import StoredTree
from safepatch_jax.io.companions import COMPANIONS, copy_companions, write_config
from safepatch_jax.io.folder import Checkpoint, tensor_hashes
from safepatch_jax.io.hf import check_keys
from safepatch_jax.io.safetensors_file import Planned, write_shards
from safepatch_jax.io.stored import DTYPES, Stored
from safepatch_jax.mesh import Sharder, make_mesh
from safepatch_jax.models.config import read_hf_config
from safepatch_jax.models.table import Param, ParamTable, nest, param_table
from safepatch_jax.patch_file.apply import AFTER, check_names, refuse_strangers, states
from safepatch_jax.patch_file.file import BITS, RUN, PatchFile, runs_of
from safepatch_jax.patching import PATCH_ROLES
from safepatch_jax.patching.out_of_core import Merger, Readable, Source
from safepatch_jax.patching.statistics import refuse_broken, refuse_no_op, totals
from safepatch_jax.run.figures import PATCH, draw_patch
from safepatch_jax.run.stages import MANIFEST, versions
from safepatch_jax.runtime import files
from safepatch_jax.runtime.console import say, some
from safepatch_jax.settings import Settings

RECORD = "merge.json"
_STAGES = {
    "derived model": "params",
    "scores": "sensitivity",
}  # arrays in the stages of a run with run.keep_scratch


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
        turns `base` into one, or the derive_* stage of a run that kept its scratch.
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
    patch, export = settings.patch, settings.export
    files.refuse_full_folder(out)
    config, checkpoint = read_hf_config(base), Checkpoint(base)
    table = param_table(config)
    check_keys(checkpoint, table, config)
    rows = table.scope(patch.scope)
    if not patch.needs_sensitivity:
        scores = {}
    elif missing := [f"--scores_{role}" for role in PATCH_ROLES if not scores.get(role)]:
        raise ValueError(
            f"patch.merge={patch.merge} ranks entries by SNIP and needs {' and '.join(missing)}: "
            "the stages "
            "score_se and score_osm of a run with --run.keep_scratch. Or choose a method that "
            "needs no scores, "
            "such as --merge=dare_ties."
        )
    derived = {
        role: _open(patches[role], "derived model", f"--patch_{role}", rows, checkpoint)
        for role in PATCH_ROLES
    }
    sensitivity = {
        role: _open(scores[role], "scores", f"--scores_{role}", rows, checkpoint) for role in scores
    }
    names = [name for row in rows for name in row.hf_names]
    merger = Merger(
        [
            Source(
                name,
                checkpoint.tensors[name],
                {r: x[name] for r, x in derived.items()},
                {r: x[name] for r, x in sensitivity.items()},
            )
            for name in names
        ],
        patch,
        settings.run.seed,
        export.dtype,
        export.rounding,
    )
    with files.new_folder(out) as folder:
        copy_companions(base, folder, COMPANIONS[1:])
        write_config(base, folder, None if export.dtype == "keep" else export.dtype)
        _write(folder, checkpoint, table, merger, set(names), settings)
        refuse_broken(merger.statistics)
        refuse_no_op(merger.statistics, patch)
        total, told = totals(merger.statistics), settings.to_dict()
        files.write_json(
            folder / RECORD,
            {
                "settings": {group: told[group] for group in ("patch", "export")},
                "seed": settings.run.seed,
                "versions": versions(),
                "total": total,
                "tensors": merger.statistics,
            },
        )
        draw_patch(merger.statistics, folder / PATCH)
    say(
        f"{out}: kept {total['kept']:,} of {total['size']:,} entries (SE {total['kept_se']:,}, "
        f"OSM {total['kept_osm']:,}); "
        f"overlap of the top sets {total['overlap']:.1%}; {total['survival']:.1%} survive the cast"
    )
    return total


def _write(
    folder: pathlib.Path,
    checkpoint: Checkpoint,
    table: ParamTable,
    merger: Merger,
    patched: set[str],
    settings: Settings,
) -> None:
    export = settings.export
    plan = {
        name: Planned(
            row.hf_shape, checkpoint.tensors[name].dtype if export.dtype == "keep" else export.dtype
        )
        for name, (row, _) in table.hf_names().items()
    }

    def copied(name: str) -> Iterator[np.ndarray]:
        stored, dtype = checkpoint.tensors[name], DTYPES[plan[name].dtype]
        for bits in runs_of(stored):
            run = bits.view(DTYPES[stored.dtype])
            with np.errstate(over="ignore"):
                x = run.astype(dtype, copy=False)
            if not np.all(np.isfinite(x)) and np.all(np.isfinite(run)):
                raise ValueError(
                    f"{name} holds numbers beyond the range of {dtype}. Use bfloat16, float32 or "
                    "keep."
                )
            yield x

    write_shards(
        folder,
        plan,
        lambda name: merger.parts(name) if name in patched else copied(name),
        export.shard_bytes,
        settings.patch.merge,
    )


def _open(
    path: str, what: str, flag: str, rows: Sequence[Param], backbone: Checkpoint
) -> Mapping[str, Readable]:
    """Return the tensors of a derived model or of its scores, by HF name. Raises ValueError if they
    are not those of `rows`."""
    place = pathlib.Path(path).expanduser()
    if place.is_file():
        if what == "scores":
            raise ValueError(
                f"{flag}={path} is a file; scores are a folder of safetensors or a stage of a run."
            )
        return _patched(place, backbone)
    if (place / _STAGES[what]).is_dir():
        return _StageArrays(place / _STAGES[what], rows)
    if not place.is_dir() or (place / MANIFEST).is_file():
        raise ValueError(
            f"{flag}={path}: no {what} is there. "
            + (
                "The run deleted it after success, as it does unless it is given "
                "--run.keep_scratch."
                if place.is_dir()
                else "Give a model folder, a patch file, or a stage such as "
                "WORKDIR/stages/derive_se."
                if what != "scores"
                else "Give a stage such as WORKDIR/stages/score_se."
            )
        )
    tensors, problems = Checkpoint(place).tensors, []
    for row in rows:
        for name in row.hf_names:
            if name not in tensors:
                problems.append(f"{name} is missing")
            elif tensors[name].shape != row.hf_shape:
                problems.append(
                    f"{name} has shape {tensors[name].shape}, the backbone's is {row.hf_shape}"
                )
            elif tensors[name].dtype not in (DTYPES if what != "scores" else ("float32",)):
                problems.append(f"{name} has dtype {tensors[name].dtype}")
    if problems:
        raise ValueError(
            f"{flag}={path} holds no {what} of this backbone: {some(problems)}. Give one that was "
            "made from "
            f"{backbone.folder}."
        )
    return tensors


def _patched(path: pathlib.Path, backbone: Checkpoint) -> dict[str, Readable]:
    patch = PatchFile(path)
    check_names(patch, backbone.tensors, backbone.folder)
    found = states(patch, tensor_hashes(backbone.tensors))
    refuse_strangers(patch, found, backbone.folder)
    if AFTER in found.values():
        raise ValueError(
            f"{backbone.folder} is patched with {path} already, at least in part; give the "
            "backbone."
        )
    return {name: _Patched(patch, name, stored) for name, stored in backbone.tensors.items()}


class _Patched:
    """A tensor of the backbone with a patch file's changes."""

    def __init__(self, patch: PatchFile, name: str, backbone: Stored):
        self.dtype, self.shape = backbone.dtype, backbone.shape
        self._patch, self._name, self._backbone = patch, name, backbone
        self._run: tuple[int, Iterator] = (0, iter(()))

    def read(self, out: np.ndarray, start: int) -> np.ndarray:
        """Fill `out`; runs are asked for in turn, each pass from the beginning, and begin at
        multiples of RUN."""
        if start == 0:
            self._run = 0, self._patch.runs(self._name)
        at, runs = self._run
        assert at == start, "runs are asked for in turn"
        self._backbone.read(out, start)
        bits = out.view(BITS[self.dtype])
        for begin in range(0, len(out), RUN):
            where, what = next(runs)
            bits[begin:][where] ^= what
        self._run = start + len(out), runs
        return out


class _StageArrays(Mapping[str, Readable]):
    """The HF tensors of a checkpoint of `save_tree`, float32; the parameter that was read last is
    held."""

    def __init__(self, path: pathlib.Path, rows: Sequence[Param]):
        sharder = Sharder(make_mesh("data:1,fsdp:1,tensor:1", jax.local_devices()[:1]))
        self._tree = StoredTree(
            path,
            nest(
                {
                    row.path: jax.ShapeDtypeStruct(
                        row.shape,
                        jnp.float32,
                        sharding=sharder.sharding(row.axes, row.shape, row.path),
                    )
                    for row in rows
                }
            ),
        )
        self._rows = {name: (row, layer) for row in rows for layer, name in enumerate(row.hf_names)}
        self._last: tuple[str, np.ndarray | None] = ("", None)

    def matrices(self, row: Param) -> np.ndarray:
        """Return a parameter as [layers, entries]."""
        if self._last[0] != row.path:
            self._last = ("", None)  # makes room
            self._last = row.path, np.asarray(self._tree[row.path]).reshape(row.num_layers, -1)
        return self._last[1]

    def __getitem__(self, name: str) -> Readable:
        row, layer = self._rows[name]
        return _Layer(self, row, layer)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


@dataclasses.dataclass(frozen=True)
class _Layer:
    """One HF tensor of `_StageArrays`."""

    arrays: _StageArrays
    row: Param
    layer: int
    dtype: str = "float32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.row.hf_shape

    def read(self, out: np.ndarray, start: int) -> np.ndarray:
        out[...] = self.arrays.matrices(self.row)[self.layer, start : start + len(out)]
        return out
