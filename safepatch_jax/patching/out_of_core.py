"""The patch operation on tensors that stay on disk: piece by piece, with the bits of
`patch_matrices`.

What a method decides at an entry depends on the entry, its position, and the thresholds of its top
sets. The thresholds are found first (`thresholds`), for which all pieces are read once or twice; a
last pass merges. In each, several threads read and compute pieces, which are handed on in their
order. Memory is that of a few pieces, whatever the size of a tensor.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np

from safepatch_jax.io.stored import Stored, aligned_empty
from safepatch_jax.numerics import tensor_keys
from safepatch_jax.patching import PATCH_ROLES, piece
from safepatch_jax.patching.agreement import SUMMED, agreement
from safepatch_jax.patching.options import Knobs, program_options, top_rates
from safepatch_jax.patching.programs import KEYED
from safepatch_jax.patching.selection import top_count
from safepatch_jax.patching.settings import PatchSettings
from safepatch_jax.patching.source import Source
from safepatch_jax.patching.statistics import combine_statistics, overlap
from safepatch_jax.patching.thresholds import COUNTED, Limit, Search
from safepatch_jax.runtime.workers import Workers, wait

PIECE = 1 << 19  # entries
_AHEAD = 4  # pieces beside those at which threads work: at times a write waits for the disk
_SOURCES = 16  # tensors of which a sample is made, at most

Limits = dict[str, list[Limit]]  # by selection, for each piece
Program = Callable[[int, int, dict[str, Any]], Any]  # of a piece's number, start and arrays


class Merger:
    """Merges tensors one after the other. As a context, it ends its threads.

    Args:
      sources: every tensor of the scope, in the order of the table, by which ties across tensors
        are broken.
      patch: settings.
      seed: of all random bits.
      dtype: storage dtype of the result; 'keep' is the backbone's, tensor by tensor.
      rounding: see `patch_matrices`.
      size: how many entries are held at a time, of each array of a tensor; the bits do not depend
        on it.
      threads: how many compute; by default as many as there are cores, and 8 at most. Nothing
        depends on it.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        patch: PatchSettings,
        seed: int,
        dtype: str = "keep",
        rounding: str = "nearest",
        size: int = PIECE,
        threads: int | None = None,
    ):
        self.statistics: dict[str, dict[str, Any]] = {}
        self._sources = {source.name: source for source in sources}
        self._largest = max(source.size for source in sources)
        self._patch, self._seed = patch, seed
        self._dtype, self._rounding, self._size = dtype, rounding, size
        threads = threads or min(8, os.cpu_count() or 1)
        self._ahead = threads + _AHEAD
        self._reader, self._calculators = Workers(1), Workers(threads)
        self._free: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
        self._compiled: set[Any] = set()
        following = [*list(self._sources)[1:], None]
        self._following = dict(zip(self._sources, following))
        self._early: dict[str, tuple[list[np.ndarray], Iterator[np.ndarray]]] = {}
        self._options = program_options(patch)
        self._counted = piece.Counted()
        self._rates = top_rates(patch)
        ranked = patch.method.ranks is not None and not self._options.by_row
        self._roles = PATCH_ROLES if ranked else ()
        fills = "support" in patch.method.settings and patch.support == "fill"
        self._fills = tuple(f"fill_{role}" for role in PATCH_ROLES) if fills else ()
        drawn = ("fill",) if fills else PATCH_ROLES * ("retention" in patch.method.settings)
        self._users = (*drawn, *["rounding"] * (rounding == "stochastic"))
        self._global: dict[str, Limits] = {}
        if self._roles and patch.ranks_whole_scope:
            total = sum(source.size for source in sources)
            numbers = {role: top_count(self._rates[role], total) for role in self._roles}
            found = self._limits([(source, {}) for source in sources], numbers)
            self._global = dict(zip(self._sources, found))

    def __enter__(self) -> Merger:
        return self

    def __exit__(self, *error: Any) -> None:
        """End the threads; what has not begun is not done."""
        for _, runs in self._early.values():
            runs.close()
        self._early.clear()
        for workers in (self._reader, self._calculators):
            workers.__exit__(*error)

    def parts(self, name: str) -> Iterator[np.ndarray]:
        """Yield the merged tensor in runs, flat, in its storage dtype; afterwards its statistics
        are there. Quickest in the order of the sources: each is begun while the one before ends.
        """
        first, runs = self._early.pop(name, ((), None))
        runs = itertools.chain(first, runs or self._parts(name))
        # By then the threads have been given all pieces of this tensor, and would soon be idle.
        all_given = max(0, self._pieces(self._sources[name]) - self._ahead)
        for number, run in enumerate(runs):
            if number == all_given:
                self._begin_early(self._following.get(name))
            yield run

    def _begin_early(self, name: str | None) -> None:
        if name is None or name in self._early or name in self.statistics:
            return
        runs = self._parts(name)
        self._early[name] = [next(runs)], runs  # a generator does nothing before its first value

    def _parts(self, name: str) -> Iterator[np.ndarray]:
        source, vectors = self._sources[name], []
        if name in self._global:
            limits = self._global[name]
        else:
            numbers = {role: top_count(self._rates[role], source.size) for role in self._roles}
            limits = self._limits([(source, {})], numbers)[0] if numbers else {}
        if self._fills:  # what fills up rests on the selections before it
            quota = Knobs.of(self._patch, source.size).quota
            numbers = dict.fromkeys(self._fills, quota)
            limits = limits | self._limits([(source, limits)], numbers)[0]
        for merged, vector in self._merged(source, limits):
            yield merged
            vectors.append(vector)
        counts, sums = zip(*self._counted.parts(np.stack(vectors)))
        total = {"size": source.size} | combine_statistics(counts)
        self.statistics[name] = total | {"overlap": overlap(total)} | agreement(sums)

    def _limits(
        self, sources: Sequence[tuple[Source, Limits]], numbers: Mapping[str, int]
    ) -> list[Limits]:
        """Return the limits of some selections in each of several tensors, of which all together
        have so many entries."""
        searches = self._begun(sources, numbers)
        while any(search.limits is None for search in searches.values()):
            # All take part in every pass, so that there is one program.
            bounds = {name: search.bounds for name, search in searches.items()}
            unknown = [name for name, search in searches.items() if search.limits is None]
            for found in self._surveyed(sources, bounds):
                for name in unknown:
                    searches[name].add(*found[name])
            for name in unknown:
                searches[name].end()
        result, done = [], 0
        for source, limits in sources:
            pieces, found = self._pieces(source), {}
            for name, search in searches.items():
                found[name] = search.limits[done : done + pieces]
                number, needed = search.partial or (-1, 0)
                if number - done in range(pieces):
                    threshold, _ = search.limits[number]
                    bounds = dict.fromkeys(searches, np.full(COUNTED + 2, threshold, np.int32))
                    ties = self._inside(source, limits, bounds, number - done)[name]
                    found[name][number - done] = threshold, int(ties[needed])
            result.append(found)
            done += pieces
        return result

    def _pieces(self, source: Source) -> int:
        return -(-source.size // math.prod(self._shape(source)))

    def _inside(
        self, source: Source, limits: Limits, bounds: Mapping[str, np.ndarray], number: int
    ) -> dict[str, np.ndarray]:
        """Return the indices within a piece of the keys in the window, by selection."""
        shape = self._shape(source)
        start = number * math.prod(shape)
        count = min(math.prod(shape), source.size - start)
        read = functools.partial(self._read, source, start, count, shape)
        _, arrays = self._read_now(source, read)
        found = self._survey(source, limits, bounds)(number, start, arrays)
        return {name: np.flatnonzero(np.asarray(inside)) for name, (_, inside, _) in found.items()}

    def _begun(
        self, sources: Sequence[tuple[Source, Limits]], numbers: Mapping[str, int]
    ) -> dict[str, Search]:
        """Begin searches, with samples of some of the tensors."""
        nothing = dict.fromkeys(numbers, np.full(COUNTED + 2, 1, np.int32))
        total = sum(source.size for source, _ in sources)
        chosen = sources[:: -(-len(sources) // _SOURCES)]
        samples: dict[str, list[np.ndarray]] = {name: [] for name in numbers}
        marks = dict.fromkeys(numbers, 0.0)
        largest = max(source.size for source, _ in chosen)
        for source, limits in chosen:
            shape = self._shape(source)
            program = self._survey(source, limits, nothing)
            sample = self._read_now(source, functools.partial(source.sample, shape))
            found = program(0, 0, sample)
            every = max(1, round(largest / source.size))  # a sample in proportion to the size
            for name, (key, _, vector) in found.items():
                count = min(source.size, math.prod(shape))
                samples[name].append(np.asarray(key).reshape(-1)[:count:every])
                marks[name] += int(vector[-1]) / count * source.size
        share = sum(source.size for source, _ in chosen) / total
        searches = {}
        for name, number in numbers.items():
            sample = np.concatenate(samples[name])
            searches[name] = Search(number, total, sample, round(marks[name] / share))
        return searches

    def _surveyed(
        self, sources: Sequence[tuple[Source, Limits]], bounds: Mapping[str, np.ndarray]
    ) -> Iterator[dict[str, Any]]:
        """Yield for each piece of each tensor what `Search.add` takes, by selection."""

        def gathered(program: Program, *piece: Any) -> dict[str, Any]:
            result = {}
            for name, (key, inside, vector) in program(*piece).items():
                places = np.flatnonzero(np.asarray(inside))
                vector = np.asarray(vector)
                result[name] = vector[:-1], int(vector[-1]), np.asarray(key).reshape(-1)[places]
            return result

        calls = (
            (functools.partial(gathered, self._survey(source, limits, bounds)), source)
            for source, limits in sources
        )
        yield from self._run(calls, ("survey", *bounds))

    def _survey(self, source: Source, limits: Limits, bounds: Mapping[str, np.ndarray]) -> Program:
        keys, counts, knobs = self._arguments(source)
        shape, wanted = self._shape(source), tuple(bounds)

        def program(number: int, start: int, arrays: dict[str, Any]) -> Any:
            return piece.survey(
                arrays,
                _arrays(limits, number),
                self._draw(start, keys, knobs, shape),
                np.uint32(start),
                keys,
                counts,
                knobs,
                bounds,
                options=self._options,
                wanted=wanted,
            )

        return program

    def _merged(self, source: Source, limits: Limits) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield for each piece the merged entries, and its statistics, see `piece.merge`."""
        keys, counts, knobs = self._arguments(source)
        shape = self._shape(source)
        dtype = source.backbone.dtype if self._dtype == "keep" else self._dtype

        def program(number: int, start: int, arrays: dict[str, Any]) -> Any:
            merged, vector = piece.merge(
                arrays,
                _arrays(limits, number),
                self._draw(start, keys, knobs, shape),
                np.uint32(start),
                keys,
                counts,
                knobs,
                options=self._options,
                dtype=dtype,
                rounding=self._rounding,
            )
            entries = min(math.prod(shape), source.size - start)
            return np.asarray(merged).reshape(-1)[:entries], np.asarray(vector)

        yield from self._run([(program, source)], ("merge", dtype))

    def _draw(self, start: int, keys: dict, knobs: dict, shape: tuple[int, ...]) -> Any:
        if not self._users:
            return {}
        return piece.draw(np.uint32(start), keys, knobs, users=self._users, shape=shape)

    def _arguments(self, source: Source) -> tuple[dict, dict, dict]:
        """Return (keys, counts, knobs), see `Tensor`; on the device, so that no piece sends them
        there."""
        keys = {user: tensor_keys(self._seed, user, [source.name])[0] for user in KEYED}
        group = source.backbone.shape[-1] if self._options.by_row else source.size
        counts = {role: np.int32(top_count(rate, group)) for role, rate in self._rates.items()}
        return jax.device_put((keys, counts, Knobs.of(self._patch, source.size).traced()))

    def _shape(self, source: Source) -> tuple[int, ...]:
        """Return the shape of a tensor's pieces; the last one is filled up with zeros."""
        if self._options.by_row:
            columns = source.backbone.shape[-1]
            # More would be summed row by row, which takes longer.
            return max(1, min(self._size, SUMMED) // columns), columns
        return (min(self._size, self._largest),)

    def _run(self, calls: Iterable[tuple[Program, Source]], kind: tuple[Any, ...]) -> Iterator[Any]:
        """Yield what programs return for each piece of their tensors, in order.

        Args:
          calls: a program, called by several threads at once, and the tensor that is read for it.
          kind: of the programs; the first piece of a kind and shape is computed alone, so that its
            programs are compiled once.
        """
        running: deque[Future] = deque()
        try:
            for program, source in calls:
                shape = self._shape(source)
                step = math.prod(shape)
                compiled = (*kind, shape, *(x.dtype for x in source.tensors))
                for number, start in enumerate(range(0, source.size, step)):
                    count = min(step, source.size - start)
                    read = functools.partial(self._read, source, start, count, shape)
                    if not _is_stored(source):
                        read = self._reader.submit(read).result
                    call = functools.partial(program, number, start)
                    running.append(self._calculators.submit(self._computed, call, read))
                    if compiled not in self._compiled:
                        self._compiled.add(compiled)
                        wait(running[-1])
                    if len(running) > self._ahead:
                        yield wait(running.popleft())
            while running:
                yield wait(running.popleft())
        finally:
            for future in running:
                future.cancel()

    def _read_now(self, source: Source, read: Callable[[], Any]) -> Any:
        """Return what is read; what the reader was given before comes first."""
        return read() if _is_stored(source) else wait(self._reader.submit(read))

    def _computed(
        self, call: Callable[[dict[str, Any]], Any], read: Callable[[], tuple[np.ndarray, dict]]
    ) -> Any:
        memory, arrays = read()
        result = jax.block_until_ready(call(arrays))
        del arrays
        self._free.put(memory)
        return result

    def _read(
        self, source: Source, start: int, count: int, shape: tuple[int, ...]
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Read a run of all arrays of a tensor, with zeros behind it up to `shape`; return the
        memory that holds them too, which is used again."""
        size = source.nbytes(shape)
        memory = np.empty(0, np.uint8)
        while len(memory) < size:
            try:
                memory = self._free.get_nowait()
            except queue.Empty:
                memory = aligned_empty((size,), np.dtype(np.uint8))
        return memory, source.read(start, count, shape, memory)


def _is_stored(source: Source) -> bool:
    """Tell whether all lies in files, which any thread may read; all else is read by one thread."""
    return all(isinstance(x, Stored) for x in source.tensors)


def _arrays(limits: Limits, number: int) -> dict[str, np.ndarray]:
    """Return the limits of one piece."""
    return {name: np.array(pieces[number], np.int32) for name, pieces in limits.items()}
