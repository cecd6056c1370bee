"""Trained models as an export stores them: rounding to nearest, or stochastically."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safepatch_jax.methods.stored import as_stored
from safepatch_jax.models.config import config_from_hf
from safepatch_jax.models.table import nest, param_table, unnest
from safepatch_jax.numerics import NotFinite
from safepatch_jax.testing import tiny_config
from tests.conftest import sharder_of

TABLE = param_table(config_from_hf(tiny_config(tie_word_embeddings=False)))
PATHS = [row.path for row in TABLE]


def stored(params, rounding, seed=0, dtype="bfloat16"):
    made = as_stored(params, TABLE, dict.fromkeys(PATHS, dtype), rounding, seed)
    return {path: np.asarray(x) for path, x in unnest(made).items()}


@pytest.fixture(scope="module")
def params():
    return TABLE.init(jax.random.key(0))


def test_nearest_is_the_plain_cast(params):
    for path, x in stored(params, "nearest").items():
        np.testing.assert_array_equal(x, np.asarray(unnest(params)[path]).astype(jnp.bfloat16))


def test_stochastic_takes_a_neighbour_and_keeps_the_mean(params):
    exact = {path: np.asarray(x, np.float64) for path, x in unnest(params).items()}
    made, other = stored(params, "stochastic"), stored(params, "stochastic", seed=1)
    moved, steps = [], 0
    for path, x in made.items():
        assert x.dtype == jnp.bfloat16
        step = np.exp2(np.floor(np.log2(np.abs(exact[path]) + 1e-300)) - 7)
        error = (x.astype(np.float64) - exact[path]) / step
        assert (np.abs(error) < 1).all(), path
        moved.append(error.reshape(-1))
        steps += (x != other[path]).sum()
    errors = np.concatenate(moved)
    assert abs(errors.mean()) < 5 * errors.std() / errors.size**0.5 and steps > 0.1 * errors.size
    wide = nest({path: jnp.asarray(x, jnp.float32) for path, x in made.items()})
    twice = stored(wide, "stochastic", seed=2)  # what the dtype has stays
    for path, x in made.items():
        np.testing.assert_array_equal(twice[path], x)


def test_what_no_export_would_hold_is_refused(params):
    flat = unnest(params)
    large = nest(flat | {PATHS[0]: flat[PATHS[0]].at[0].set(1e6)})
    stored(large, "nearest")
    with pytest.raises(NotFinite, match="beyond the range of float16"):
        stored(large, "nearest", dtype="float16")


def test_the_same_on_eight_devices(params):
    shardings = unnest(TABLE.shardings(sharder_of(8)))
    spread = {path: jax.device_put(x, shardings[path]) for path, x in unnest(params).items()}
    made = as_stored(nest(spread), TABLE, dict.fromkeys(PATHS, "bfloat16"), "stochastic", 0)
    for path, x in stored(params, "stochastic").items():
        there = unnest(made)[path]
        assert there.sharding == shardings[path]
        np.testing.assert_array_equal(np.asarray(there), x)
