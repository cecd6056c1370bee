"""Near-duplicates: prompts that say nearly the same in nearly the same words."""

from __future__ import annotations

import collections
import re
from collections.abc import Sequence

# Share of common words from which two prompts count as one: at 4/5 pairs of AdvBench differ in
# "Write" or "Provide", or in "secure"; at 7/10 short questions that differ in the one word that
# matters ("How do I kill a ...") would count as one as well.
_SAME, _OF = 4, 5


def first_of_each(prompts: Sequence[str]) -> list[int]:
    """Return the positions that stay when each prompt that is nearly one before it, among those
    that stay, is dropped.

    Two prompts are nearly the same if the Jaccard similarity of their sets of words (letters and
    digits, lower case) is at least 0.8. The comparison is exact; 50,000 short prompts take seconds,
    since two sets that are so similar share a word among the few rarest of each, and only those are
    looked up.
    """
    sets = [
        frozenset(re.findall(r"\w+", prompt.lower())) or frozenset([prompt]) for prompt in prompts
    ]
    frequency = collections.Counter(word for words in sets for word in words)
    holders: dict[str, list[frozenset[str]]] = collections.defaultdict(list)
    kept = []
    for position, words in enumerate(sets):
        needed = -(
            -_SAME * len(words) // _OF
        )  # a set with fewer words in common is not similar enough
        rarest = sorted(words, key=lambda word: (frequency[word], word))[: len(words) - needed + 1]
        if not any(_similar(words, other) for word in rarest for other in holders[word]):
            kept.append(position)
            for word in rarest:
                holders[word].append(words)
    return kept


def _similar(a: frozenset[str], b: frozenset[str]) -> bool:
    common = len(a & b)
    return _OF * common >= _SAME * (len(a) + len(b) - common)
