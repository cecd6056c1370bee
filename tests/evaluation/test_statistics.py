"""Intervals and paired tests against textbook values, against scipy, and by hand."""

import math

import pytest

from safepatch_jax.evaluation.statistics import mcnemar, mean_interval, paired, wilson


@pytest.mark.parametrize(
    "count, n, low, high",
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (1, 10, 0.0179, 0.4042),
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)  # Newcombe 1998
def test_wilson(count, n, low, high):
    assert wilson(count, n) == pytest.approx((low, high), abs=6e-5)


def test_wilson_holds_its_share():
    assert wilson(0, 0) == (0.0, 1.0)
    for n in range(1, 200):
        for count in (0, n // 3, n):
            low, high = wilson(count, n)
            assert 0 <= low <= count / n + 1e-12 and count / n - 1e-12 <= high <= 1
            assert (low, high) == pytest.approx([1 - x for x in wilson(n - count, n)][::-1])


def test_wilson_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for count, n in ((0, 7), (3, 7), (20, 31), (499, 500)):
        interval = stats.binomtest(count, n).proportion_ci(method="wilson")
        assert wilson(count, n) == pytest.approx((interval.low, interval.high), abs=1e-6)


@pytest.mark.parametrize(
    "gained, lost, p",
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (2, 0, 0.5),
        (0, 5, 2 / 32),
        (6, 0, 2 / 64),
        (1, 5, 2 * 7 / 64),
        (3, 3, 1.0),
        (2, 4, 2 * 22 / 64),
    ],
)
def test_mcnemar_by_hand(gained, lost, p):
    assert mcnemar(gained, lost) == pytest.approx(p) == mcnemar(lost, gained)


def test_mcnemar_is_the_binomial_test():
    stats = pytest.importorskip("scipy.stats")
    for gained, lost in [(a, b) for a in range(12) for b in range(12) if a + b] + [
        (40, 70),
        (500, 400),
        (3, 2000),
    ]:
        assert mcnemar(gained, lost) == pytest.approx(
            stats.binomtest(gained, gained + lost).pvalue, rel=1e-9, abs=1e-300
        )


def test_paired_takes_the_items_that_both_have():
    ours = {"a": True, "b": True, "c": False, "d": True, "only ours": True}
    theirs = {"a": True, "b": False, "c": True, "d": False, "only theirs": False}
    assert paired(ours, theirs) == {"n": 4, "gained": 2, "lost": 1, "p": 1.0}
    assert paired(ours, {}) == {"n": 0, "gained": 0, "lost": 0, "p": 1.0}


def test_mean_interval():
    assert mean_interval([2.0]) == (2.0, 2.0, 2.0)
    mean, low, high = mean_interval([1.0, 2.0, 3.0, 4.0])
    half = 1.959964 * math.sqrt(5 / 3 / 4)
    assert (mean, low, high) == pytest.approx((2.5, 2.5 - half, 2.5 + half))
