"""What a sweep leaves of derived models, and the run that uses them once more and deletes them."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator, Sequence

from safepatch_jax.run.state import Run
from safepatch_jax.runtime import addresses
from safepatch_jax.runtime.console import say


@contextlib.contextmanager
def announced(run: Run) -> Iterator[None]:
    """Say, however the block ends, where derived models and scores are kept and how to delete
    them."""
    try:
        yield
    finally:
        if run.runner.scratch_left():
            folder = run.workdir / "stages"
            fix = f"Delete them when you are done: rm -r {shlex.quote(str(folder))}"
            if addresses.address_of(folder):
                fix = "Delete that folder of the bucket when you are done."
            say(
                f"Derived models and scores are kept in {folder}: jailbroken and broken models, "
                f"handle with care. {fix}"
            )


def say_run(command: Sequence[str], chosen: Sequence[str]) -> None:
    """Say with which command the chosen settings are measured on the report split.

    Args:
      command: a run with all else that the sweep was given, its workdir above all.
      chosen: the flags of the choice.
    """
    say(
        "A report on the model that these flags make, without a second training: a run in this "
        "workdir reuses the derived models and scores, and deletes them at its end (the folder is "
        "a run's from then on: sweep in another)."
    )
    say(f"  {shlex.join([*command, *chosen])}")
