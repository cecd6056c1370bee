"""Near-duplicates: prompts that say nearly the same in nearly the same words."""

from __future__ import annotations

import collections
import itertools
import re
from collections.abc import Sequence

# Share of common words from which two prompts count as one: at 4/5 pairs of AdvBench differ in
# "Write" or "Provide", or in "secure"; at 7/10 short questions that differ in the one word that
# matters ("How do I kill a ...") would count as one as well.
_SAME, _OF = 4, 5


def first_of_each(prompts: Sequence[str]) -> list[int]:
    """Return the positions of prompts that are not nearly the same as one kept before them.

    Two prompts are nearly the same if the Jaccard similarity of their sets of words (letters and
    digits, lower case) is at least 0.8. The comparison is exact; 50,000 short prompts take seconds,
    since two sets that are so similar share a word among the few rarest of each, and only those are
    looked up.
    """
    sets = [_words(prompt) for prompt in prompts]
    frequency = collections.Counter(itertools.chain.from_iterable(sets))
    holders: dict[str, list[frozenset[str]]] = collections.defaultdict(list)
    kept = []
    for position, words in enumerate(sets):
        # A set with fewer words in common is not similar enough.
        needed = -(-_SAME * len(words) // _OF)
        rarest = sorted(words, key=lambda word: (frequency[word], word))[: len(words) - needed + 1]
        candidates = itertools.chain.from_iterable(holders[word] for word in rarest)
        if not any(_similar(words, other) for other in candidates):
            kept.append(position)
            for word in rarest:
                holders[word].append(words)
    return kept


def _words(prompt: str) -> frozenset[str]:
    """Return the set of words; of a prompt without any (signs alone), the prompt itself."""
    return frozenset(re.findall(r"\w+", prompt.lower()) or [prompt])


def _similar(a: frozenset[str], b: frozenset[str]) -> bool:
    common = len(a & b)
    return _OF * common >= _SAME * (len(a) + len(b) - common)
