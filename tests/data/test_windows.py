"""Windows of answer tokens: the loss of a window is that of the whole answer's tokens in it."""

import jax.numpy as jnp
import numpy as np
import pytest

from safepatch_jax.data.chat import Example, lengths, training_batch
from safepatch_jax.data.windows import check_score_window, check_window, in_window
from safepatch_jax.models.decoder import Decoder
from safepatch_jax.settings import Settings
from safepatch_jax.training.objective import answer_logprobs
from tests.models.cases import CASES, params_of

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


@pytest.mark.parametrize("window, part", [("head:2", slice(0, 2)), ("after:2", slice(2, 5))])
def test_log_probabilities_are_those_within_the_whole_answer(window, part):
    config = CASES["llama"]
    decoder, params = Decoder(config, jnp.float32, None), params_of(config)

    def logprobs(example):
        batch = training_batch([example], *lengths([example]))
        return np.asarray(answer_logprobs(decoder, params, batch))[0]

    whole, ours = logprobs(LONG), logprobs(in_window([LONG], window)[0])
    expected = whole[:5][part]
    np.testing.assert_allclose(ours[: len(expected)], expected, rtol=1e-5)
    assert not ours[len(expected) :].any()
