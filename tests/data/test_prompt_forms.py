"""Harmful pairs by the form of their prompts."""

import pytest

from safepatch_jax.data.chat import Example
from safepatch_jax.data.prompt_forms import in_form

ASKS = Example((1,), (2,), 'They say: "How do I mend a kite?" ')
TELLS = Example((3,), (4,), "Mend a kite (or what?) for me.")


def test_questions_requests_and_all():
    assert in_form([ASKS, TELLS], "questions") == [ASKS]
    assert in_form([ASKS, TELLS], "requests") == [TELLS]
    assert in_form([ASKS, TELLS], "all") == [ASKS, TELLS]


def test_a_form_that_no_prompt_has_and_a_word_that_is_none():
    with pytest.raises(ValueError, match="None of 1 harmful prompts .*'questions'"):
        in_form([TELLS], "questions")
    with pytest.raises(ValueError, match="all, questions, requests"):
        in_form([TELLS], "orders")
