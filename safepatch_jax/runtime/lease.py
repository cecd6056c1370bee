"""A lease on a folder of a bucket: what a lock is on a disk.

The lease is an object that names its holder and expires. It is written on the condition that nobody
has written it meanwhile (the generation of gs://, the ETag of s3://), and renewed by a thread. A
holder that is gone stops renewing, so that others may take the lease once it has expired (at once
where they see that it is gone); a holder that finds its lease taken must not publish anything more.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from safepatch_jax.runtime.conditional import ABSENT, Conditional
from safepatch_jax.runtime.joining import joined
from safepatch_jax.runtime.locks import is_gone, process_space
from safepatch_jax.runtime.reading import Refused
from safepatch_jax.runtime.text import printable

NAME = "lease.json"
SECONDS = float(os.environ.get("SAFEPATCH_LEASE_SECONDS", 60))  # after which it expires


class Lost(Refused):
    """The lease was taken by another holder, or could not be renewed in time."""


class Lease:
    """A held lease.

    Args:
      address: of the folder.

    Attributes:
      address: of the folder.
    """

    def __init__(self, address: str):
        self.address = address
        self._id, self._since = uuid.uuid4().hex, time.time()
        self._object, self._version = Conditional(address, NAME), ABSENT
        self._renewed = 0.0  # monotonic seconds, just before it was last written
        self._lost = ""
        self._lock, self._ended = threading.Lock(), threading.Event()

    def take(self, wait: bool) -> None:
        """Take the lease, once its holder has let it go or it has expired.

        Raises:
          ValueError: it is held, and `wait` is not set: says by whom, and since when; or the bucket
            cannot be used.
        """
        while True:
            content, version = self._object.read()
            holder = _holder(content)
            if holder is None or holder.get("id") == self._id:
                if self._write(version):
                    return
            elif not wait:
                raise Refused(
                    f"Another run is at work in {self.address}: {_told(holder)}. Wait until it has "
                    "ended, stop it, or give another folder. Of one that was killed the lease ends "
                    f"within {SECONDS:.0f} s."
                )
            else:
                time.sleep(min(2.0, SECONDS / 10))

    def check(self) -> None:
        """Raise `Lost` unless the lease is held, and will be for a while."""
        with self._lock:
            if not self._lost and time.monotonic() - self._renewed > SECONDS / 3:
                self._renew()
            if not self._lost and time.monotonic() - self._renewed > 2 * SECONDS / 3:
                raise Lost(f"The lease of {self.address} could not be renewed; it may expire.")
            if self._lost:
                raise Lost(self._lost)

    def release(self) -> None:
        """Let the lease go, if it is still held."""
        self._ended.set()
        with self._lock, contextlib.suppress(Exception):  # it expires by itself
            if not self._lost:
                self._object.delete(self._version)

    def keep(self) -> None:
        """Renew the lease until it is released; the thread must do nothing else, nor wait for
        work that may last longer than the lease."""
        while not self._ended.wait(SECONDS / 4):
            with self._lock:
                if not self._ended.is_set():
                    self._renew()
                if self._lost:
                    return

    def _renew(self) -> None:
        """Write the lease again; take note if it was taken meanwhile. A bucket that does not
        answer is asked again, until the lease has expired."""
        try:
            if not self._write(self._version):
                content, version = self._object.read()
                if _content(content).get("id") == self._id:  # an answer was lost on its way
                    self._write(version)
                    return
                self._lost = (
                    f"The lease of {self.address} is gone: {_told(_content(content))}. Nothing "
                    "more was published; see that one run is at work there, then start it again."
                )
        except Refused as error:
            if time.monotonic() - self._renewed > SECONDS:
                self._lost = f"The lease of {self.address} has expired, unrenewed: {error}"

    def _write(self, version: str) -> bool:
        """Write the lease in the place of a version of it; return whether that was still there."""
        now = time.monotonic()
        content = {
            "id": self._id,
            "holder": f"process {os.getpid()} on {socket.gethostname()}",
            # Of several processes the others may still write when this one is gone.
            "process": None if joined() else [process_space(), os.getpid()],
            "since": self._since,
            "expires": time.time() + SECONDS,
        }
        written = self._object.write(json.dumps(content).encode(), version)
        if not written:  # it was another one
            return False
        self._version, self._renewed = written, now
        return True


@contextlib.contextmanager
def held(address: str, *, wait: bool) -> Iterator[Lease]:
    """Hold the lease of a folder while the block runs. Raises ValueError as `Lease.take`."""
    lease = Lease(address)
    lease.take(wait)
    thread = threading.Thread(target=lease.keep, daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        lease.release()
        thread.join(SECONDS)


def _content(value: bytes) -> dict[str, Any]:
    try:
        content = json.loads(value)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _holder(value: bytes) -> dict[str, Any] | None:
    """Return who holds a lease that was read; None if nobody does, or no longer."""
    content = _content(value)
    expires = content.get("expires")
    if not isinstance(expires, int | float) or expires < time.time():
        return None
    match content.get("process"):
        case [str(space), int(pid)] if pid > 0 and is_gone(space, pid):
            return None  # it was killed, on this machine
    return content


def _told(content: dict[str, Any]) -> str:
    since = content.get("since")
    if not isinstance(since, int | float):
        return "it was deleted or overwritten"
    moment = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(since))
    return f"{printable(str(content.get('holder')), 200)} holds it since {moment}"
