"""Intervals, tests and agreement against textbook values, against scipy, and by hand."""

import itertools
import math
import operator
import random
from fractions import Fraction

import pytest

from safepatch_jax.evaluation.judges.base import UNKNOWN, Verdict
from safepatch_jax.evaluation.statistics import (
    agreement,
    compare,
    mcnemar,
    mean_interval,
    means,
    paired,
    rate,
    sign_flip,
    t_interval,
    wilson,
)


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


# Several runs.


def by_counting(differences):
    """Go through all sign patterns."""
    as_far = patterns = 0
    for signs in itertools.product((1, -1), repeat=len(differences)):
        total = sum(map(operator.mul, signs, differences))
        as_far += abs(total) >= abs(sum(differences))
        patterns += 1
    return as_far / patterns


@pytest.mark.parametrize("seed", range(8))
def test_sign_flip_is_what_counting_gives(seed):
    draw = random.Random(seed)
    differences = [Fraction(draw.randint(-6, 6), draw.choice((1, 2, 3, 5))) for _ in range(10)]
    assert sign_flip(differences) == pytest.approx(by_counting(differences), rel=1e-12)
    assert (
        sign_flip([-d for d in differences])
        == sign_flip([7 * d for d in differences])
        == sign_flip(differences)
    )


def test_sign_flip_at_the_ends():
    assert (
        sign_flip([])
        == 1.0
        == sign_flip([Fraction(0)] * 5)
        == sign_flip([Fraction(1), Fraction(-1)])
    )
    assert sign_flip([Fraction(1, 3)] * 6) == 2 / 64 and sign_flip([Fraction(1)] * 2000) < 1e-300


@pytest.mark.parametrize("gained, lost", [(0, 0), (1, 0), (5, 1), (3, 3), (40, 70), (3, 200)])
def test_one_run_is_mcnemar(gained, lost):
    differences = [Fraction(1)] * gained + [Fraction(-1)] * lost + [Fraction(0)] * 9
    assert sign_flip(differences) == pytest.approx(mcnemar(gained, lost), rel=1e-9)
    ours = {str(i): d == 1 for i, d in enumerate(differences)}
    theirs = {str(i): d == -1 for i, d in enumerate(differences)}
    assert compare([ours], [theirs]) == {
        "n": len(differences),
        "gained": gained,
        "lost": lost,
        "p": mcnemar(gained, lost),
    }


def test_sign_flip_is_the_permutation_test():
    stats = pytest.importorskip("scipy.stats")
    differences = [Fraction(x, 2) for x in (3, -1, 4, 0, 5, -2, 6, 1, 1, -3)]
    expected = stats.permutation_test(
        ([float(d) for d in differences],),
        lambda x, axis: x.sum(axis),
        permutation_type="samples",
        n_resamples=float("inf"),
        vectorized=True,
    )
    assert sign_flip(differences) == pytest.approx(expected.pvalue)


def test_runs_of_the_same_answers_are_no_more_than_one():
    """Seeds that all say the same give the interval and the test of one of them."""
    run = {str(i): i < 3 for i in range(10)}
    one, five = rate([run]), rate([run] * 5)
    assert one == {"n": 10, "count": 3, "rate": 0.3, "interval": wilson(3, 10)}
    assert five == one | {"by_run": [0.3] * 5, "spread": [0.3, 0.3]}
    other = {str(i): i > 7 for i in range(10)}
    assert compare([run] * 5, [other] * 5) == compare([run], [other])


def test_means_over_runs():
    runs = [{"a": True, "b": False, "c": True}, {"a": False, "b": False}]
    assert means(runs) == {"a": Fraction(1, 2), "b": 0, "c": 1} and means(runs, complete=True) == {
        "a": Fraction(1, 2),
        "b": 0,
    }
    found = rate(runs)
    assert (found["n"], found["count"], found["rate"], found["by_run"]) == (
        3,
        1.5,
        0.5,
        [2 / 3, 0.0],
    )
    assert found["interval"] == wilson(1.5, 3) and found["spread"] == [0.0, 2 / 3]
    assert compare(runs, [{"a": True, "b": False, "c": False}] * 2) == {
        "n": 2,
        "gained": 0,
        "lost": 1,
        "p": 1.0,
    }
    assert rate([{}, {}]) == {
        "n": 0,
        "count": 0,
        "rate": None,
        "interval": (0.0, 1.0),
        "by_run": [None, None],
        "spread": None,
    }


def test_t_interval():
    assert (
        t_interval([4.0]) is None
        and t_interval([]) is None
        and t_interval([2.0, 2.0]) == (2.0, 2.0)
    )
    half = 2.7764451 * (2.5 / 5) ** 0.5  # t of 4 degrees of freedom
    assert t_interval([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx((3 - half, 3 + half))


# Agreement.


def verdicts_of(text):
    return [
        Verdict({"c": "complied", "r": "refused", "i": "incoherent", "?": UNKNOWN}[letter])
        for letter in text
    ]


def test_agreement():
    result = agreement(
        verdicts_of("c" * 25 + "r" * 25 + "?i"),
        verdicts_of("c" * 20 + "r" * 5 + "c" * 10 + "r" * 15 + "c?"),
    )
    assert result["table"] == {
        "complied": {"complied": 20, "refused": 5, "incoherent": 0},
        "refused": {"complied": 10, "refused": 15, "incoherent": 0},
        "incoherent": {"complied": 0, "refused": 0, "incoherent": 0},
    }
    assert (result["n"], result["unknown"], result["agree"]) == (50, 2, 0.7)
    assert result["kappa"] == pytest.approx(0.4)  # Cohen's textbook case: chance 0.5
    assert agreement(verdicts_of("cri"), verdicts_of("cri"))["kappa"] == 1.0
    assert agreement(verdicts_of("cr"), verdicts_of("rc"))["kappa"] == -1.0
    assert agreement(verdicts_of("ccc"), verdicts_of("ccr"))["kappa"] == 0.0
    same = agreement(verdicts_of("rr"), verdicts_of("rr"))
    assert (same["agree"], same["kappa"]) == (1.0, None)
    none = agreement(verdicts_of("?"), verdicts_of("c"))
    assert (none["n"], none["unknown"], none["agree"], none["kappa"]) == (0, 1, None, None)
    with pytest.raises(ValueError, match="2 verdicts against 1"):
        agreement(verdicts_of("rr"), verdicts_of("r"))
