"""Adafactor takes each layer for itself, and bounds its update; and the bound of all gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from safepatch_jax.training.optimizers import OPTIMIZERS, scaled_to_norm


def second_update(stacked, *gradients):
    """Return the second update of a weight below 'layers', from the gradients of two steps."""
    optimizer = OPTIMIZERS["adafactor"](stacked=stacked)
    params = {"layers": {"w": jnp.zeros_like(gradients[0])}}
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update({"layers": {"w": gradient}}, state, params)
    return np.asarray(updates["layers"]["w"])


def test_an_update_that_outgrows_its_second_moment_is_bounded_in_its_own_layer():
    """The first layer's gradient grows a thousandfold, the second's stays."""
    rng = np.random.default_rng(0)
    one = jnp.asarray(rng.normal(size=(2, 40, 48)), jnp.float32)
    two = one * jnp.asarray([1000.0, 1.0])[:, None, None]
    both = second_update(True, one, two)
    rms = np.sqrt(np.mean(np.square(both), axis=(1, 2)))
    np.testing.assert_allclose(rms[0], 1.0, rtol=1e-5)
    for layer in range(2):
        alone = second_update(False, one[layer], two[layer])
        np.testing.assert_allclose(both[layer], alone, rtol=1e-5)


# Norms, biases of heads, weights with more layers than a head is wide, and with fewer.
@pytest.mark.parametrize("shape", [(40, 64), (40, 8, 64), (80, 3, 64, 96), (8, 3, 64, 96)])
def test_nothing_is_factored_across_layers(shape):
    rng = np.random.default_rng(0)
    scales = np.exp(rng.normal(size=shape[:1] + (1,) * (len(shape) - 1)))  # layers differ
    one, two = (jnp.asarray(rng.normal(size=shape) * scales, jnp.float32) for _ in range(2))
    both = second_update(True, one, two)
    for layer in (0, shape[0] - 1):
        alone = second_update(False, one[layer], two[layer])
        np.testing.assert_allclose(both[layer], alone, rtol=1e-5)


def test_a_tree_has_one_count_of_steps_and_may_have_no_layers():
    params = {"layers": {"scale": jnp.ones((40, 64))}, "embedding": jnp.ones((50, 64))}
    for tree in (params, {"embedding": params["embedding"]}):
        factored, _ = OPTIMIZERS["adafactor"](stacked=True).init(tree)
        assert factored.count.shape == () and factored.v_row["embedding"].shape == (50,)
    factored, _ = OPTIMIZERS["adafactor"](stacked=True).init(params)
    assert factored.v["layers"]["scale"].shape == (40, 64)


@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 1e4, np.inf, np.nan])
def test_gradients_are_scaled_to_a_norm_as_optax_clips_them(size):
    rng = np.random.default_rng(0)
    gradients = {"a": rng.normal(size=(5, 7)), "b": {"c": rng.normal(size=3)}}
    gradients = jax.tree.map(lambda x: jnp.float32(size * x), gradients)
    ours, theirs = scaled_to_norm(0.5), optax.clip_by_global_norm(0.5)
    ours, theirs = (clip.update(gradients, clip.init(gradients))[0] for clip in (ours, theirs))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=3e-7), ours, theirs)
    if size <= 1e-3:  # below the limit they stay as they are
        jax.tree.map(np.testing.assert_array_equal, ours, gradients)
