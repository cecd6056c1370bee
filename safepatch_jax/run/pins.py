"""The commit that a run's model of the Hugging Face Hub stands for: looked up once, then part of
the run's settings, so that a branch that moves changes no run. Needs no JAX."""

from __future__ import annotations

import pathlib

from safepatch_jax.io import hub
from safepatch_jax.run.agreement import SAME_COMMAND
from safepatch_jax.runtime import files, processes
from safepatch_jax.runtime.console import say
from safepatch_jax.settings import Settings


def pinned(
    settings: Settings, record: pathlib.Path | None = None, afresh: bool = False
) -> Settings:
    """Return settings whose model.source, where it names a model of the Hub, names its commit too.
    All processes call this.

    Args:
      settings: as given.
      record: where settings of an earlier call of the command lie; a model that is given without
        a revision keeps the commit that it has there.
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
    try:
        source = files.read_json(record)["model"]["source"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return source if isinstance(source, str) else ""
