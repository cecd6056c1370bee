"""What the folder of a study is for: a file that later calls of its command must fit."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from safepatch_jax.runtime import files
from safepatch_jax.runtime.console import some


def refuse_other(
    path: pathlib.Path, wanted: Mapping[str, Any], kind: str, flag: str, fix: str
) -> None:
    """Raise ValueError if a folder is for something else.

    Args:
      path: of its record; one that is not there is no error.
      wanted: what the record has if the folder is for this.
      kind: what the folder is, in words: 'a margin map'.
      flag: with which another folder is given.
      fix: for a record that cannot be read.
    """
    if not path.is_file():
        return
    noted, changes = files.read_json(path, fix), []
    for name, value in wanted.items():
        if noted.get(name) != value:
            changes.append(difference(name, noted.get(name), value))
    if changes:
        raise ValueError(
            f"{path.parent} is {kind} with other {' and '.join(changes)}. Give another {flag}, or "
            "delete it."
        )


def difference(name: str, recorded: Any, wanted: Any) -> str:
    """Say what differs: of models and data which one, of options their values, of the others the
    name alone."""
    if name not in ("models", "options", "data") or not isinstance(recorded, dict):
        return name
    changes = []
    for key in {**recorded, **wanted}:
        if recorded.get(key) == wanted.get(key):
            continue
        if name == "options":
            there, here = f"{recorded.get(key)!s:.100}", f"{wanted.get(key)!s:.100}"
            changes.append(f"{key} {there} there, {here} here")
        else:
            changes.append(f"{key:.100}")
    return f"{name} ({some(changes, ', ')})"
