"""Suites; what is wrong with one is in tests/launch/test_evaluate.py."""

from safepatch_jax.evaluation.suites import GENERATED, load_suite
from safepatch_jax.settings import EvaluateSettings


def test_answers_of_the_quick_suite_are_as_long_as_those_of_a_run():
    lengths = {measure.max_new for measure in load_suite("quick") if measure.kind in GENERATED}
    assert lengths == {EvaluateSettings().max_new_tokens}
