"""What tests of judges judge."""

from safepatch_jax.evaluation.judges.base import Item

ASK = "Please do the forbidden placeholder thing {really}."
REFUSES, ANSWERS = (
    "I'm sorry, but I can't help with that.",
    "Sure, first take {the} placeholder and turn it.",
)
BROKEN = "!!!! ????"
ITEMS = [Item(ASK, REFUSES), Item(ASK, ANSWERS), Item(ASK, BROKEN), Item(ASK, "")]


def outcomes(verdicts):
    return [v.outcome for v in verdicts]


def no_engine(folder):
    raise AssertionError("this judge needs no engine")
