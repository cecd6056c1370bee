"""The final table is as wide as a console, and no figure is cut for it."""

import pytest

from safepatch_jax.reporting import ending

TEST = {"n": 400, "gained": 1, "lost": 120, "p": 3.2e-12}


def test_a_long_name_gives_way_to_figures():
    counts = {"count": 130, "n": 400}, {"count": 11, "n": 400}
    row = ending.share_row("harm: " + "prefix_injection " * 8, *counts, TEST)
    lines = ending.lines([row])
    assert max(map(len, lines)) <= 100
    assert lines[1].startswith("harm: prefix") and "…" in lines[1]
    assert lines[1].endswith("fewer (p = 3.2e-12)")


@pytest.mark.parametrize(
    "after, verdict",
    [
        (10.4, "kept within 5 %"),
        (10.6, "worse by more than 5 %"),
        (5.0, "better by more than 5 %"),
        (float("nan"), "not a number"),
    ],
)
def test_what_a_perplexity_says(after, verdict):
    assert ending.perplexity_row("perplexity", 10.0, after)[-1] == verdict
