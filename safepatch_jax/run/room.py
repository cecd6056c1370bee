"""What a run needs on disk: part by part, at most at once, and against what is free.

Derived models, scores and the patched model stay until the run is done, for the report measures
them; so most is needed at the end, unless the checkpoints of training are larger than what comes
after them.
"""

from __future__ import annotations

import math
import os
import pathlib
import shutil
from collections.abc import Collection, Mapping
from typing import NamedTuple

import jax.numpy as jnp

from safepatch_jax.models.config import DecoderConfig
from safepatch_jax.models.table import param_table
from safepatch_jax.patching import PATCH_ROLES
from safepatch_jax.patching.options import scope_rows
from safepatch_jax.run.stages import CACHE, Runner
from safepatch_jax.runtime import files
from safepatch_jax.runtime.addresses import address_of
from safepatch_jax.runtime.reading import Refused
from safepatch_jax.settings import PatchSettings, Settings
from safepatch_jax.training.checkpoints import KEPT

# Settings with which less is kept, the nearest first.
LESS_DISK = {
    "run.checkpoint_minutes": 0.0,
    "derive.train": "scope",
    "derive.store": "bfloat16",
    "score.store": "bfloat16",
}
_POSITION = 2  # bytes of a patch file that say where an entry is, at most


class Disk(NamedTuple):
    """Bytes on disk.

    Attributes:
      derived, scores: of both patches together.
      checkpoints: of derivation, all that lie there at once.
      aligning: those of alignment; 0 without it.
      model: the backbone's or the result's.
      patch_file: at most; 0 where none is written.
    """

    derived: int
    scores: int
    checkpoints: int
    aligning: int
    model: int
    patch_file: int

    def stages(self) -> dict[str, tuple[int, int]]:
        """Return, by stage and in the order in which they run, (bytes that stay, bytes beside them
        while it is under way)."""
        stages = {"align": (self.model, self.aligning)}
        for role in PATCH_ROLES:
            stages[f"derive_{role}"] = self.derived // 2, self.checkpoints
        for role in PATCH_ROLES:
            stages[f"score_{role}"] = self.scores // 2, 0
        return stages | {
            "patch": (self.model, 0),  # the export links its files
            "patch_file": (self.patch_file, 0),
        }

    @property
    def most(self) -> int:
        """Return the most that a whole run in one workdir has there at once, alignment aside."""
        held = most = 0
        for name, (stays, beside) in self.stages().items():
            if name != "align":
                most = max(most, held + stays + beside)
                held += stays
        return most


def disk_bytes(settings: Settings, config: DecoderConfig) -> Disk:
    """Return what a run of an architecture needs on disk."""
    table = param_table(config)
    scope = sum(math.prod(row.shape) for row in scope_rows(table, settings.patch))
    trained = scope if settings.derive.train == "scope" else table.size
    # Weights and moments; those that are kept and the one that is being written, or at SIGTERM one.
    state = 12 if settings.derive.optimizer == "adamw" else 4
    state *= KEPT + 1 if settings.run.checkpoint_minutes else 1
    keeps = settings.export.dtype == "keep"
    entry = jnp.dtype(config.dtype if keeps else settings.export.dtype).itemsize
    patch_file = 0
    if keeps:
        changed = math.ceil(_changed_share(settings.patch) * scope)
        patch_file = min(entry * scope, (entry + _POSITION) * changed)
    return Disk(
        derived=2 * jnp.dtype(settings.derive.store).itemsize * trained,
        scores=2 * jnp.dtype(settings.score.store).itemsize * scope,
        checkpoints=state * trained,
        aligning=state * table.size if settings.align.enabled else 0,
        model=entry * table.size,
        patch_file=patch_file,
    )


def _changed_share(patch: PatchSettings) -> float:
    """Return which share of the entries a patch changes, at most."""
    if patch.merge != "safepatching":
        return 1.0
    if patch.support == "fill":
        return min(1.0, 2 * patch.retention)
    return min(1.0, (patch.top_rate_se + patch.top_rate_osm) * patch.retention)


def missing(runner: Runner, disk: Disk, waiting: Collection[str]) -> dict[pathlib.Path, int]:
    """Return the most that a run will add to its file systems, {a folder on it: bytes}.

    Args:
      runner: its stages.
      disk: see `disk_bytes`.
      waiting: which stages will run; what lies there of the others is there already.
    """
    held: dict[int, int] = {}
    most: dict[int, int] = {}
    folders: dict[int, pathlib.Path] = {}
    for name, (stays, beside) in disk.stages().items():
        if name not in waiting:
            continue
        folder = runner.folder(name)
        if address_of(folder) and name.startswith(("derive_", "score_")):
            continue  # arrays go straight to the bucket
        place = _existing(folder)
        device = place.stat().st_dev
        folders.setdefault(device, place)
        # What a killed run left is used, or cleared away before anything is written.
        begun = _size(runner.aside(name)) + sum(map(_size, files.half_written_of(folder)))
        now = held.get(device, 0) + max(0, stays + beside - begun)
        most[device] = max(most.get(device, 0), now)
        held[device] = held.get(device, 0) + stays - begun - _size(folder)
    return {folders[device]: number for device, number in most.items()}


def refuse_small_disk(
    needed: Mapping[pathlib.Path, int], free: Mapping[pathlib.Path, int | None], settings: Settings
) -> None:
    """Raise ValueError, which names the nearest ways out, if a file system has less than a run
    needs there.

    Args:
      needed, free: bytes, by a folder on that file system; None where it does not tell.
      settings: of the run.
    """
    for place, number in needed.items():
        room = free[place]
        if room is not None and number > room:
            raise Refused(
                f"{place}: this run still needs up to {number / 1e9:,.1f} GB there at once, and "
                f"{room / 1e9:,.1f} GB are free. Free space, use another --workdir or {CACHE}, or "
                f"keep less: {_ways_out(settings)}."
            )


def _ways_out(settings: Settings) -> str:
    """Name those of LESS_DISK that are left."""
    now = settings.flat()
    left = []
    for name, value in LESS_DISK.items():
        if now[name] != value:
            left.append(f"--{name}={value:g}" if isinstance(value, float) else f"--{name}={value}")
    return " ".join(left) or "a smaller --patch.scope"


def free_bytes(folder: pathlib.Path) -> int | None:
    """Return what is free for a folder that need not be there yet; None where its file system does
    not tell."""
    usage = shutil.disk_usage(_existing(folder))
    return usage.free if usage.total else None


def _existing(folder: pathlib.Path) -> pathlib.Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def _size(folder: pathlib.Path) -> int:
    """Return the bytes of the files below a folder; links are not followed."""
    total = 0
    for root, _, names in os.walk(folder):
        total += sum(os.lstat(os.path.join(root, name)).st_size for name in names)
    return total
