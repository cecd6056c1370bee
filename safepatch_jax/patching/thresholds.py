"""The threshold of a selection over tensors that are read in pieces: by counting, in few passes.

A sample says about where the threshold lies. A pass counts how many keys reach a few numbers around
it, and gathers the keys in a window that should hold it; where it does not, the next pass looks
between the two numbers that it lies between. Counts are kept for each piece, so it is known which
pieces keep their entries that equal the threshold, and pieces can be merged in any order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from safepatch_jax.patching.selection import NONE

# Of a piece: a threshold, and a row-major index; entries that equal the threshold are marked below
# it.
Limit = tuple[int, int]
_NOTHING: Limit = (NONE, 0)
# The window, and further ranks whose keys are counted, as multiples of the wanted rank.
_WINDOW = (1.2, 0.8)
_RANKS = (8, 2, 1.2, 1.05, 0.95, 0.8, 0.4)
COUNTED = len(_RANKS) + 1
_GATHERED = 1 << 23  # keys that a pass holds at most
_SMALL = 1 << 18  # keys that are all gathered in the first pass


@dataclasses.dataclass(frozen=True)
class _Count:
    """How many keys of each piece are at least a threshold, int64 [pieces]."""

    threshold: int
    pieces: np.ndarray

    @property
    def total(self) -> int:
        return int(self.pieces.sum())


class Search:
    """The search for the `number` largest keys of all pieces, zeros left out.

    Keys are below 2^31. Ties go to the earlier piece, and within one to the lower index. A pass
    hands `add` what it finds with the numbers of `bounds`, piece by piece, and ends with `end`.

    Args:
      number: how many, marks that count towards it included.
      size: how many keys there are.
      sample: some of the keys.
      marks: about how many marks count towards the number.

    Attributes:
      bounds: int32 [COUNTED + 2]: thresholds, and first and last key of the window.
      limits: of each piece in turn; None until they are found.
      partial: (number of a piece, how many of its entries that equal the threshold are marked) if
        there is one of which some are and some are not; its limit says that none is.
    """

    def __init__(self, number: int, size: int, sample: np.ndarray, marks: int = 0):
        self.limits: list[Limit] | None = None
        self.partial: tuple[int, int] | None = None
        self._number = number
        self._low, self._high = _Count(0, np.zeros(0)), _Count(NONE + 1, np.zeros(1, np.int64))
        ranked = np.sort(sample)[::-1]
        rank = max(number - marks, 0) / size * len(ranked)

        def key(share: float) -> int:
            return max(1, int(ranked[min(int(share * rank), len(ranked) - 1)]))

        window = (1, NONE) if size <= _SMALL else tuple(key(share) for share in _WINDOW)
        self._begin([1, *(key(share) for share in _RANKS)], window)

    def _begin(self, thresholds: Sequence[int], window: tuple[int, int]) -> None:
        self.bounds = np.array([*thresholds, *window], np.int32)
        self._counts: list[np.ndarray] = []
        self._keys: list[np.ndarray] = []
        self._marks = self._held = 0

    def add(self, counts: np.ndarray, marks: int, keys: np.ndarray) -> None:
        """Take a piece's counts (int32 [COUNTED]), marks, and keys within the window."""
        self._counts.append(counts)
        self._marks += marks
        self._held += len(keys)
        if self._held > _GATHERED:
            self._keys.clear()
        else:
            self._keys.append(keys)

    def end(self) -> None:
        """End a pass: the limits are there, or the bounds of the next one."""
        columns = np.array(self._counts, np.int64).T
        number = min(max(self._number - self._marks, 0), int(columns[0].sum()))
        if self._low.threshold == 0 and not number:
            self.limits = [_NOTHING] * len(self._counts)
            return
        for threshold, pieces in zip(self.bounds.tolist(), columns):
            count = _Count(threshold, pieces)
            if count.total >= number and threshold > self._low.threshold:
                self._low = count
            if count.total < number and threshold < self._high.threshold:
                self._high = count
        first, last = self._low.threshold, self._high.threshold - 1
        if first == last:
            above = np.broadcast_to(self._high.pieces, self._low.pieces.shape)
            self._finish(first, number, above, self._low.pieces - above)
        elif self.bounds[-2] <= first and last <= self.bounds[-1] and self._held <= _GATHERED:
            self._look(number)
        elif self._low.total - self._high.total <= _GATHERED:
            self._begin([1] * COUNTED, (first, last))
        else:
            inner = np.linspace(first, last + 1, COUNTED + 1)[1:-1]
            self._begin([1, *np.clip(inner.astype(np.int64), first + 1, last)], (NONE, NONE))

    def _look(self, number: int) -> None:
        """Find the threshold among the keys of the window."""
        first, last = self._low.threshold, self._high.threshold - 1
        parts = [keys[(keys >= first) & (keys <= last)] for keys in self._keys]
        wanted = number - self._high.total
        keys = np.concatenate(parts)
        threshold = int(np.partition(keys, len(keys) - wanted)[len(keys) - wanted])
        above = self._high.pieces + [np.count_nonzero(part > threshold) for part in parts]
        ties = np.array([np.count_nonzero(part == threshold) for part in parts])
        self._finish(threshold, number, above, ties)

    def _finish(self, threshold: int, number: int, above: np.ndarray, ties: np.ndarray) -> None:
        remaining, self.limits = number - int(above.sum()), []
        for count in ties.tolist():
            if 0 < remaining < count:
                self.partial = len(self.limits), remaining
            self.limits.append((threshold, NONE if remaining >= count else 0))
            remaining = max(0, remaining - count)
