"""The patched models of a sweep's points. Points that differ in alpha and beta alone share the
selection, which is most of a merge."""

from __future__ import annotations

import collections
from collections.abc import Iterable

from safepatch_jax.patching.kept import KeptEntries, selection
from safepatch_jax.run import models
from safepatch_jax.run.state import Run
from safepatch_jax.studies.sweep.points import Point

# Points beyond the first of their selection: fewer do not pay for compiling two programs more.
LEAST = 8
_MOST_BYTES = 1 << 30  # of selections that are held, beside the last one


class Merger:
    """Merges a run's patches with the settings of points.

    Attributes:
      run: its derived models and scores must be in place before the first merge.
    """

    def __init__(self, run: Run):
        self.run = run
        self._expected: collections.Counter[tuple] = collections.Counter()
        self._kept: collections.OrderedDict[tuple, KeptEntries] = collections.OrderedDict()

    @property
    def held(self) -> int:
        """How many selections are held."""
        return len(self._kept)

    def expect(self, points: Iterable[Point]) -> None:
        """Say which points will be merged: what only one of them selects is not held, and
        nothing where few share a selection."""
        for point in points:
            key = selection(point.patch, point.seed)
            if key is not None:
                self._expected[key] += 1

    def merged(self, point: Point) -> models.Flat:
        """Return the flat parameters of a point's model; see `models.patched` for errors."""
        kept = self._selected(point)
        flat = None if kept is None else models.weigh(self.run, point.patch, kept)
        return models.patched(self.run, point.patch, point.seed) if flat is None else flat

    def _selected(self, point: Point) -> KeptEntries | None:
        """Return what a point keeps, where others keep the same."""
        key = selection(point.patch, point.seed)
        if key is None:
            return None
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        spared = sum(number - 1 for number in self._expected.values())
        if self._expected[key] < 2 or spared < LEAST:
            return None
        kept = models.keep(self.run, point.patch, point.seed)
        if kept is not None:
            self._kept[key] = kept
            while len(self._kept) > 1 and sum(x.size for x in self._kept.values()) > _MOST_BYTES:
                self._kept.popitem(last=False)
        return kept
