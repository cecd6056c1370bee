"""The files of a run: a part's record, written again after each figure; which parts are done.

Imports no JAX.
"""

from __future__ import annotations

import pathlib
import time
from typing import Any

from safepatch_jax.runtime import files

FIX = "Delete it, or give another --out."


class Record:
    """The record of a part at work.

    Args:
      path: the file, OUT/parts/NAME.json.
      shapes: 'full' or 'tiny'.
      limit: seconds that the part may take.
    """

    def __init__(self, path: pathlib.Path, shapes: str, limit: float):
        self._path, self._begun = path, time.monotonic()
        self.figures: dict[str, Any] = {}
        self._head = {"part": path.stem, "shapes": shapes, "limit": limit}
        self._write("running")

    def note(self, **figures: Any) -> None:
        """Add figures, or replace them."""
        self.figures |= figures
        self._write("running")

    def end(self, status: str, reason: str = "") -> None:
        """Write how the part ended."""
        self._write(status, reason)

    def _write(self, status: str, reason: str = "") -> None:
        state = {"status": status, "reason": reason, "seconds": time.monotonic() - self._begun}
        files.write_json(self._path, self._head | state | {"figures": self.figures})


def read(path: pathlib.Path) -> dict[str, Any]:
    """Return a part's record, an empty one where there is none. Raises ValueError if it is
    damaged."""
    return files.read_json(path, FIX) if path.is_file() else {}


def ended(path: pathlib.Path, status: str, reason: str, seconds: float, shapes: str) -> None:
    """Write how a part ended that could not write it itself; its figures so far stay."""
    record = {"part": path.stem, "shapes": shapes, "figures": {}} | read(path)
    files.write_json(path, record | {"status": status, "reason": reason, "seconds": seconds})
