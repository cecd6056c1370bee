"""derive.memory=auto: the settings with which a run fits the devices at hand."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from safepatch_jax.models.config import DecoderConfig
from safepatch_jax.planning.chips import GIB, Target, present
from safepatch_jax.planning.programs import architecture
from safepatch_jax.planning.search import Changes, Planner, as_flags
from safepatch_jax.run.context import Context
from safepatch_jax.run.job import SETTINGS, is_of_run
from safepatch_jax.run.pins import pinned
from safepatch_jax.run.room import LESS_DISK, disk_bytes, free_bytes
from safepatch_jax.run.stages import CACHE
from safepatch_jax.runtime import files, processes
from safepatch_jax.runtime.console import say
from safepatch_jax.runtime.memory import available_memory
from safepatch_jax.runtime.programs import keep_programs
from safepatch_jax.runtime.records import read_record
from safepatch_jax.settings import Settings

# What may be chosen, see `search.ladder`.
CHOSEN = (
    "model.remat",
    "derive.train",
    "derive.backward",
    "derive.optimizer",
    "derive.accumulate",
    "derive.store",
    "score.in_flight",
    "score.store",
    "score.inputs",
    "evaluate.batch_size",
    "run.checkpoint_minutes",
)
HOST_SHARE = 0.8  # of a host's available memory: its devices are CPUs, and files are read there too


def fitted(
    settings: Settings,
    workdir: str | pathlib.Path,
    *,
    afresh: bool = False,
    target: Target | None = None,
    pin: bool = True,
) -> Settings:
    """Return the settings of a run; with derive.memory=auto those nearest to them that fit.

    What a workdir was begun with stays: another choice, on other devices, would be another result.

    Args:
      settings: as given.
      workdir: of the run.
      afresh: choose again.
      target: the devices, if not those at hand.
      pin: look up the commit of a model of the Hub; the plan of an absent model needs none.

    Raises:
      ValueError: an unknown architecture, or nothing fits.
    """
    if settings.derive.memory != "auto":
        return settings
    path = pathlib.Path(workdir).absolute() / SETTINGS
    if pin:
        settings = pinned(settings, path, afresh)
    earlier = processes.on_first(_earlier, settings.flat(), path)
    if earlier is not None and not afresh:
        changes = earlier
        say(
            f"Memory:  {as_flags(changes) or 'settings as given'}, as this workdir was begun "
            "(--update chooses again)"
        )
        return settings.override(changes)
    config, context = architecture(settings), Context(settings)
    context.check_batches()
    processes.on_first(files.refuse_unusable, context.cache_dir, CACHE)
    keep_programs(context.cache_dir)
    sharder = context.sharder
    target = target or at_hand(present(sharder))
    # All processes choose alike.
    target = dataclasses.replace(target, memory=processes.on_first(int, target.memory or 0) or None)
    memory = "unknown memory" if target.memory is None else f"{target.memory / GIB:.1f} GiB each"
    fit = Planner(config, target).fit(settings)
    if fit is None:
        raise ValueError(
            f"derive.memory=auto: nothing that leaves the mesh {settings.mesh.shape} as it is fits "
            f"{target.title}, {memory}. --dry_run with --derive.memory=given says what is needed; "
            "take more or larger devices, fewer tokens or a smaller batch."
        )
    most = max(fit.figures, key=lambda f: f.required)
    chosen = settings.override(fit.changes)
    if earlier is None:
        less = less_disk(chosen, config, processes.on_first(free_bytes, path.parent))
    else:  # what lies there was kept so
        less = {name: earlier[name] for name in LESS_DISK if name in earlier}
        less.pop("derive.train", None)  # chosen above
        if chosen.derive.train != "scope":
            less.pop("derive.store", None)
    changes = fit.changes | less
    say(
        f"Memory:  {as_flags(changes) or 'settings as given'}; {most.title} takes most, "
        f"{most.required / GIB:.2f} GiB, of {target.title}, {memory}"
    )
    return settings.override(changes)


def less_disk(settings: Settings, config: DecoderConfig, free: int | None) -> Changes:
    """Return the nearest settings with which a run has room on a disk, as far as there are any that
    leave what is trained.

    Args:
      settings: of the run.
      config: the architecture.
      free: bytes; None where the file system does not tell.
    """
    changes: Changes = {}
    for name, value in LESS_DISK.items():
        if free is None or disk_bytes(settings.override(changes), config).most <= free:
            break
        trains_all = settings.derive.train != "scope"
        if name == "derive.train" or (name == "derive.store" and trains_all):
            continue
        changes[name] = value
    return changes


def _earlier(settings: Mapping[str, Any], path: pathlib.Path) -> Changes | None:
    """Return what the run of a settings.json chose, where it differs from settings by dotted name;
    None if there is no such run."""
    stored = read_record(path, {}, "Use another --workdir.") if path.is_file() else {}
    if not is_of_run(stored) or stored["derive"].get("memory") != "auto":
        return None  # the run itself says what is wrong with it
    changes = {}
    for name in CHOSEN:
        group, option = name.split(".")
        value = stored[group].get(option, settings[name])
        if value != settings[name]:
            changes[name] = value
    return changes


def at_hand(target: Target) -> Target:
    """Return a target of CPUs with its share of the memory that programs can have here."""
    if target.memory is not None or target.devices[0].platform != "cpu":
        return target
    free, own = HOST_SHARE * available_memory(), len(target.devices) // processes.count()
    return dataclasses.replace(target, memory=int(free / max(1, own)))
