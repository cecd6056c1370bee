"""derive.memory=auto: the settings with which a run fits the devices at hand."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re

from safepatch_jax.models.config import DecoderConfig
from safepatch_jax.planning.chips import GIB, Target, present
from safepatch_jax.planning.programs import architecture
from safepatch_jax.planning.search import Changes, Planner, as_flags
from safepatch_jax.run.context import Context
from safepatch_jax.run.job import SETTINGS
from safepatch_jax.run.room import disk_bytes, free_bytes
from safepatch_jax.runtime import processes
from safepatch_jax.runtime.console import say
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
)
# What is kept on disk, the nearest first.
LESS_DISK = {
    "run.checkpoint_minutes": 0.0,
    "derive.store": "bfloat16",
    "score.store": "bfloat16",
}
HOST_SHARE = 0.8  # of a host's available memory: its devices are CPUs, and files are read there too


def fitted(
    settings: Settings,
    workdir: str | pathlib.Path,
    *,
    afresh: bool = False,
    target: Target | None = None,
) -> Settings:
    """Return the settings of a run; with derive.memory=auto those nearest to them that fit.

    What a workdir was begun with stays: another choice, on other devices, would be another result.

    Args:
      settings: as given.
      workdir: of the run.
      afresh: choose again.
      target: the devices, if not those at hand.

    Raises:
      ValueError: an unknown architecture, or nothing fits.
    """
    if settings.derive.memory != "auto":
        return settings
    path = pathlib.Path(workdir) / SETTINGS
    if path.is_file() and not afresh:
        changes = _earlier(settings, path)
        if changes is not None:
            say(f"Memory:  {as_flags(changes) or 'settings as given'}, as this workdir was begun")
            return settings.override(changes)
    config, sharder = architecture(settings), Context(settings).sharder
    target = target or at_hand(present(sharder))
    memory = "unknown memory" if target.memory is None else f"{target.memory / GIB:.1f} GiB each"
    fit = Planner(config, target).fit(settings)
    if fit is None:
        raise ValueError(
            f"derive.memory=auto: nothing that leaves the mesh {settings.mesh.shape} as it is fits "
            f"{target.title}, {memory}. --dry_run with --derive.memory=given says what is needed; "
            "take more or larger devices, fewer tokens or a smaller batch."
        )
    most = max(fit.figures, key=lambda f: f.required)
    changes = fit.changes | _less_disk(settings.override(fit.changes), config, workdir)
    say(
        f"Memory:  {as_flags(changes) or 'settings as given'}; {most.title} takes most, "
        f"{most.required / GIB:.2f} GiB, of {target.title}, {memory}"
    )
    return settings.override(changes)


def _less_disk(settings: Settings, config: DecoderConfig, workdir: str | pathlib.Path) -> Changes:
    """Return the settings of what is kept on disk with which a run has room there, as far as there
    are any."""
    free = processes.on_first(free_bytes, pathlib.Path(workdir).absolute())
    changes: Changes = {}
    for name, value in LESS_DISK.items():
        if free is None or disk_bytes(settings.override(changes), config).most <= free:
            break
        if name != "derive.store" or settings.derive.train == "scope":
            changes[name] = value
    return changes


def _earlier(settings: Settings, path: pathlib.Path) -> dict | None:
    """Return what the run of a settings.json chose; None if nothing."""
    stored = read_record(path, {}, "Use another --workdir.")
    if not isinstance(stored, dict) or stored.get("derive", {}).get("memory") != "auto":
        return None
    changes = {}
    for name in CHOSEN:
        group, option = name.split(".")
        value = stored.get(group, {}).get(option, settings.flat()[name])
        if value != settings.flat()[name]:
            changes[name] = value
    return changes


def at_hand(target: Target) -> Target:
    """Return a target of CPUs with its share of the memory that this host has free."""
    if target.memory is not None or target.devices[0].platform != "cpu":
        return target
    free = HOST_SHARE * available_memory()
    return dataclasses.replace(target, memory=int(free / len(target.devices)))


def available_memory() -> int:
    """Return the bytes of this host's memory that programs can have."""
    try:
        text = pathlib.Path("/proc/meminfo").read_text()
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 1024 * int(re.search(r"MemAvailable:\s+(\d+) kB", text).group(1))
