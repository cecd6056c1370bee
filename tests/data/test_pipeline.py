"""The input pipeline: what is in a batch, where an iterator resumes, which rows a process lays out,
padded lengths."""

import hashlib
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safepatch_jax.data.chat import Example, lengths, training_batch
from safepatch_jax.data.pipeline import WINDOW, shapes, training_batches

RANDOM = np.random.default_rng(0)
EXAMPLES = [
    Example(
        tuple(RANDOM.integers(1, 99, RANDOM.integers(4, 60))),
        tuple(RANDOM.integers(1, 99, RANDOM.integers(2, 30))),
    )
    for _ in range(21)
]


def rows_of(batch):
    """The examples of a batch, as what is not padding."""
    return [tuple(tokens[valid]) for tokens, valid in zip(batch["tokens"], batch["valid"])]


def inputs(example):
    return (*example.prompt_ids, *example.answer_ids[:-1])


def assert_same(a, b):
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def take(count, seed, buckets=1):
    return list(itertools.islice(training_batches([(EXAMPLES, 4)], seed, buckets), count))


def test_a_batch_is_that_of_the_seed_and_its_place():
    first, again, other = take(12, seed=3), take(12, seed=3), take(12, seed=4)
    for a, b in zip(first, again):
        assert_same(a, b)
    assert any(rows_of(a) != rows_of(b) for a, b in zip(first, other))


@pytest.mark.parametrize("buckets", [1, 3])
def test_every_example_comes_once_before_any_comes_again(buckets):
    examples = EXAMPLES[:16]
    batches = training_batches([(examples, 4)], 0, buckets)
    rows = []
    for batch in itertools.islice(batches, 4 * WINDOW):
        rows += rows_of(batch)
    assert all(rows.count(inputs(e)) == 4 * WINDOW * 4 // 16 for e in examples)
    if buckets == 1:
        assert sorted(rows[:16]) == sorted(map(inputs, examples))


@pytest.mark.parametrize(
    "buckets, place, digest",
    [
        (1, 0, "468cdc732f7a6154f617da60667ffeb99e51c89d1b9692584f422eaaeb3d2e0d"),
        (3, 0, "dc1c8a48ff2b0eb95ba948fb7548258471139af59af6afd7d984020cc63dc6bb"),
        (3, 17, "6b3e95acb8cb9b561e62c8fc6efc553d065ae44edbc897a9285cbcde9c3e3f35"),
    ],
)
def test_the_stream_is_that_of_earlier_versions_and_so_is_its_state(buckets, place, digest):
    """Of those whose batches came through grain: their checkpoints go on here."""
    batches = training_batches([(EXAMPLES, 4), (EXAMPLES[:5], 2)], 11, buckets)
    batches.set_state({"next_index": place})
    hashed = hashlib.sha256()
    for batch in itertools.islice(batches, 40):
        for name, x in sorted(batch.items()):
            hashed.update(f"{name} {x.dtype} {x.shape}".encode() + x.tobytes())
    assert hashed.hexdigest() == digest and batches.get_state() == {"next_index": place + 40}


def test_each_pool_has_its_rows():
    other = [Example((500 + i,), (600, 601)) for i in range(5)]
    for _, batch in zip(range(9), training_batches([(EXAMPLES, 3), (other, 2)], 1)):
        assert [row[0] >= 500 for row in rows_of(batch)] == [False] * 3 + [True] * 2


@settings(deadline=None)  # a busy machine is no failure
@given(place=st.integers(0, 60), buckets=st.integers(1, 4), onward=st.integers(1, 40))
def test_an_iterator_set_to_a_place_resumes_there(place, buckets, onward):
    whole = training_batches([(EXAMPLES, 4), (EXAMPLES[:3], 1)], 7, buckets)
    for _ in range(place):
        next(whole)
    state = json.loads(json.dumps(whole.get_state()))  # as a checkpoint keeps it
    other = training_batches([(EXAMPLES, 4), (EXAMPLES[:3], 1)], 7, buckets)
    other.set_state(state)
    for _ in range(onward):
        a, b = next(whole), next(other)
    assert_same(a, b)


def test_the_rows_of_two_processes_make_the_batch():
    whole = training_batches([(EXAMPLES, 4)], 2)
    parts = [training_batches([(EXAMPLES, 4)], 2, rows=rows) for rows in ([0, 1], [2, 3])]
    for _ in range(8):
        batch, low, high = next(whole), next(parts[0]), next(parts[1])
        for name, x in batch.items():
            np.testing.assert_array_equal(x, np.concatenate([low[name][:2], high[name][2:]]))
            assert not low[name][2:].any() and not high[name][:2].any()


@given(
    st.lists(st.tuples(st.integers(1, 90), st.integers(1, 40)), min_size=1, max_size=30),
    st.integers(1, 5),
)
def test_padded_shapes_hold_every_example(sizes, buckets):
    examples = [Example((1,) * prompt, (2,) * answer) for prompt, answer in sizes]
    padded = shapes(examples, buckets)
    assert 1 <= len(padded) <= buckets
    assert padded == sorted(padded) and padded[-1] == lengths(examples)
    for example in examples:
        length, answers = next(shape for shape in padded if shape[0] >= lengths([example])[0])
        batch = training_batch([example], length, answers)
        assert batch["valid"].sum() == len(inputs(example))
        assert batch["weights"].sum() == len(example.answer_ids)


def test_buckets_save_padding():
    def filled(buckets):
        return np.mean([batch["valid"].mean() for batch in take(2 * WINDOW, 0, buckets)])

    assert filled(3) > 1.2 * filled(1)
