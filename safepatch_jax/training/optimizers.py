"""The optimisers of the train step; each makes steps of about the size of the learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from safepatch_jax.models.layerwise import LAYERS


def _adamw(stacked: bool) -> optax.GradientTransformation:
    """Kingma & Ba 2015; the decay is the train step's (Loshchilov & Hutter 2019)."""
    return optax.scale_by_adam()


def _adafactor(stacked: bool) -> optax.GradientTransformation:
    """Shazeer & Stern 2018, of each layer for itself; heads of 64 are factored too, and the root
    mean square of each layer's update of a weight is bounded."""
    factored = optax.scale_by_factored_rms(min_dim_size_to_factor=32)
    if stacked:
        factored = _by_layer(factored)
    return optax.chain(factored, _bounded_rms(stacked))


# Called with whether what is below 'layers' has an axis of layers in front.
OPTIMIZERS = {"adamw": _adamw, "adafactor": _adafactor}


def _by_layer(factored: optax.GradientTransformation) -> optax.GradientTransformation:
    """Factor what is below 'layers' layer by layer: along that axis nothing is alike, and a norm's
    scales, of each layer a vector, would be a matrix. The count of steps stays one number."""

    def axes_of(params):
        # Optax asks for the state's structure with a stand-in for the whole tree.
        if not isinstance(params, Mapping) or LAYERS not in params:
            return None
        axes = {name: 0 if name == LAYERS else None for name in params}
        return axes, optax.FactoredState(None, axes, axes, axes)

    def init(params):
        axes = axes_of(params)
        if axes is None:
            return factored.init(params)
        return jax.vmap(factored.init, in_axes=axes[:1], out_axes=axes[1])(params)

    def update(gradients, state, params):
        axes = axes_of(params)
        if axes is None:
            return factored.update(gradients, state, params)
        of_params, of_state = axes
        by_layer = jax.vmap(
            factored.update, in_axes=(of_params, of_state, of_params), out_axes=axes
        )
        return by_layer(gradients, state, params)

    return optax.GradientTransformation(init, update)


def _bounded_rms(stacked: bool) -> optax.GradientTransformation:
    """Scale each tensor's update down to a root mean square of 1; of stacked ones each layer's."""

    def bounded(path, update):
        first = int(stacked and path[0].key == LAYERS)
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
