"""The sequential test of paired differences: against a plain oracle, its error rates, its ends."""

import math

import numpy as np
import pytest

from safepatch_jax.evaluation.sequential import (
    FAIL,
    OPEN,
    PASS,
    SHARES,
    Limits,
    decide,
    log_capital,
)

LIMITS = Limits(0.1, 0.1)


def oracle(differences, least):
    """The capital after each difference, bet by bet, as plain products."""
    purses, path = [1.0] * len(SHARES), []
    for d in differences:
        for k, share in enumerate(SHARES):
            purses[k] *= 1 + share * (least - d) / (1 - least)
        path.append(sum(purses) / len(purses))
    return path


def draws(rng, count, n, more, less):
    """Differences of paired yes and no: +1 and -1 with these probabilities."""
    uniform = rng.random((count, n))
    return np.where(uniform < more, 1.0, np.where(uniform < more + less, -1.0, 0.0))


@pytest.mark.parametrize("least", [0.1, 0.0, -0.3])
def test_capital_is_that_of_the_bets(least):
    rng = np.random.default_rng(0)
    for values in (draws(rng, 1, 60, 0.2, 0.1)[0], rng.uniform(-1, 1, 60)):
        expected = np.log(oracle(values.tolist(), least))
        np.testing.assert_allclose(log_capital(values, least), expected, rtol=0, atol=1e-12)


def test_capital_of_one_bet_is_fair_at_the_limit():
    """Exactly, over all outcomes of one prompt, and less where the mean is above the limit."""
    for more, expected in ((0.25, 1.0), (0.35, None)):
        chances = {1.0: more, -1.0: 0.15, 0.0: 0.85 - more}
        mean = 0.0
        for d, chance in chances.items():
            mean += chance * math.exp(log_capital(np.array([d]), 0.1)[0])
        assert mean == pytest.approx(1.0) if expected else mean < 1


def test_false_passes_and_fails_stay_below_alpha_with_a_look_at_every_prompt():
    """At the margin itself; 300 looks at a test of a fixed size would give several times 5 %."""
    rng = np.random.default_rng(1)
    values, level = draws(rng, 2000, 300, 0.2, 0.1), -math.log(0.05)
    for signed, least in ((values, 0.1), (-values, -0.1)):
        crossed = (log_capital(signed, least) >= level).any(-1).mean()
        assert 0 < crossed <= 0.05


def test_verdicts():
    assert decide([0.0] * 100, LIMITS).verdict == PASS
    assert decide([1.0, 0.0] * 40, LIMITS).verdict == FAIL
    assert decide([0.0] * 10, LIMITS).verdict == OPEN
    assert decide([], LIMITS).verdict == OPEN and decide([], LIMITS).mean is None
    worse = [1.0, 0, 0, 0, 0, 0, 0, 0, 0, 0, -1.0, 1.0] * 100
    assert decide(worse, Limits(0.2, 0.2)).verdict == PASS
    assert decide(worse, Limits(0.2, 0.0)).decided_at < 1200  # one of the two, before all are seen


def test_a_verdict_is_what_the_confidence_sequence_says_and_it_stays():
    rng = np.random.default_rng(2)
    for more, less in ((0.05, 0.05), (0.4, 0.1), (0.2, 0.1)):
        values = draws(rng, 1, 400, more, less)[0].tolist()
        end = decide(values, LIMITS)
        assert (end.high < 0.1) == (end.verdict == PASS)
        assert (end.low > 0.1) == (end.verdict == FAIL)
        assert end.low <= sum(values) / 400 <= end.high
        if end.verdict != OPEN:
            assert decide(values[: end.decided_at], LIMITS).verdict == end.verdict
            assert decide(values[: end.decided_at - 1], LIMITS).verdict == OPEN


def test_the_forecast_is_what_it_then_takes():
    pattern = [1.0, -1.0] + [0.0] * 18
    begun = decide(pattern * 2, LIMITS)
    whole = decide(pattern * 40, LIMITS)
    assert begun.verdict == OPEN and whole.verdict == PASS
    assert abs(40 + begun.more - whole.decided_at) <= 20
    assert decide(([1.0] + [0.0] * 9) * 4, LIMITS).more is None  # at the margin itself


def test_differences_of_another_size_count_in_its_units():
    values = np.random.default_rng(3).uniform(-0.4, 0.5, 300)
    scaled = decide((values / 0.5).tolist(), Limits(0.3, 0.3))
    own = decide(values.tolist(), Limits(0.15, 0.15, bound=0.5))
    assert own.decided_at == scaled.decided_at and own.high == pytest.approx(scaled.high / 2)
    for wrong in ([0.6], [math.nan]):
        with pytest.raises(ValueError, match=r"no number of size 0.5 or less"):
            decide(wrong, Limits(0.15, 0.15, bound=0.5))


@pytest.mark.parametrize("values", [(0.0, 0.0), (0.1, 0.2), (1.0, 0.5), (0.1, 0.1, 0.0)])
def test_wrong_limits(values):
    with pytest.raises(ValueError, match="margin|alpha"):
        Limits(*values)
