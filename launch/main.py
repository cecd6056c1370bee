"""How every launcher starts and how it reports a user's mistake."""

from __future__ import annotations

import atexit
import difflib
import errno
import functools
import logging as logging_of_python
import os
import pathlib
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging

from launch import INTERRUPTED, manual
from launch import show as print_text
from safepatch_jax.runtime import addresses, libraries, processes, stopping
from safepatch_jax.runtime.console import some
from safepatch_jax.runtime.programs import shortage
from safepatch_jax.runtime.reading import reason
from safepatch_jax.runtime.text import printable

SUBCOMMAND = "safepatch "  # so sys.argv[0] begins where `safepatch NAME` started the launcher
_MISTAKE = 2  # exit code
_FIXES = {
    errno.ENOSPC: "Free space on that disk or use another, then give the same command again.",
    errno.EDQUOT: "Your quota is used up: free space, then give the same command again.",
    errno.EACCES: "Give a path that you may read and write, or change its permissions.",
    errno.EPERM: "Give a path that you may read and write, or change its permissions.",
    errno.EROFS: "The file system is read-only: give a path on another.",
    errno.ENOENT: "Give a path that exists.",
    errno.ENOTDIR: "A part of the path is a file: give another.",
    errno.EISDIR: "It is a folder: give a file.",
    errno.ENAMETOOLONG: "Give a shorter path.",
    errno.ELOOP: "Links go round in a circle, or lie where none is followed: give another path.",
    errno.ENOLCK: "The file system has no file locks: use a folder on a local disk.",
}
_KEPT = (
    "Nothing is half-written and what was finished is kept; the same command goes on from there."
)
_NEEDED = re.compile(r"(--\S+) must have a value other than None")
_UNKNOWN = re.compile(r"Unknown command line flag '(.*)'", re.DOTALL)


def run(main: Callable[..., int | None], *, positional: bool = False) -> None:
    """Run a launcher: a ValueError or a full disk ends it with one clear line and exit code 2, in
    all processes.

    Args:
      main: the launcher; it may return an exit code.
      positional: it takes positional arguments, and is given the list of them.
    """

    def wrapped(argv):
        if len(argv) > 1 and not positional:
            _refuse(f"unexpected argument '{argv[1]}'; settings are given as --group.option=value.")
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.ERROR)
        elif logging.get_verbosity() >= logging.DEBUG:
            os.environ.setdefault("JAX_LOG_COMPILES", "1")  # before JAX is imported
        libraries.quiet_jax()
        # So that half-filled folders are cleared away, and training is saved.
        stopping.install()
        try:
            return main(argv[1:]) if positional else main()
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
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.alarm(0)
            at_once = isinstance(error, (KeyboardInterrupt, SystemExit))
            processes.fail(
                addresses.shown(text), _code(error), consequence=consequence, at_once=at_once
            )

    # A name that a console cannot show must not end the command.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    doc = main.__globals__["__doc__"]
    try:
        app.run(wrapped, flags_parser=functools.partial(_parse, doc))
    except SystemExit as ending:
        code = ending.code or 0
        # JAX leaves the other processes of a run as its client is taken apart.
        if main.__module__ == "__main__" and isinstance(code, int) and not processes.joined():
            _end.append(code)
        raise


_end: list[int] = []  # the exit code of a program that ends without being taken apart


def _end_at_once() -> None:
    """End the process: for Python to take its modules apart takes JAX a third of a second. Threads
    have ended, and what was registered after this was imported has been called."""
    watched = sys.gettrace() or sys.getprofile() or "coverage" in sys.modules
    if not _end or watched:  # what watches a program writes its findings later still
        return
    logging_of_python.shutdown()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):  # Python says so, and has an exit code for it
        return
    os._exit(_end[0])


atexit.register(_end_at_once)  # before JAX is imported, so after what JAX registers


def words() -> list[str]:
    """Return the words with which this program can be called again, for records."""
    name = sys.argv[0]
    if name.startswith(SUBCOMMAND):
        return [*name.split(), *sys.argv[1:]]
    return ["python", "-m", f"launch.{pathlib.Path(name).stem}", *sys.argv[1:]]


def _parse(doc: str, argv: list[str]) -> list[str]:
    """Parse flags; a wrong one ends the process with one line and exit code 2, --help with 0."""
    if asked := manual.asked_for(argv):
        print_text(manual.text(_as_called(doc), asked == "help_all"))
        sys.exit(0)
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        _refuse(_flag_problem(" ".join(str(error).split())))
    except SystemExit:  # of --help
        sys.exit(0)


def _as_called(doc: str) -> str:
    """Return a manual whose examples call the launcher as it was called."""
    if not sys.argv[0].startswith(SUBCOMMAND):
        return doc
    from launch.command import MODULES

    for name, module in MODULES.items():
        doc = re.sub(rf"python -m {module}\b", SUBCOMMAND + name, doc)
    return doc


def _flag_problem(text: str) -> str:
    """Return absl's message on a wrong flag, with the nearest names of flags that there are."""
    if needed := _NEEDED.search(text):
        return f"{needed[1]} is needed. See --help."
    unknown = _UNKNOWN.search(text)
    if unknown is None:
        return f"{text.rstrip('.')}. See --help."
    close = difflib.get_close_matches(unknown[1], list(flags.FLAGS), n=3)
    hint = f" Did you mean {some([f'--{name}' for name in close], ' or ')}?" if close else ""
    return f"there is no flag --{unknown[1]}.{hint} See --help."


def _refuse(problem: str) -> NoReturn:
    print(f"error: {printable(problem)}", file=sys.stderr)
    sys.exit(_MISTAKE)


def _code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else _MISTAKE


def command_of(
    launcher: str,
    arguments: Sequence[str],
    commands: Mapping[str, tuple[Any, int, str]],
    words: tuple[str, str],
    fits: Callable[[str], bool] = bool,
) -> tuple[str, list[str]]:
    """Return the command that was given, and what stands after it.

    Args:
      launcher: its name.
      arguments: of the command line, flags aside.
      commands: by name: what is called, how many words it takes, its flags.
      words: what these are called, one and several.
      fits: whether a word is such a one.

    Raises:
      ValueError: no such command, or other words after it.
    """
    command, *rest = arguments or [""]
    if command not in commands:
        problem = f"got {command}" if command else "none was given"
        raise ValueError(
            f"one command is needed, {problem}. There are {', '.join(commands)}; see python -m "
            f"launch.{launcher} --help."
        )
    count = commands[command][1]
    if len(rest) != count or not all(map(fits, rest)):
        raise ValueError(
            f"{command} takes {count or 'no'} {words[count != 1]} after it, got '{' '.join(rest)}'."
        )
    return command, rest


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
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted by Ctrl-C. {_KEPT}"
    if isinstance(error, SystemExit) and error.code == stopping.CODE:
        return f"ended by SIGTERM. {_KEPT}"
    if isinstance(error, OSError):
        return _os_problem(error)
    if isinstance(error, ValueError):
        return str(error)
    if _is_of_backend(error):
        return _backend_problem(error)
    if lacking := shortage(error):
        return (
            f"out of memory ({lacking}). Use more devices or a machine with more memory; in a run "
            "also lower --derive.batch_size and --evaluate.batch_size, or set --model.remat=full; "
            "in an evaluation --batch_size."
        )
    return None


def _os_problem(error: OSError) -> str:
    """Return a message that names file and reason; of our own errors their text."""
    if error.strerror is None:
        return str(error)
    where = f"{error.filename}: " if error.filename else ""
    fix = _FIXES.get(error.errno, "See that the path, its permissions and the disk are right.")
    return f"{where}{error.strerror}. {fix}"


def _is_of_backend(error: BaseException) -> bool:
    """Return whether JAX found no devices: it has no class of its own for that error."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename.endswith("xla_bridge.py")


def _backend_problem(error: BaseException) -> str:
    wanted = os.environ.get("JAX_PLATFORMS", "")
    return (
        f"JAX cannot use the devices that were asked for (JAX_PLATFORMS={wanted or 'not set'}; "
        f"{reason(error)}). Install the jax package for them (pip install "
        "'jax[cuda12]' or 'jax[tpu]') and see that drivers and devices are there, or set "
        "JAX_PLATFORMS=cpu."
    )


def _interruption(error: BaseException) -> tuple[str, bool]:
    """Return the message of one of several processes for another error, and whether another process
    may be the cause."""
    if isinstance(error, SystemExit):
        return f"ended by sys.exit({error.code})", False
    if isinstance(error, processes.AnotherFailed) or type(error).__name__ == "JaxRuntimeError":
        reason = str(error).partition("\n")[0]
        return (
            f"a step that all processes take together failed ({reason}). Did a process end, or a "
            "host lose its network? The same command, given to all again, resumes this run."
        ), True
    traceback.print_exception(error)
    return repr(error), False
