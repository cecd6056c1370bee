"""The cast to the storage dtype: stochastic rounding against an oracle in exact arithmetic, and its
keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safepatch_jax.numerics import cast, random_bits, stochastic_round, tensor_keys
from tests.conftest import sharder_of

DTYPES = {"bfloat16": jnp.bfloat16, "float16": jnp.float16}


def every_number(dtype):
    """All finite numbers of a 16-bit dtype, in ascending order, as float64."""
    with np.errstate(invalid="ignore"):  # NaN
        numbers = np.arange(2**16, dtype=np.uint16).view(dtype).astype(np.float64)
    return np.unique(numbers[np.isfinite(numbers)])


def neighbours(x, dtype):
    """The next numbers of the dtype at or towards zero, and away from zero, for float32 within its
    range."""
    numbers = every_number(dtype)
    positive = numbers[numbers >= 0]
    below = positive[np.searchsorted(positive, np.abs(x), side="right") - 1]
    above = positive[
        np.minimum(np.searchsorted(positive, np.abs(x), side="left"), len(positive) - 1)
    ]
    return np.copysign(below, x), np.copysign(above, x)


def samples(dtype):
    rng = np.random.default_rng(0)
    scale = 2.0 ** rng.integers(-20, 12, 4000)
    return (rng.normal(size=4000) * scale).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_rounds_to_a_neighbour_up_when_the_bits_are_below_the_share_of_the_way(dtype):
    x, dtype = samples(dtype), np.dtype(dtype)
    bits = np.random.default_rng(1).integers(0, 2**32, x.shape, np.uint32)
    below, above = neighbours(x.astype(np.float64), dtype)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(above == below, 0.0, (x - below) / (above - below))
    expected = np.where((bits >> 8) * 2.0**-24 < share, above, below)
    got = np.asarray(jax.jit(stochastic_round, static_argnums=1)(x, dtype, bits))
    assert got.dtype == dtype
    np.testing.assert_array_equal(got.astype(np.float64), expected)
    assert 0.3 < np.mean(expected == above) < 0.7


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("bits", [0, 2**32 - 1])
def test_what_needs_no_rounding_is_kept(dtype, bits):
    exact = every_number(np.dtype(dtype)).astype(np.float32)
    normal = exact[
        (np.abs(exact) >= 2.0**-126) | (exact == 0)
    ]  # some processors flush smaller float32 to zero
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan], np.float32)
    for x in (normal, special):
        got = np.asarray(
            stochastic_round(jnp.asarray(x), dtype, jnp.full(x.shape, bits, jnp.uint32))
        )
        np.testing.assert_array_equal(got.view(np.uint16), x.astype(dtype).view(np.uint16))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_right_on_average_where_rounding_to_nearest_loses_everything(dtype):
    one_step = float(jnp.finfo(dtype).eps)
    x = np.full(200_000, 1.0 + 0.1 * one_step, np.float32)
    assert np.all(np.asarray(cast(jnp.asarray(x), dtype)) == 1.0)
    key = tensor_keys(0, "rounding", ("w",))[0]
    bits = functools.partial(random_bits, jnp.asarray(key), x.shape)
    mean = np.asarray(cast(jnp.asarray(x), dtype, "stochastic", bits)).astype(np.float64).mean()
    deviation = one_step * np.sqrt(0.1 * 0.9 / x.size)
    assert abs(mean - x[0].astype(np.float64)) < 5 * deviation


def test_float32_is_not_rounded():
    x = np.random.default_rng(0).normal(size=100).astype(np.float32)
    np.testing.assert_array_equal(
        cast(jnp.asarray(x), "float32", "stochastic"), x
    )  # nor are bits asked for


def test_the_same_bits_on_every_mesh_and_others_for_another_name_or_seed():
    x = np.random.default_rng(0).normal(size=(64, 48)).astype(np.float32)
    key = tensor_keys(0, "rounding", ("w",))[0]
    run = jax.jit(
        lambda x, dtype, rounding, key: cast(x, dtype, rounding, lambda: random_bits(key, x.shape)),
        static_argnums=(1, 2),
    )
    reference = np.asarray(run(x, jnp.bfloat16, "stochastic", key))
    for devices, tensor in ((2, 1), (8, 2)):
        placed = jax.device_put(x, sharder_of(devices, tensor).sharding(("mlp", "embed")))
        np.testing.assert_array_equal(
            np.asarray(run(placed, jnp.bfloat16, "stochastic", key)).view(np.uint16),
            reference.view(np.uint16),
        )
    for other in (tensor_keys(1, "rounding", ("w",))[0], tensor_keys(0, "rounding", ("v",))[0]):
        assert np.mean(np.asarray(run(x, jnp.bfloat16, "stochastic", other)) != reference) > 0.2
    assert (
        np.asarray(random_bits(key, (4, 4))).tobytes()
        == np.asarray(random_bits(key, (16,))).tobytes()
    )
