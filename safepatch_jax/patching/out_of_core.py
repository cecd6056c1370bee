"""The patch operation on tensors that stay on disk: piece by piece, with the bits of
`patch_matrices`.

What a method decides at an entry depends on the entry, its position, and the thresholds of its top
sets. The thresholds are counted first, in two passes over the pieces (a histogram of the upper bits
of all keys, then one of the lower bits of those at the boundary); a third pass merges. Memory is
that of a few pieces, whatever the size of a tensor.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from safepatch_jax.io.stored import DTYPES, aligned_empty
from safepatch_jax.numerics import random_bits, tensor_keys
from safepatch_jax.patching import PATCH_ROLES
from safepatch_jax.patching.agreement import agreement, agreement_sums
from safepatch_jax.patching.merge import KEYED, merge_tensor, patch_and_importance
from safepatch_jax.patching.methods import MERGE_METHODS
from safepatch_jax.patching.options import Knobs, program_options, top_rates
from safepatch_jax.patching.selection import (
    NONE,
    lowest,
    share_out,
    threshold_of,
    top_count,
    top_of_keys,
)
from safepatch_jax.patching.settings import PatchSettings
from safepatch_jax.patching.statistics import combine_statistics, overlap, tensor_statistics
from safepatch_jax.patching.tensor import ProgramOptions, Tensor
from safepatch_jax.runtime.workers import Workers, wait

PIECE = 1 << 18  # entries
# Bits of a key that the second histogram tells apart; the first one tells apart the other 16.
_LOW = 15
_AHEAD = 4  # pieces that are computed beside the one that is used

Limit = tuple[int, int]  # a threshold, and how many of the entries that equal it are still to mark
_NOTHING: Limit = (NONE, 0)


class Readable(Protocol):
    """A tensor of which runs can be read; `Stored` is one."""

    dtype: str
    shape: tuple[int, ...]

    def read(self, out: np.ndarray, start: int) -> np.ndarray:
        """Fill `out`, of `dtype`, with the elements that begin at the flat index `start`."""


@dataclasses.dataclass(frozen=True)
class Source:
    """One HF tensor before the merge.

    Attributes:
      name: of the HF tensor.
      backbone: in its stored dtype, of the HF shape.
      derived: {'se', 'osm'}: of the derived models, any float dtype.
      sensitivity: {'se', 'osm'}: sums of |gradient|, float32; may be empty for an importance that
        needs none.
    """

    name: str
    backbone: Readable
    derived: Mapping[str, Readable]
    sensitivity: Mapping[str, Readable]

    @property
    def size(self) -> int:
        return math.prod(self.backbone.shape)


class _Selections:
    """The selections that a method makes in a piece, recorded while the program is traced.

    Attributes:
      limits: {name of a selection: int32 [2], a `Limit`}.
      keys: {name: (keys, number of marks that count towards the size)}, filled in.
      next_limits: {name: the limit for the next piece}, filled in.
    """

    def __init__(self, limits: Mapping[str, jax.Array]):
        self.limits = limits
        self.keys: dict[str, tuple[jax.Array, jax.Array]] = {}
        self.next_limits: dict[str, jax.Array] = {}

    def select(self, name: str, key: jax.Array, included: jax.Array | None) -> jax.Array:
        """Mark the piece's part of a selection."""
        marks = jnp.int32(0) if included is None else jnp.sum(included, dtype=jnp.int32)
        self.keys[name] = key, marks
        if name not in self.limits:  # the program is to find it, and does not use what follows
            return jnp.zeros(key.shape, bool)
        threshold, needed = self.limits[name]
        count = jnp.sum(key == threshold, dtype=jnp.int32)
        self.next_limits[name] = jnp.stack([threshold, jnp.maximum(needed - count, 0)])
        group = (1,) * key.ndim
        ties = lowest(
            key,
            jnp.reshape(threshold, group),
            jnp.reshape(count, group),
            jnp.reshape(needed, group),
            tuple(range(key.ndim)),
            bits=1,
        )
        return (key > threshold) | ties


@dataclasses.dataclass(frozen=True)
class _Piece(Tensor):
    """A run of a tensor's entries within the compiled program.

    Attributes:
      start: row-major index of the first one, uint32 scalar.
      selections: records what the method selects.
    """

    start: jax.Array
    selections: _Selections

    def select(self, name, key, number, included=None, axes=None):
        if axes == (-1,):
            return top_of_keys(key, number, axes)  # a piece has whole rows
        return self.selections.select(name, key, included)

    def bits(self, user):
        return random_bits(self.keys[user], self.patch["se"].shape, self.start)


def _patch_and_importance(arrays, start, keys, options: ProgramOptions):
    sensitivity = arrays["sensitivity"] or dict.fromkeys(PATCH_ROLES)
    return patch_and_importance(
        arrays["backbone"], arrays["derived"], sensitivity, keys, options, start
    )


def _piece(arrays, limits, start, keys, counts, knobs, options) -> _Piece:
    patch, importance = _patch_and_importance(arrays, start, keys, options)
    selections = _Selections(limits)
    return _Piece(patch, importance, keys, counts, knobs, options, start, selections)


@functools.partial(jax.jit, static_argnames=("options", "wanted"))
def _keys(arrays, limits, start, keys, counts, knobs, *, options: ProgramOptions, wanted: str):
    """Return (keys of a piece in one of the method's selections, number of marks that count towards
    it)."""
    piece = _piece(arrays, limits, start, keys, counts, knobs, options)
    MERGE_METHODS[options.merge].function(piece)
    return piece.selections.keys[wanted]


@functools.partial(jax.jit, static_argnames=("options", "dtype", "rounding"))
def _merge(
    arrays,
    limits,
    start,
    keys,
    counts,
    knobs,
    *,
    options: ProgramOptions,
    dtype: str,
    rounding: str,
):
    """Return (merged entries of a piece, its top sets, kept sets, limits of the next piece)."""
    piece = _piece(arrays, limits, start, keys, counts, knobs, options)
    merged, choice = merge_tensor(piece, arrays["backbone"], dtype, rounding)
    return merged, choice.top, choice.kept, piece.selections.next_limits


# A program of its own: within the one above XLA on CPU would draw the random bits anew for the
# counts.
@functools.partial(jax.jit, static_argnames="options")
def _statistics(arrays, merged, top, kept, start, keys, *, options: ProgramOptions):
    """Return (statistics of a piece, its sums of both patches)."""
    patch, importance = _patch_and_importance(arrays, start, keys, options)
    counts = tensor_statistics(patch, importance, top, kept, merged, arrays["backbone"])
    return counts, agreement_sums(patch)


class Merger:
    """Merges tensors one after the other.

    Args:
      sources: every tensor of the scope, in the order of the table, by which ties across tensors
        are broken.
      patch: settings.
      seed: of all random bits.
      dtype: storage dtype of the result; 'keep' is the backbone's, tensor by tensor.
      rounding: see `patch_matrices`.
      piece: how many entries are held at a time, of each array of a tensor; the bits do not depend
        on it.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        patch: PatchSettings,
        seed: int,
        dtype: str = "keep",
        rounding: str = "nearest",
        piece: int = PIECE,
    ):
        self.statistics: dict[str, dict[str, Any]] = {}
        self._sources = {source.name: source for source in sources}
        self._patch, self._seed = patch, seed
        self._dtype, self._rounding, self._piece = dtype, rounding, piece
        self._options = program_options(patch)
        self._rates = top_rates(patch)
        ranked = patch.method.ranks is not None and not self._options.by_row
        self._roles = PATCH_ROLES if ranked else ()
        fills = "support" in patch.method.settings and patch.support == "fill"
        self._fills = tuple(f"fill_{role}" for role in PATCH_ROLES) if fills else ()
        self._global: dict[str, dict[str, Limit]] = {}
        if patch.ranks_whole_scope:
            size = sum(source.size for source in sources)
            for role in self._roles:
                number = top_count(self._rates[role], size)
                limits = self._limits([(source, {}) for source in sources], role, number)
                self._global[role] = dict(zip(self._sources, limits))

    def parts(self, name: str) -> Iterator[np.ndarray]:
        """Yield the merged tensor in runs, flat, in its storage dtype; afterwards its statistics
        are there."""
        source, parts = self._sources[name], []
        limits: dict[str, Limit] = {}
        for role in self._roles:
            if role in self._global:
                limits[role] = self._global[role][name]
            else:
                number = top_count(self._rates[role], source.size)
                limits[role] = self._limits([(source, {})], role, number)[0]
        quota = Knobs.of(self._patch, source.size).quota
        for fill in self._fills:  # what fills up rests on the selections before it
            limits[fill] = self._limits([(source, limits)], fill, quota)[0]
        for count, merged, statistics in self._merged(source, limits):
            yield np.asarray(merged).reshape(-1)[:count]
            parts.append(statistics)
        parts = jax.tree.map(np.ndarray.tolist, jax.device_get(parts))
        counts, sums = zip(*parts)
        total = {"size": source.size} | combine_statistics(counts)
        self.statistics[name] = total | {"overlap": overlap(total)} | agreement(sums)

    def _limits(
        self, sources: Sequence[tuple[Source, dict[str, Limit]]], wanted: str, number: int
    ) -> list[Limit]:
        """Return the limit of one selection in each of several tensors, of which it has `number`
        entries together."""

        def keys() -> Iterator[tuple[int, np.ndarray, Any]]:
            for i, (source, limits) in enumerate(sources):
                for count, (key, marks) in self._keys(source, limits, wanted):
                    yield i, np.asarray(key).reshape(-1)[:count], marks

        histogram = _Histogram(keys, len(sources))
        number = max(number - histogram.marks, 0)
        shares = share_out(histogram.at_least, number)
        if not any(shares):
            return [_NOTHING] * len(sources)
        threshold = threshold_of(histogram.at_least, sum(shares))
        above = histogram.at_least(threshold + 1)
        return [(threshold, share - more) for share, more in zip(shares, above)]

    def _keys(
        self, source: Source, limits: Mapping[str, Limit], wanted: str
    ) -> Iterator[tuple[int, Any]]:
        """Yield for each piece of a tensor the number of entries in it, and (keys, marks)."""
        keys, counts, knobs = self._arguments(source)
        limits = _arrays(limits)

        def program(start: int, arrays: dict[str, Any]) -> Any:
            return _keys(
                arrays,
                limits,
                np.uint32(start),
                keys,
                counts,
                knobs,
                options=self._options,
                wanted=wanted,
            )

        yield from self._run(program, source)

    def _merged(
        self, source: Source, limits: Mapping[str, Limit]
    ) -> Iterator[tuple[int, jax.Array, tuple[dict[str, jax.Array], ...]]]:
        """Yield for each piece the number of entries in it, the merged entries, and what
        `_statistics` returns."""
        keys, counts, knobs = self._arguments(source)
        next_limits = _arrays(limits)
        dtype = source.backbone.dtype if self._dtype == "keep" else self._dtype

        def program(start: int, arrays: dict[str, Any]) -> Any:
            nonlocal next_limits  # what a piece leaves of each limit is for the next one
            start = np.uint32(start)
            merged, top, kept, next_limits = _merge(
                arrays,
                next_limits,
                start,
                keys,
                counts,
                knobs,
                options=self._options,
                dtype=dtype,
                rounding=self._rounding,
            )
            return merged, _statistics(
                arrays, merged, top, kept, start, keys, options=self._options
            )

        for count, (merged, statistics) in self._run(program, source):
            yield count, merged, statistics

    def _arguments(self, source: Source) -> tuple[dict, dict, dict]:
        """Return (keys, counts, knobs), see `Tensor`."""
        keys = {user: tensor_keys(self._seed, user, [source.name])[0] for user in KEYED}
        group = source.backbone.shape[-1] if self._options.by_row else source.size
        counts = {role: np.int32(top_count(rate, group)) for role, rate in self._rates.items()}
        return keys, counts, Knobs.of(self._patch, source.size).traced()

    def _run(
        self, program: Callable[[int, dict[str, Any]], Any], source: Source
    ) -> Iterator[tuple[int, Any]]:
        """Call a program with the start and the arrays of each piece; yield the number of entries
        in it and what the program returns."""
        columns = source.backbone.shape[-1]
        if self._options.by_row:
            shape = (max(1, self._piece // columns), columns)
        else:
            shape = (min(self._piece, source.size),)
        step = math.prod(shape)
        with Workers(1) as reader:
            running: deque[tuple[int, Any]] = deque()
            reading = reader.submit(_read, source, 0, min(step, source.size), shape)
            for start in range(0, source.size, step):
                arrays = wait(reading)
                following = start + step
                if following < source.size:
                    count = min(step, source.size - following)
                    reading = reader.submit(_read, source, following, count, shape)
                running.append((min(step, source.size - start), program(start, arrays)))
                if len(running) > _AHEAD:
                    yield running.popleft()
            yield from running


def _arrays(limits: Mapping[str, Limit]) -> dict[str, np.ndarray]:
    return {name: np.array(limit, np.int32) for name, limit in limits.items()}


class _Histogram:
    """How many keys of several tensors are at least a threshold, from two passes over them.

    Args:
      keys: yields (number of the tensor, int32 keys, marks that count towards the selection) until
        all have passed; called anew for each pass.
      tensors: how many there are.

    Attributes:
      marks: the sum of all marks.
    """

    def __init__(self, keys: Callable[[], Iterator[tuple[int, np.ndarray, Any]]], tensors: int):
        self._keys, self._tensors = keys, tensors
        self._fine_of, self._fine = -1, np.zeros((tensors, 0), np.int64)
        self._positive = np.zeros(tensors, np.int64)
        coarse = np.zeros((tensors, 1 << 31 - _LOW), np.int64)
        self.marks = 0
        for i, key, marks in keys():
            coarse[i] += np.bincount(key >> _LOW, minlength=coarse.shape[1])
            self._positive[i] += np.count_nonzero(key)
            self.marks += int(marks)
        self._above = _at_least(coarse)

    def at_least(self, threshold: int) -> list[int]:
        """Return for each tensor how many of its keys are at least a threshold in [1, 2^31)."""
        if threshold == 1:
            return self._positive.tolist()
        high, low = threshold >> _LOW, threshold & (1 << _LOW) - 1
        if not low:
            return self._above[:, high].tolist()
        if self._fine_of != high:
            self._fine_of, self._fine = high, self._lower_bits(high)
        return (self._above[:, high + 1] + self._fine[:, low]).tolist()

    def _lower_bits(self, high: int) -> np.ndarray:
        """Count the lower bits of the keys that have these upper ones."""
        fine = np.zeros((self._tensors, 1 << _LOW), np.int64)
        for i, key, _ in self._keys():
            lower = key[key >> _LOW == high] & (1 << _LOW) - 1
            fine[i] += np.bincount(lower, minlength=fine.shape[1])
        return _at_least(fine)


def _at_least(histogram: np.ndarray) -> np.ndarray:
    """Return for [tensors, n] counts of each value those of values at least as large, [tensors, n +
    1]."""
    return np.pad(np.cumsum(histogram[:, ::-1], axis=1)[:, ::-1], ((0, 0), (0, 1)))


def _read(source: Source, start: int, count: int, shape: tuple[int, ...]) -> dict[str, Any]:
    """Read a run of all arrays of a tensor, with zeros behind it up to `shape`."""

    def run(tensor: Readable) -> jax.Array:
        out = aligned_empty((math.prod(shape),), DTYPES[tensor.dtype])
        tensor.read(out[:count], start)
        out[count:] = 0
        # Takes over the memory; a jitted function that is given NumPy's would copy it.
        return jnp.asarray(out.reshape(shape))

    return {
        "backbone": run(source.backbone),
        "derived": {role: run(x) for role, x in source.derived.items()},
        "sensitivity": {role: run(x) for role, x in source.sensitivity.items()},
    }
