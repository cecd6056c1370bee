"""Checksums of the files of a folder, kept in it: written when it is made, compared before it is
read."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from safepatch_jax.runtime import files
from safepatch_jax.runtime.console import progress, say
from safepatch_jax.runtime.reading import Refused
from safepatch_jax.runtime.workers import Workers

NAME = "checksums.json"
_LONG = 1 << 31  # bytes from which on a bar is shown
_checked: dict[pathlib.Path, Any] = {}  # what a file looked like when it was hashed
_unchecked: list[pathlib.Path] = []  # the folder of which the console has said so


def write(folder: pathlib.Path, hashes: Mapping[str, Any] | None = None) -> None:
    """Write down the SHA-256 of the files below a folder: of all, or as `folder_hashes` gives
    them."""
    listed = files.folder_hashes(folder) if hashes is None else dict(hashes)
    listed.pop(NAME, None)
    files.write_json(folder / NAME, {"sha256": listed})


def check(folder: pathlib.Path, fix: str, only: Collection[str] = ()) -> None:
    """Compare the files of a folder with what was written down when it was made.

    Each file is read once in a process, and again where its size or time has changed: 1 to 2 GB/s.
    A folder of earlier versions has no checksums, which the console says once.

    Args:
      folder: made by this project.
      fix: a sentence: what the user can do.
      only: names relative to the folder; all by default.

    Raises:
      ValueError: a file is missing or has other bytes; names it, and ends with `fix`.
    """
    path = folder / NAME
    if not path.is_file():
        if folder.is_dir():
            _say_unchecked(folder)
        return
    listed = _listed(path, fix)
    todo = {}
    for name, entry in listed.items():
        if only and name not in only:
            continue
        file = folder / name
        if not file.is_file():
            raise Refused(f"{file} is missing. {fix}")
        status = file.stat()
        seen = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, entry)
        if status.st_size != entry["bytes"]:
            raise Refused(f"{file} has {status.st_size:,} bytes, not {entry['bytes']:,}. {fix}")
        if _checked.get(file) != seen:
            todo[file] = seen
    total = sum(seen[0] for seen in todo.values())
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(progress(total, "check", "B")) if total >= _LONG else None
        pool = stack.enter_context(Workers(2))
        for (file, seen), digest in zip(todo.items(), pool.map(files.file_sha256, todo)):
            if digest != seen[-1]["sha256"]:
                raise Refused(f"{file} has other bytes than were written (SHA-256). {fix}")
            _checked[file] = seen
            if bar is not None:
                bar.update(seen[0])


def _listed(path: pathlib.Path, fix: str) -> dict[str, dict[str, Any]]:
    """Read what was written down. Raises ValueError if that is damaged."""
    listed = files.read_json(path, fix).get("sha256")
    known = isinstance(listed, dict)
    for entry in listed.values() if known else ():
        known &= isinstance(entry, dict) and type(entry.get("bytes")) is int
        known = known and isinstance(entry.get("sha256"), str)
    if not known:
        raise Refused(f"{path} is damaged: it is no list of checksums. {fix}")
    for name in listed:
        if pathlib.PurePath(name).is_absolute() or ".." in pathlib.PurePath(name).parts:
            raise Refused(f"{path} is damaged: it names {name!r:.100}, outside the folder. {fix}")
    return listed


def _say_unchecked(folder: pathlib.Path) -> None:
    if not _unchecked:
        _unchecked.append(folder)
        say(
            f"  {folder} has no checksums, as an earlier version made it: it, and others of that "
            "kind, are read unchecked"
        )
