"""The patch operation on tensors that stay on disk: piece by piece, with the bits of
`patch_matrices`.

What a method decides at an entry depends on the entry, its position, and the thresholds of its top
sets. The thresholds are found first (`thresholds`), for which all pieces are read once or twice; a
last pass merges. In each, several threads read and compute pieces, which are handed on in their
order, while those of the next tensor are begun. Memory is that of a few pieces, whatever the size
of a tensor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import queue
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np

from safepatch_jax.io.stored import DTYPES, Stored, aligned_empty
from safepatch_jax.numerics import tensor_keys
from safepatch_jax.patching import PATCH_ROLES, piece
from safepatch_jax.patching.agreement import agreement
from safepatch_jax.patching.merge import KEYED
from safepatch_jax.patching.options import Knobs, program_options, top_rates
from safepatch_jax.patching.selection import top_count
from safepatch_jax.patching.settings import PatchSettings
from safepatch_jax.patching.sources import Run, Source, read_run, read_sample, tensors_of
from safepatch_jax.patching.statistics import combine_statistics, overlap
from safepatch_jax.patching.thresholds import COUNTED, Limit, Search
from safepatch_jax.runtime.workers import Workers, wait

PIECE = 1 << 20  # entries
BLOCK = 1 << 16  # entries, of which what is made stays in a core's caches
_AHEAD = 2  # pieces that are read or computed beside those at which threads work
_SOURCES = 16  # tensors of which a sample is made, at most

Limits = dict[str, list[Limit]]  # by selection, for each piece
Program = Callable[["Run", dict[str, Any]], Any]


@dataclasses.dataclass(frozen=True)
class _Task:
    """What is to be computed of a piece.

    Attributes:
      source: what is read.
      run: the piece.
      program: called with the piece and its arrays, by several threads at once.
      kind: of the program; the first piece of a kind is computed alone, so that its programs are
        compiled once.
    """

    source: Source
    run: Run
    program: Program
    kind: tuple[Any, ...]


class Merger:
    """Merges tensors one after the other.

    Args:
      sources: every tensor of the scope, in the order of the table, by which ties across tensors
        are broken.
      patch: settings.
      seed: of all random bits.
      dtype: storage dtype of the result; 'keep' is the backbone's, tensor by tensor.
      rounding: see `patch_matrices`.
      size: how many entries are held at a time, of each array of a tensor.
      block: how many of them are computed at a time. The bits depend on neither.
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
        block: int = BLOCK,
        threads: int | None = None,
    ):
        self.statistics: dict[str, dict[str, Any]] = {}
        self._sources = {source.name: source for source in sources}
        self._largest = max(source.size for source in sources)
        self._patch, self._seed = patch, seed
        self._dtype, self._rounding = dtype, rounding
        self._size, self._block = size, block
        self._threads = threads or min(8, os.cpu_count() or 1)
        self._free: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
        self._compiled: set[Any] = set()
        self._options = program_options(patch)
        self._counted = piece.Counted()
        self._rates = top_rates(patch)
        ranked = patch.method.ranks is not None and not self._options.by_row
        self._roles = PATCH_ROLES if ranked else ()
        fills = "support" in patch.method.settings and patch.support == "fill"
        self._fills = tuple(f"fill_{role}" for role in PATCH_ROLES) if fills else ()
        names = list(self._sources)
        self._after = dict(zip(names, [*names[1:], None]))
        self._next: str | None = None  # the tensor whose results come next
        self._results: Generator[Any, None, None] | None = None
        self._workers: tuple[Workers, Workers] | None = None
        self._global: dict[str, Limits] = {}
        if self._roles and patch.ranks_whole_scope:
            total = sum(source.size for source in sources)
            numbers = {role: top_count(self._rates[role], total) for role in self._roles}
            found = self._limits([(source, {}) for source in sources], numbers)
            self._global = dict(zip(self._sources, found))

    def parts(self, name: str) -> Iterator[np.ndarray]:
        """Yield the merged tensor in runs, flat, in its storage dtype; afterwards its statistics
        are there.

        The tensors that come after it are begun meanwhile: quickest in the order of the sources.
        """
        source, vectors = self._sources[name], []
        if self._next != name:
            self.close()
            self._results = self._run(self._merges(name))
        self._next = None  # what is left halfway is begun anew
        for _ in range(self._pieces(source)):
            merged, vector = next(self._results)
            yield merged
            vectors.append(vector)
        self._next = self._after[name]
        if self._next is None:
            self.close()
        counts, sums = zip(*self._counted.parts(np.concatenate(vectors)))
        total = {"size": source.size} | combine_statistics(counts)
        self.statistics[name] = total | {"overlap": overlap(total)} | agreement(sums)

    def close(self) -> None:
        """End the threads, and what has been begun of a tensor that nobody asked for."""
        if self._results is not None:
            self._results.close()
            self._results = None

    def _merges(self, first: str) -> Iterator[_Task]:
        """Yield what merges the tensors from `first` on."""
        name: str | None = first
        while name is not None:
            source = self._sources[name]
            yield from self._merged(source, self._limits_of(source))
            name = self._after[name]

    def _limits_of(self, source: Source) -> Limits:
        if source.name in self._global:
            limits = self._global[source.name]
        else:
            numbers = {role: top_count(self._rates[role], source.size) for role in self._roles}
            limits = self._limits([(source, {})], numbers)[0] if numbers else {}
        if self._fills:  # what fills up rests on the selections before it
            quota = Knobs.of(self._patch, source.size).quota
            numbers = dict.fromkeys(self._fills, quota)
            limits = limits | self._limits([(source, limits)], numbers)[0]
        return limits

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
            tasks = (self._surveyed(source, limits, bounds) for source, limits in sources)
            for found in self._run(itertools.chain.from_iterable(tasks)):
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
        run = self._runs(source)[number]
        _, arrays = self._read(source, run)
        found = self._survey(source, limits, bounds)(run, arrays)
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
            count, arrays = read_sample(source, shape)
            found = program(Run(0, 0, count), arrays)
            every = max(1, round(largest / source.size))  # a sample in proportion to the size
            for name, (key, _, vector) in found.items():
                samples[name].append(np.asarray(key).reshape(-1)[:count:every])
                marks[name] += int(vector[-1]) / count * source.size
        share = sum(source.size for source, _ in chosen) / total
        searches = {}
        for name, number in numbers.items():
            sample = np.concatenate(samples[name])
            searches[name] = Search(number, total, sample, round(marks[name] / share))
        return searches

    def _surveyed(
        self, source: Source, limits: Limits, bounds: Mapping[str, np.ndarray]
    ) -> Iterator[_Task]:
        """Yield for each piece what finds what `Search.add` takes, by selection."""
        program = self._survey(source, limits, bounds)

        def gathered(run: Run, arrays: dict[str, Any]) -> dict[str, Any]:
            result = {}
            for name, (key, inside, vector) in program(run, arrays).items():
                places = np.flatnonzero(np.asarray(inside))
                vector = np.asarray(vector)
                result[name] = vector[:-1], int(vector[-1]), np.asarray(key)[places]
            return result

        return self._tasks(source, gathered, ("survey", *bounds))

    def _survey(self, source: Source, limits: Limits, bounds: Mapping[str, np.ndarray]) -> Program:
        keys, counts, knobs = self._arguments(source)
        wanted = tuple(bounds)

        def program(run: Run, arrays: dict[str, Any]) -> Any:
            return piece.survey(
                arrays,
                _arrays(limits, run.number),
                np.uint32(run.start),
                np.int32(-(-run.count // self._block_of(source))),
                keys,
                counts,
                knobs,
                bounds,
                block=self._block_of(source),
                options=self._options,
                wanted=wanted,
            )

        return program

    def _merged(self, source: Source, limits: Limits) -> Iterator[_Task]:
        """Yield for each piece what merges its entries, and makes its statistics, see
        `piece.merge`."""
        keys, counts, knobs = self._arguments(source)
        dtype = source.backbone.dtype if self._dtype == "keep" else self._dtype

        def program(run: Run, arrays: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
            blocks = -(-run.count // self._block_of(source))
            merged, vectors = piece.merge(
                arrays,
                _arrays(limits, run.number),
                np.uint32(run.start),
                np.int32(blocks),
                keys,
                counts,
                knobs,
                block=self._block_of(source),
                options=self._options,
                dtype=dtype,
                rounding=self._rounding,
            )
            return np.asarray(merged)[: run.count], np.asarray(vectors)[:blocks]

        return self._tasks(source, program, ("merge", dtype))

    def _arguments(self, source: Source) -> tuple[dict, dict, dict]:
        """Return (keys, counts, knobs), see `Tensor`; on the device, so that no piece sends them
        there."""
        keys = {user: tensor_keys(self._seed, user, [source.name])[0] for user in KEYED}
        group = source.backbone.shape[-1] if self._options.by_row else source.size
        counts = {role: np.int32(top_count(rate, group)) for role, rate in self._rates.items()}
        return jax.device_put((keys, counts, Knobs.of(self._patch, source.size).traced()))

    def _shape(self, source: Source) -> tuple[int, ...]:
        """Return the shape of a tensor's pieces: whole blocks, or less than one."""
        row = source.backbone.shape[-1] if self._options.by_row else 1
        rows = max(1, min(self._size, self._largest) // row)
        rows -= rows % min(rows, max(1, self._block // row))
        return (rows, row) if self._options.by_row else (rows,)

    def _block_of(self, source: Source) -> int:
        """Return how many entries of a piece are computed at a time."""
        shape = self._shape(source)
        row = math.prod(shape[1:])
        return row * min(shape[0], max(1, self._block // row))

    def _runs(self, source: Source) -> list[Run]:
        step = math.prod(self._shape(source))
        starts = enumerate(range(0, source.size, step))
        return [Run(i, start, min(step, source.size - start)) for i, start in starts]

    def _tasks(self, source: Source, program: Program, kind: tuple[Any, ...]) -> Iterator[_Task]:
        kind = (*kind, self._shape(source), *(x.dtype for x in tensors_of(source)))
        for run in self._runs(source):
            yield _Task(source, run, program, kind)

    def _run(self, tasks: Iterable[_Task]) -> Generator[Any, None, None]:
        """Yield what the programs return, in the order of the tasks.

        One of the tasks may need what another call of this finds first, which then has the same
        threads.
        """
        with contextlib.ExitStack() as stack:
            if self._workers is None:
                pools = Workers(1), Workers(self._threads)
                self._workers = stack.enter_context(pools[0]), stack.enter_context(pools[1])
                stack.callback(setattr, self, "_workers", None)
            reader, calculators = self._workers
            running: deque[Future] = deque()
            for task in tasks:
                read = functools.partial(self._read, task.source, task.run)
                if not all(isinstance(x, Stored) for x in tensors_of(task.source)):
                    read = reader.submit(read).result
                running.append(calculators.submit(self._compute, task, read))
                if task.kind not in self._compiled:
                    self._compiled.add(task.kind)
                    wait(running[-1])
                if len(running) > self._threads + _AHEAD:
                    yield wait(running.popleft())
            while running:
                yield wait(running.popleft())

    def _compute(self, task: _Task, read: Callable[[], Any]) -> Any:
        memory, arrays = read()
        result = jax.block_until_ready(task.program(task.run, arrays))
        del arrays
        self._free.put(memory)
        return result

    def _read(self, source: Source, run: Run) -> tuple[np.ndarray, dict[str, Any]]:
        """Read a piece of all arrays of a tensor, with zeros behind it up to the end of a block;
        return the memory that holds them too, which is used again."""
        shape, block = self._shape(source), self._block_of(source)
        size = sum(math.prod(shape) * DTYPES[x.dtype].itemsize + 64 for x in tensors_of(source))
        memory = np.empty(0, np.uint8)
        while len(memory) < size:
            try:
                memory = self._free.get_nowait()
            except queue.Empty:
                memory = aligned_empty((size,), np.dtype(np.uint8))
        return memory, read_run(source, run, shape, block, memory)


def _arrays(limits: Limits, number: int) -> dict[str, np.ndarray]:
    """Return the limits of one piece."""
    return {name: np.array(pieces[number], np.int32) for name, pieces in limits.items()}
