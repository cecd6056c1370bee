"""The optimisers of the train step; each makes steps of about the size of the learning rate."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax


def _adamw(stacked: bool) -> optax.GradientTransformation:
    """Kingma & Ba 2015; the decay is the train step's (Loshchilov & Hutter 2019)."""
    return optax.scale_by_adam()


def _adafactor(stacked: bool) -> optax.GradientTransformation:
    """Shazeer & Stern 2018; heads of 64 are factored too, and the root mean square of each layer's
    update of a weight is bounded."""
    return optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=32), _bounded_rms(stacked)
    )


# Called with whether what is below 'layers' has an axis of layers in front.
OPTIMIZERS = {"adamw": _adamw, "adafactor": _adafactor}


def _bounded_rms(stacked: bool) -> optax.GradientTransformation:
    """Scale each tensor's update down to a root mean square of 1; of stacked ones each layer's."""

    def bounded(path, update):
        first = int(stacked and path[0].key == "layers")
        axes = tuple(range(first, update.ndim))
        rms = jnp.sqrt(jnp.mean(jnp.square(update), axis=axes, keepdims=True))
        return update / jnp.maximum(1.0, rms)

    return optax.stateless(
        lambda updates, params: jax.tree_util.tree_map_with_path(bounded, updates)
    )


def scaled_to_norm(most: float) -> optax.GradientTransformation:
    """Scale float32 gradients whose global norm exceeds `most` down to that norm.

    As `optax.clip_by_global_norm` but for rounding: by one factor, which the optimiser's loops
    multiply by as they read gradients. Optax selects and divides entry by entry, with which these
    loops took twice as long on a CPU.
    """

    def scaled(gradients, params):
        factor = factor_to_norm(optax.tree.norm(gradients), most)
        return jax.tree.map(lambda g: factor * g, gradients)

    return optax.stateless(scaled)


def factor_to_norm(norm: jax.Array, most: float) -> jax.Array:
    """Return what gradients of a global norm are multiplied by, so that it is `most` at most."""
    return jnp.where(norm < most, 1.0, most / norm)


def updated(
    params: Any, updates: Any, stopped: jax.Array, learning_rate: jax.Array, decay: jax.Array
) -> Any:
    """Return parameters after a step, or as they are where it stopped; the decay is decoupled."""
    # Chosen, not multiplied by 0: an update that is not taken may be NaN.
    return jax.tree.map(
        lambda p, u: jnp.where(stopped, p, p - learning_rate * (u + decay * p)), params, updates
    )
