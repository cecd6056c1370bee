"""What is left of a patch's entries: of two models before and after both were treated alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from safepatch_jax.models.table import Param
from safepatch_jax.runtime import processes

_COUNTS = ("changed", "differ", "same_sign", "same_value", "outside")
_SUMS = ("along", "before", "after")


@jax.jit
def _by_channel(
    base_LOI: jax.Array, model_LOI: jax.Array, treated_LOI: jax.Array, other_LOI: jax.Array
) -> dict[str, jax.Array]:
    """Return counts (int32) and sums (float32) by layer and output channel, [L, O]."""

    def of_layer(layer):
        base, model, treated, other = (x.astype(jnp.float32) for x in layer)
        before, after = model - base, other - treated
        changed = model != base
        counts = {
            "changed": changed,
            "differ": changed & (after != 0),
            "same_sign": changed & (jnp.sign(after) == jnp.sign(before)),
            "same_value": changed & (after == before),
            "outside": ~changed & (after != 0),
        }
        sums = {"along": after * before, "before": before * before, "after": after * after}
        result = {name: jnp.sum(x, axis=-1, dtype=jnp.int32) for name, x in counts.items()}
        return result | {name: jnp.sum(x, axis=-1) for name, x in sums.items()}

    return jax.lax.map(of_layer, (base_LOI, model_LOI, treated_LOI, other_LOI))


def entries_of(
    row: Param, base: jax.Array, model: jax.Array, treated: jax.Array, other: jax.Array
) -> dict[str, dict[str, float]]:
    """Return what is left of the patch in one parameter, by Hugging Face name.

    Args:
      row: its declaration.
      base, model: the two models' weights before.
      treated, other: those of the base and of the patched model after; any float dtype.

    Returns:
      changed: entries in which the models differ before, d != 0; of these differ: those that do
      after, d' != 0; same_sign: with the sign of before; same_value: d' == d; outside: entries that
      differ after alone. Sums over all entries: along <d', d>, before <d, d>, after <d', d'>.
    """
    shape = row.num_layers, row.hf_shape[0], -1  # what has no in side is a column
    views = [x.reshape(shape) for x in (base, model, treated, other)]
    parts = {name: processes.fetch(x) for name, x in _by_channel(*views).items()}
    result = {}
    for layer, name in enumerate(row.hf_names):
        of_tensor: dict[str, Any] = {}
        for count in _COUNTS:
            of_tensor[count] = int(parts[count][layer].sum(dtype=np.int64))
        for of_sum in _SUMS:
            of_tensor[of_sum] = float(parts[of_sum][layer].sum(dtype=np.float64))
        result[name] = of_tensor
    return result


def total(tensors: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Return the figures of all tensors together.

    Returns:
      the sums of `entries_of`; along_patch: <d', d> / <d, d>; cosine of d' and d, None where d' is
      0; size: |d'| / |d|; least, largest: along_patch of the tensors that the patch changes, as
      [value, name].
    """
    result: dict[str, Any] = {}
    for name in _COUNTS:
        result[name] = sum(x[name] for x in tensors.values())
    for name in _SUMS:
        result[name] = math.fsum(x[name] for x in tensors.values())
    if not result["before"]:
        return result
    result["along_patch"] = result["along"] / result["before"]
    result["cosine"] = None
    if result["after"]:
        result["cosine"] = result["along"] / math.sqrt(result["before"] * result["after"])
    result["size"] = math.sqrt(result["after"] / result["before"])
    shares = [[x["along"] / x["before"], name] for name, x in _changed(tensors)]
    result["least"], result["largest"] = min(shares), max(shares)
    return result


def _changed(
    tensors: Mapping[str, Mapping[str, float]],
) -> Iterable[tuple[str, Mapping[str, float]]]:
    return [(name, x) for name, x in tensors.items() if x["before"]]
