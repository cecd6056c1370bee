"""The commit that a model of the Hugging Face Hub stands for in a run or study: looked up once,
then part of its settings, so that a branch that moves changes neither. Needs no JAX."""

from __future__ import annotations

import pathlib

from safepatch_jax.io import hub
from safepatch_jax.run.agreement import SAME_COMMAND
from safepatch_jax.runtime import files, mirror, processes
from safepatch_jax.runtime.console import say
from safepatch_jax.settings import Settings


def pinned(
    settings: Settings, record: pathlib.Path | None = None, afresh: bool = False
) -> Settings:
    """Return settings whose model.source, where it names a model of the Hub, names its commit too.
    All processes call this.

    Args:
      settings: as given.
      record: where an earlier call of the command noted its settings: settings.json and the like,
        what a study's folder is for, or a log that begins with that; a model that is given
        without a revision keeps the commit that it has there.
      afresh: look the commit up again all the same.

    Raises:
      ValueError: see `hub.snapshot`; processes that were given different models.
    """
    source = settings.model.source
    processes.agree({"model.source": source}, SAME_COMMAND)
    if hub.split(source.removeprefix("hf:")) is None:
        return settings
    known = None if afresh else record
    return settings.override({"model.source": processes.on_first(_pinned, source, known)})


def _pinned(source: str, record: pathlib.Path | None) -> str:
    parts = hub.named(source.removeprefix("hf:"))
    if parts is None:
        return source
    name, revision = parts
    earlier = "" if record is None else _recorded(record)
    of_name, _, commit = earlier.partition("@")
    if not revision and of_name == name and hub.is_commit(commit):
        say(f"Hub: {name} at commit {commit}, with which this workdir was begun")
        return earlier
    return hub.pinned(source)


def _recorded(record: pathlib.Path) -> str:
    """Return the model.source of recorded settings; '' where none is to be read, of which another
    line tells."""
    if not record.is_file():
        mirror.bring_file(record)
    try:
        lines = record.suffix == ".jsonl"
        content = files.read_jsonl(record)[0] if lines else files.read_json(record)
        if "settings" in content:
            source = content["settings"]["model.source"]
        else:
            source = content["model"]["source"]
    except (OSError, ValueError, LookupError, TypeError):
        return ""
    return source if isinstance(source, str) else ""
