"""The patch operation on tensors that stay on disk: piece by piece, with the bits of
`patch_matrices`.

What a method decides at an entry depends on the entry, its position, and the thresholds of its top
sets. The thresholds are counted first, in two passes over the pieces (a histogram of the upper bits
of all scores, then one of the lower bits of those at the boundary); a third pass merges. Memory is
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
from safepatch_jax.patching.merge import KEYED, METHODS, merge_layer, patch_and_score
from safepatch_jax.patching.selection import (
    ROLES,
    lowest,
    share_out,
    threshold_of,
    top_count,
    top_of_keys,
)
from safepatch_jax.patching.statistics import combine_statistics, overlap, tensor_statistics
from safepatch_jax.patching.tensor import UNTRIMMED, Knobs, Layer, Method, top_rates
from safepatch_jax.runtime.workers import Workers, wait
from safepatch_jax.settings import PatchSettings

PIECE = 1 << 18  # entries
# bits of a key that the second histogram tells apart; the first one tells apart the other 16
_LOW = 15
_AHEAD = 4  # pieces that are computed beside the one that is used
_NOTHING = (0x7FFFFFFF, 0)  # a limit that no finite score reaches


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
      sensitivity: {'se', 'osm'}: sums of |gradient|, float32; may be empty for the importances in
        `UNSCORED`.
    """

    name: str
    backbone: Readable
    derived: Mapping[str, Readable]
    sensitivity: Mapping[str, Readable]

    @property
    def size(self) -> int:
        return math.prod(self.backbone.shape)


@dataclasses.dataclass(frozen=True)
class _Piece(Layer):
    """A run of a tensor's entries within the compiled program.

    Attributes:
      start: row-major index of the first one, uint32 scalar.
      limits: {name of a selection: int32 [2]}: the threshold, and how many of the entries that
        equal it are still to take.
      asked: filled in as the method makes its selections: {name: (keys, marks that count towards
        the number)}.
      left: likewise: the limits of the next piece.
    """

    start: jax.Array
    limits: Mapping[str, jax.Array]
    asked: dict[str, Any] = dataclasses.field(default_factory=dict)
    left: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

    def select(self, name, key, number, taken=None, axes=None):
        if axes == (-1,):
            return top_of_keys(key, number, axes)  # a piece has whole rows
        self.asked[name] = key, jnp.int32(0) if taken is None else jnp.sum(taken, dtype=jnp.int32)
        if name not in self.limits:  # the program is to find out, and does not use what follows
            return jnp.zeros(key.shape, bool)
        threshold, left = self.limits[name]
        count = jnp.sum(key == threshold, dtype=jnp.int32)
        self.left[name] = jnp.stack([threshold, jnp.maximum(left - count, 0)])
        axes = tuple(range(key.ndim))
        one = lambda x: jnp.reshape(x, (1,) * key.ndim)
        return (key > threshold) | lowest(key, one(threshold), one(count), one(left), axes, bits=1)

    def bits(self, user):
        return random_bits(self.keys[user], self.patch["se"].shape, self.start)


def _patch_and_score(arrays, start, keys, method: Method):
    sensitivity = arrays["sensitivity"] or dict.fromkeys(ROLES)
    return patch_and_score(arrays["backbone"], arrays["derived"], sensitivity, keys, method, start)


def _piece(arrays, limits, start, keys, counts, knobs, method) -> _Piece:
    patch, score = _patch_and_score(arrays, start, keys, method)
    return _Piece(patch, score, keys, counts, knobs, method, start, limits)


@functools.partial(jax.jit, static_argnames=("method", "wanted"))
def _keys(arrays, limits, start, keys, counts, knobs, *, method: Method, wanted: str):
    """Return (keys of a piece in one of the method's selections, number of marks that count towards
    it)."""
    piece = _piece(arrays, limits, start, keys, counts, knobs, method)
    METHODS[method.merge](piece)
    return piece.asked[wanted]


@functools.partial(jax.jit, static_argnames=("method", "dtype", "rounding"))
def _merge(
    arrays, limits, start, keys, counts, knobs, *, method: Method, dtype: str, rounding: str
):
    """Return (merged entries of a piece, its top sets, kept sets, limits of the next piece)."""
    piece = _piece(arrays, limits, start, keys, counts, knobs, method)
    merged, choice = merge_layer(piece, arrays["backbone"], dtype, rounding)
    return merged, choice.top, choice.kept, piece.left


# A program of its own: within the one above XLA on CPU would draw the random bits anew for the
# counts.
@functools.partial(jax.jit, static_argnames="method")
def _statistics(arrays, merged, top, kept, start, keys, *, method: Method):
    patch, score = _patch_and_score(arrays, start, keys, method)
    return tensor_statistics(patch, score, top, kept, merged, arrays["backbone"])


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
        self._patch, self._seed, self._dtype, self._rounding, self._piece = (
            patch,
            seed,
            dtype,
            rounding,
            piece,
        )
        self._method = Method.of(patch)
        self._rates = top_rates(patch)
        self._global: dict[str, dict[str, tuple[int, int]]] = {}
        trimmed = patch.merge not in UNTRIMMED
        self._roles = ROLES if trimmed and not self._method.by_row else ()
        self._fills = (
            tuple(f"fill_{r}" for r in ROLES)
            if patch.merge == "safepatching" and patch.support == "fill"
            else ()
        )
        if self._roles and patch.granularity == "global":
            for role in self._roles:
                number = top_count(self._rates[role], sum(x.size for x in sources))
                found = self._limits([(x, {}) for x in sources], role, number)
                self._global[role] = dict(zip(self._sources, found))

    def parts(self, name: str) -> Iterator[np.ndarray]:
        """Yield the merged tensor in runs, flat, in its storage dtype; afterwards its statistics
        are there."""
        source, statistics = self._sources[name], []
        limits = {
            role: self._global[role][name]
            if role in self._global
            else self._limits([(source, {})], role, top_count(self._rates[role], source.size))[0]
            for role in self._roles
        }
        quota = Knobs.of(self._patch, source.size).quota
        for fill in self._fills:  # what fills up rests on the selections before it
            limits[fill] = self._limits([(source, limits)], fill, quota)[0]
        dtype = source.backbone.dtype if self._dtype == "keep" else self._dtype
        program = functools.partial(_merge, dtype=dtype, rounding=self._rounding)
        for count, (merged, counted) in self._run(program, source, limits):
            yield np.asarray(merged).reshape(-1)[:count]
            statistics.append(counted)
        found = [{k: v.tolist() for k, v in part.items()} for part in jax.device_get(statistics)]
        own = {"size": source.size} | combine_statistics(found)
        self.statistics[name] = own | {"overlap": overlap(own)}

    def _limits(
        self, sources: Sequence[tuple[Source, dict]], wanted: str, number: int
    ) -> list[tuple[int, int]]:
        """Return the limit of one selection in each of several tensors, of which it takes `number`
        entries together."""
        program = functools.partial(_keys, wanted=wanted)
        taken = []

        def keys() -> Iterator[tuple[int, np.ndarray]]:
            for i, (source, limits) in enumerate(sources):
                for count, (key, marks) in self._run(program, source, limits):
                    taken.append(marks)
                    yield i, np.asarray(key).reshape(-1)[:count]

        counts = _Histogram(keys, len(sources))
        number = max(number - sum(map(int, taken)), 0)
        if not (shares := share_out(counts.at_least, number)) or not any(shares):
            return [_NOTHING] * len(sources)
        threshold = threshold_of(counts.at_least, sum(shares))
        return [
            (threshold, share - more) for share, more in zip(shares, counts.at_least(threshold + 1))
        ]

    def _run(
        self, program: Callable, source: Source, limits: Mapping[str, tuple[int, int]]
    ) -> Iterator[tuple[int, Any]]:
        """Run a program on each piece; yield the number of entries in it and what the program
        returns."""
        keys = {user: tensor_keys(self._seed, user, [source.name])[0] for user in KEYED}
        columns = source.backbone.shape[-1]
        row = columns if self._method.by_row else source.size
        counts = {role: np.int32(top_count(rate, row)) for role, rate in self._rates.items()}
        knobs = Knobs.of(self._patch, source.size).traced()
        limits = {name: np.array(limit, np.int32) for name, limit in limits.items()}
        shape = (
            (max(1, self._piece // columns), columns)
            if self._method.by_row
            else (min(self._piece, source.size),)
        )
        step = math.prod(shape)
        reading = lambda start: reader.submit(
            _read, source, start, min(step, source.size - start), shape
        )
        with Workers(1) as reader:
            running, ahead = deque(), reading(0)
            for start in range(0, source.size, step):
                arrays = wait(ahead)
                if start + step < source.size:
                    ahead = reading(start + step)
                result = program(
                    arrays, limits, np.uint32(start), keys, counts, knobs, method=self._method
                )
                if len(result) == 4:
                    merged, top, kept, limits = result
                    result = (
                        merged,
                        _statistics(
                            arrays, merged, top, kept, np.uint32(start), keys, method=self._method
                        ),
                    )
                running.append((min(step, source.size - start), result))
                if len(running) > _AHEAD:
                    yield running.popleft()
            yield from running


class _Histogram:
    """How many keys of several tensors are at least a threshold, from two passes over them.

    Args:
      keys: yields (number of the tensor, int32 keys) until all have passed; called anew for each
        pass.
      tensors: how many there are.
    """

    def __init__(self, keys: Callable[[], Iterator[tuple[int, np.ndarray]]], tensors: int):
        self._keys, self._tensors, self._fine = keys, tensors, (-1, None)
        self._positive = np.zeros(tensors, np.int64)
        coarse = np.zeros((tensors, 1 << 31 - _LOW), np.int64)
        for i, key in keys():
            coarse[i] += np.bincount(key >> _LOW, minlength=coarse.shape[1])
            self._positive[i] += np.count_nonzero(key)
        self._above = _at_least(coarse)

    def at_least(self, threshold: int) -> list[int]:
        if threshold == 1:
            return self._positive.tolist()
        high, low = threshold >> _LOW, threshold & (1 << _LOW) - 1
        if not low:
            return self._above[:, high].tolist()
        if self._fine[0] != high:
            fine = np.zeros((self._tensors, 1 << _LOW), np.int64)
            for i, key in self._keys():
                fine[i] += np.bincount(
                    key[key >> _LOW == high] & (1 << _LOW) - 1, minlength=fine.shape[1]
                )
            self._fine = high, _at_least(fine)
        return (self._above[:, high + 1] + self._fine[1][:, low]).tolist()


def _at_least(histogram: np.ndarray) -> np.ndarray:
    """Return for [tensors, n] counts of each value those of values at least as large, [tensors, n +
    1]."""
    return np.pad(np.cumsum(histogram[:, ::-1], axis=1)[:, ::-1], ((0, 0), (0, 1)))


def _read(source: Source, start: int, count: int, shape: tuple[int, ...]) -> dict[str, Any]:
    """Read a run of all arrays of a tensor, with zeros behind it up to `shape`."""

    def run(tensor: Readable) -> np.ndarray:
        out = aligned_empty((math.prod(shape),), DTYPES[tensor.dtype])
        tensor.read(out[:count], start)
        out[count:] = 0
        return jnp.asarray(
            out.reshape(shape)
        )  # takes over the memory, which a jitted function given NumPy's would copy

    return {
        "backbone": run(source.backbone),
        "derived": {r: run(x) for r, x in source.derived.items()},
        "sensitivity": {r: run(x) for r, x in source.sensitivity.items()},
    }
