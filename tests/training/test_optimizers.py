"""Adafactor's bound: of each layer's update of a weight, stacked or not."""

import jax.numpy as jnp
import numpy as np

from safepatch_jax.training.optimizers import OPTIMIZERS


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
