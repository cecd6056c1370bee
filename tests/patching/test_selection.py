"""Top sets, their combination and random retention, against the NumPy oracle and by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from safepatch_jax.numerics import bernoulli, random_bits, tensor_keys
from safepatch_jax.patching.methods import combine_sets
from safepatch_jax.patching.selection import share_out, top_count, top_mask
from safepatch_jax.patching.tensor import importance_of
from tests.patching import oracle

SELECT = jax.jit(top_mask)


def test_hand_made_matrix_with_ties():
    importance_se = np.array([[9, 5, 5, 5], [0, 0, 1, 5], [5, 2, 2, 2], [0, 0, 0, 8]], np.float32)
    importance_osm = np.array([[9, 0, 0, 0], [0, 0, 7, 7], [0, 0, 0, 0], [3, 0, 0, 0]], np.float32)
    se = np.asarray(
        SELECT(importance_se, top_count(0.25, 16))
    )  # 4 of 16: 9, 8, then the first two of the five 5s
    osm = np.asarray(SELECT(importance_osm, top_count(0.5, 16)))  # 8 of 16, but only 4 are positive
    assert sorted(zip(*np.nonzero(se))) == [(0, 0), (0, 1), (0, 2), (3, 3)]
    assert sorted(zip(*np.nonzero(osm))) == [(0, 0), (1, 2), (1, 3), (3, 0)]
    d_se, d_osm = combine_sets(se, osm, "difference")
    assert sorted(zip(*np.nonzero(d_se))) == [(0, 1), (0, 2), (3, 3)]
    assert sorted(zip(*np.nonzero(d_osm))) == [(1, 2), (1, 3), (3, 0)]
    both, same = combine_sets(se, osm, "intersection")
    assert sorted(zip(*np.nonzero(both))) == [(0, 0)] and (both == same).all()
    assert (combine_sets(se, osm, "union")[0] == se).all()


TINY = np.finfo(np.float32).tiny  # the smallest normal number


def test_scores_below_the_smallest_normal_number_are_zeros():
    scores = np.array([[TINY / 2, TINY, 1e-45, 3 * TINY, 0, 0, 0]], np.float32)
    assert np.flatnonzero(SELECT(scores, 5)).tolist() == [1, 3]
    np.testing.assert_array_equal(SELECT(scores, 1), oracle.top_set(scores, 0.2))


@pytest.mark.parametrize("kind", ["delta", "weight", "magnitude"])
def test_an_importance_is_no_subnormal_number_whatever_the_platform(kind):
    few = np.array([1e-45, TINY / 2, 2 * TINY, 1.0], np.float32)
    importance = np.asarray(importance_of(few, few, np.ones(4, np.float32), kind))
    np.testing.assert_array_equal(importance, [0, 0, 2 * TINY, 1])
    if (
        kind != "magnitude"
    ):  # products: of a small sensitivity, and a small product of normal numbers
        ones = np.ones(4, np.float32)
        np.testing.assert_array_equal(importance_of(ones, ones, few, kind), [0, 0, 2 * TINY, 1])
        half = np.full(1, 2.0**-70, np.float32)
        assert not np.any(importance_of(half, half, half, kind))


values = st.one_of(
    st.floats(0, 2.0**126, width=32, allow_subnormal=False),
    st.sampled_from([0.0, 1.0, 1.0, 2.0, 1e-45, 1e-38, 3e38]),
)


SHAPES = [(1, 7), (7, 1), (1, 1), (5, 6)]  # of the other tests too: each is a program


@settings(deadline=None, max_examples=60)
@given(
    hnp.arrays(np.float32, st.sampled_from(SHAPES), elements=values),
    st.floats(0, 1).map(lambda r: round(r, 3)),
)
def test_matches_stable_sort(importance, rate):
    mask = np.asarray(SELECT(importance, top_count(rate, importance.size)))
    np.testing.assert_array_equal(mask, oracle.top_set(importance, rate))


@pytest.mark.parametrize(
    "importance",
    [
        np.zeros((5, 6)),
        np.ones((5, 6)),
        np.full((1, 7), 1e-45),
        np.arange(7.0).reshape(7, 1),
        np.array([[1e-45, 3e38, 0, 0, 0, 0, 0]]),
    ],
)
@pytest.mark.parametrize("rate", [0.0, 0.34, 1.0])
def test_edge_matrices(importance, rate):
    importance = importance.astype(np.float32)
    mask = np.asarray(SELECT(importance, top_count(rate, importance.size)))
    np.testing.assert_array_equal(mask, oracle.top_set(importance, rate))


@pytest.mark.parametrize("rate", [0.0, 0.34, 1.0])
def test_rows_are_groups_of_their_own(rate):
    importance = np.random.default_rng(0).integers(0, 4, (6, 9)).astype(np.float32)
    importance[2], importance[3] = 0, 1e-45
    mask = np.asarray(jax.jit(top_mask, static_argnums=2)(importance, top_count(rate, 9), (-1,)))
    np.testing.assert_array_equal(mask, oracle.top_sets([importance], rate, "row")[0])


@settings(deadline=None, max_examples=100)
@given(
    st.lists(
        st.lists(values, max_size=6).map(lambda v: np.array(v, np.float32)), min_size=1, max_size=4
    ),
    st.floats(0, 1).map(lambda r: round(r, 3)),
)
def test_shares_of_a_global_top_set(importances, rate):
    def count_at(threshold):
        return [int((oracle.flushed(x).view(np.int32) >= threshold).sum()) for x in importances]

    shares = share_out(count_at, top_count(rate, sum(x.size for x in importances)))
    assert shares == [mask.sum() for mask in oracle.top_sets(importances, rate, "global")]


def test_shares_above_two_to_the_31():
    """Three tensors of 3 G equal importances each: the first whole, a part of the second."""
    size = 3 * 10**9
    assert share_out(lambda threshold: [size * (threshold <= 7)] * 3, 5 * 10**9) == [
        size,
        2 * 10**9,
        0,
    ]
    assert share_out(lambda threshold: [size * (threshold <= 7)] * 3, 10**10) == [size] * 3


def test_count_is_exact_in_decimal_digits():
    assert top_count(0.29, 100) == 29  # 0.29 * 100 is 28.999999999999996 in floats
    assert top_count(0.003, 10**9) == 3_000_000
    assert (top_count(0.0, 7), top_count(1.0, 7)) == (0, 7)


def test_retention_matches_threefry_oracle_and_binomial_bounds():
    keys = tensor_keys(
        3, "se", ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight")
    )
    shape = 200, 300
    for p in (0.3, 1.0, 0.01):
        mask = np.asarray(bernoulli(random_bits(jnp.asarray(keys[0]), shape), jnp.float32(p)))
        np.testing.assert_array_equal(mask, oracle.retained(keys[0], shape, p))
        assert abs(mask.mean() - p) <= 5 * np.sqrt(p * (1 - p) / mask.size) + 1e-9
    masks = [
        np.asarray(bernoulli(random_bits(jnp.asarray(k), shape), jnp.float32(0.5))) for k in keys
    ]
    assert abs((masks[0] == masks[1]).mean() - 0.5) < 0.02  # layers draw independently


def test_keys_depend_on_seed_role_and_name():
    names = ("a", "b")
    keys = set()
    for seed, role in itertools.product((0, 1), ("se", "osm")):
        keys |= {row.tobytes() for row in tensor_keys(seed, role, names)}
    assert len(keys) == 8


def test_unknown_combination():
    with pytest.raises(ValueError, match="one of difference, intersection, union"):
        combine_sets(np.ones(1, bool), np.ones(1, bool), "xor")
