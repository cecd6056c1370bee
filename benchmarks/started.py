"""A program that a benchmark starts, listens to and may kill."""

from __future__ import annotations

import contextlib
import os
import pathlib
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence


class Started:
    """A started module of Python whose lines can be waited for.

    Args:
      module, arguments: as after `python -m`.
      log: a file to which all that it prints is added.
    """

    def __init__(self, module: str, arguments: Sequence[str], log: pathlib.Path):
        file = open(log, "a", encoding="utf-8")
        command = [sys.executable, "-m", module, *arguments]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=file, text=True, env=os.environ
        )
        self.pid = self._process.pid
        self._lines: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(file,), daemon=True).start()

    def _read(self, log) -> None:
        for line in self._process.stdout:
            log.write(line)
            log.flush()
            self._lines.put((time.monotonic(), line.rstrip("\n")))
        self._lines.put((time.monotonic(), None))

    def lines(self) -> Iterator[tuple[float, str]]:
        """Yield (moment, line) to the end."""
        while (entry := self._lines.get())[1] is not None:
            yield entry

    def wait(self, seconds: float, prefix: str) -> None:
        """Wait so long, or until a line begins so, or to the end."""
        until = time.monotonic() + seconds
        with contextlib.suppress(queue.Empty):
            while (
                line := self._lines.get(timeout=max(0.0, until - time.monotonic()))[1]
            ) is not None and not line.startswith(prefix):
                pass

    def end(self, with_signal: int | None = None) -> int:
        """Return the exit code, after a signal if one is given."""
        if with_signal is not None:
            self._process.send_signal(with_signal)
        return self._process.wait()
