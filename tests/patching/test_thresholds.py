"""The counting search finds the limits that a stable sort of all keys gives."""

import numpy as np
import pytest

from safepatch_jax.patching import thresholds
from safepatch_jax.patching.thresholds import Search

SIZES = (40_000, 1, 70_000, 3_000, 40_000, 200_000)  # of pieces
NUMBERS = (0, 1, 7, 3_530, 100_000, 349_000, 500_000)


def keys(kind):
    rng = np.random.default_rng(1)
    pieces = []
    for i, size in enumerate(SIZES):
        normal = np.abs(rng.standard_normal(size, np.float32))
        pieces.append(
            {
                "plain": normal,
                "uneven": normal * np.float32(1000.0**i),  # a sample of the first is of no use
                "ties": np.round(normal, 1),
                "equal": np.full(size, 0.5, np.float32),
                "sparse": np.where(rng.random(size) < 0.99, 0, normal),
                "zero": np.zeros(size, np.float32),
                "huge": np.where(rng.random(size) < 0.1, np.inf, normal),
            }[kind].astype(np.float32)
        )
    return [x.view(np.int32) for x in pieces]


def marked(pieces, search):
    """Apply limits as a program does: all keys above the threshold, and the first that equal it."""
    result = []
    for i, (key, (threshold, bound)) in enumerate(zip(pieces, search.limits, strict=True)):
        ties = np.flatnonzero(key == threshold)
        if search.partial and search.partial[0] == i:
            assert bound == 0
            bound = ties[search.partial[1]]
        mask = key > threshold
        mask[ties[ties < bound]] = True
        result.append(mask)
    return np.concatenate(result)


def find(pieces, number, sample):
    search = Search(number, sum(map(len, pieces)), sample)
    passes = 0
    while search.limits is None:
        first, last = search.bounds[-2:]
        for key in pieces:
            counts = np.array([np.count_nonzero(key >= x) for x in search.bounds[:-2]], np.int32)
            search.add(counts, 0, key[(key >= first) & (key <= last)])
        search.end()
        passes += 1
    return search, passes


@pytest.mark.parametrize("kind", ["plain", "uneven", "ties", "equal", "sparse", "zero", "huge"])
@pytest.mark.parametrize("held", [1 << 23, 100])
def test_limits_are_those_of_a_sort(kind, held, monkeypatch):
    monkeypatch.setattr(thresholds, "_GATHERED", held)  # 100: a window can seldom be gathered
    pieces = keys(kind)
    every = np.concatenate(pieces)
    order = np.argsort(-every, kind="stable")
    order = order[every[order] > 0]
    for number in NUMBERS:
        expected = np.zeros(len(every), bool)
        expected[order[:number]] = True
        search, passes = find(pieces, number, pieces[0][::4])
        np.testing.assert_array_equal(marked(pieces, search), expected)
        assert passes <= (3 if held > 100 else 13)


def test_a_sample_of_all_pieces_needs_one_pass():
    pieces = keys("uneven")
    search, passes = find(pieces, 9_000, np.concatenate([x[::4] for x in pieces]))
    assert passes == 1 and np.count_nonzero(marked(pieces, search)) == 9_000
