"""The merging methods, one row each in `MERGE_METHODS`: what a method keeps of the two patches, and
with what weight.

Every method is theta + sum over both patches of weight * patch[kept], in float32, SE first, with
one cast at the end; an entry that it does not keep has the backbone's bits. `alpha` and `beta`
weigh the SE and the OSM patch in all of them. The random bits are the same in all methods that
retain at random.

The rows say all there is to say about a method: settings, flags, the patch program, reports and the
comparison read them. So this module needs no JAX: methods are written with what `Tensor` offers and
with Python's operators. docs/compare.md shows how to add one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from safepatch_jax.option import row_of
from safepatch_jax.patching import PATCH_ROLES
from safepatch_jax.patching.importances import IMPORTANCES

if TYPE_CHECKING:
    import jax

    from safepatch_jax.patching.tensor import Tensor


class Choice(NamedTuple):
    """A method's decision: theta + sum over roles of weight * patch[kept].

    Attributes:
      top: {role: bool}: entries that the method considers before it combines or drops any.
      kept: {role: bool}: entries whose patch is added.
      weight: {role: float32 scalar or array}.
    """

    top: Mapping[str, jax.Array]
    kept: Mapping[str, jax.Array]
    weight: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class MergeMethod:
    """A row of `MERGE_METHODS`.

    Attributes:
      name: patch.merge.
      label: in reports.
      function: what it decides about a tensor.
      help: in a few words, for --help.
      ranks: how `Tensor.top_sets` ranks entries: by patch.importance (at the two top rates), by
        magnitude (at patch.density), or None where every entry of a patch is in its top set.
      settings: options of the patch group that it takes.
      linear: whether the kept entries do not depend on alpha and beta, and both weigh.
      divides: whether what is kept is divided by patch.retention (where `settings` has rescale,
        that option decides).
      comparison: {option: value} that it has in a comparison instead of the run's values.
    """

    name: str
    label: str
    function: Callable[[Tensor], Choice]
    help: str
    ranks: Literal["importance", "magnitude"] | None = None
    settings: tuple[str, ...] = ("alpha", "beta")
    linear: bool = True
    divides: bool = False
    comparison: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def safepatching(tensor: Tensor) -> Choice:
    """Combine the two top sets, retain at random, weigh with alpha and beta."""
    top = tensor.top_sets()
    candidates = combine_sets(top["se"], top["osm"], tensor.combined())
    candidates = dict(zip(PATCH_ROLES, candidates))
    if tensor.options.support == "fill":
        kept = tensor.filled(candidates, top)
    else:
        kept = tensor.retained(candidates)
    return Choice(top, kept, tensor.weights())


def average(tensor: Tensor) -> Choice:
    """Add half of each patch."""
    top = tensor.nonzero()
    return Choice(top, top, {role: 0.5 * weight for role, weight in tensor.weights().items()})


def task_arithmetic(tensor: Tensor) -> Choice:
    """Add both patches (Ilharco et al. 2023)."""
    top = tensor.nonzero()
    return Choice(top, top, tensor.weights())


def ties(tensor: Tensor) -> Choice:
    """Trim each patch to its largest entries, elect a sign for each entry, and average the patches
    that have it (Yadav et al. 2023)."""
    top = tensor.top_sets()
    return Choice(top, *tensor.elected(top))


def dare(tensor: Tensor) -> Choice:
    """Drop entries of each patch at random and divide the others by the share that is kept (Yu et
    al. 2024)."""
    top = tensor.nonzero()
    return Choice(top, tensor.retained(top), tensor.weights())


def dare_ties(tensor: Tensor) -> Choice:
    """Drop at random instead of trimming, then elect and average as TIES does [choice, as in
    mergekit]."""
    top = tensor.nonzero()
    return Choice(top, *tensor.elected(tensor.retained(top)))


def resta(tensor: Tensor) -> Choice:
    """Subtract the OSM patch, which points away from safety (Bhardwaj et al. 2024).

    RESTA's gamma is beta: theta + gamma * (theta - theta_OSM).
    """
    top = tensor.nonzero() | {"se": tensor.no_entries()}
    return Choice(top, tensor.retained(top), {"se": 0.0, "osm": -tensor.weights()["osm"]})


def combine_sets(
    se: jax.Array, osm: jax.Array, combine: str | tuple[Any, Any]
) -> tuple[jax.Array, jax.Array]:
    """Return the candidate sets (SE, OSM) from the two top sets.

    Args:
      se, osm: bool, the top sets.
      combine: difference: what only one of them holds; intersection: what both hold, for both;
        union: each its own top set. Or what `combined` returns for it, which may be traced.
    """
    alone, shared = combined(combine) if isinstance(combine, str) else combine
    return se & (osm & shared | ~osm & alone), osm & (se & shared | ~se & alone)


def combined(combine: str) -> tuple[bool, bool]:
    """Return whether entries of one top set alone are candidates, and whether those of both are.

    Raises:
      ValueError: unknown name.
    """
    if combine not in _COMBINED:
        raise ValueError(f"unknown combine '{combine}'; one of {', '.join(_COMBINED)}.")
    return _COMBINED[combine]


_COMBINED = {"difference": (True, False), "intersection": (False, True), "union": (True, True)}
_EQUAL = {"alpha": 1.0, "beta": 1.0}  # in a comparison, not the weights SafePatching was given

MERGE_METHODS = {
    method.name: method
    for method in (
        MergeMethod(
            "safepatching",
            "SafePatching",
            safepatching,
            "top sets by importance, combined, retained at random",
            ranks="importance",
            settings=(
                "importance",
                "granularity",
                "top_rate_se",
                "top_rate_osm",
                "combine",
                "retention",
                "support",
                "rescale",
                "alpha",
                "beta",
            ),
        ),
        MergeMethod("average", "average", average, "half of each patch", comparison=_EQUAL),
        MergeMethod(
            "task_arithmetic", "task arithmetic", task_arithmetic, "both patches", comparison=_EQUAL
        ),
        MergeMethod(
            "ties",
            "TIES",
            ties,
            "the largest entries of each patch, then those of the elected sign",
            ranks="magnitude",
            settings=("alpha", "beta", "density", "granularity"),
            linear=False,  # both elect a sign by the weighted patches
            comparison=_EQUAL | {"granularity": "global"},  # as its authors trim
        ),
        MergeMethod(
            "dare",
            "DARE",
            dare,
            "a random share of each patch",
            settings=("alpha", "beta", "retention"),
            divides=True,
            comparison=_EQUAL,
        ),
        MergeMethod(
            "dare_ties",
            "DARE-TIES",
            dare_ties,
            "a random share of each patch, then the entries of the elected sign",
            settings=("alpha", "beta", "retention"),
            linear=False,
            divides=True,
            comparison=_EQUAL,
        ),
        MergeMethod(
            "resta",
            "RESTA",
            resta,
            "minus the OSM patch, beta is its gamma, retention below 1 adds DARE",
            settings=("beta", "retention"),
            linear=False,  # alpha has no part in it
            divides=True,
            comparison=_EQUAL | {"retention": 1.0},
        ),
    )
}


def merge_method(name: str) -> MergeMethod:
    """Return the row of a method. Raises ValueError: there is none (names the nearest)."""
    return row_of(MERGE_METHODS, name, "merging method (patch.merge)")


def describe(patch: Mapping[str, Any], mode: str) -> str:
    """Say in one line the settings that have a part in the merge.

    Args:
      patch: the settings of the patch group, by name.
      mode: score.mode.

    Raises:
      ValueError: unknown method or importance (with the nearest match).
    """
    method = merge_method(patch["merge"])
    weights = f"alpha = {patch['alpha']:g}, beta = {patch['beta']:g}, scope {patch['scope']}"
    if method.name == "safepatching":
        return f"{_selection(patch, mode)}, {weights}"
    parts = []
    for name in method.settings:
        if name not in ("alpha", "beta", "granularity"):
            parts.append(_setting(name, patch))
    if method.divides:
        parts.append("rescaled")
    return f"Merged by {method.label}: {', '.join([*parts, weights])}"


def _selection(patch: Mapping[str, Any], mode: str) -> str:
    """Describe which entries SafePatching keeps."""
    importance = row_of(IMPORTANCES, patch["importance"], "importance (patch.importance)")
    ranking = importance.without_snip or f"of '{importance.name}' ({mode})"
    support = "up to a share p" if patch["support"] == "fill" else "retained with probability p"
    rescaled = ", rescaled" if patch["rescale"] else ""
    return (
        f"a = {patch['top_rate_se']:g}, b = {patch['top_rate_osm']:g} per {patch['granularity']}, "
        f"{patch['combine']} of the top sets, {support} = {patch['retention']:g}{rescaled}, "
        f"importance {ranking}"
    )


def _setting(name: str, patch: Mapping[str, Any]) -> str:
    value = patch[name]
    text = f"{value:g}" if isinstance(value, float) else str(value)
    within = f" per {patch['granularity']}" if name == "density" else ""
    return f"{name} {text}{within}"
