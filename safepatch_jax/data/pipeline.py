"""The input pipeline of training: seed and batch number alone decide which examples make a batch.

So the state of an iterator is the number of its next batch. It is stored with a training
checkpoint; an iterator that is set to it resumes at that example, whatever the number of processes.
Each process lays out the rows that its devices hold. Examples lie in memory, and a batch is laid
out in a fraction of a millisecond while the devices compute, so nothing is read ahead.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from safepatch_jax.data.chat import LENGTH_STEP, Example, lengths, shared_prefix, training_batch

Pool = tuple[Sequence[Example], int]  # examples, and how many of them each batch has
WINDOW = 16  # batches within which examples of like length are brought together
_STATE = "next_index"  # grain's name for it, which checkpoints of earlier versions have
_LENGTH = operator.attrgetter("length")


def training_batches(
    pools: Sequence[Pool],
    seed: int,
    buckets: int = 1,
    rows: Sequence[int] | None = None,
    compact: bool = False,
) -> TrainingBatches:
    """Return an endless iterator of training batches.

    Args:
      pools: (examples, rows of a batch) pairs; each pool is shuffled anew whenever it is used up.
      seed: of the order.
      buckets: padded shapes that batches may have, see `shapes`. With several, the examples of
        WINDOW batches are sorted by length and dealt out anew, so that a batch has examples of like
        length.
      rows: numbers of the rows that this process needs, the others are left empty; None for all.
      compact: for one CPU device, whose time is that of the tokens: the same examples, but what
        all prompts begin with is laid out once, and padding ends with the longest example.
    """
    every = list(itertools.chain.from_iterable(examples for examples, _ in pools))
    offered, prefix = shapes(every, buckets), 0
    batches = _Batches(pools, seed, sort=len(offered) > 1)
    if compact:
        offered = shapes(every, buckets, compact=True)
        prefix = shared_prefix([example.prompt_ids for example in every])
    return TrainingBatches(batches, offered, rows, prefix)


class TrainingBatches:
    """An endless iterator of NumPy batches, see `safepatch_jax.data.chat.training_batch`."""

    def __init__(
        self,
        batches: _Batches,
        offered: Sequence[tuple[int, int]],
        rows: Sequence[int] | None,
        prefix: int,
    ):
        self._batches, self._offered, self._rows = batches, offered, rows
        self._prefix, self._next = prefix, 0

    def __iter__(self) -> TrainingBatches:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        examples = self._batches[self._next]
        self._next += 1
        longest, _ = lengths(examples, 1)
        length, answer = next(shape for shape in self._offered if shape[0] >= longest)
        return training_batch(examples, length - self._prefix, answer, self._rows, self._prefix)

    def get_state(self) -> dict[str, int]:
        """Return the position, JSON-able."""
        return {_STATE: self._next}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go to a position that `get_state` has returned."""
        self._next = int(state[_STATE])


def shapes(
    examples: Sequence[Example], buckets: int, compact: bool = False
) -> list[tuple[int, int]]:
    """Return at most so many padded shapes (T, A), ascending, the last of which holds every example
    (see `lengths`), multiples of LENGTH_STEP; if compact as many, or fewer, which end with an
    example.

    The others hold equal shares of the examples; their answer length is that of the longest answer
    among these.
    """
    step = LENGTH_STEP
    if compact:
        buckets, step = len(shapes(examples, buckets)), 1
    ordered = sorted(examples, key=_LENGTH)
    ends = [-(-len(ordered) * part // buckets) for part in range(1, buckets + 1)]
    padded = {lengths(ordered[:end], step)[0] for end in ends if end}
    result = []
    for length in sorted(padded):
        # More examples have this padded length than the quantile counted; all of them must fit.
        fitting = [example for example in ordered if example.length <= length]
        result.append((length, lengths(fitting, step)[1]))
    return result


class _Batches:
    """The examples of each batch, by its number."""

    def __init__(self, pools: Sequence[Pool], seed: int, sort: bool):
        self._pools, self._seed, self._sort = pools, seed, sort
        self._generators = np.random.default_rng(seed).spawn(len(pools))
        # By pool, one permutation for each pass over it.
        self._orders: list[list[np.ndarray]] = [[] for _ in pools]

    def __getitem__(self, number: int) -> list[Example]:
        batch = []
        for pool, (_, rows) in enumerate(self._pools):
            batch += self._of_pool(pool, number, rows)
        return batch

    def _of_pool(self, pool: int, number: int, rows: int) -> list[Example]:
        if not self._sort:
            return self._drawn(pool, number * rows, rows)
        window, place = divmod(number, WINDOW)
        alike = sorted(self._drawn(pool, window * WINDOW * rows, WINDOW * rows), key=_LENGTH)
        # The same turn for all pools, so that the long ones meet.
        turn = int(np.random.default_rng((self._seed, window)).permutation(WINDOW)[place])
        return alike[turn * rows : (turn + 1) * rows]

    def _drawn(self, pool: int, start: int, count: int) -> list[Example]:
        """Return examples from a place of the pool's endless order."""
        examples, orders = self._pools[pool][0], self._orders[pool]
        while len(orders) * len(examples) < start + count:
            orders.append(self._generators[pool].permutation(len(examples)))
        drawn = []
        for place in range(start, start + count):
            turn, at = divmod(place, len(examples))
            drawn.append(examples[orders[turn][at]])
        return drawn
