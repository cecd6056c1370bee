"""Merging baselines on the same two patches: what each keeps of them, and with what weight.

Every method is theta + sum over both roles of weight * patch[kept], in float32, SE first, with one
cast at the end; an entry that it does not keep has the backbone's bits. `alpha` and `beta` weigh
the SE and the OSM patch everywhere.

| patch.merge | keeps | weight | further settings |
|---|---|---|---|
| average | all | alpha / 2, beta / 2 | |
| task_arithmetic | all (Ilharco et al. 2023) | alpha, beta | |
| ties | the largest entries, then those of the elected sign (Yadav et al. 2023) | as dare_ties, p = 1 | density, granularity |
| dare | a random share (Yu et al. 2024) | alpha / p, beta / p | retention (p) |
| dare_ties | a random share, then those of the elected sign | as dare; halved where both are kept | retention (p) |
| resta | the OSM patch, a random share of it (Bhardwaj et al. 2024) | 0, -beta / p | retention (p; 1 for RESTA without DARE) |

RESTA's gamma is beta: theta + gamma * (theta - theta_OSM). The random bits are those of
SafePatching's retention. patch.importance, top rates, combine, support and rescale have no part in
these methods.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from safepatch_jax.patching.tensor import Choice, Layer, rounded


def average(layer: Layer) -> Choice:
    """Add half of each patch."""
    top = layer.nonzero()
    return Choice(top, top, {role: 0.5 * weight for role, weight in layer.weights().items()})


def task_arithmetic(layer: Layer) -> Choice:
    """Add both patches."""
    top = layer.nonzero()
    return Choice(top, top, layer.weights())


def ties(layer: Layer) -> Choice:
    """Trim each patch to its largest entries, elect a sign for each entry, and average the patches
    that have it."""
    top = layer.top_sets()
    return Choice(top, *_elect(layer, top))


def dare(layer: Layer) -> Choice:
    """Drop entries of each patch at random and divide the others by the share that is kept."""
    top = layer.nonzero()
    return Choice(top, layer.dropped(top), layer.weights())


def dare_ties(layer: Layer) -> Choice:
    """Drop at random instead of trimming, then elect and average as TIES does [choice, as in
    mergekit]."""
    top = layer.nonzero()
    return Choice(top, *_elect(layer, layer.dropped(top)))


def resta(layer: Layer) -> Choice:
    """Subtract the OSM patch: it points away from safety."""
    top = layer.nonzero() | {"se": jnp.zeros(layer.patch["se"].shape, bool)}
    return Choice(top, layer.dropped(top), {"se": jnp.float32(0), "osm": -layer.weights()["osm"]})


def _elect(
    layer: Layer, kept: Mapping[str, jax.Array]
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Return (kept, weight) after TIES' election.

    The elected sign is that of the sum of both weighted patches; entries of the other sign are not
    kept, and where the two cancel exactly none is. The mean is over the patches that are kept at an
    entry.
    """
    weights = layer.weights()
    vote = {
        role: jnp.where(
            kept[role], rounded(weights[role] * layer.patch[role], layer.knobs["zero"]), 0.0
        )
        for role in kept
    }
    elected = jnp.sign(vote["se"] + vote["osm"])
    agree = {role: (vote[role] != 0) & (jnp.sign(vote[role]) == elected) for role in kept}
    share = jnp.where(agree["se"] & agree["osm"], jnp.float32(0.5), jnp.float32(1))
    return agree, {role: share * weights[role] for role in kept}


BASELINES = {
    "average": average,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "dare": dare,
    "dare_ties": dare_ties,
    "resta": resta,
}
