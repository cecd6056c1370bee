"""--profile=DIR: a trace of what a launcher computes, for TensorBoard and Perfetto."""

from __future__ import annotations

import contextlib
import pathlib
import threading
from collections.abc import Iterator

from launch import kinds
from safepatch_jax.runtime import files, processes
from safepatch_jax.runtime.console import say
from safepatch_jax.runtime.paths import resolve

_SECONDS = 120  # a trace of a long run would take gigabytes
_PROFILE = kinds.local(
    "profile",
    "",
    f"Folder of a trace by jax.profiler (TensorBoard, Perfetto) of the first {_SECONDS} seconds; "
    "each of several processes has a folder of its own in it.",
)


@contextlib.contextmanager
def traced() -> Iterator[None]:
    """Trace the block, or the first part of a long one, if --profile is given.

    Raises:
      ValueError: the folder cannot be written.
    """
    if not _PROFILE.value:
        yield
        return
    folder = resolve(_PROFILE.value)
    processes.on_first(files.make_usable, folder, "--profile")
    import jax

    if processes.several():
        folder /= f"process-{jax.process_index()}"
    jax.profiler.start_trace(str(folder))
    stop = _once(lambda: _end(folder))
    late = threading.Timer(_SECONDS, stop)
    late.daemon = True
    late.start()
    try:
        yield
    finally:
        late.cancel()
        stop()


def _end(folder: pathlib.Path) -> None:
    import jax

    jax.profiler.stop_trace()
    say(f"Trace:  {folder}")


def _once(function):
    """Return a function that calls another the first time alone; it may be called by threads."""
    lock, called = threading.Lock(), []

    def call() -> None:
        with lock:
            if not called:
                called.append(True)
                function()

    return call
