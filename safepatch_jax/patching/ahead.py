"""The programs of the patch operation compiled ahead: in threads, while others compile or run."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from safepatch_jax.patching import PATCH_ROLES
from safepatch_jax.patching.options import Knobs
from safepatch_jax.patching.programs import KEYED, compare_patches, patch_matrices
from safepatch_jax.patching.tensor import ProgramOptions
from safepatch_jax.runtime.workers import Workers, wait

_THREADS = 4  # that compile, at most


@dataclasses.dataclass(frozen=True)
class Signature:
    """What the programs of a weight are compiled for; weights with equal ones share them.

    Attributes:
      stored: the backbone's array, or a view of it; derived models and sensitivities lie as it
        does, in float32.
      shape, options, dtype, rounding, sharding: see `patch_matrices`.
      sensitivity: whether there is one.
    """

    stored: jax.ShapeDtypeStruct
    shape: tuple[int, ...]
    options: ProgramOptions
    sensitivity: bool
    dtype: str
    rounding: str
    sharding: jax.sharding.Sharding | None

    def trace_merge(self) -> jax.stages.Traced:
        """Trace `patch_matrices`."""
        key = jax.ShapeDtypeStruct((self.shape[0], 2), jnp.uint32)
        count = jax.ShapeDtypeStruct(self.shape[:1], jnp.int32)
        return patch_matrices.trace(
            self.stored,
            self._derived(),
            self._derived() if self.sensitivity else dict.fromkeys(PATCH_ROLES),
            dict.fromkeys(KEYED, key),
            dict.fromkeys(PATCH_ROLES, count),
            Knobs(0, 0, 0, 0, False, False).traced(),
            options=self.options,
            shape=self.shape,
            dtype=self.dtype,
            rounding=self.rounding,
            sharding=self.sharding,
        )

    def trace_comparison(self) -> jax.stages.Traced:
        """Trace `compare_patches`."""
        return compare_patches.trace(self.stored, self._derived(), np.int32(0), shape=self.shape)

    def _derived(self) -> dict[str, jax.ShapeDtypeStruct]:
        x = jax.ShapeDtypeStruct(self.stored.shape, jnp.float32, sharding=self.stored.sharding)
        return dict.fromkeys(PATCH_ROLES, x)


class PatchPrograms:
    """The programs of several weights, compiled in their order. As a context, it ends its threads.

    Args:
      signatures: of the weights.
      compare: whether `comparison` is wanted.
    """

    def __init__(self, signatures: Iterable[Signature], compare: bool):
        self._workers = Workers(min(_THREADS, os.cpu_count() or 1))
        self._compiled: dict[tuple[Signature, bool], Future] = {}
        self._signatures, self._compare = list(dict.fromkeys(signatures)), compare

    def __enter__(self) -> PatchPrograms:
        try:
            for signature in self._signatures:  # each once: two threads would both compile it
                for comparing in (True, False) if self._compare else (False,):
                    future = self._workers.submit(_compiled, signature, comparing)
                    self._compiled[signature, comparing] = future
        except BaseException:  # a signal: what has not begun is not compiled
            self._workers.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        self._workers.__exit__(*error)

    def merge(self, signature: Signature) -> jax.stages.Compiled:
        """Return `patch_matrices`, which takes its arrays alone."""
        return wait(self._compiled[signature, False])

    def comparison(self, signature: Signature) -> jax.stages.Compiled:
        """Return `compare_patches`, which takes its arrays alone."""
        return wait(self._compiled[signature, True])


def _compiled(signature: Signature, comparing: bool) -> jax.stages.Compiled:
    traced = signature.trace_comparison() if comparing else signature.trace_merge()
    return traced.lower().compile()
