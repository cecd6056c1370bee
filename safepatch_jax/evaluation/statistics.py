"""Intervals of a share, and whether two models differ on the same items."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Z = 1.959964  # of a 95 % interval


def wilson(count: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson 1927); (0, 1) if nothing was counted."""
    if not n:
        return 0.0, 1.0
    centre, spread = count + Z * Z / 2, Z * math.sqrt(count * (n - count) / n + Z * Z / 4)
    # At the ends the formula gives 0 and 1, up to rounding.
    return (
        max(0.0, (centre - spread) / (n + Z * Z)) if count else 0.0,
        min(1.0, (centre + spread) / (n + Z * Z)) if count < n else 1.0,
    )


def mcnemar(gained: int, lost: int) -> float:
    """Return the two-sided p of McNemar's exact test.

    Args:
      gained, lost: items on which only the first, or only the second model has the property; the
        others say nothing.
    """
    n, least = gained + lost, min(gained, lost)
    log_choose = lambda k: (
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2)
    )
    return min(1.0, 2 * sum(math.exp(log_choose(k)) for k in range(least + 1)))


def paired(ours: Mapping[str, bool], theirs: Mapping[str, bool]) -> dict[str, Any]:
    """Compare two models on the items that both have: {'n', 'gained', 'lost', 'p'}; see
    `mcnemar`."""
    common = ours.keys() & theirs.keys()
    gained = sum(ours[i] and not theirs[i] for i in common)
    lost = sum(theirs[i] and not ours[i] for i in common)
    return {"n": len(common), "gained": gained, "lost": lost, "p": mcnemar(gained, lost)}


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return (mean, low, high) with the normal 95 % interval of the mean; the interval is the mean
    itself below two values."""
    n, mean = len(values), math.fsum(values) / len(values)
    if n < 2:
        return mean, mean, mean
    half = Z * math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
    return mean, mean - half, mean + half
