"""What the patch operation counts in each tensor, the totals, and the refusals that follow from
them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from safepatch_jax.patching import PATCH_ROLES
from safepatch_jax.patching.agreement import total_agreement
from safepatch_jax.patching.selection import NONE, float_bits, reduce_together
from safepatch_jax.patching.settings import PatchSettings

_BFLOAT16_BITS = 7  # of the mantissa: at |w| in [1, 2) one step is 2^-7
STEPS = range(-9, 7)  # powers of two of the histogram of steps
_STACK = 8  # words whose bits are counted together; below 16
SUMMED = ("size", "top_se", "top_osm", "top_both", "kept_se", "kept_osm", "kept", "survived")


def tensor_statistics(
    patch: Mapping[str, jax.Array],
    importance: Mapping[str, jax.Array],
    top: Mapping[str, jax.Array],
    kept: Mapping[str, jax.Array],
    merged: jax.Array,
    stored: jax.Array,
    more: Mapping[str, jax.Array] | None = None,
    whole: bool = False,
) -> dict[str, jax.Array]:
    """Count within the compiled program; scalars, in which {r} is a role.

    top_{r}, top_both, kept_{r}, kept: sizes of the top sets, their overlap, the kept sets, their
    union; survived: kept entries whose stored bits changed; threshold_{r}: smallest importance in
    the top set; nonzero_{r}, largest_{r}: of the whole patch; low_{r}, high_{r}: smallest and
    largest |patch| that is kept (0 where a set is empty); steps_{r}: int32, how many of the kept
    |patch| are at least 2^k bfloat16 steps of their weight, for k in STEPS; finite, finite_merged.

    Args:
      patch, importance, top, kept: by role; as `merged` and `stored` of one shape.
      more: bool, counted too under their names.
      whole: the arrays are not cut over devices; on CPU steps are then counted faster.
    """
    changed, untouched = kept["se"] | kept["osm"], stored.astype(merged.dtype)
    sums = dict(more or {}) | {
        "top_both": top["se"] & top["osm"],
        "kept": changed,
        "survived": changed & (_bits(merged) != _bits(untouched)),
        "finite": ~(jnp.isfinite(importance["se"]) & jnp.isfinite(importance["osm"])),
        "finite_merged": ~jnp.isfinite(merged),
    }
    largest, smallest = {}, {}
    for role in PATCH_ROLES:
        sums[f"top_{role}"] = top[role]
        sums[f"kept_{role}"] = kept[role]
        sums[f"nonzero_{role}"] = patch[role] != 0
        size = float_bits(patch[role])
        largest[f"largest_{role}"] = size
        largest[f"high_{role}"] = jnp.where(kept[role], size, 0)
        ranked = float_bits(importance[role])
        smallest[f"threshold_{role}"] = jnp.where(top[role], ranked, NONE)
        smallest[f"low_{role}"] = jnp.where(kept[role], size, NONE)
    steps = _packed(patch, kept, stored)
    packed = whole and steps.size % _STACK == 0
    if not packed:
        sums |= {f"bit_{i:02}": steps >> i & 1 != 0 for i in range(32)}
    counts, highest, lowest = reduce_together(sums, largest, smallest)
    if packed:
        bits = _count_bits(steps)
    else:
        bits = [counts.pop(f"bit_{i:02}") for i in range(32)]
    for i, role in enumerate(PATCH_ROLES):
        counts[f"steps_{role}"] = jnp.stack(bits[i * len(STEPS) : (i + 1) * len(STEPS)])
    for name in ("finite", "finite_merged"):
        counts[name] = counts[name] == 0  # what was counted is not finite
    return counts | {name: _number(bits) for name, bits in (highest | lowest).items()}


def _packed(
    patch: Mapping[str, jax.Array], kept: Mapping[str, jax.Array], stored: jax.Array
) -> jax.Array:
    """Return a word for each entry, uint32: bit 16 i + j says of role i that the entry is kept and
    its patch is at least 2^STEPS[j] steps."""
    word, weight = jnp.uint32(0), _exponent(stored.astype(jnp.float32))
    for i, role in enumerate(PATCH_ROLES):
        # A power of two is at most |x| exactly if its exponent is at most that of x.
        reached = _exponent(patch[role]) - weight + (_BFLOAT16_BITS - STEPS.start + 1)
        reached = jnp.where(kept[role], jnp.clip(reached, 0, len(STEPS)), 0).astype(jnp.uint32)
        word |= (jnp.uint32(1) << reached) - 1 << i * len(STEPS)
    return word


def _count_bits(words: jax.Array) -> list[jax.Array]:
    """Count each bit of uint32 words: first of a few words together, in four bits a count."""
    stacked, sums = words.reshape(_STACK, -1), {}
    for first in range(4):  # of every fourth bit
        few = sum(stacked[i] >> first & jnp.uint32(0x11111111) for i in range(_STACK))
        for bit in range(first, 32, 4):
            sums[f"{bit:02}"] = (few >> bit - first & 15).astype(jnp.int32)
    counts = reduce_together(sums, {}, {})[0]
    return [counts[name] for name in sorted(counts)]


def _exponent(x: jax.Array) -> jax.Array:
    return float_bits(x) >> 23


def _number(bits: jax.Array) -> jax.Array:
    """Return the float32 of these bits, 0 for the bits of an empty set."""
    return lax.bitcast_convert_type(jnp.where(bits == NONE, 0, bits), jnp.float32)


def combine_statistics(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Combine the statistics of a tensor's parts, as Python's numbers, to those of the tensor."""
    rules = {"finite": all, "largest": max, "high": max}
    sets = {"low": "kept", "threshold": "top"}  # 0 stands for an empty set, and for a 0 in it
    result = {}
    for name in parts[0]:
        kind, _, role = name.partition("_")
        if kind == "steps":
            result[name] = _sums([part[name] for part in parts])
        elif kind in sets:
            values = [part[name] for part in parts if part[f"{sets[kind]}_{role}"]]
            result[name] = min(values, default=0.0)
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
    stored bits changed. `low_*` and `high_*` are the range of |patch| over all kept entries. See
    also `total_agreement`.
    """
    tensors = statistics.values()
    total: dict[str, Any] = {}
    for name in SUMMED:
        total[name] = sum(s[name] for s in tensors)
    total["overlap"] = overlap(total)
    total["survival"] = total["survived"] / total["kept"] if total["kept"] else 0.0
    for role in PATCH_ROLES:
        total[f"steps_{role}"] = _sums([s[f"steps_{role}"] for s in tensors])
        lows = [s[f"low_{role}"] for s in tensors if s[f"kept_{role}"]]
        total[f"low_{role}"] = min(lows, default=0.0)
        for name in (f"high_{role}", f"largest_{role}"):
            total[name] = max(s[name] for s in tensors)
    return total | total_agreement(tensors)


def describe_totals(total: Mapping[str, Any]) -> str:
    """Say in one line what a patch keeps; `total` as `totals` returns it."""
    return (
        f"kept {total['kept']:,} of {total['size']:,} entries (SE {total['kept_se']:,}, OSM "
        f"{total['kept_osm']:,}); overlap of the top sets {total['overlap']:.1%}; "
        f"{total['survival']:.1%} survive the cast"
    )


def _sums(histograms: Sequence[Sequence[int]]) -> list[int]:
    """Add up histograms, bin by bin."""
    return [sum(counts) for counts in zip(*histograms)]


_SHARE = 0.01  # of the other's entries: fewer are next to nothing


class BadSettings(ValueError):
    """Patch settings, not the models, make a result of no use."""


def refuse_broken_importance(names: Sequence[str]) -> None:
    """Raise ValueError if there are tensors with an importance that is NaN or infinite."""
    if names:
        raise ValueError(
            f"The importance of entries in {len(names)} tensors is NaN or infinite, first "
            f"{names[0]}: a derived model or its gradients overflowed. Lower "
            "derive.*_learning_rate."
        )


def refuse_broken(statistics: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ValueError if an importance or a merged weight (BadSettings) is NaN or infinite, naming
    a tensor."""
    refuse_broken_importance([name for name, s in statistics.items() if not s["finite"]])
    broken = [name for name, s in statistics.items() if not s["finite_merged"]]
    if broken:
        raise BadSettings(
            f"The merged weights of {len(broken)} tensors are NaN or infinite in the storage "
            f"dtype, first {broken[0]}. Lower patch.alpha and patch.beta, or use "
            "export.dtype=float32."
        )


def _lost_role(total: Mapping[str, Any], patch: PatchSettings) -> str | None:
    """Return the role that SafePatching was to merge, and of which no entry is kept because none
    could be."""
    asked = _asked(patch)
    for role in PATCH_ROLES:
        candidates = total[f"top_{role}"]
        if patch.combine == "difference":
            candidates -= total["top_both"]
        kept = total[f"kept_{role}"]
        if patch.merge == "safepatching" and asked[role] and not (candidates or kept):
            return role
    return None


def _asked(patch: PatchSettings) -> dict[str, float]:
    """Return for each role whether the settings want entries of it: a number above 0, or 0."""
    return {"se": patch.alpha and patch.top_rate_se, "osm": patch.beta and patch.top_rate_osm}


def one_sided(total: Mapping[str, Any], patch: PatchSettings) -> str:
    """Return a warning where SafePatching keeps of one patch next to nothing beside the other, so
    that the result is nearly the other patch alone; '' else. `total` as `totals` returns it."""
    if patch.merge != "safepatching" or not all(_asked(patch).values()):
        return ""
    for role, other in (PATCH_ROLES, PATCH_ROLES[::-1]):
        few, many = total[f"kept_{role}"], total[f"kept_{other}"]
        if few < _SHARE * many:
            return (
                f"WARNING: {few:,} entries of the {role.upper()} patch are kept and {many:,} of "
                f"the {other.upper()} patch, so the result is nearly the {other.upper()} patch "
                "alone. Change patch.top_rate_se and patch.top_rate_osm."
            )
    return ""


def refuse_no_op(statistics: Mapping[str, Mapping[str, Any]], patch: PatchSettings) -> None:
    """Raise ValueError if the result would equal the backbone, or the backbone with one of
    SafePatching's two patches because nothing of the other could be kept, saying why; BadSettings
    where it lies with the patch settings. See also `one_sided`."""
    for role in PATCH_ROLES:
        if not any(s[f"nonzero_{role}"] for s in statistics.values()):
            raise ValueError(
                f"The {role.upper()} patch is zero everywhere: the derived model equals the "
                f"backbone. Raise derive.{role}_steps or derive.{role}_learning_rate."
            )
    total = totals(statistics)
    sets = (
        f"(top sets: SE {total['top_se']}, OSM {total['top_osm']}, in both {total['top_both']}; "
        f"combine '{patch.combine}', retention {patch.retention:g})"
    )
    if not total["kept"]:
        limits = ("top_rate_se", "top_rate_osm", "density", "retention")
        names = [f"patch.{name}" for name in limits if name in patch.method.settings]
        fix = f"Raise {', '.join(names)}." if names else "Raise derive.*_learning_rate."
        raise BadSettings(
            f"No entry is kept by '{patch.merge}' {sets}, so the result would equal the backbone. "
            f"{fix}"
        )
    if role := _lost_role(total, patch):
        raise BadSettings(
            f"No entry of the {role.upper()} patch is kept {sets}, so the result would be the "
            "other patch alone. Change patch.top_rate_se and patch.top_rate_osm, so that no top "
            "set holds the other. (A patch that is not wanted has the weight 0: patch.alpha is "
            "SE's, patch.beta OSM's.)"
        )
    if not total["survived"]:
        raise BadSettings(
            "Every kept entry is lost when cast to the storage dtype, so the result would equal "
            "the backbone. Use export.dtype=float32, export.rounding=stochastic, or larger "
            "learning rates."
        )
