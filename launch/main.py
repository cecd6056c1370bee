"""How every launcher starts and how it reports a user's mistake."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from absl import app, flags, logging

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
            if positional:
                main(argv[1:])
            else:
                main()
        except BaseException as error:
            if isinstance(error, BrokenPipeError):
                # The reader of the output (head, less) has ended.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                if not processes.joined():
                    sys.exit(141)
            text, consequence = _message(error), False
            if text is None:
                if not processes.joined():
                    raise
                text, consequence = _interruption(error)
            # The process ends now, and must have the time to report that to the others.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.alarm(0)
            code = error.code if isinstance(error, SystemExit) else 2
            processes.fail(text, code, consequence=consequence)

    app.run(wrapped)


def command_values(
    command: str, takes: str, holders: Mapping[str, flags.FlagHolder], stray: Iterable[str] = ()
) -> list[Any]:
    """Return the values of the flags that a command takes, in order.

    Args:
      command: its name.
      takes: names of flags; a trailing ? marks one that may be left out.
      holders: the flags of all commands, by name.
      stray: other flags that are given and not taken.

    Raises:
      ValueError: a flag is missing, or one is given that the command does not take.
    """
    names = takes.replace("?", "").split()
    missing = [
        f"--{name}" for name in takes.split() if name in names and holders[name].value is None
    ]
    others = [name for name in holders if name not in names and holders[name].value is not None]
    faults = []
    if missing:
        faults.append(f"needs {', '.join(missing)}")
    if others := [f"--{name}" for name in (*others, *stray)]:
        faults.append(f"does not take {', '.join(others)}")
    if faults:
        raise ValueError(f"{command} {' and '.join(faults)}.")
    return [holders[name].value for name in names]


def _message(error: BaseException) -> str | None:
    """Return the message for a user's mistake, or too little memory or disk; None for other
    errors."""
    if isinstance(error, (ValueError, OSError)):
        return str(error)
    # By its text: JAX's errors are RuntimeErrors, and some launchers do not import JAX.
    exhausted = isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    if exhausted or isinstance(error, MemoryError):
        reason = str(error).partition("\n")[0] or "the system gives no more"
        return (
            f"out of memory ({reason}). Use more devices or a machine with more memory; in a run "
            "also lower --derive.batch_size and --evaluate.batch_size, or set --model.remat=full; "
            "in an evaluation --batch_size."
        )
    return None


def _interruption(error: BaseException) -> tuple[str, bool]:
    """Return the message of one of several processes for another error, and whether another process
    may be the cause."""
    if isinstance(error, SystemExit):
        return f"ended by SIGTERM or sys.exit({error.code})", False
    if isinstance(error, processes.AnotherFailed) or type(error).__name__ == "JaxRuntimeError":
        reason = str(error).partition("\n")[0]
        return (
            f"a step that all processes take together failed ({reason}). Did a process end, or a "
            "host lose its network? The same command, given to all again, resumes this run."
        ), True
    if not isinstance(error, KeyboardInterrupt):
        traceback.print_exception(error)
    return repr(error), False
