"""The one boundary between what others wrote and this project.

A file, an archive, a template or a server's reply may make its reader raise anything:
RecursionError from nested JSON, OverflowError from a number, a panic of a Rust library, which is no
Exception. Each reader has one block of `reading`, after which all of it is one line: what it is,
why, and the way out.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator

from safepatch_jax.runtime.text import without_user

_LFS = b"version https://git-lfs"
_MOST = 300  # characters of a reason


class Refused(ValueError):
    """An error that already says what is wrong and how to mend it; `reading` lets it pass."""


@contextlib.contextmanager
def reading(path: str | pathlib.Path, what: str, fix: str) -> Iterator[None]:
    """Turn whatever a reader raises in the block into "PATH cannot be read as WHAT: REASON. FIX".

    Args:
      path: of the file, or another name of what is read.
      what: as what it is read: 'JSON', 'a chat template'.
      fix: a sentence: what the user can do.

    Raises:
      ValueError: in place of any error but `Refused` and requests to end the process.
    """
    try:
        yield
    except (Refused, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of a Rust library is no Exception
        refuse_pointer(path)
        raise Refused(f"{path} cannot be read as {what}: {reason(error)}. {fix}") from error


def reason(error: BaseException) -> str:
    """Say in a few words what an error was, without user and password of a URL in it."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    if isinstance(error, OSError) and error.strerror:
        return os.strerror(error.errno) if (error.errno or 0) > 0 else error.strerror
    text = without_user(str(error)).strip().partition("\n")[0].rstrip(".")[:_MOST]
    if text and (isinstance(error, ValueError) or type(error) is Exception):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def refuse_pointer(path: str | pathlib.Path) -> None:
    """Raise Refused if a file is a Git LFS pointer: the few lines that stand for a large file in a
    clone without git-lfs."""
    try:
        with open(path, "rb") as file:
            is_pointer = file.read(len(_LFS)) == _LFS
    except (OSError, ValueError):  # there is no such file, or it is no file's name
        return
    if is_pointer:
        raise Refused(
            f"{path} is a Git LFS pointer, not the file itself: the folder was cloned without "
            "git-lfs. Run 'git lfs install' and 'git lfs pull' in it, or download the file."
        )
