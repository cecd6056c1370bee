"""Is one model worse than another on the same prompts, by more than a margin? A test that may be
looked at after every prompt.

The difference of a prompt is our loss minus theirs (1: only ours does what it should not, -1: only
theirs does, 0: both alike), or any number of bounded size. Prompts are taken as independent draws,
in an order fixed before; 'the mean' is that of the population they are drawn from.

A bet of a share s in (0, 1) against 'the mean is m or more' multiplies its capital by
1 + s (m - d) / (1 - m) at each difference d in [-1, 1]: never negative, and 1 or less in
expectation where that hypothesis is true. So is the mean of the capital over fixed shares s. By
Ville's inequality such capital, 1 at first, ever reaches 1 / alpha with probability alpha at most,
so a look after every prompt, and an end at any of them, costs nothing (Waudby-Smith and Ramdas
2024, 'Estimating means of bounded random variables by betting'; a mixture of fixed bets is Cover's
universal portfolio of 1991). Pure NumPy, float64.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

PASS, FAIL, OPEN = VERDICTS = ("pass", "fail", "not enough evidence")
SHARES = np.geomspace(0.05, 0.95, 8)  # of the capital that may be staked
_MOST = 10_000_000  # prompts; beyond that a forecast is none
_STEPS = 50  # of a bisection


@dataclasses.dataclass(frozen=True)
class Limits:
    """What is to be shown of a mean difference, and how surely.

    Attributes:
      margin: pass where the mean is shown to be below it.
      fail_above: fail where the mean is shown to be above it; the margin or less.
      alpha: probability, at most, of a pass where the mean is the margin or more, whenever one
        stops.
      alpha_fail: probability, at most, of a fail where the mean is `fail_above` or less.
      bound: largest size of a difference.
    """

    margin: float
    fail_above: float
    alpha: float = 0.05
    alpha_fail: float = 0.05
    bound: float = 1.0

    def __post_init__(self):
        if not 0 <= self.fail_above <= self.margin or not 0 < self.margin < self.bound:
            raise ValueError(
                f"margin {self.margin:g}, fail_above {self.fail_above:g}, bound {self.bound:g}: a "
                "margin is above 0 and below the bound, and fail_above from 0 to the margin."
            )
        if not (0 < self.alpha < 1 and 0 < self.alpha_fail < 1):
            raise ValueError(
                f"alpha {self.alpha:g} and {self.alpha_fail:g} must be between 0 and 1."
            )


@dataclasses.dataclass(frozen=True)
class Decision:
    """What the differences of some prompts show.

    Attributes:
      verdict: PASS, FAIL or OPEN.
      n: prompts.
      decided_at: how many of them it took; None where the verdict is open.
      mean: of the differences; None without any.
      low, high: the mean is at least, at most that: each with the confidence of its side, at all
        prompts together.
      e_pass, e_fail: the largest capital so far against 'worse' and against 'not worse', as natural
        logarithms.
      more: about how many prompts more a verdict needs if they go on as these; None where it is
        there, or where no number is enough.
    """

    verdict: str
    n: int
    decided_at: int | None
    mean: float | None
    low: float
    high: float
    e_pass: float
    e_fail: float
    more: int | None


def log_capital(differences: np.ndarray, least: float) -> np.ndarray:
    """Return the logarithm of the capital against 'the mean is `least` or more' after each
    difference.

    Args:
      differences: float64 [..., n], each in [-1, 1].
      least: below 1.

    Returns:
      float64 [..., n].
    """
    gains = SHARES[:, None] * (least - differences[..., None, :]) / (1 - least)
    return _mean_of_logs(np.cumsum(np.log1p(gains), axis=-1))


def _mean_of_logs(logs: np.ndarray) -> np.ndarray:
    """Return log(mean(exp(x))) over the last axis but one, where the shares are."""
    top = logs.max(axis=-2)
    return top + np.log(np.exp(logs - top[..., None, :]).mean(axis=-2))


def decide(differences: Sequence[float], limits: Limits) -> Decision:
    """Return what the differences show, in their order.

    Raises:
      ValueError: a difference is larger than the bound, or no number.
    """
    scaled = np.asarray(differences, np.float64) / limits.bound
    if not np.all(np.abs(scaled) <= 1):
        raise ValueError(f"a difference is no number of size {limits.bound:g} or less.")
    n = len(scaled)
    below = log_capital(scaled, limits.margin / limits.bound)
    above = log_capital(-scaled, -limits.fail_above / limits.bound)
    verdict, at = _first(below, above, limits)
    mean = math.fsum(differences) / n if n else None
    return Decision(
        verdict=verdict,
        n=n,
        decided_at=at,
        mean=mean,
        low=-_at_most(-scaled, limits.alpha_fail) * limits.bound,
        high=_at_most(scaled, limits.alpha) * limits.bound,
        e_pass=float(below.max(initial=0.0)),
        e_fail=float(above.max(initial=0.0)),
        more=_more(scaled, limits) if verdict == OPEN else None,
    )


def _first(below: np.ndarray, above: np.ndarray, limits: Limits) -> tuple[str, int | None]:
    """Return the verdict that comes first, and after how many prompts; of two at once the fail."""
    ends = []
    for verdict, capital, alpha in ((FAIL, above, limits.alpha_fail), (PASS, below, limits.alpha)):
        reached = np.flatnonzero(capital >= -math.log(alpha))
        if len(reached):
            ends.append((int(reached[0]) + 1, verdict))
    if not ends:
        return OPEN, None
    at, verdict = min(ends, key=lambda end: end[0])
    return verdict, at


def _at_most(scaled: np.ndarray, alpha: float) -> float:
    """Return the least m for which 'the mean is m or more' is rejected at some prompt, 1 where
    there is none: capital rises with m."""
    low, high = -1.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if len(scaled) and log_capital(scaled, middle).max() >= -math.log(alpha):
            high = middle
        else:
            low = middle
    return high


def _more(scaled: np.ndarray, limits: Limits) -> int | None:
    """Forecast how many prompts more the nearer verdict needs: the capital goes on to grow as it
    did on average."""
    forecasts = []
    for signed, least, alpha in (
        (scaled, limits.margin / limits.bound, limits.alpha),
        (-scaled, -limits.fail_above / limits.bound, limits.alpha_fail),
    ):
        if needed := _needed(signed, least, alpha):
            forecasts.append(max(1, needed - len(scaled)))
    return min(forecasts, default=None)


def _needed(signed: np.ndarray, least: float, alpha: float) -> int | None:
    """Return with how many prompts like these the capital reaches 1 / alpha; None if it does not
    grow."""
    if not len(signed):
        return None
    gains = SHARES[:, None] * (least - signed) / (1 - least)
    growth_S = np.log1p(gains).mean(axis=-1)

    def reached(n: int) -> bool:
        return float(_mean_of_logs(n * growth_S[:, None])[0]) >= -math.log(alpha)

    if not reached(_MOST):
        return None
    low, high = 0, _MOST  # reached at high, not at low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high
