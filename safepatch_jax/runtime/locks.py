"""Locks: files that one process holds, which a dead process does not keep.

Every lock of this project is opened here: a link is not followed, nothing is truncated, and what
others have put under a lock's name is left as it is.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import pathlib
import re
import socket
import stat
from collections.abc import Iterator

from safepatch_jax.runtime.reading import Refused

LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_CONTENT = re.compile(rb"(process \d+ on [^\0\n]{1,255})?")  # of a lock: nothing, or its holder
_MOST = 400  # bytes of a lock that are read


class Held(BlockingIOError):
    """A lock is held by another process; `holder` says by which, '' if unknown."""

    def __init__(self, holder: str = ""):
        super().__init__(errno.EWOULDBLOCK, "the lock is held by another process")
        self.holder = holder


@contextlib.contextmanager
def locked(path: str | pathlib.Path) -> Iterator[None]:
    """Hold an exclusive lock while the block runs. Raises ValueError as `held`."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with held(path, wait=True):
        yield


@contextlib.contextmanager
def claimed(folder: str | pathlib.Path) -> Iterator[None]:
    """Be the only process that works in a folder while the block runs.

    Raises:
      ValueError: another one is at work there; says which. Or as `held`.
    """
    path = pathlib.Path(folder) / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            handle = stack.enter_context(held(path, wait=False))
        except Held as error:
            raise ValueError(
                f"Another run is at work in {folder} ({error.holder or 'just begun'}). Wait until "
                "it has ended, stop it, or give another folder."
            ) from error
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield


@contextlib.contextmanager
def held(path: pathlib.Path, *, wait: bool) -> Iterator[int]:
    """Hold the lock of a file, which is made if it is not there; yield its descriptor.

    Args:
      wait: until another process has let it go.

    Raises:
      Held: another process has it, and `wait` is not set.
      ValueError: what has the lock's name is a link or no lock; or the file system has no locks.
    """
    handle, made = open_alone(path, os.O_RDWR)
    try:
        content = os.pread(handle, _MOST, 0)
        if not _CONTENT.fullmatch(content):
            raise _stranger(path, "a file with another content than a lock's")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Held(content.decode(errors="replace")) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            if made:
                path.unlink(missing_ok=True)
            raise Refused(
                f"{path} cannot be locked ({error.strerror}): the file system of this folder has "
                "no file locks, which keep two runs from one folder. Give a folder on another disk "
                "(--workdir, --out, --run.cache_dir), or mount this one with locks (NFS: without "
                "nolock)."
            ) from error
        yield handle
    finally:
        os.close(handle)


def open_alone(path: pathlib.Path, flags: int) -> tuple[int, bool]:
    """Open a file that this project writes to where it lies, or make it; a link is not followed.

    Returns:
      (file descriptor, whether the file was made).

    Raises:
      ValueError: its name is that of a link, of something that is no file, or of a file that has
        other names too.
    """
    flags |= os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # one that is no file must not block
    while True:
        try:
            return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666), True
        except FileExistsError:
            pass
        try:
            handle = os.open(path, flags)
        except FileNotFoundError:
            continue  # its holder has removed it meanwhile
        except OSError:
            if path.is_symlink() or (path.exists() and not path.is_file()):
                raise _stranger(path, _kind(path)) from None
            raise
        status = os.fstat(handle)
        if stat.S_ISREG(status.st_mode) and status.st_nlink <= 1:
            return handle, False
        os.close(handle)
        raise _stranger(path, _kind(path))


def _kind(path: pathlib.Path) -> str:
    if path.is_symlink():
        return f"a link to {os.readlink(path)}"
    if path.is_dir():
        return "a folder"
    return "a file that has other names too (hard links)" if path.is_file() else "no plain file"


def _stranger(path: pathlib.Path, kind: str) -> Refused:
    return Refused(
        f"{path} is {kind}, and a file of this project needs that name. It was left as it is; move "
        "it away, or use another folder."
    )


def is_gone(space: str | None, pid: int) -> bool:
    """Return whether a process of this boot and process namespace has ended; False of others."""
    if space is None or space != process_space():
        return False
    try:
        os.kill(pid, 0)  # /proc may hide the processes of others
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


@functools.cache
def process_space() -> str | None:
    """Return a name of this boot and process namespace, in which a process number means one
    process; None if unknown."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        return None
    return hashlib.sha256((boot + namespace).encode()).hexdigest()[:8]
