"""Addresses of buckets (``gs://``, ``s3://``), and the local paths that stand for them.

A path below `base` stands for an object or folder of a bucket: its first part is the scheme, its
second the bucket. So every other module works with paths, and those that must know ask here.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator

from safepatch_jax.runtime import joining
from safepatch_jax.runtime.reading import Refused

SCHEMES = ("gs", "s3")
BASE = "SAFEPATCH_BUCKETS_DIR"  # environment variable: another folder than `base` is by default
_ADDRESS = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://(.*)", re.DOTALL)
# What `files.new_folder` and `new_file` fill before it is renamed, by the name that it will have.
_PARTIAL = re.compile(r"\.(.+?)\.(?:[0-9a-f]{8}|None)-\d+(?:\.\w+)?\.partial", re.DOTALL)


def is_address(text: str | os.PathLike[str]) -> bool:
    """Return whether a text is an address of a bucket that can be used here."""
    match = _ADDRESS.fullmatch(os.fspath(text))
    return match is not None and match[1] in SCHEMES


def plain(text: str) -> str:
    """Return an address without slashes at its end or twice. Raises ValueError if it names no
    bucket, or leaves it."""
    scheme, rest = _ADDRESS.fullmatch(text).groups()
    bucket, *parts = [part for part in rest.split("/") if part] or [""]  # '' is no name
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,220}", bucket):
        raise Refused(f"'{text}' names no bucket. Give {scheme}://BUCKET/FOLDER.")
    if bad := re.search(r"[%#?*\[\]\s]", rest):
        raise Refused(f"'{text}' holds {bad[0]!r}, which clients of buckets read in several ways.")
    if {".", ".."} & set(parts):
        raise Refused(f"'{text}' holds '.' or '..' as a name. Give the address without it.")
    return f"{scheme}://{'/'.join([bucket, *parts])}"


def base() -> pathlib.Path:
    """Return the folder below which this process keeps what it has of buckets.

    Each process of a run has one of its own: those on one host must not write to the same files.
    """
    default = pathlib.Path("~/.cache/safepatch_jax/buckets").expanduser()
    folder = pathlib.Path(os.environ.get(BASE) or default).resolve()
    index = joining.index()
    return folder / f"process-{index}" if index else folder


@contextlib.contextmanager
def copies_apart() -> Iterator[None]:
    """Keep copies in a temporary folder while the block runs: a run of this machine has its own
    below `base`, and what was brought here must not stay."""
    before = os.environ.get(BASE)
    with tempfile.TemporaryDirectory(prefix="safepatch-") as folder:
        os.environ[BASE] = folder
        try:
            yield
        finally:
            del os.environ[BASE]
            if before is not None:
                os.environ[BASE] = before


def stand_in(address: str) -> pathlib.Path:
    """Return the local path that stands for an address, see `plain`."""
    scheme, _, rest = plain(address).partition("://")
    return base() / scheme / rest


def address_of(path: str | os.PathLike[str]) -> str:
    """Return the address for which a path stands, '' if it is just a path. What is being filled
    under a temporary name stands for what it will be."""
    try:
        scheme, *parts = pathlib.Path(path).relative_to(base()).parts
    except ValueError:
        return ""
    if scheme not in SCHEMES or not parts:
        return ""
    names = [match[1] if (match := _PARTIAL.fullmatch(part)) else part for part in parts]
    return f"{scheme}://{'/'.join(names)}"


def is_partial(path: pathlib.Path) -> bool:
    """Return whether a path lies in something that is being filled under a temporary name."""
    return any(_PARTIAL.fullmatch(part) for part in path.parts)


def shown(text: str) -> str:
    """Return a text in which paths that stand for addresses are written as these."""
    return re.sub(rf"{re.escape(str(base()))}/({'|'.join(SCHEMES)})/", r"\1://", text)


def name_of(path: str | os.PathLike[str]) -> str:
    """Return how a path is shown: by its address where it stands for one."""
    return address_of(path) or os.fspath(path)
