"""What a patch keeps, apart from how it is weighed: selected once for many alphas and betas.

The kept entries of a linear method (`MergeMethod.linear`) do not depend on alpha and beta. So a
sweep selects them once and weighs them at each of its points, to the bits of
`merge.apply_patching`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from safepatch_jax.models.table import Param
from safepatch_jax.patching import PATCH_ROLES
from safepatch_jax.patching.merge import by_role, matrix_counts, row_keys
from safepatch_jax.patching.methods import MERGE_METHODS
from safepatch_jax.patching.options import Knobs, program_options
from safepatch_jax.patching.programs import (
    derived_and_patch,
    merge_tensor,
    patch_and_importance,
    stack,
)
from safepatch_jax.patching.settings import PatchSettings
from safepatch_jax.patching.tensor import ProgramOptions, Tensor
from safepatch_jax.runtime.console import progress

Trees = Mapping[str, Mapping[str, jax.Array]]  # by role, then by path
_WEIGHTS = ("alpha", "beta")


@dataclasses.dataclass(frozen=True)
class _Weighed(Tensor):
    """A tensor whose kept entries are known: every selection of a method gives them."""

    kept: Mapping[str, jax.Array]

    def top_sets(self) -> dict[str, jax.Array]:
        return dict(self.kept)

    def retained(self, masks: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        return dict(self.kept)

    def filled(
        self, candidates: Mapping[str, jax.Array], top: Mapping[str, jax.Array]
    ) -> dict[str, jax.Array]:
        return dict(self.kept)


@dataclasses.dataclass(frozen=True)
class KeptEntries:
    """The kept entries of a patch within its scope.

    Attributes:
      seed: of all random bits.
      packed: {path: {role: uint8 [L, ceil(n / 8)]}}, a bit an entry, row-major.
    """

    seed: int
    packed: Mapping[str, Mapping[str, jax.Array]]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(x.nbytes for x in jax.tree.leaves(dict(self.packed)))


def selection(patch: PatchSettings, seed: int) -> tuple | None:
    """Return what the kept entries follow from, beside the models; None where they cannot be told
    apart from their weights, or are shared out over the whole scope."""
    if not patch.method.linear or patch.ranks_whole_scope:
        return None
    options = dataclasses.asdict(patch)
    return seed, *((name, options[name]) for name in sorted(options.keys() - set(_WEIGHTS)))


def keep_entries(
    backbone: Mapping[str, jax.Array],
    derived: Trees,
    sensitivity: Trees,
    rows: Sequence[Param],
    patch: PatchSettings,
    seed: int,
    title: str,
) -> KeptEntries | None:
    """Select the entries that a patch keeps.

    Args:
      backbone, derived, sensitivity, rows, patch, seed, title: see `apply_patching`; nothing is
        donated, and `selection` must not be None.

    Returns:
      them; None where an importance is NaN or infinite, or a patch zero everywhere
      (`apply_patching` and `refuse_no_op` say what is wrong).
    """
    if not patch.needs_sensitivity:
        sensitivity = dict.fromkeys(PATCH_ROLES, dict.fromkeys(row.path for row in rows))
    counts, packed, finite, nonzero = matrix_counts(rows, patch), {}, [], []
    with progress(len(rows), title, "weight") as bar:
        for row in rows:
            packed[row.path], is_finite, is_nonzero = _keep(
                backbone[row.path],
                by_role(derived, row.path),
                by_role(sensitivity, row.path),
                row_keys(row, seed),
                by_role(counts, row.path),
                Knobs.of(patch, math.prod(row.hf_shape)).traced(),
                options=program_options(patch),
                shape=stack(row),
            )
            finite.append(is_finite)
            nonzero.append(is_nonzero)
            bar.update()
    sound = all(map(bool, finite)) and np.any(np.stack(nonzero), axis=0).all()
    return KeptEntries(seed, packed) if sound else None


def weigh_entries(
    kept: KeptEntries,
    backbone: Mapping[str, jax.Array],
    derived: Trees,
    rows: Sequence[Param],
    patch: PatchSettings,
    title: str,
    dtype: str = "keep",
    rounding: str = "nearest",
) -> dict[str, jax.Array] | None:
    """Merge kept entries with the weights of `patch`.

    Args:
      kept: see `keep_entries`; chosen by these settings.
      backbone, derived, rows, patch, title, dtype, rounding: see `apply_patching`; the patched
        entries of the backbone are donated.

    Returns:
      flat ``{path: array}`` over the scope; None where a merged weight is NaN or infinite or none
      has changed (`apply_patching` says which, and how to fix it).
    """
    merged, finite, changed = {}, [], []
    with progress(len(rows), title, "weight") as bar:
        for row in rows:
            stored = backbone[row.path]
            merged[row.path], is_finite, has_changed = _weigh(
                stored,
                by_role(derived, row.path),
                kept.packed[row.path],
                row_keys(row, kept.seed),
                Knobs.of(patch, math.prod(row.hf_shape)).traced(),
                options=program_options(patch),
                shape=stack(row),
                dtype=str(stored.dtype) if dtype == "keep" else dtype,
                rounding=rounding,
            )
            finite.append(is_finite)
            changed.append(has_changed)
            bar.update()
    return merged if all(map(bool, finite)) and any(map(bool, changed)) else None


@functools.partial(jax.jit, static_argnames=("options", "shape"))
def _keep(
    theta,
    derived,
    sensitivity,
    keys,
    counts,
    knobs,
    *,
    options: ProgramOptions,
    shape: tuple[int, ...],
) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    """Return (the kept entries of one weight in all blocks, packed; whether all importances are
    finite; which patches are not zero there, [2]); see `patch_matrices`."""

    def one_tensor(xs):
        stored, derived, sensitivity, keys, counts = xs
        patch, importance = patch_and_importance(stored, derived, sensitivity, keys, options)
        tensor = Tensor(patch, importance, keys, counts, knobs, options)
        kept = MERGE_METHODS[options.merge].function(tensor).kept
        finite = [jnp.all(jnp.isfinite(importance[role])) for role in PATCH_ROLES]
        packed = {role: jnp.packbits(kept[role].reshape(-1)) for role in PATCH_ROLES}
        nonzero = [jnp.any(patch[role] != 0) for role in PATCH_ROLES]
        return packed, jnp.all(jnp.stack(finite)), jnp.stack(nonzero)

    theta, derived, sensitivity = _in_matrices((theta, derived, sensitivity), shape)
    packed, finite, nonzero = lax.map(one_tensor, (theta, derived, sensitivity, keys, counts))
    return packed, jnp.all(finite), jnp.any(nonzero, axis=0)


@functools.partial(
    jax.jit, static_argnames=("options", "shape", "dtype", "rounding"), donate_argnums=0
)
def _weigh(
    theta,
    derived,
    packed,
    keys,
    knobs,
    *,
    options: ProgramOptions,
    shape: tuple[int, ...],
    dtype: str,
    rounding: str,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return (one weight in all blocks, merged and of its own shape; whether it is finite; whether
    any stored bit has changed)."""
    size = math.prod(shape[1:])

    def one_tensor(xs):
        stored, derived, packed, keys = xs
        patch, kept = derived_and_patch(stored, derived)[1], {}
        for role in PATCH_ROLES:
            kept[role] = jnp.unpackbits(packed[role], count=size).reshape(shape[1:]).astype(bool)
        tensor = _Weighed(patch, {}, keys, {}, knobs, options, kept)
        merged, _ = merge_tensor(tensor, stored, dtype, rounding)
        return merged, jnp.all(jnp.isfinite(merged)), jnp.any(merged != stored.astype(dtype))

    matrices, models = _in_matrices((theta, derived), shape)
    merged, finite, changed = lax.map(one_tensor, (matrices, models, packed, keys))
    return merged.reshape(theta.shape), jnp.all(finite), jnp.any(changed)


def _in_matrices(tree: Any, shape: tuple[int, ...]) -> Any:
    """View arrays as [L, *HF shape]."""
    return jax.tree.map(lambda x: x.reshape(shape), tree)
