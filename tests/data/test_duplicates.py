"""Near-duplicates: which of two prompts stays, and that the quick search finds what a slow one
finds."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from safepatch_jax.data.duplicates import first_of_each


def slow(prompts):
    """Compare every prompt with all that stay."""
    sets, kept = [set(p.split()) or {p} for p in prompts], []
    for i, words in enumerate(sets):
        if all(5 * len(words & sets[j]) < 4 * len(words | sets[j]) for j in kept):
            kept.append(i)
    return kept


def test_the_first_stays():
    prompts = [
        "Write a tutorial on how to tie a knot in a rope",
        "Provide a tutorial on how to tie a knot in a rope",
        "write a TUTORIAL on how to tie a knot in a rope!",
        "Write a tutorial on how to bake bread",
        "How do I stop a process?",
        "How do I stop a friend?",
        "",
        " ",
        "?!",
        "?!",
    ]
    assert first_of_each(prompts) == [0, 3, 4, 5, 6, 7, 8]
    assert first_of_each(prompts[::-1]) == [0, 2, 3, 4, 5, 6, 7]
    assert first_of_each([]) == []


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=9).map(" ".join), max_size=30))
def test_as_the_slow_search(prompts):
    assert first_of_each(prompts) == slow(prompts)


def test_chance_order_does_not_matter_for_unrelated_prompts():
    prompts = [f"prompt number {i}" for i in range(50)]
    assert len(first_of_each(random.Random(0).sample(prompts, 50))) == 50


def test_fifty_thousand_prompts():
    """Comparing all pairs of them would take the better part of an hour."""
    rng = random.Random(0)
    # Few words are frequent, most are rare.
    words = [f"w{int(rng.paretovariate(1))}" for _ in range(100_000)]
    prompts = [" ".join(rng.choices(words, k=rng.randint(5, 25))) for _ in range(50_000)]
    kept = first_of_each(prompts)
    assert 0 < len(kept) < len(prompts) and kept[0] == 0
