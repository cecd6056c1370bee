"""Refuse processes of one run that would not do the same work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from safepatch_jax.run.place import Place, source_facts
from safepatch_jax.run.stages import versions
from safepatch_jax.run.state import source_hashes
from safepatch_jax.runtime import processes
from safepatch_jax.runtime.addresses import is_address, name_of
from safepatch_jax.runtime.paths import resolve
from safepatch_jax.settings import Settings

SAME_COMMAND = "Start every process with the same command, in the same folder."
SAME_FILES = "Give every host the same model and data files, best from one file system."


def agree_on_run(
    settings: Settings,
    source: Place,
    flags: Mapping[str, Any],
    hashes: Callable[[], Mapping[str, str]],
) -> None:
    """Compare settings, flags, devices, versions, model and data between all processes.

    Args:
      settings: of the run.
      source: where the model is.
      flags: what else the command was given, JSON-able, by flag.
      hashes: returns those of the records by name; asked for once all else agrees.

    Raises:
      ValueError: in all processes; names what differs, with the values and whose they are.
    """
    if not processes.several():
        return
    cache = {"run.cache_dir": name_of(resolve(settings.run.cache_dir))}
    options = settings.flat()
    apart = is_address(flags.get("--workdir", ""))
    if apart:  # hosts need share nothing, so each may have its own copy
        del options["model.source"]
    processes.agree(options | cache | dict(flags), SAME_COMMAND)
    processes.agree_on_devices()
    installed = {f"version of {name}": version for name, version in versions().items()}
    processes.agree(installed, "Install the same packages on every host.")
    records = {f"records of data.{name}": digest for name, digest in hashes().items()}
    processes.agree(source_facts(source) | records, SAME_FILES)
    if apart:
        found = source_hashes(source)
        processes.agree({f"SHA-256 of {name}": x for name, x in found.items()}, SAME_FILES)
