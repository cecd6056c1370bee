"""Windows of answer tokens: the loss of a window is that of the whole answer's tokens in it."""

import pytest

from safepatch_jax.data.chat import Example
from safepatch_jax.data.windows import check_score_window, check_window, in_window
from safepatch_jax.evaluation.engine import Engine
from safepatch_jax.evaluation.likelihoods import answer_likelihoods
from safepatch_jax.io.hf import load_params
from safepatch_jax.settings import Settings

LONG, SHORT = Example((1, 2, 3), (4, 5, 6, 7, 8)), Example((1, 9), (10, 11))


@pytest.mark.parametrize(
    "window, prompts, answers",
    [
        ("all", [(1, 2, 3), (1, 9)], [(4, 5, 6, 7, 8), (10, 11)]),
        ("head:3", [(1, 2, 3), (1, 9)], [(4, 5, 6), (10, 11)]),
        ("tail:3", [(1, 2, 3, 4, 5), (1, 9)], [(6, 7, 8), (10, 11)]),
        ("after:1", [(1, 2, 3, 4), (1, 9, 10)], [(5, 6, 7, 8), (11,)]),
        ("after:2", [(1, 2, 3, 4, 5)], [(6, 7, 8)]),
    ],
)
def test_prompt_and_answer_of_a_window(window, prompts, answers):
    examples = in_window([LONG, SHORT], window)
    assert [e.prompt_ids for e in examples] == prompts
    assert [e.answer_ids for e in examples] == answers


def test_no_answer_reaches_a_window():
    with pytest.raises(ValueError, match="None of 2 answers .*'after:5': the longest has 5 tokens"):
        in_window([LONG, SHORT], "after:5")
    with pytest.raises(ValueError, match="head:N"):
        in_window([LONG], "first:3")


@pytest.mark.parametrize("window", ["", "head", "head:", "head:0", "head:-1", "tail:x", "All", "4"])
def test_words_that_are_no_window(window):
    with pytest.raises(ValueError, match="head:8|'all'"):
        check_window(window)
    if window:  # an empty setting is the default
        with pytest.raises(ValueError, match="'derive.se_tokens'"):
            Settings().override({"derive.se_tokens": window})


def test_a_window_is_written_in_one_way():
    assert check_window("head:08") == "head:8"
    assert check_score_window("derive") == "derive"
    assert Settings().override({"score.osm_tokens": "tail:07"}).score.osm_tokens == "tail:7"


def test_the_loss_of_an_answer_is_that_of_its_windows(tiny, sharder):
    engine = Engine(*load_params(tiny, sharder), tiny, sharder)

    def nll(window):
        rows = {}
        answer_likelihoods(engine, in_window([LONG], window), None, "nll", rows.__setitem__)
        return rows[0]["nll"]

    whole = nll("all")
    assert whole == pytest.approx(nll("head:2") + nll("after:2"), rel=1e-5)
    assert whole == pytest.approx(nll("head:4") + nll("tail:1"), rel=1e-5)
    assert nll("head:2") < whole
