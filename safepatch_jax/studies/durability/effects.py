"""What a patch does on each measure, prompt by prompt, and how much of it is left after a treatment
of both models."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from safepatch_jax.evaluation.statistics import student, t_interval
from safepatch_jax.studies.durability.options import ANSWERS, MARGINS

BASE, MODEL = WHOS = ("base", "model")
BETTER, WORSE, NONE = ("better", "worse", "none shown")
Values = Mapping[str, Mapping[str, Sequence[float]]]  # by model and measure, of each prompt


@dataclasses.dataclass(frozen=True)
class Measure:
    """A measure of a model, the mean over prompts.

    Attributes:
      title: in reports.
      unit: 'share', 'nats', or 'nats a token'.
      better: +1 where more is better, -1 where less is.
      kinds: by which kinds of measuring it is taken.
    """

    title: str
    unit: str
    better: int
    kinds: tuple[str, ...]


MEASURES = {
    "harm": Measure("harm, expected compliance", "share", -1, (MARGINS,)),
    "over_refusal": Measure("over-refusal, expected refusals", "share", -1, (MARGINS,)),
    "harmful_margin": Measure("margin of harmful prompts", "nats", 1, (MARGINS,)),
    "lookalike_margin": Measure("margin of look-alikes", "nats", -1, (MARGINS,)),
    "content_nll": Measure("content NLL of harmful answers", "nats a token", 1, (MARGINS,)),
    "harm_answers": Measure("harm, answers that comply", "share", -1, (ANSWERS,)),
    "over_refusal_answers": Measure("over-refusal, answers that refuse", "share", -1, (ANSWERS,)),
    "ordinary_nll": Measure("NLL of ordinary answers", "nats a token", -1, (MARGINS, ANSWERS)),
}


def effect(name: str, values: Values) -> dict[str, Any]:
    """Return what a patch does on one measure: levels of both models, and the paired difference.

    Args:
      name: of the measure.
      values: of the two models in the same state.

    Returns:
      n; base and model: their means; effect: patched less base, with `interval` (95 %, Student's
      t; None of one prompt); shown: BETTER, WORSE, or NONE where the interval holds 0.
    """
    base, model = (values[who][name] for who in WHOS)
    differences = _differences(name, values)
    mean = math.fsum(differences) / len(differences)
    interval, shown = t_interval(differences), NONE  # of one prompt nothing is shown
    if interval and (interval[0] > 0 or interval[1] < 0):
        shown = BETTER if mean * MEASURES[name].better > 0 else WORSE
    return {
        "n": len(differences),
        "base": math.fsum(base) / len(base),
        "model": math.fsum(model) / len(model),
        "effect": mean,
        "interval": interval and list(interval),
        "shown": shown,
    }


def _differences(name: str, values: Values) -> list[float]:
    base, model = (values[who][name] for who in WHOS)
    return [ours - theirs for ours, theirs in zip(model, base, strict=True)]


def left(name: str, before: Values, after: Values) -> dict[str, Any] | None:
    """Return how much of a measure's effect is left: effect after / effect before.

    The interval is Fieller's (1954) of a ratio of two paired means, 95 %, with Student's t: it is
    bounded where the effect before is told from 0, and else there is nothing to be left.

    Returns:
      {'value', 'interval'}; None where no effect was shown before.
    """
    if effect(name, before)["shown"] == NONE:
        return None
    y, x = _differences(name, after), _differences(name, before)
    n = len(x)
    mean_y, mean_x = math.fsum(y) / n, math.fsum(x) / n
    t_squared = student(n) ** 2
    vy, vx, c = (t_squared * _covariance(*pair) for pair in ((y, y), (x, x), (y, x)))
    a, b = mean_x * mean_x - vx, mean_x * mean_y - c
    half = math.sqrt(max(0.0, b * b - a * (mean_y * mean_y - vy)))
    return {"value": mean_y / mean_x, "interval": [(b - half) / a, (b + half) / a]}


def _covariance(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the estimated covariance of two means of the same prompts."""
    n = len(x)
    mean_x, mean_y = math.fsum(x) / n, math.fsum(y) / n
    products = [(a - mean_x) * (b - mean_y) for a, b in zip(x, y)]
    return math.fsum(products) / (n - 1) / n


def names_of(kinds: Sequence[str], values: Values) -> list[str]:
    """Return the measures that some kinds of measuring take, and that both models have."""
    names = []
    for name, measure in MEASURES.items():
        taken = any(kind in measure.kinds for kind in kinds)
        if taken and all(values[who].get(name) for who in WHOS):
            names.append(name)
    return names
