"""What a tuning run is asked for, and the measures of its steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from safepatch_jax.numerics import NotFinite

# What a process asks of all after a step; the largest request of any process counts.
CONTINUE, SAVE, END = range(3)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings of a tuning run; a `sign` of +1 lowers the NLL (descent), -1 raises it (ascent)."""

    sign: float
    steps: int
    learning_rate: float
    nll_ceiling: float = float("inf")
    weight_decay: float = 0.0


Recorder = Callable[[int, Mapping[str, float]], None]


def ignore(step: int, values: Mapping[str, float]) -> None:
    """Record nothing."""


class Journal:
    """The measures of a run's steps, which are read in order, each once."""

    def __init__(
        self, nll: Sequence[float], bar: tqdm, title: str, recipe: Recipe, record: Recorder
    ):
        self.nll, self.stopped, self.request = list(nll), False, CONTINUE
        self._bar, self._title, self._recipe, self._record = bar, title, recipe, record

    def read(self, metrics: Mapping[str, Any]) -> None:
        """Wait for a step and note what it measured. Raises ValueError if that is not finite."""
        nll, norm = float(metrics["nll"]), float(metrics["gradient_norm"])
        self.stopped = bool(metrics["stopped"])
        self.request = max(self.request, int(metrics["request"]))
        # A gradient that was not used may be anything.
        if not (np.isfinite(nll) and (np.isfinite(norm) or self.stopped)):
            raise NotFinite(
                f"{self._title}: answer NLL {nll}, gradient norm {norm} at step "
                f"{len(self.nll) + 1}. Lower the learning rate ({self._recipe.learning_rate:g}), "
                "or check the weights of the model for NaN."
            )
        self.nll.append(nll)
        self._record(len(self.nll), {"answer_nll": nll, "gradient_norm": norm})
        self._bar.set_postfix_str(f"answer NLL {nll:.3f}", refresh=False)
        self._bar.update()
