"""Several runs over the same items, such as seeds of sampling: rates, their spread and intervals,
and a paired test.

Answers to one prompt are not independent of one another, so a prompt counts once, with its mean
over the runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from safepatch_jax.evaluation.statistics import paired, wilson

Values = Mapping[str, Any]  # of items by id: yes or no, or a grade


def means(runs: Sequence[Values], complete: bool = False) -> dict[str, Fraction]:
    """Return each item's mean over the runs that have it; with `complete` only of items that all
    runs have."""
    found: dict[str, list[Fraction]] = {}
    for run in runs:
        for i, value in run.items():
            found.setdefault(i, []).append(Fraction(value))
    return {i: sum(x) / len(x) for i, x in found.items() if not complete or len(x) == len(runs)}


def rate(runs: Sequence[Mapping[str, bool]]) -> dict[str, Any]:
    """Return the mean share of items that hold.

    Returns:
      n: items that some run has; count: the sum of their shares over the runs; rate: count / n,
        None where n is 0; interval:
      Wilson's with the n items for sample, 95 %. An item's share varies at most as much as a single
      answer would, so with several runs the interval is at least as wide as it should be, and with
      one it is the usual one. Of several runs also by_run (the rate of each) and spread (the least
      and the largest of these).
    """
    shares = means(runs)
    total, n = sum(shares.values(), Fraction(0)), len(shares)
    count = int(total) if total.denominator == 1 else float(total)
    found = {"n": n, "count": count, "rate": count / n if n else None, "interval": wilson(count, n)}
    return found | spread([sum(run.values()) / len(run) if run else None for run in runs])


def spread(by_run: Sequence[float | None]) -> dict[str, Any]:
    """Return the figure of each run and [least, largest]; nothing for one run."""
    if len(by_run) < 2:
        return {}
    known = [x for x in by_run if x is not None]
    return {"by_run": list(by_run), "spread": [min(known), max(known)] if known else None}


def compare(ours: Sequence[Values], theirs: Sequence[Values]) -> dict[str, Any]:
    """Compare two models on the items that all runs of both have.

    Returns:
      n; gained, lost: items whose mean over the runs is higher, or lower, with our model; p: of
      `sign_flip` on the differences of the means. For one run of yes and no this is McNemar's exact
      test.
    """
    if len(ours) == len(theirs) == 1 and all(
        isinstance(x, bool) for run in (*ours, *theirs) for x in run.values()
    ):
        return paired(ours[0], theirs[0])
    a, b = means(ours, complete=True), means(theirs, complete=True)
    differences = [a[i] - b[i] for i in a if i in b]
    return {
        "n": len(differences),
        "gained": sum(d > 0 for d in differences),
        "lost": sum(d < 0 for d in differences),
        "p": sign_flip(differences),
    }


def sign_flip(differences: Sequence[Fraction]) -> float:
    """Return the two-sided p of the exact sign-flip permutation test of differences (Fisher 1935).

    If the two models answer alike, each item's difference is as likely with the other sign,
    whatever its size; p is the share of all sign patterns whose sum is as far from 0 as the one
    found. It is computed over the sums, not over the patterns.
    """
    scale = math.lcm(*(d.denominator for d in differences))
    steps = [int(d * scale) for d in differences if d]
    divisor = math.gcd(*steps) or 1
    steps = [abs(x) // divisor for x in steps]
    found = abs(sum(int(d * scale) for d in differences)) // divisor
    chance, room = (
        np.ones(1),
        0,
    )  # chance[k]: that the sum of the signed steps so far is 2 * k - room
    for x in steps:
        moved = np.zeros(len(chance) + x)
        moved[: len(chance)] += chance / 2
        moved[x:] += chance / 2
        chance, room = moved, room + x
    sums = 2 * np.arange(len(chance)) - room
    return min(1.0, float(chance[np.abs(sums) >= found].sum()))


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean by Student's t; None below two values."""
    from scipy.special import (
        stdtrit,  # imported here: it takes a while, and only graded measures need it
    )

    n = len(values)
    if n < 2:
        return None
    mean = math.fsum(values) / n
    half = float(stdtrit(n - 1, 0.975)) * math.sqrt(
        math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n
    )
    return mean - half, mean + half
