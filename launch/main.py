"""How every launcher starts and how it reports a user's mistake."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable

from absl import app, logging

from safepatch_jax.runtime import processes, stopping


def run(main: Callable[..., None], *, positional: bool = False) -> None:
    """Run a launcher: a ValueError or a full disk ends it with one clear line and exit code 2, in
    all processes.

    Args:
      main: the launcher.
      positional: it takes positional arguments, and is given the list of them.
    """

    def wrapped(argv):
        if len(argv) > 1 and not positional:
            print(
                f"error: unexpected argument '{argv[1]}'; settings are given as "
                "--group.option=value.",
                file=sys.stderr,
            )
            sys.exit(2)
        logging.set_verbosity(logging.ERROR)
        # So that half-filled folders are cleared away, and training is saved.
        signal.signal(signal.SIGTERM, stopping.on_signal)
        try:
            main(*([argv[1:]] if positional else []))
        except BaseException as error:
            if isinstance(error, BrokenPipeError):  # who reads the output (head, less) has enough
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                if not processes.joined():
                    sys.exit(141)
            text, consequence = _message(error), False
            if text is None:
                if not processes.joined():
                    raise
                text, consequence = _interruption(error)
            # The end is near, and the other processes should hear of it.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.alarm(0)
            processes.fail(
                text, error.code if isinstance(error, SystemExit) else 2, consequence=consequence
            )

    app.run(wrapped)


def _message(error: BaseException) -> str | None:
    """Return what a user should read who made a mistake or has too little memory or disk; None for
    other errors."""
    if isinstance(error, (ValueError, OSError)):
        return str(error)
    # JAX's errors are RuntimeErrors; some launchers do without JAX.
    if (
        isinstance(error, MemoryError)
        or isinstance(error, RuntimeError)
        and "RESOURCE_EXHAUSTED" in str(error)
    ):
        reason = str(error).partition("\n")[0] or "the system gives no more"
        return (
            f"out of memory ({reason}). Use more devices or a machine with more memory; in a run "
            "also lower --derive.batch_size and --evaluate.batch_size, or set --model.remat=full; "
            "in an evaluation --batch_size."
        )
    return None


def _interruption(error: BaseException) -> tuple[str, bool]:
    """Return what one of several processes says of another error, and whether the reason may lie
    with another process."""
    if isinstance(error, SystemExit):
        return f"ended by SIGTERM or sys.exit({error.code})", False
    if isinstance(error, processes.AnotherFailed) or type(error).__name__ == "JaxRuntimeError":
        reason = str(error).partition("\n")[0]
        return (
            f"a step that all processes take together failed ({reason}). Did a process end, or a "
            "host lose its network? The same command, given to all again, goes on where this run "
            "stopped."
        ), True
    if not isinstance(error, KeyboardInterrupt):
        traceback.print_exception(error)
    return repr(error), False
