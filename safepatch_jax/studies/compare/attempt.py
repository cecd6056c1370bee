"""Why a method could not be made: the others go into the table all the same."""

from __future__ import annotations

import gc
from collections.abc import Callable

from safepatch_jax.methods.bench import Method, NotMade
from safepatch_jax.numerics import NotFinite
from safepatch_jax.patching.statistics import BadSettings
from safepatch_jax.runtime import processes
from safepatch_jax.runtime.programs import shortage
from safepatch_jax.runtime.reading import Refused


def not_made(method: Method, make: Callable[[], None]) -> str | None:
    """Make a method; return why it cannot be made, the same in all processes, None if it is.

    Raises:
      RuntimeError, MemoryError: of another cause than too little memory; or of the backbone,
        without which there is no table.
      ValueError: too little memory in one of several processes.
    """
    reason = None
    try:
        make()
    except (NotMade, NotFinite, BadSettings) as error:
        reason = str(error)
    except (RuntimeError, MemoryError) as error:
        lacking = shortage(error)
        if not lacking or method.group == "backbone":
            raise
        reason = (
            f"out of memory ({lacking}). Give the same command again with more devices, "
            "--model.remat=full or a larger --derive.accumulate, or leave "
            f"{method.name} out of --methods."
        )
        if processes.several():
            # The others may wait for this one's part of a program: all end together.
            raise Refused(f"{method.label}: {reason}") from error
    if reason:
        gc.collect()  # frames of an error hold arrays, also in circles: the next needs the room
    return next(filter(None, processes.everyones(reason)), None)
