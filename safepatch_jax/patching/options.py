"""What the patch settings become: static options of the compiled program, and traced scalars."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from safepatch_jax.models.table import Param, ParamTable
from safepatch_jax.patching import PATCH_ROLES
from safepatch_jax.patching.methods import combined
from safepatch_jax.patching.selection import top_count
from safepatch_jax.patching.settings import PatchSettings
from safepatch_jax.patching.tensor import ProgramOptions

_MOST = 2**31 - 1  # entries of a tensor


@dataclasses.dataclass(frozen=True)
class Knobs:
    """The options that are traced scalars, so that a change of value compiles nothing."""

    retention: float
    quota: int
    alpha: float
    beta: float
    alone: bool
    shared: bool

    @classmethod
    def of(cls, patch: PatchSettings, size: int) -> Knobs:
        """Return the knobs for a tensor of so many entries."""
        method = patch.method
        divided = patch.rescale if "rescale" in method.settings else method.divides
        scale = 1.0 / patch.retention if divided else 1.0
        quota = top_count(patch.retention, size)
        weights = patch.alpha * scale, patch.beta * scale
        return cls(patch.retention, quota, *weights, *combined(patch.combine))

    def traced(self) -> dict[str, Any]:
        """Return them as the program takes them."""
        return {
            "retention": np.float32(self.retention),
            "quota": np.int32(self.quota),
            "alpha": np.float32(self.alpha),
            "beta": np.float32(self.beta),
            "alone": np.bool_(self.alone),  # for `combine_sets`
            "shared": np.bool_(self.shared),
            "zero": np.int32(0),  # for `Tensor.weighted`
        }


def program_options(patch: PatchSettings) -> ProgramOptions:
    """Return the options that decide which program is compiled; those without a part in the method
    do not."""
    method = patch.method
    by_row = patch.granularity == "row" and method.ranks is not None
    support = patch.support if "support" in method.settings else "sequential"
    return ProgramOptions(patch.merge, patch.ranking, by_row, support)


def scope_rows(table: ParamTable, patch: PatchSettings) -> tuple[Param, ...]:
    """Return the parameters that a patch ranks and changes.

    Raises:
      ValueError: a tensor has more entries than are counted and numbered in int32.
    """
    rows = table.scope(patch.scope)
    for row in rows:
        if math.prod(row.hf_shape) > _MOST:
            raise ValueError(
                f"{row.hf_names[0]} has {math.prod(row.hf_shape):,} entries, and tensors of 2^31 "
                f"or more are not ranked. Leave it out: patch.scope is '{patch.scope}', and "
                "block_linear has the linear layers of the blocks alone."
            )
    return rows


def top_rates(patch: PatchSettings) -> dict[str, float]:
    """Return the share of entries in each patch's top set."""
    ranks = patch.method.ranks
    if ranks == "importance":
        return {"se": patch.top_rate_se, "osm": patch.top_rate_osm}
    return dict.fromkeys(PATCH_ROLES, patch.density if ranks == "magnitude" else 1.0)
