"""How the two patches stand to each other before anything is selected: angle, signs and norms.

They are trained on the same data with opposite sign. A cosine near -1 says that they move the model
along one line, whatever is selected; norms far apart say that one of them weighs more at equal
alpha and beta.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from safepatch_jax.patching import PATCH_ROLES
from safepatch_jax.patching.selection import float_bits, reduce_together

_COUNTS = ("nonzero_both", "same_sign")
_FRACTION = 24  # bits of a scaled product behind the point; it is below 4
_LOW, _PART = 13, 11  # bits of the limbs of a number, and of a row's sum
SUMMED = 1 << 18  # entries whose limbs are summed without overflow
_SHIFTS = (0, _PART, 2 * _PART, _LOW, _LOW + _PART, _LOW + 2 * _PART)


def agreement_sums(patch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Sum up within the compiled program what `agreement` reads; int32.

    nonzero_both, same_sign: entries that both patches change, and those of them with equal sign;
    exponent_{r}: of the largest |patch| of a role; square_{r}, product: sums, see `_exact_sums`, of
    patch^2 and of the product of both, each patch divided by 2^exponent.

    Args:
      patch: {'se', 'osm'}: float32, at most 2^18 entries along the last axis and 2^20 along the
        others.
    """
    counts, largest, _ = reduce_together(
        both_changed(patch), {role: float_bits(patch[role]) for role in PATCH_ROLES}, {}
    )
    return dict(counts) | agreement_squares(patch, largest)


def both_changed(patch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Return what `agreement_sums` counts, bool."""
    both = (patch["se"] != 0) & (patch["osm"] != 0)
    return {"nonzero_both": both, "same_sign": both & ((patch["se"] > 0) == (patch["osm"] > 0))}


def agreement_squares(
    patch: Mapping[str, jax.Array], largest: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """Return the exponents and sums of `agreement_sums`, whose bounds hold, but not for arrays of
    one axis. `largest`: bits of the largest |patch|."""
    sums, scales = {}, {}
    for role in PATCH_ROLES:
        # The inverse power of two is a normal number too.
        exponent = jnp.clip((largest[role] >> 23) - 127, -126, 126)
        scales[role] = lax.bitcast_convert_type((127 - exponent) << 23, jnp.float32)
        sums[f"exponent_{role}"] = exponent
    parts = [patch]
    if patch["se"].ndim == 1:  # in parts; a CPU takes twice as long where it is made a matrix
        parts = []
        for start in range(0, len(patch["se"]), SUMMED):
            parts.append({role: x[start : start + SUMMED] for role, x in patch.items()})
    exact = []
    for part in parts:
        scaled = {role: x * scales[role] for role, x in part.items()}
        products = {f"square_{role}": x * x for role, x in scaled.items()}
        exact.append(_exact_sums(products | {"product": scaled["se"] * scaled["osm"]}))
    return sums | jax.tree.map(lambda *rows: sum(rows), *exact)


def _exact_sums(numbers: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Sum arrays of one shape of numbers below 4, each rounded to a multiple of 2^-24, exactly;
    int32 [6] each, which `_number` reads.

    Float32 sums would depend on the mesh, which orders them, and statistics do not. Whole numbers
    are summed in limbs that cannot overflow: first along rows (of as many last axes as 2^18 entries
    hold), then over the rows' sums, so that no more than one number a row, from each device that
    holds a part of it, crosses devices.
    """
    limbs = {}
    for name, x in numbers.items():
        whole = lax.round(x * 2.0**_FRACTION, lax.RoundingMethod.TO_NEAREST_EVEN).astype(jnp.int32)
        # The upper one carries the sign.
        limbs[f"low_{name}"], limbs[f"high_{name}"] = whole & (1 << _LOW) - 1, whole >> _LOW
    rows = _row_sums(limbs)
    mask, parts, result = (1 << _PART) - 1, {}, {}
    for name in numbers:
        for half, x in enumerate((rows[f"low_{name}"], rows[f"high_{name}"])):
            parts[name, 3 * half] = x & mask
            parts[name, 3 * half + 1] = x >> _PART & mask
            parts[name, 3 * half + 2] = x >> 2 * _PART
    sums = reduce_together(parts, {}, {})[0]
    for name in numbers:
        result[name] = jnp.stack([sums[name, i] for i in range(len(_SHIFTS))])
    return result


def _row_sums(limbs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Sum arrays of one shape along their rows; one number each where they have 2^18 entries at
    most."""
    shape = next(iter(limbs.values())).shape
    if math.prod(shape) <= SUMMED:
        return reduce_together(limbs, {}, {})[0]
    trailing = 1  # axes that make a row
    while math.prod(shape[-trailing - 1 :]) <= SUMMED:
        trailing += 1
    row = tuple(range(len(shape) - trailing, len(shape)))
    assert math.prod(shape[i] for i in row) <= SUMMED, shape
    assert math.prod(shape[:-trailing]) <= 1 << 20, shape
    return reduce_together(limbs, {}, {}, row)[0]


def _number(limbs: Sequence[int]) -> float:
    """Return a sum of `_exact_sums`."""
    return sum(limb << shift for limb, shift in zip(limbs, _SHIFTS)) * 2.0**-_FRACTION


def agreement(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return how the patches of a tensor stand to each other, from the sums over its parts, as
    Python's numbers.

    cosine: of the two patches; nonzero_both, same_sign: see `agreement_sums`; sign_agreement: their
    ratio; norm_se, norm_osm: L2; norm_ratio: SE's by OSM's. 0 stands for what is not defined.
    """
    return _figures(map(_of_part, parts))


def _of_part(part: Mapping[str, Any]) -> dict[str, float]:
    """Return the sums of one part as plain numbers."""
    exponents = {role: part[f"exponent_{role}"] for role in PATCH_ROLES}
    result = {name: part[name] for name in _COUNTS}
    for role in PATCH_ROLES:
        result[role] = math.ldexp(_number(part[f"square_{role}"]), 2 * exponents[role])
    product = math.ldexp(_number(part["product"]), sum(exponents.values()))
    return result | {"product": product}


def total_agreement(statistics: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what `agreement` does, of all tensors together, and the range of their cosines, least
    and largest; nothing if one of them has no such figures, as in runs of earlier versions."""
    statistics = list(statistics)
    if not statistics or not all("cosine" in s for s in statistics):
        return {}
    cosines = [s["cosine"] for s in statistics]
    ends = {"cosine_least": min(cosines), "cosine_largest": max(cosines)}
    return _figures(map(_of_tensor, statistics)) | ends


def _of_tensor(statistics: Mapping[str, Any]) -> dict[str, float]:
    """Return the sums that a tensor's figures stand for."""
    norms = {role: statistics[f"norm_{role}"] for role in PATCH_ROLES}
    result = {name: statistics[name] for name in _COUNTS}
    result |= {role: norm**2 for role, norm in norms.items()}
    return result | {"product": statistics["cosine"] * norms["se"] * norms["osm"]}


def _figures(sums: Iterable[Mapping[str, float]]) -> dict[str, Any]:
    """Return the figures of several parts, each with the two counts, the sum of squares of each
    patch and that of their products."""
    total = dict.fromkeys((*_COUNTS, *PATCH_ROLES, "product"), 0)
    for part in sums:
        for name in total:
            total[name] += part[name]
    # What is not finite makes sums of no meaning, also below 0; such patches are refused later on.
    norms = {role: math.sqrt(max(0.0, total[role])) for role in PATCH_ROLES}
    # Each is exact to a multiple of 2^-24, so their ratio may be just beyond 1.
    area = norms["se"] * norms["osm"]
    cosine = min(1.0, max(-1.0, total["product"] / area)) if area else 0.0
    return {
        "cosine": cosine,
        **{name: total[name] for name in _COUNTS},
        "sign_agreement": total["same_sign"] / max(1, total["nonzero_both"]),
        **{f"norm_{role}": norm for role, norm in norms.items()},
        "norm_ratio": norms["se"] / norms["osm"] if norms["osm"] else 0.0,
    }


def bearing(cosine: float) -> str:
    """Say in a few words what the cosine of the two patches means."""
    size, way = abs(cosine), "against each other" if cosine < 0 else "the same way"
    if size < 0.1:
        return "they are next to unrelated"
    share = f"{cosine**2:.0%} of either's squared norm lies along the other"
    return f"they point {'mostly' if size >= 0.7 else 'partly'} {way}: {share}"


def describe_agreement(total: Mapping[str, Any]) -> str:
    """Say in one line how the two patches stand to each other; `total` as `total_agreement` returns
    it."""
    return (
        f"SE and OSM patch before selection: cosine {total['cosine']:.3f}, signs equal in "
        f"{total['sign_agreement']:.1%} of {total['nonzero_both']:,} entries; norms "
        f"{total['norm_se']:.3g} and {total['norm_osm']:.3g}, SE / OSM {total['norm_ratio']:.3g}"
    )
