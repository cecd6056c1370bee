"""What the patch operation counts in each tensor, the totals, and the refusals that follow from them."""

from __future__ import annotations

from typing import Any, Mapping

import jax
import jax.numpy as jnp
from jax import lax

from safepatch_jax.patching.layer import Choice
from safepatch_jax.patching.selection import ROLES, float_bits
from safepatch_jax.settings import PatchSettings

SUMMED = ("size", "top_se", "top_osm", "top_both", "kept_se", "kept_osm", "kept", "survived")


def tensor_statistics(patch: Mapping[str, jax.Array], score: Mapping[str, jax.Array], choice: Choice, merged: jax.Array,
                      untouched: jax.Array) -> dict[str, jax.Array]:
    """Count within the compiled program; scalars, in which {r} is a role.

    top_{r}, top_both, kept_{r}, kept: sizes of the top sets, their overlap, the kept sets, their union; survived: kept
    entries whose stored bits changed; threshold_{r}: smallest score in the top set; nonzero_{r}, largest_{r}: of the whole
    patch; low_{r}, high_{r}: smallest and largest |patch| that is kept (0 where a set is empty); finite, finite_merged.
    """
    count = lambda mask: jnp.sum(mask, dtype=jnp.int32)
    changed = choice.kept["se"] | choice.kept["osm"]
    result = {
        "top_both": count(choice.top["se"] & choice.top["osm"]), "kept": count(changed),
        "survived": count(changed & (_bits(merged) != _bits(untouched))),
        "finite": jnp.all(jnp.isfinite(score["se"]) & jnp.isfinite(score["osm"])),
        "finite_merged": jnp.all(jnp.isfinite(merged)),
    }
    for r in ROLES:
        result |= {
            f"top_{r}": count(choice.top[r]), f"kept_{r}": count(choice.kept[r]), f"nonzero_{r}": count(patch[r] != 0),
            f"largest_{r}": jnp.max(jnp.abs(patch[r])), f"threshold_{r}": _smallest(score[r], choice.top[r]),
            f"low_{r}": _smallest(patch[r], choice.kept[r]),
            f"high_{r}": jnp.max(jnp.where(choice.kept[r], jnp.abs(patch[r]), 0.0)),
        }
    return result


def _bits(x: jax.Array) -> jax.Array:
    """Return the storage bits: comparing the numbers, a compiler might skip the cast that is to be looked at."""
    return lax.bitcast_convert_type(x, jnp.uint32 if x.dtype.itemsize == 4 else jnp.uint16)


def _smallest(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the smallest |x| of the mask, 0 if it is empty; on the bits, which order as the numbers do."""
    none = jnp.int32(0x7FFFFFFF)
    bits = jnp.min(jnp.where(mask, float_bits(x), none))
    return lax.bitcast_convert_type(jnp.where(bits == none, 0, bits), jnp.float32)


def overlap(s: Mapping[str, Any]) -> float:
    """Return the Jaccard index of the two top sets, 0 where both are empty."""
    union = s["top_se"] + s["top_osm"] - s["top_both"]
    return s["top_both"] / union if union else 0.0


def totals(statistics: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Sum the statistics of all tensors and derive the overlap and the survival of the cast.

    `overlap` is the Jaccard index of the two top sets; `survival` the share of kept entries whose stored bits changed.
    `low_*` and `high_*` are the range of |patch| over all kept entries.
    """
    tensors = statistics.values()
    total = {name: sum(s[name] for s in tensors) for name in SUMMED}
    total["overlap"] = overlap(total)
    total["survival"] = total["survived"] / total["kept"] if total["kept"] else 0.0
    for role in ROLES:
        total[f"low_{role}"] = min((s[f"low_{role}"] for s in tensors if s[f"kept_{role}"]), default=0.0)
        for name in (f"high_{role}", f"largest_{role}"):
            total[name] = max(s[name] for s in tensors)
    return total


def refuse_broken(statistics: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ValueError if scores or merged weights are NaN or infinite, naming a tensor."""
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
            f"No entry is kept by '{patch.merge}' (top sets: SE {total['top_se']}, OSM {total['top_osm']}, in both "
            f"{total['top_both']}; combine '{patch.combine}', retention {patch.retention:g}), so the result would equal the "
            "backbone. " + ("Raise patch.top_rate_se, patch.top_rate_osm or patch.retention." if patch.merge == "safepatching"
                            else "Raise patch.density or patch.retention."))
    if not total["survived"]:
        raise ValueError("Every kept entry is lost when cast to the storage dtype, so the result would equal the backbone. "
                         "Use export.dtype=float32, export.rounding=stochastic, or larger learning rates.")
