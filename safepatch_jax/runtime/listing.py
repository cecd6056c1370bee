"""Lists of published folders, and the files that they name."""

from __future__ import annotations

import json
import os
import pathlib
import re
from typing import Any

from safepatch_jax.runtime.addresses import address_of
from safepatch_jax.runtime.reading import Refused

_HASH = re.compile("[0-9a-f]{64}")


def below(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Return the files below a folder by name; links are not followed."""
    found = {}
    for root, _, names in os.walk(folder):
        for name in names:
            path = pathlib.Path(root, name)
            if path.is_file() and not path.is_symlink():
                found[path.relative_to(folder).as_posix()] = path
    return found


def inside(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Return where an object lies locally. Raises ValueError if its name leads out of the
    folder."""
    parts = name.split("/")
    if {"", ".", ".."} & set(parts):
        raise Refused(f"{address_of(folder)} holds an object {name!r:.100}, no name of a file.")
    return folder.joinpath(*parts)


def listed_outputs(content: bytes) -> dict[str, dict[str, Any]]:
    """Return {name: {bytes, sha256}} of a list. Raises ValueError if it is damaged."""
    try:
        listed = json.loads(content)
    except ValueError:
        listed = None
    outputs = listed.get("outputs") if isinstance(listed, dict) else None
    if not isinstance(outputs, dict) or not all(map(_is_entry, outputs.values())):
        raise Refused("The list of a published folder is damaged. Publish the folder again.")
    return outputs


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or type(entry.get("bytes")) is not int:
        return False
    return _HASH.fullmatch(str(entry.get("sha256"))) is not None
