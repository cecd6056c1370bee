"""How a path that a user gives is read: in every flag and setting, by these functions."""

from __future__ import annotations

import os
import pathlib
import re

from safepatch_jax.runtime.reading import Refused

_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://?")


def plain(path: str | os.PathLike[str]) -> str:
    """Return a path with '~' as the home folder and without a slash at its end; a relative one is
    relative to the folder in which the command was started.

    Raises:
      ValueError: it is empty or an address (``gs://``), or there is no such home folder.
    """
    text = os.fspath(path)
    if not text.strip():
        raise Refused(
            "A path is empty. Give the name of a file or folder ('.' is the current one)."
        )
    if "\0" in text:
        raise Refused(f"The path {text!r} holds a NUL character, which no name can.")
    # pathlib would make one slash of the two, and a local folder of that name.
    if (match := _SCHEME.match(text)) and not os.path.exists(text):
        raise Refused(
            f"'{text}': {match[1]}:// is not supported, only local files and folders. Copy it to a "
            "local disk, or mount it (for buckets gcsfuse, s3fs), and give that path."
        )
    try:
        return str(pathlib.Path(text).expanduser())
    except RuntimeError as error:
        raise Refused(f"'{text}': {error} Give the whole path.") from error


def resolve(path: str | os.PathLike[str]) -> pathlib.Path:
    """Return the absolute path of what a user named. Raises ValueError as `plain` does."""
    return pathlib.Path(plain(path)).absolute()
