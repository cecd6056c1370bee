"""What a run shows the person at the terminal: one line for each choice, a bar for each long
stage."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from absl import logging
from tqdm import tqdm

from safepatch_jax.runtime import addresses
from safepatch_jax.runtime.processes import first
from safepatch_jax.runtime.text import printable

_MOST_OF_EXAMPLE = 50_000  # characters
_INDENTED = "\n  "
_GREEN, _MARKS = ("\033[32m", "\033[0m"), (">>>", "<<<")  # around an answer


def say(text: str) -> None:
    """Print one line, in the first process alone; what could steer the terminal is escaped."""
    show(printable(addresses.shown(text)))


def show(text: str) -> None:
    """Print lines with styles of our own, in the first process alone; the caller has passed what
    comes from others through `printable`."""
    if first():
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def detail(text: str) -> None:
    """Print one line that only --verbosity=0 and more ask for."""
    if logging.get_verbosity() >= logging.INFO:
        say(text)


def coloured() -> bool:
    """Return whether the console shows colours: it is a terminal, and NO_COLOR is not set."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def example(text: str, answer: str = "") -> str:
    """Return a text of others, and an answer in green after it (between >>> and <<< where there are
    no colours), as `show` may print them: lines after the first are indented, so that none of them
    passes for one of ours."""
    shown = printable(text, _MOST_OF_EXAMPLE, _INDENTED)
    if answer:
        before, after = _GREEN if coloured() else _MARKS
        shown += f"{before}{printable(answer, _MOST_OF_EXAMPLE, _INDENTED)}{after}"
    return shown


def progress(total: int, title: str, unit: str, done: int = 0) -> tqdm:
    """Return a progress bar with rate and remaining time, silent in all but the first process; it
    begins at `done` units."""
    return tqdm(
        total=total,
        initial=done,
        desc=f"  {printable(title, 60)}",
        unit=unit,
        unit_scale=unit == "B",
        file=sys.stderr,
        dynamic_ncols=True,
        mininterval=0.5,
        disable=not first(),
        leave=True,
    )


def some(items: Sequence[str], between: str = "; ", most: int = 6) -> str:
    """Return the first few items of a list that may be long, and how many more there are."""
    shown = list(items[:most])
    if len(items) > most:
        shown.append(f"and {len(items) - most} more")
    return between.join(shown)


def duration(seconds: float) -> str:
    """Say about how long something takes."""
    if seconds < 90:
        return f"about {seconds:.0f} s"
    if seconds < 5400:
        return f"about {seconds / 60:.0f} min"
    return f"about {seconds / 3600:.1f} h"
