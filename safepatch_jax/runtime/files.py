"""Atomic writes, hashes, and paths that stay inside their folder.

Links are never followed where something is locked, appended or deleted: what they lead to is not
ours.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import pathlib
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, BinaryIO

from safepatch_jax.runtime.addresses import address_of, name_of
from safepatch_jax.runtime.locks import (
    LOCK,
    claimed,
    is_gone,
    locked,
    open_alone,
    process_space,
)
from safepatch_jax.runtime.reading import Refused, reading
from safepatch_jax.runtime.text import redacted

__all__ = ["LOCK", "claimed", "locked"]

# What `mirror` does with paths that stand for an address: raise ValueError if something is there;
# and a context in which a new file (`replace` is None) or folder is filled and put in its place.
checks: list[Callable[[pathlib.Path], None]] = []
fillings: list[Callable[[pathlib.Path, bool | None], contextlib.AbstractContextManager[None]]] = []
FETCH = "Fetch or copy the file again."
# Of files and folders that are filled under a temporary name: .NAME.SPACE-PID[.RANDOM].partial; of
# folders that were replaced, until they are deleted: .NAME.SPACE-PID.RANDOM.old; and of what
# `processes.shared` writes.
_HALF_WRITTEN = re.compile(
    r"\..+\.(?:(?:[0-9a-f]{8}|None)-)?\d+(?:\.\w+)?\.partial"
    r"|\..+\.(?:[0-9a-f]{8}|None)-\d+\.\w+\.old|\.shared\.\w{8}\.partial",
    re.DOTALL,
)
# Two writes within one step of the file system's clock leave a file the same times: the hash of one
# that was changed so recently is not kept. A local disk's steps are 10 ms at most; where times are
# whole seconds, two seconds (FAT). In ns.
_STEP, _COARSE_STEP, _SECOND = 20_000_000, 2_100_000_000, 1_000_000_000
_hashed: dict[tuple[int, ...], str] = {}  # SHA-256 by what a file looks like


def write_text(path: str | pathlib.Path, text: str) -> None:
    """Write a text file under a temporary name, then rename: a reader sees the old file or the
    whole new one."""
    write_bytes(path, redacted(text).encode())


def write_bytes(path: str | pathlib.Path, content: bytes) -> None:
    """Do what `write_text` does, with bytes as they are."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _renamed(path) as temporary, new_alone(temporary) as f:
        f.write(content)
        _sync(f)


def new_alone(path: pathlib.Path) -> BinaryIO:
    """Open a new file to be filled, in the place of one of this name, which is ours; a link is
    removed and not followed."""
    path.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return open(os.open(path, flags, 0o666), "wb")


def appended(path: str | pathlib.Path) -> IO[str]:
    """Open a text file of ours, to which lines are added. Raises ValueError if it is a link or no
    file."""
    path = pathlib.Path(path)
    return open(open_alone(path, os.O_WRONLY | os.O_APPEND)[0], "a", encoding="utf-8")


@contextlib.contextmanager
def _renamed(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a temporary name beside a path; what has it after the block is renamed to the path."""
    temporary = path.with_name(f".{path.name}.{process_space()}-{os.getpid()}.partial")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(file: IO[Any]) -> None:
    """Bring to the disk what was written, so that a rename cannot come before it."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: pathlib.Path) -> None:
    """Bring names in a folder to the disk, so that they outlive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: str | pathlib.Path, fix: str = FETCH) -> dict[str, Any]:
    """Read a file that holds one JSON object. Raises ValueError, which ends with `fix`, if it is
    absent, damaged or another value."""
    with reading(path, "JSON", fix):
        # A byte order mark may stand before it.
        value = json.loads(pathlib.Path(path).read_text(encoding="utf-8-sig"))
    if not isinstance(value, dict):
        raise Refused(f"{path} holds {type(value).__name__}, not an object. {fix}")
    return value


def write_json(path: str | pathlib.Path, value: Any) -> None:
    """Write JSON atomically, keys in the order given."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_jsonl(path: str | pathlib.Path, fix: str = FETCH) -> list[Any]:
    """Read one JSON value a line; lines end at newlines alone, not at the other breaks that text
    may hold (U+2028). Raises ValueError, which ends with `fix`, if one is damaged."""
    with reading(path, "JSON lines", fix):
        lines = pathlib.Path(path).read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines if line.strip()]


def write_jsonl(path: str | pathlib.Path, rows: Iterable[Any]) -> None:
    """Write one JSON value a line, atomically."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_text(path, "".join(lines))


def copy(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copy a file under a temporary name, then rename."""
    with open(source, "rb") as reader, _renamed(target) as temporary:
        with new_alone(temporary) as writer:
            shutil.copyfileobj(reader, writer, 1 << 20)


@contextlib.contextmanager
def published(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a temporary folder; once all its files are made they are copied to `folder`, where each
    appears whole."""
    with tempfile.TemporaryDirectory() as temporary:
        yield pathlib.Path(temporary)
        for path in sorted(pathlib.Path(temporary).iterdir()):
            copy(path, folder / path.name)


def half_written(name: str) -> bool:
    """Return whether a name is one under which this project fills files and folders before it
    renames them, or deletes folders that were replaced."""
    return _HALF_WRITTEN.fullmatch(name) is not None


def half_written_of(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return what lies beside a folder under such a name: what it was filled in, or replaced by
    another one."""
    others = sorted(folder.parent.glob(f".{glob.escape(folder.name)}.*"))
    return [path for path in others if half_written(path.name)]


def make_usable(folder: pathlib.Path, flags: str) -> None:
    """Make a folder that many runs share. Raises ValueError, which names the flags that give
    another one, if it cannot be made or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unusable(folder, error.strerror or str(error), flags) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise unusable(folder, "no permission to write there", flags)


def refuse_unusable(folder: pathlib.Path, flags: str) -> None:
    """Raise ValueError as `make_usable` if a folder that is not there cannot be made; nothing is
    made."""
    if folder.is_dir():
        return
    parent = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not parent.is_dir():
        raise unusable(folder, f"{parent} is no folder", flags)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise unusable(folder, f"no permission to write in {parent}", flags)


def unusable(folder: pathlib.Path, reason: str, flags: str) -> Refused:
    """Return the error for a folder that cannot be written."""
    return Refused(f"{folder} cannot be written: {reason}. Give a folder that can, with {flags}.")


def refuse_full_folder(path: str | pathlib.Path) -> None:
    """Raise ValueError if `path` exists and is anything but an empty folder."""
    path = pathlib.Path(path)
    _refuse_unread_address(path)
    if address_of(path):  # what lies there locally is a copy
        for check in checks:
            check(path)
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(
            f"'{name_of(path)}' exists and is not empty; nothing was written. Give another folder "
            "or remove it first."
        )


def _refuse_unread_address(path: pathlib.Path) -> None:
    if path.parts[:1] in (("gs:",), ("s3:",)):
        raise Refused(f"{path}: this cannot be written to a bucket. Give a local path.")


@contextlib.contextmanager
def _filling(path: pathlib.Path, replace: bool | None = None) -> Iterator[None]:
    _refuse_unread_address(path)
    with contextlib.ExitStack() as stack:
        for filling in fillings:
            stack.enter_context(filling(path, replace))
        yield


def delete_abandoned(path: pathlib.Path) -> None:
    """Delete what killed processes left half-filled or half-deleted beside a folder or file; those
    of other machines are left alone."""
    if process_space() is None:
        return
    prefix = f".{path.name}.{process_space()}-"
    for other in path.parent.iterdir():
        pid = other.name.removeprefix(prefix).partition(".")[0]
        ours = other.name.startswith(prefix) and half_written(other.name) and pid.isdigit()
        if ours and is_gone(process_space(), int(pid)):
            with contextlib.suppress(OSError):  # another process may delete it at the same time
                delete(other)


@contextlib.contextmanager
def new_file(path: str | pathlib.Path) -> Iterator[BinaryIO]:
    """Fill a file under a temporary name, then rename it to `path`; on failure nothing is left.

    Raises:
      ValueError: `path` exists.
    """
    path = pathlib.Path(path)
    if path.exists() and not address_of(path):
        raise ValueError(
            f"'{path}' exists; nothing was written. Give another name or remove it first."
        )
    with _filling(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        delete_abandoned(path)
        with _renamed(path) as temporary, new_alone(temporary) as file:
            yield file
            _sync(file)


@contextlib.contextmanager
def new_folder(path: str | pathlib.Path, *, replace: bool = False) -> Iterator[pathlib.Path]:
    """Fill a folder under a temporary name, then rename it to `path`; on failure nothing is left.

    Raises:
      ValueError: `path` exists, is not an empty folder, and `replace` is not set; or it cannot be
        renamed over; or it is a link to what `replace` would delete.
    """
    if replace:
        refuse_link(pathlib.Path(path))
    path = pathlib.Path(path).resolve()
    if not replace:
        refuse_full_folder(path)
    if path.is_dir() and (path.is_mount() or path == pathlib.Path.cwd()):
        raise ValueError(
            f"'{path}' is a mount point or the current folder, which cannot be put in place as a "
            "whole. Give the name of a new folder inside it."
        )
    with _filling(path, replace), _put_in_place(path, replace) as temporary:
        yield temporary


@contextlib.contextmanager
def _put_in_place(path: pathlib.Path, replace: bool) -> Iterator[pathlib.Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    delete_abandoned(path)
    prefix = f".{path.name}.{process_space()}-{os.getpid()}."
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=prefix, suffix=".partial", dir=path.parent))
    # mkdtemp makes it for its owner alone; it gets the mode that the folder has or would have had.
    temporary.chmod(path.stat().st_mode & 0o777 if path.is_dir() else 0o777 & ~umask())
    old = temporary.with_suffix(".old")
    try:
        yield temporary
        if replace and path.exists():
            os.replace(path, old)
        try:
            os.replace(temporary, path)  # over an empty folder at most
        except OSError as error:
            if old.exists():
                os.replace(old, path)
            raise ValueError(
                f"'{path}' was made or filled by someone else meanwhile ({error.strerror}); "
                "nothing was written to it. Give another folder."
            ) from error
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def keep_only(folder: pathlib.Path, inner: pathlib.Path) -> None:
    """Replace a folder's content by that of a folder within it."""
    for path in folder.iterdir():
        if path != inner:
            delete(path)
    # A hidden name, so that none of its files has the folder's own.
    inner = inner.rename(inner.with_name(f".{inner.name}"))
    for path in inner.iterdir():
        path.rename(folder / path.name)
    inner.rmdir()


def delete(path: pathlib.Path) -> None:
    """Delete a file or a folder with all that is in it; nothing happens if it is not there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def refuse_link(path: pathlib.Path, root: pathlib.Path | None = None) -> None:
    """Raise ValueError if what is to be changed or deleted is a link, or lies below `root` behind
    one: there it is not ours."""
    for place in (path, *path.parents):
        if place == root:
            break
        if place.is_symlink():
            raise Refused(
                f"{place} is a link to {os.readlink(place)}, whose content is neither changed nor "
                "deleted. Put a folder in its place, or remove the link."
            )
        if root is None:
            break


def umask() -> int:
    """Return the process's file mode mask."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def file_sha256(path: str | pathlib.Path) -> str:
    """Return the SHA-256 of a file's content, in hex."""
    with open(path, "rb") as f:
        begun, looks = time.time_ns(), _looks(os.fstat(f.fileno()))
        digest = hashlib.file_digest(f, "sha256").hexdigest()
        if _settled(begun, *looks[-2:]) and _looks(os.fstat(f.fileno())) == looks:
            _hashed[looks] = digest
    return digest


def known_sha256(path: str | pathlib.Path) -> str | None:
    """Return the SHA-256 of a file that this process has read before and that has not changed since
    (by inode, size and times); None of others."""
    return _hashed.get(_looks(os.stat(path)))


def _looks(status: os.stat_result) -> tuple[int, ...]:
    times = status.st_mtime_ns, status.st_ctime_ns
    return status.st_dev, status.st_ino, status.st_size, *times


def _settled(now: int, modified: int, changed: int) -> bool:
    """Return whether a change from now on would show in a file's times; each moves the second."""
    coarse = not modified % _SECOND and not changed % _SECOND
    return now - changed > (_COARSE_STEP if coarse else _STEP)


def folder_hashes(folder: str | pathlib.Path, leave_out: str = "") -> dict[str, dict[str, Any]]:
    """Return ``{relative path: {bytes, sha256}}`` of every file below a folder, sorted, but for
    those of one folder in it. A file of which `known_sha256` knows is not read again."""
    folder, result = pathlib.Path(folder), {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and name.parts[0] != leave_out:
            digest = known_sha256(path) or file_sha256(path)
            result[str(name)] = {"bytes": path.stat().st_size, "sha256": digest}
    return result


def text_hash(value: Any) -> str:
    """Return the SHA-256 of a JSON-able value in canonical form."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def own_file(path: pathlib.Path, folder: pathlib.Path | None = None) -> pathlib.Path:
    """Return `path` if it lies in `folder` (by default the one it is in), or is a link as the
    Hugging Face cache makes them (into its ``blobs``).

    Raises:
      ValueError: it is a link to somewhere else, whose content would be published with a model.
    """
    folder, target = (folder or path.parent).resolve(), path.resolve()
    if target.is_relative_to(folder):
        return path
    if folder.parent.name == "snapshots" and target.parent == folder.parents[1] / "blobs":
        return path
    raise ValueError(
        f"{path} is a link that leaves its folder (to {target}). If you trust it, copy the file "
        "itself into the folder."
    )


def plain_name(name: str, where: str) -> str:
    """Return `name` if it is a bare file name; refuse anything that could leave its folder.

    Raises:
      ValueError: it holds a separator, a drive, or dots only.
    """
    plain = isinstance(name, str) and name not in ("", ".", "..")
    if not plain or any(character in name for character in "/\\:\0"):
        raise ValueError(
            f"{where}: refusing the file name {name!r:.100}: it must be a plain name inside the "
            "folder."
        )
    return name
