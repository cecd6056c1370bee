"""SIGTERM, with which a machine is taken away: work that can save itself is asked to end, all else ends at once."""

from __future__ import annotations

import contextlib
import sys
from typing import Any, Iterator

CODE = 143  # of a process that SIGTERM ended


class _State:
    listeners = 0
    asked = False


def on_signal(*_: Any) -> None:
    """Handle SIGTERM: a second one does not wait."""
    if _State.asked or not _State.listeners:
        sys.exit(CODE)
    _State.asked = True


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Let SIGTERM set `asked` while the block runs, which must look at it often and then end the process by `stop`."""
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
