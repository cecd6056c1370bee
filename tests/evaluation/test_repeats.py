"""Rates over several runs, and the sign-flip test against counting by hand, McNemar's test and
scipy's permutation test."""

import itertools
import random
from fractions import Fraction

import pytest

from safepatch_jax.evaluation.repeats import compare, means, rate, sign_flip, t_interval
from safepatch_jax.evaluation.statistics import mcnemar, wilson


def by_counting(differences):
    """Go through all sign patterns."""
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return sum(x >= abs(sum(differences)) for x in sums) / len(sums)


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
    ours, theirs = ({str(i): d == sign for i, d in enumerate(differences)} for sign in (1, -1))
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
