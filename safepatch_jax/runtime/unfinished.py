"""The mark of a model folder whose weight files are being patched in place.

It is written before the first of them is replaced and removed after the last one, so a folder that
has it may be neither the backbone nor the patched model. Whatever opens a model folder refuses such
a one; applying and reverting alone go on from there.
"""

from __future__ import annotations

import json
import os
import pathlib
import shlex

from safepatch_jax.runtime import files
from safepatch_jax.runtime.reading import Refused

MARK = "unfinished_patch.json"
OTHER = {"apply": "revert", "revert": "apply"}
_LONGEST = 4096  # characters of a path
_LARGEST = 1 << 16  # bytes of a mark


def write(folder: pathlib.Path, patch: pathlib.Path, verb: str) -> None:
    """Mark a folder, durably.

    Args:
      folder: of the model.
      patch: the patch file.
      verb: 'apply' or 'revert'.

    Raises:
      ValueError: the mark's name is taken by something else.
    """
    path = folder / MARK
    if os.path.lexists(path) and _read(folder) is None:
        raise Refused(
            f"{path} is needed to mark the folder while it is patched, and is something else. It "
            "was left as it is, and nothing was patched; move it away."
        )
    files.write_json(path, {"verb": verb, "patch": str(patch.absolute())})
    files.sync_folder(folder)


def remove(folder: pathlib.Path) -> None:
    """Take the mark away, durably, and what a killed process left of one; what is no mark stays."""
    files.delete_abandoned(folder / MARK)
    if is_marked(folder):
        (folder / MARK).unlink()
        files.sync_folder(folder)


def is_marked(folder: pathlib.Path) -> bool:
    return _read(folder) is not None


def refuse(folder: str | pathlib.Path) -> None:
    """Raise ValueError if a folder has a mark, or anything of its name; says how to go on."""
    folder = pathlib.Path(folder)
    if not os.path.lexists(folder / MARK):
        return
    where, patch, verbs = shlex.quote(str(folder)), "FILE", list(OTHER)
    if mark := _read(folder):
        patch, verbs = shlex.quote(mark["patch"]), [mark["verb"], OTHER[mark["verb"]]]
    finish, undo = (
        f"python -m launch.patch {verb} --patch={patch} --model={where}" for verb in verbs
    )
    raise Refused(
        f"{folder} is neither the backbone nor the patched model: {verbs[0]} in place is under way "
        f"or was interrupted ({MARK} is there). Finish it: {finish} or undo it: {undo}"
    )


def _read(folder: pathlib.Path) -> dict[str, str] | None:
    """Return what a mark says; None where there is none."""
    path = folder / MARK
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > _LARGEST:
            return None
        mark = json.loads(path.read_text(encoding="utf-8"))
        known = mark["verb"] in tuple(OTHER) and isinstance(mark["patch"], str)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return mark if known and 0 < len(mark["patch"]) <= _LONGEST else None
