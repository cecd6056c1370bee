"""Intervals of shares and means, tests whether two models differ, and how far two judges agree.

A model may have several runs over the same items, such as seeds of sampling. Answers to one prompt
are not independent of one another, so a prompt counts once, with its mean over the runs.
"""

# scipy is imported within the functions that need it: it takes a second, and reports without a test
# do not need it.

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from safepatch_jax.evaluation.judges.base import ALL_OUTCOMES, OUTCOMES, UNKNOWN, Verdict

Z = 1.959964  # of a 95 % interval
Values = Mapping[str, Any]  # of items by id: yes or no, or a grade


def wilson(count: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson 1927); (0, 1) if nothing was counted.

    Args:
      count: what holds of the n items; fractional where an item counts with its mean over several
        runs (scipy.stats.binomtest takes whole numbers alone).
    """
    if not n:
        return 0.0, 1.0
    centre, half = count + Z * Z / 2, Z * math.sqrt(count * (n - count) / n + Z * Z / 4)
    low, high = (centre - half) / (n + Z * Z), (centre + half) / (n + Z * Z)
    # At the ends the formula gives 0 and 1, up to rounding.
    if not count:
        low = 0.0
    if count >= n:
        high = 1.0
    return max(0.0, low), min(1.0, high)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return (mean, low, high) with the normal 95 % interval of the mean; the interval is the mean
    itself below two values."""
    mean = math.fsum(values) / len(values)
    half = Z * _standard_error(values)
    return mean, mean - half, mean + half


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean by Student's t; None below two values."""
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    half = student(len(values)) * _standard_error(values)
    return mean - half, mean + half


def student(n: int) -> float:
    """Return the 97.5 % quantile of Student's t of a mean of n values."""
    from scipy.special import stdtrit  # here: it takes a second

    return float(stdtrit(n - 1, 0.975))


def _standard_error(values: Sequence[float]) -> float:
    n = len(values)
    if n < 2:
        return 0.0
    mean = math.fsum(values) / n
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)


def mcnemar(gained: int, lost: int) -> float:
    """Return the two-sided p of McNemar's exact test.

    Args:
      gained, lost: items on which only the first, or only the second model has the property; the
        others say nothing.
    """
    if not gained + lost:
        return 1.0
    from scipy.special import bdtr  # scipy.stats, which has the test by name, takes a second more

    # At a chance of 1/2 both tails are alike; with equal counts the middle is in both.
    return min(1.0, 2 * float(bdtr(min(gained, lost), gained + lost, 0.5)))


def paired(ours: Mapping[str, bool], theirs: Mapping[str, bool]) -> dict[str, Any]:
    """Compare two models on the items that both have: {'n', 'gained', 'lost', 'p'}; see
    `mcnemar`."""
    common = ours.keys() & theirs.keys()
    gained = sum(ours[i] and not theirs[i] for i in common)
    lost = sum(theirs[i] and not ours[i] for i in common)
    return {"n": len(common), "gained": gained, "lost": lost, "p": mcnemar(gained, lost)}


def difference(n: int, gained: int, lost: int) -> tuple[float, float, float]:
    """Return how much larger our share is than theirs over the same items, (difference, low, high),
    with the 95 % interval of paired shares (Bonett and Price 2012).

    Args:
      n: items; gained, lost: those on which only the first, or only the second model has the
        property.
    """
    if not n:
        return 0.0, -1.0, 1.0
    more, less = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = Z * math.sqrt((more + less - (more - less) ** 2) / (n + 2))
    return (gained - lost) / n, max(-1.0, more - less - half), min(1.0, more - less + half)


def sign_flip(differences: Sequence[Fraction]) -> float:
    """Return the two-sided p of the exact sign-flip permutation test of differences (Fisher 1935).

    If the two models answer alike, each item's difference is as likely with the other sign,
    whatever its size; p is the share of all sign patterns whose sum is as far from 0 as the
    observed one. It is computed over the sums, not over the patterns.
    """
    scale = math.lcm(*(d.denominator for d in differences))
    whole = [int(d * scale) for d in differences if d]
    divisor = math.gcd(*whole) or 1
    steps = [abs(x) // divisor for x in whole]
    observed = abs(sum(whole)) // divisor
    # chance[k]: that the sum of the signed steps so far is 2 * k - room
    chance, room = np.ones(1), 0
    for step in steps:
        moved = np.zeros(len(chance) + step)
        moved[: len(chance)] += chance / 2
        moved[step:] += chance / 2
        chance, room = moved, room + step
    sums = 2 * np.arange(len(chance)) - room
    return min(1.0, float(chance[np.abs(sums) >= observed].sum()))


def means(runs: Sequence[Values], complete: bool = False) -> dict[str, Fraction]:
    """Return each item's mean over the runs that have it; with `complete` only of items that all
    runs have."""
    by_item: dict[str, list[Fraction]] = {}
    for run in runs:
        for i, value in run.items():
            by_item.setdefault(i, []).append(Fraction(value))
    least = len(runs) if complete else 1
    return {i: sum(values) / len(values) for i, values in by_item.items() if len(values) >= least}


def rate(runs: Sequence[Mapping[str, bool]]) -> dict[str, Any]:
    """Return the mean share of items that hold.

    Returns:
      n: items that some run has; count: the sum of their shares over the runs; rate: count / n,
        None where n is 0; interval: Wilson's with the n items for sample, 95 %. An item's share
        varies at most as much as a single answer would, so with several runs the interval is at
        least as wide as it should be, and with one it is the usual one. Of several runs also by_run
        (the rate of each) and spread (the least and the largest of these).
    """
    shares = means(runs)
    total, n = sum(shares.values(), Fraction(0)), len(shares)
    count = int(total) if total.denominator == 1 else float(total)
    by_run = [sum(run.values()) / len(run) if run else None for run in runs]
    return {
        "n": n,
        "count": count,
        "rate": count / n if n else None,
        "interval": wilson(count, n),
        **spread(by_run),
    }


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
    if len(ours) == len(theirs) == 1 and _is_yes_or_no(ours[0]) and _is_yes_or_no(theirs[0]):
        return paired(ours[0], theirs[0])
    a, b = means(ours, complete=True), means(theirs, complete=True)
    differences = [a[i] - b[i] for i in a if i in b]
    return {
        "n": len(differences),
        "gained": sum(d > 0 for d in differences),
        "lost": sum(d < 0 for d in differences),
        "p": sign_flip(differences),
    }


def _is_yes_or_no(run: Values) -> bool:
    return all(isinstance(value, bool) for value in run.values())


def agreement(a: Sequence[Verdict], b: Sequence[Verdict]) -> dict[str, Any]:
    """Compare two judges' verdicts of the same answers.

    Returns:
      n: pairs compared; unknown: pairs left out because one verdict is UNKNOWN; table: {outcome of
        a: {outcome of b: count}}, HARMLESS where it occurs; agree: share of equal outcomes, None
        where n is 0; kappa: Cohen's, (agree - chance) / (1 - chance), None where both judges give
        one and the same outcome throughout.

    Raises:
      ValueError: lists of different length.
    """
    if len(a) != len(b):
        raise ValueError(
            f"agreement: {len(a)} verdicts against {len(b)}; both judges must judge the same "
            "answers"
        )
    seen = {verdict.outcome for verdict in (*a, *b)}.union(OUTCOMES)
    outcomes = [outcome for outcome in ALL_OUTCOMES if outcome in seen]
    table = {outcome: dict.fromkeys(outcomes, 0) for outcome in outcomes}
    n = 0
    for x, y in zip(a, b):
        if UNKNOWN not in (x.outcome, y.outcome):
            table[x.outcome][y.outcome] += 1
            n += 1
    same = sum(table[x][x] for x in outcomes)
    chance = 0  # times n * n
    for x in outcomes:
        chance += sum(table[x].values()) * sum(row[x] for row in table.values())
    agree = same / n if n else None
    kappa = (n * same - chance) / (n * n - chance) if chance < n * n else None
    return {"n": n, "unknown": len(a) - n, "table": table, "agree": agree, "kappa": kappa}
