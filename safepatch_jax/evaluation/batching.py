"""How many sequences run together, and which: those of like length, in few shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from safepatch_jax.data.chat import Example, shared_prefix
from safepatch_jax.evaluation.serving import Rows

_LONG = 512  # tokens
_ROWS = 8  # where fewer are quicker their number is a multiple, so that few programs are compiled
_FEW_GROUPS = 4  # of prompts, where answers are short
_GAIN = 0.85  # smaller batches are taken where this share of the rows, or less, is computed


@dataclasses.dataclass(frozen=True)
class Batching:
    """How sequences are brought together.

    Attributes:
      size: sequences at once, at most.
      ways: devices over which a batch is cut.
      one_cpu: whether this is one CPU device. There tokens that all begin with are read once (see
        `models.prefix`), and fewer rows take less time.
    """

    size: int
    ways: int
    one_cpu: bool = False

    def prefix(self, prompts: Sequence[Sequence[int]]) -> int:
        """Return how many first tokens of these prompts are read once."""
        return shared_prefix(prompts) if self.one_cpu else 0

    def groups(self, sizes: Sequence[int], few_idle: bool = False) -> list[tuple[int, list[int]]]:
        """Return (rows, indices) of each batch: those of like size together, and the longest at the
        beginning.

        Args:
          few_idle: take half as many rows, or a quarter, where far fewer are idle then: where a row
            costs what its tokens do, and not a step of all weights a token.
        """
        order, groups = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)), []
        limits = [self.rows(padded(sizes[i])) for i in order]
        limit = rows = 0
        while order:
            if limits[-len(order)] != limit:
                limit = rows = limits[-len(order)]
                if few_idle:
                    rows = self._least_idle(limit, limits.count(limit))
            groups.append((rows, order[:rows]))
            order = order[rows:]
        return groups

    def _least_idle(self, rows: int, needed: int) -> int:
        rows = self.fewer(rows, needed)
        choices = [rows]
        while choices[-1] % (2 * self.ways) == 0 and len(choices) < 3:
            choices.append(choices[-1] // 2)
        filled = {few: -(-needed // few) * few for few in choices}
        least = min(choices, key=filled.__getitem__)  # of equal ones the largest
        return least if filled[least] <= _GAIN * filled[rows] else rows

    def rows(self, length: int) -> int:
        """Return how many sequences run together: the batch size, and fewer where they are longer
        than _LONG tokens."""
        ways = self.ways
        return max(ways, min(self.size, self.size * _LONG // length) // ways * ways)

    def fewer(self, rows: int, needed: int) -> int:
        """Return half as many rows, or a quarter, and so on, where no more are needed: so there are
        few programs."""
        while rows % (2 * self.ways) == 0 and rows >= 2 * needed:
            rows //= 2
        return rows

    def pools(
        self, prompts: Sequence[Sequence[int]], max_new: int, most: int
    ) -> list[tuple[Rows, list[int]]]:
        """Return how prompts run that are continued by at most `max_new` tokens, and their indices:
        the longest first, and those of less than half of its size apart, where they need less of a
        cache. Their rows are filled in `most` groups, or fewer."""
        sizes, pools = [len(ids) + max_new for ids in prompts], []
        order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
        while order:
            capacity, ways = _width(sizes[order[0]]), self.ways
            pool = [i for i in order if 2 * sizes[i] > sizes[order[0]]]
            if len(pool) < self.rows(capacity):  # they would not fill the rows
                pool = order[: self.rows(capacity)]
            number = self.fewer(self.rows(capacity), len(pool))
            if self.one_cpu:
                number = self.fewer(min(number, -(-len(pool) // _ROWS) * _ROWS), len(pool))
            groups = most
            if max_new <= 2 * (sizes[order[0]] - max_new):
                # Many prompts together are read faster, and a short answer does not leave its row
                # idle for long.
                groups = min(groups, _FEW_GROUPS)
            group = ways * max(1, number // ways // groups)
            shared = self.prefix([prompts[i] for i in pool]) if group > 1 else 0
            prefix = tuple(prompts[pool[0]][:shared])
            pools.append((Rows(number, group, capacity, _width, prefix), pool))
            order = order[len(pool) :]
        return pools


def padded(length: int) -> int:
    """Round a length up to one of few, at most a quarter above it, so that few programs are
    compiled."""
    step = max(8, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step


def _width(length: int) -> int:
    """Round the length of a prompt, alone or with its answer, up to one of very few."""
    return padded(-(-length // 16) * 16)


def length_of(example: Example) -> int:
    """Return the number of tokens of a prompt with its answer."""
    return len(example.prompt_ids) + len(example.answer_ids)
