"""SIGTERM, with which a machine is taken away: work that can save itself is asked to end, all else
ends at once."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import Any

CODE = 143  # of a process that SIGTERM ended
_GRACE = 300  # seconds: longer than files take to be closed and folders to be cleared away


class _State:
    listeners = 0  # blocks within `listening`
    deferrals = 0  # blocks within `deferred`
    requested = False  # a listener is to end the process
    pending = False  # SIGTERM came while it was deferred


def on_signal(*_: Any) -> None:
    """Handle SIGTERM: a second one does not wait.

    Code that the exception leaves with a lock held may wait for itself for ever, so the kernel ends
    the process after a while.
    """
    if not _State.listeners:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(_GRACE)
    if _State.deferrals and not _State.pending:
        _State.pending = True
    elif _State.requested or _State.pending or not _State.listeners:
        _State.pending = False
        sys.exit(CODE)
    else:
        _State.requested = True


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Let SIGTERM wait until the block has run or raised, because it takes locks that threads need
    to end. In the main thread alone."""
    _State.deferrals += 1
    try:
        yield
    finally:
        _State.deferrals -= 1
        if _State.pending and not _State.deferrals:
            _State.pending = False
            on_signal()


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Let SIGTERM set `requested` while the block runs, which must look at it often and then end
    the process by `stop`."""
    _State.listeners += 1
    try:
        yield
    finally:
        _State.listeners -= 1
    if _State.requested:  # after the last look
        stop()


def requested() -> bool:
    """Return whether this process was asked to end."""
    return _State.requested


def stop() -> None:
    """End the process as SIGTERM does, folders that are half filled cleared away."""
    sys.exit(CODE)
