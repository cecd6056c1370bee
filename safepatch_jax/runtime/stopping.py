"""SIGTERM, with which a machine is taken away: work that can save itself is asked to end, all else
ends at once."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import Any

CODE = 143  # of a process that SIGTERM ended
_MOMENT = 0.1  # seconds
_AGAIN = 5  # seconds after which Ctrl-C is raised once more
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


def install() -> None:
    """Handle SIGTERM and Ctrl-C from here on. In the main thread."""
    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_interrupt)
    sys.unraisablehook = _on_lost


def _on_lost(unraisable: Any) -> None:
    """Raise again, a moment later, what a signal raised within a callback of a library or a
    destructor, where Python only prints it."""
    handler = {KeyboardInterrupt: on_interrupt, SystemExit: on_signal}.get(unraisable.exc_type)
    if handler is None:
        sys.__unraisablehook__(unraisable)
        return
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, _MOMENT)


def on_interrupt(*_: Any) -> None:
    """Handle Ctrl-C: raise KeyboardInterrupt, and again after a while if a library dropped it."""
    signal.signal(signal.SIGALRM, _on_alarm)
    signal.alarm(_AGAIN)
    raise KeyboardInterrupt


def _on_alarm(*_: Any) -> None:
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    if error is None:  # it was lost
        on_interrupt()
    signal.alarm(_AGAIN)  # files are closed and folders cleared away


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
