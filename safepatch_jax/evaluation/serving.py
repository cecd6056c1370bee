"""Continuous batching: a sequence that has ended gives its row to the next prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from safepatch_jax.data.chat import prompt_batch, with_prefix
from safepatch_jax.evaluation.generate import Prompts, State
from safepatch_jax.runtime import processes

PIECE = 32  # tokens between two looks for a stop text
_WORTH = 32  # tokens that must still be possible for fewer rows to be worth their compilation


class Model(Protocol):
    """See `generate.Whole`.

    Attributes:
      groups: in so many groups the rows are filled.
      shrinks: whether fewer rows take less time; then there is `take`, see `by_block.ByBlock`.
    """

    groups: int
    shrinks: bool

    def idle(self, rows: int, capacity: int, max_new: int, sampled: bool) -> State: ...

    def admit(self, state: State, prompts, rows_G, stop_ids, sampling) -> State: ...

    def advance(self, state: State, stop_ids, sampling, steps: int, enough: int) -> State: ...

    def take(self, state: State, rows) -> State: ...


@dataclasses.dataclass(frozen=True)
class Rows:
    """How prompts run together.

    Attributes:
      number: sequences at once.
      group: prompts that are read together.
      capacity: tokens of a prompt with its answer, at most.
      width: maps the length of a prompt to that to which a group is padded.
      prefix: tokens that all prompts begin with, read once a group.
    """

    number: int
    group: int
    capacity: int
    width: Callable[[int], int]
    prefix: tuple[int, ...] = ()


class Server:
    """Continues prompts, as many at once as there are rows.

    Args:
      model: what continues them.
      rows: how they run together.
      stop_ids: int32 [n].
      draws: None for the most likely token, or what `decode` takes as `sampling`, with a 'key' for
        each prompt.
      max_new: tokens of an answer, at most.
      put: lays a batch, {name: array [G, ...]}, out on the mesh.
      finished: tells, from the tokens of an answer so far, whether what follows is not wanted;
        asked whenever the host looks, after PIECE tokens at the latest; how long an answer goes on
        after it is finished depends on its neighbours. None: never.
    """

    def __init__(
        self,
        model: Model,
        rows: Rows,
        stop_ids: np.ndarray,
        draws: dict[str, np.ndarray] | None,
        max_new: int,
        put: Callable[[Any], Any],
        finished: Callable[[np.ndarray], bool] | None = None,
    ):
        self._model, self._rows, self._stop_ids = model, rows, stop_ids
        self._draws, self._max_new, self._put = draws, max_new, put
        self._finished = finished

    def run(
        self, prompts: Sequence[tuple[int, Sequence[int]]], done: Callable[[int, np.ndarray], None]
    ) -> None:
        """Continue prompts, each with its number, in their order.

        Args:
          done: called with the number and the new tokens, int32 [n], of each answer that has ended;
            a stop token included.
        """
        waiting = list(reversed(prompts))
        owners: list[int | None] = [None] * self._rows.number
        state = self._model.idle(
            len(owners), self._rows.capacity, self._max_new, self._draws is not None
        )
        while waiting or any(owner is not None for owner in owners):
            state = self._admit(state, waiting, owners)
            enough = len(owners)
            if waiting:
                enough = min(enough, max(self._rows.group, owners.count(None) + 1))
            elif self._pays(state, owners):
                state, owners = self._shrunk(state, owners)
                enough = -(-len(owners) // 2)
            steps = min(PIECE, self._max_new - 1) if self._finished else self._max_new - 1
            state = self._model.advance(state, self._stop_ids, self._sampling(), steps, enough)
            state = self._collect(state, owners, done)

    def _admit(self, state: State, waiting: list, owners: list[int | None]) -> State:
        """Put waiting prompts into free rows, group by group."""
        free = [row for row, owner in enumerate(owners) if owner is None]
        running = len(owners) > len(free)
        while waiting and free:
            if running and len(free) < min(self._rows.group, len(waiting)):
                break  # a part of a group costs as much as all of it
            group = [waiting.pop() for _ in range(min(self._rows.group, len(free), len(waiting)))]
            rows, free = free[: len(group)], free[len(group) :]
            for row, (number, _) in zip(rows, group):
                owners[row] = number
            # A group is filled up with copies of its last prompt, which go nowhere.
            lacking = self._rows.group - len(group)
            group += [group[-1]] * lacking
            rows = np.array(rows + [len(owners)] * lacking, np.int32)
            sampling = self._sampling([number for number, _ in group])
            width = self._rows.width(max(len(ids) for _, ids in group))
            shared = len(self._rows.prefix)
            batch = prompt_batch([ids[shared:] for _, ids in group], width - shared)
            batch = self._put(with_prefix(batch, self._rows.prefix))
            prompts = Prompts(batch["tokens"], batch["lengths"], batch.get("prefix"))
            state = self._model.admit(state, prompts, rows, self._stop_ids, sampling)
        return state

    def _sampling(self, numbers: Sequence[int] | None = None) -> dict[str, np.ndarray] | None:
        if self._draws is None:
            return None
        sampling = {name: x for name, x in self._draws.items() if name != "key"}
        return sampling if numbers is None else sampling | {"key": self._draws["key"][numbers]}

    def _pays(self, state: State, owners: list[int | None]) -> bool:
        """Tell whether so many tokens may follow that fewer rows would be quicker."""
        if not self._model.shrinks or len(owners) == 1:
            return False
        running = [row for row, owner in enumerate(owners) if owner is not None]
        return self._max_new - np.asarray(state.count_B)[running].min() >= _WORTH

    def _shrunk(self, state: State, owners: list[int | None]) -> tuple[State, list[int | None]]:
        """Halve the number of rows as long as there are idle ones enough."""
        running = [row for row, owner in enumerate(owners) if owner is not None]
        number = len(owners)
        while number >= 2 * len(running):
            number //= 2
        if number == len(owners):
            return state, owners
        free = [row for row, owner in enumerate(owners) if owner is None]
        rows = (running + free)[:number]
        return self._model.take(state, np.array(rows, np.int32)), [owners[row] for row in rows]

    def _collect(
        self, state: State, owners: list[int | None], done: Callable[[int, np.ndarray], None]
    ) -> State:
        """Hand over the answers that have ended, and free their rows."""
        ended, out = (processes.fetch(x) for x in (state.done_B, state.out))
        late = []
        for row, owner in enumerate(owners):
            if owner is None:
                continue
            ids = out[row][out[row] >= 0]  # a copy: the state's own memory is used again
            if not ended[row] and self._finished and self._finished(ids):
                late.append(row)
            elif not ended[row]:
                continue
            done(owner, ids)
            owners[row] = None
        if late:
            ended = np.array(ended)
            ended[late] = True
            state = state._replace(done_B=jax.device_put(ended, state.done_B.sharding))
        return state
