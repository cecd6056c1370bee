"""Controllable patching (METHOD 3): scores, top sets, combination, retention and merge, one program a weight shape."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from safepatch_jax.console import progress
from safepatch_jax.mesh import Sharder
from safepatch_jax.models.table import Param
from safepatch_jax.numerics import cast, tensor_keys
from safepatch_jax.patching.retention import retained
from safepatch_jax.patching.selection import combine_sets, top_count, top_mask
from safepatch_jax.settings import PatchSettings

ROLES = ("se", "osm")


@dataclasses.dataclass(frozen=True)
class Knobs:
    """The settings of the patch operation as traced scalars, so that a change of value compiles nothing."""

    top_se: int
    top_osm: int
    retention: float
    alpha: float
    beta: float

    @classmethod
    def of(cls, patch: PatchSettings, size: int) -> "Knobs":
        scale = 1.0 / patch.retention if patch.rescale else 1.0
        return cls(top_count(patch.top_rate_se, size), top_count(patch.top_rate_osm, size), patch.retention,
                   patch.alpha * scale, patch.beta * scale)

    def traced(self) -> dict[str, Any]:
        return {"top_se": np.int32(self.top_se), "top_osm": np.int32(self.top_osm), "retention": np.float32(self.retention),
                "alpha": np.float32(self.alpha), "beta": np.float32(self.beta), "zero": np.int32(0)}


@functools.partial(jax.jit, static_argnames=("importance", "combine", "dtype", "rounding"), donate_argnums=0)
def patch_matrices(theta, derived, sensitivity, keys, knobs, *, importance: str, combine: str, dtype: str,
                   rounding: str = "nearest"):
    """Patch all layers of one weight.

    Args:
      theta: backbone, [L, out, in] (or [L, n]), storage dtype; donated.
      derived: {'se', 'osm'}: derived models, float32, same shape.
      sensitivity: {'se', 'osm'}: sums of |gradient|, float32, same shape.
      keys: {'se', 'osm', 'rounding'}: uint32 [L, 2].
      knobs: see `Knobs.traced`.
      importance, combine: see PatchSettings.
      dtype: storage dtype of the result; the one cast is to it, at the end.
      rounding: of the changed entries in that cast, nearest or stochastic; the others are rounded to nearest.

    Returns:
      (merged weight in that dtype, statistics {name: [L]}).
    """
    def one_layer(layer):
        backbone, derived, sensitivity, keys = layer
        patch = {r: derived[r] - backbone.astype(jnp.float32) for r in ROLES}
        score = {r: jnp.abs(patch[r] if importance == "delta" else derived[r]) * sensitivity[r] for r in ROLES}
        finite = jnp.all(jnp.isfinite(score["se"]) & jnp.isfinite(score["osm"]))
        top = {r: top_mask(score[r], knobs[f"top_{r}"]) for r in ROLES}
        candidates = dict(zip(ROLES, combine_sets(top["se"], top["osm"], combine)))
        kept = {r: candidates[r] & retained(keys[r], backbone.shape, knobs["retention"]) for r in ROLES}
        merged = backbone.astype(jnp.float32)
        for role, weight in (("se", knobs["alpha"]), ("osm", knobs["beta"])):
            merged = jnp.where(kept[role], merged + _rounded(weight * patch[role], knobs["zero"]), merged)
        changed = kept["se"] | kept["osm"]
        untouched = backbone.astype(dtype)
        merged = jnp.where(changed, cast(merged, dtype, rounding, keys["rounding"]), untouched)
        count = lambda mask: jnp.sum(mask, dtype=jnp.int32)
        statistics = {
            "top_se": count(top["se"]), "top_osm": count(top["osm"]), "top_both": count(top["se"] & top["osm"]),
            "kept_se": count(kept["se"]), "kept_osm": count(kept["osm"]), "kept": count(changed),
            "survived": count(changed & (merged != untouched)),
            "nonzero_se": count(patch["se"] != 0), "nonzero_osm": count(patch["osm"] != 0),
            "largest_se": jnp.max(jnp.abs(patch["se"])), "largest_osm": jnp.max(jnp.abs(patch["osm"])),
            "finite": finite, "finite_merged": jnp.all(jnp.isfinite(merged)),
        }
        return merged, statistics

    return lax.map(one_layer, (theta, derived, sensitivity, keys))


def _rounded(product: jax.Array, zero: jax.Array) -> jax.Array:
    """Round a product to float32 before it is added: a zero that the compiler does not know keeps it from fusing
    product and sum to one FMA, which some machines would do and others not."""
    return lax.bitcast_convert_type(lax.bitcast_convert_type(product, jnp.int32) ^ zero, jnp.float32)


def apply_patching(backbone: Mapping[str, jax.Array], derived: Mapping[str, Mapping[str, jax.Array]],
                   sensitivity: Mapping[str, Mapping[str, jax.Array]], rows: Sequence[Param], patch: PatchSettings,
                   seed: int, sharder: Sharder, title: str, dtype: str = "keep", rounding: str = "nearest",
                   ) -> tuple[dict[str, jax.Array], dict[str, dict[str, Any]]]:
    """Patch the backbone.

    Args:
      backbone: flat ``{path: array}``; the patched entries are donated and must not be used again.
      derived: {'se', 'osm'}: flat parameters of the two derived models, float32.
      sensitivity: {'se', 'osm'}: see `SensitivityMeter.measure`.
      rows: the scope.
      patch: settings.
      seed: of the random retention and the stochastic rounding.
      sharder: the mesh.
      title: shown at the progress bar.
      dtype: storage dtype of the result; 'keep' is the backbone's.
      rounding: see `patch_matrices`.

    Returns:
      (flat ``{path: array}`` over the scope, statistics ``{HF name: {name: number}}``; see also `refuse_no_op`).

    Raises:
      ValueError: NaN or infinite scores or merged weights (names the tensors).
    """
    merged, statistics = {}, {}
    with progress(len(rows), title, "weight") as bar:
        for row in rows:
            keys = {role: tensor_keys(seed, role, row.hf_names) for role in (*ROLES, "rounding")}
            matrices = lambda tree: {role: row.as_matrices(tree[role][row.path]) for role in ROLES}
            result, stats = patch_matrices(
                row.as_matrices(backbone[row.path]), matrices(derived), matrices(sensitivity), keys,
                Knobs.of(patch, math.prod(row.hf_shape)).traced(), importance=patch.importance, combine=patch.combine,
                dtype=str(backbone[row.path].dtype) if dtype == "keep" else dtype, rounding=rounding)
            merged[row.path] = jax.device_put(
                row.from_matrices(result), sharder.sharding(row.axes, row.shape, row.path))
            stats = {name: np.asarray(values) for name, values in stats.items()}
            for layer, hf_name in enumerate(row.hf_names):
                statistics[hf_name] = {"size": math.prod(row.hf_shape)} | {n: v[layer].item() for n, v in stats.items()}
            bar.update()
    _refuse_broken(statistics)
    return merged, statistics


def totals(statistics: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Sum the statistics of all tensors and derive the overlap and the survival of the cast.

    `overlap` is the Jaccard index of the two top sets; `survival` the share of kept entries whose stored bits changed.
    """
    names = ("size", "top_se", "top_osm", "top_both", "kept_se", "kept_osm", "kept", "survived")
    total = {name: sum(s[name] for s in statistics.values()) for name in names}
    union = total["top_se"] + total["top_osm"] - total["top_both"]
    total["overlap"] = total["top_both"] / union if union else 0.0
    total["survival"] = total["survived"] / total["kept"] if total["kept"] else 0.0
    for role in ROLES:
        total[f"largest_{role}"] = max(s[f"largest_{role}"] for s in statistics.values())
    return total


def _refuse_broken(statistics: Mapping[str, Mapping[str, Any]]) -> None:
    if broken := [name for name, s in statistics.items() if not s["finite"]]:
        raise ValueError(f"The importance scores of {len(broken)} tensors are NaN or infinite, first {broken[0]}: a "
                         "derived model or its gradients overflowed. Lower derive.*_learning_rate.")
    if broken := [name for name, s in statistics.items() if not s["finite_merged"]]:
        raise ValueError(f"The merged weights of {len(broken)} tensors are NaN or infinite in the storage dtype, first "
                         f"{broken[0]}. Lower patch.alpha and patch.beta, or use export.dtype=float32.")


def refuse_no_op(statistics: Mapping[str, Mapping[str, Any]], patch: PatchSettings) -> None:
    """Raise ValueError if the result would equal the backbone, saying why (METHOD 4.6)."""
    for role in ROLES:
        if not any(s[f"nonzero_{role}"] for s in statistics.values()):
            raise ValueError(f"The {role.upper()} patch is zero everywhere: the derived model equals the backbone. Raise "
                             f"derive.{role}_steps or derive.{role}_learning_rate.")
    total = totals(statistics)
    if not total["kept"]:
        raise ValueError(
            f"No entry is kept (top sets: SE {total['top_se']}, OSM {total['top_osm']}, in both {total['top_both']}; "
            f"combine '{patch.combine}', retention {patch.retention:g}), so the result would equal the backbone. Raise "
            "patch.top_rate_se, patch.top_rate_osm or patch.retention.")
    if not total["survived"]:
        raise ValueError("Every kept entry is lost when cast to the storage dtype, so the result would equal the backbone. "
                         "Use export.dtype=float32, export.rounding=stochastic, or larger learning rates.")
