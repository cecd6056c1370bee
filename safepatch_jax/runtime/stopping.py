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
    listeners = 0
    holders = 0
    asked = False  # a listener is to look
    late = False  # SIGTERM came while the process was held


def on_signal(*_: Any) -> None:
    """Handle SIGTERM: a second one does not wait.

    Code that the exception leaves with a lock held may wait for itself for ever: the kernel ends
    the process then.
    """
    if not _State.listeners:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(_GRACE)
    if _State.holders and not _State.late:
        _State.late = True
    elif _State.asked or _State.late or not _State.listeners:
        _State.late = False
        sys.exit(CODE)
    else:
        _State.asked = True


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Let SIGTERM wait until the block has run or raised, which takes locks that threads need to
    end. In the main thread alone."""
    _State.holders += 1
    try:
        yield
    finally:
        _State.holders -= 1
        if _State.late and not _State.holders:
            _State.late = False
            on_signal()


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Let SIGTERM set `asked` while the block runs, which must look at it often and then end the
    process by `stop`."""
    _State.listeners += 1
    try:
        yield
    finally:
        _State.listeners -= 1
    if _State.asked:  # after the last look
        stop()


def asked() -> bool:
    """Return whether this process was asked to end."""
    return _State.asked


def stop() -> None:
    """End the process as SIGTERM does, folders that are half filled cleared away."""
    sys.exit(CODE)
