"""What the patch operation counts in each tensor, the totals, and the refusals that follow from
them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from safepatch_jax.patching.selection import ROLES, float_bits, reduce_together
from safepatch_jax.settings import PatchSettings

_NONE = 0x7FFFFFFF  # above the bits of every number
_BFLOAT16_BITS = 7  # of the mantissa: at |w| in [1, 2) one step is 2^-7
STEPS = range(-9, 7)  # powers of two of the histogram of steps
SUMMED = ("size", "top_se", "top_osm", "top_both", "kept_se", "kept_osm", "kept", "survived")


def tensor_statistics(
    patch: Mapping[str, jax.Array],
    score: Mapping[str, jax.Array],
    top: Mapping[str, jax.Array],
    kept: Mapping[str, jax.Array],
    merged: jax.Array,
    stored: jax.Array,
) -> dict[str, jax.Array]:
    """Count within the compiled program; scalars, in which {r} is a role.

    top_{r}, top_both, kept_{r}, kept: sizes of the top sets, their overlap, the kept sets, their
    union; survived: kept entries whose stored bits changed; threshold_{r}: smallest score in the
    top set; nonzero_{r}, largest_{r}: of the whole patch; low_{r}, high_{r}: smallest and largest
    |patch| that is kept (0 where a set is empty); steps_{r}: int32, how many of the kept |patch| are at least 2^k bfloat16 steps of their weight, for k in STEPS; finite, finite_merged.
    """
    changed, untouched = kept["se"] | kept["osm"], stored.astype(merged.dtype)
    broken = ~(jnp.isfinite(score["se"]) & jnp.isfinite(score["osm"]))
    sums = {
        "top_both": top["se"] & top["osm"],
        "kept": changed,
        "survived": changed & (_bits(merged) != _bits(untouched)),
        "finite": broken,
        "finite_merged": ~jnp.isfinite(merged),
    }
    largest, smallest = {}, {}
    exponent = lambda x: float_bits(x) >> 23
    # A power of two is at most |x| exactly if its exponent is at most that of x.
    in_steps = {
        r: exponent(patch[r]) - exponent(stored.astype(jnp.float32)) + _BFLOAT16_BITS for r in ROLES
    }
    for r in ROLES:
        sums |= {f"steps_{r}_{k}": kept[r] & (in_steps[r] >= k) for k in STEPS}
        sums |= {f"top_{r}": top[r], f"kept_{r}": kept[r], f"nonzero_{r}": patch[r] != 0}
        size = float_bits(patch[r])
        largest |= {f"largest_{r}": size, f"high_{r}": jnp.where(kept[r], size, 0)}
        smallest |= {
            f"threshold_{r}": jnp.where(top[r], float_bits(score[r]), _NONE),
            f"low_{r}": jnp.where(kept[r], size, _NONE),
        }
    counted, highest, lowest = reduce_together(sums, largest, smallest)
    number = lambda bits: lax.bitcast_convert_type(jnp.where(bits == _NONE, 0, bits), jnp.float32)
    counted |= {
        f"steps_{r}": jnp.stack([counted.pop(f"steps_{r}_{k}") for k in STEPS]) for r in ROLES
    }
    finite = {name: counted.pop(name) == 0 for name in ("finite", "finite_merged")}
    return counted | finite | {name: number(bits) for name, bits in (highest | lowest).items()}


def combine_statistics(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Combine the statistics of a tensor's parts, as Python's numbers, to those of the tensor."""
    rules = {"finite": all, "largest": max, "high": max}
    sets = {"low": "kept", "threshold": "top"}  # 0 stands for an empty set, and for a 0 in it
    result = {}
    for name in parts[0]:
        kind, _, role = name.partition("_")
        if kind == "steps":
            result[name] = [sum(counts) for counts in zip(*(part[name] for part in parts))]
        elif kind in sets:
            result[name] = min(
                (part[name] for part in parts if part[f"{sets[kind]}_{role}"]), default=0.0
            )
        else:
            result[name] = rules.get(kind, sum)(part[name] for part in parts)
    return result


def _bits(x: jax.Array) -> jax.Array:
    """Return the storage bits: comparing the numbers, a compiler might skip the cast that is to be
    looked at."""
    return lax.bitcast_convert_type(x, jnp.uint32 if x.dtype.itemsize == 4 else jnp.uint16)


def overlap(s: Mapping[str, Any]) -> float:
    """Return the Jaccard index of the two top sets, 0 where both are empty."""
    union = s["top_se"] + s["top_osm"] - s["top_both"]
    return s["top_both"] / union if union else 0.0


def totals(statistics: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Sum the statistics of all tensors and derive the overlap and the survival of the cast.

    `overlap` is the Jaccard index of the two top sets; `survival` the share of kept entries whose
    stored bits changed. `low_*` and `high_*` are the range of |patch| over all kept entries.
    """
    tensors = statistics.values()
    total = {name: sum(s[name] for s in tensors) for name in SUMMED}
    total["overlap"] = overlap(total)
    total["survival"] = total["survived"] / total["kept"] if total["kept"] else 0.0
    for role in ROLES:
        total[f"steps_{role}"] = [
            sum(counts) for counts in zip(*(s[f"steps_{role}"] for s in tensors))
        ]
        total[f"low_{role}"] = min(
            (s[f"low_{role}"] for s in tensors if s[f"kept_{role}"]), default=0.0
        )
        for name in (f"high_{role}", f"largest_{role}"):
            total[name] = max(s[name] for s in tensors)
    return total


class BadSettings(ValueError):
    """Patch settings, not the models, make a result of no use."""


def refuse_broken(statistics: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ValueError if scores or merged weights (BadSettings) are NaN or infinite, naming a
    tensor."""
    if broken := [name for name, s in statistics.items() if not s["finite"]]:
        raise ValueError(
            f"The importance scores of {len(broken)} tensors are NaN or infinite, first "
            f"{broken[0]}: a "
            "derived model or its gradients overflowed. Lower derive.*_learning_rate."
        )
    if broken := [name for name, s in statistics.items() if not s["finite_merged"]]:
        raise BadSettings(
            f"The merged weights of {len(broken)} tensors are NaN or infinite in the storage "
            "dtype, first "
            f"{broken[0]}. Lower patch.alpha and patch.beta, or use export.dtype=float32."
        )


def refuse_no_op(statistics: Mapping[str, Mapping[str, Any]], patch: PatchSettings) -> None:
    """Raise ValueError if the result would equal the backbone, saying why; BadSettings where it
    lies with the patch settings."""
    for role in ROLES:
        if not any(s[f"nonzero_{role}"] for s in statistics.values()):
            raise ValueError(
                f"The {role.upper()} patch is zero everywhere: the derived model equals the "
                "backbone. Raise "
                f"derive.{role}_steps or derive.{role}_learning_rate."
            )
    total = totals(statistics)
    if not total["kept"]:
        raise BadSettings(
            f"No entry is kept by '{patch.merge}' (top sets: SE {total['top_se']}, OSM "
            f"{total['top_osm']}, in both "
            f"{total['top_both']}; combine '{patch.combine}', retention {patch.retention:g}), so "
            "the result would equal the "
            "backbone. "
            + (
                "Raise patch.top_rate_se, patch.top_rate_osm or patch.retention."
                if patch.merge == "safepatching"
                else "Raise patch.density or patch.retention."
            )
        )
    if not total["survived"]:
        raise BadSettings(
            "Every kept entry is lost when cast to the storage dtype, so the result would equal "
            "the backbone. "
            "Use export.dtype=float32, export.rounding=stochastic, or larger learning rates."
        )
