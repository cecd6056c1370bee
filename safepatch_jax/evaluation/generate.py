"""Generation, greedy or sampled: prompts are read into a cache, then token follows token."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from safepatch_jax.models.cache import Cache
from safepatch_jax.models.decoder import Decoder

_LEAST = 1e-6  # of temperature and top_p


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: the most likely one at temperature 0, else drawn (see `decode`).

    Raises:
      ValueError: a temperature or top_p that is no such number, or so small that float32 logits
        divided by it would overflow, or that it would be 0 there.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        drawn = math.isfinite(self.temperature) and self.temperature >= _LEAST
        if not ((drawn or self.temperature == 0) and _LEAST <= self.top_p <= 1):
            raise ValueError(
                f"temperature must be 0 (greedy) or at least {_LEAST:g} and top_p in "
                f"[{_LEAST:g}, 1], got {self.temperature} and {self.top_p}."
            )


class Past(NamedTuple):
    """What a model has read: its cache, and the number of tokens of each sequence in it [B]."""

    cache: Any
    length_B: jax.Array


class Prompts(NamedTuple):
    """Prompts that are read together: tokens [G, T], RIGHT padded, how many of each are real [G],
    and the tokens [1, P] that all begin with and that are not counted there, or None."""

    tokens_GT: Any
    length_G: Any
    prefix_1P: Any = None


class State(NamedTuple):
    """Sequences that are being continued.

    Attributes:
      token_B: the last token of each, emitted but not yet read.
      count_B: tokens emitted.
      done_B: which have ended; nothing is emitted there any more.
      out: int32 [B, max_new], the tokens emitted, then -1.
      key: uint32 [B, 2] of each sequence, for draws; None where the most likely token is taken.
      past: a Past, or one for each of the streams that are continued with the same tokens.
    """

    token_B: jax.Array
    count_B: jax.Array
    done_B: jax.Array
    out: jax.Array
    key: jax.Array | None
    past: Any


def idle(rows: int, max_new: int, sampled: bool, past: Any) -> State:
    """Return a state of so many sequences, all of which have ended."""
    number_B = jnp.zeros(rows, jnp.int32)
    key = jnp.zeros((rows, 2), jnp.uint32) if sampled else None
    out = jnp.full((rows, max_new), -1, jnp.int32)
    return State(number_B, number_B, jnp.ones(rows, bool), out, key, past)


@functools.partial(jax.jit, static_argnames=("decoder", "max_new"))
def decode(
    decoder: Decoder, params: Any, tokens_BT, length_B, stop_ids, sampling=None, *, max_new: int
) -> jax.Array:
    """Continue right-padded prompts, all at once, until the last has ended.

    Args:
      decoder: the model.
      params: nested parameter dictionary.
      tokens_BT, length_B: prompts, RIGHT padded, and how many tokens of each are real.
      stop_ids: int32 [n]; a sequence ends with the first of these that it emits.
      sampling: None for the most likely token; or {'temperature', 'top_p': float32 scalars, 'key':
        uint32 [B, 2], a key for each sequence}.
      max_new: number of tokens at most.

    Returns:
      int32 [B, max_new]; after a stop token the rest is -1.
    """
    logits_BV, past = read(decoder, params, tokens_BT, length_B, tokens_BT.shape[1] + max_new)
    state = first_state(logits_BV, past, stop_ids, sampling, max_new)
    follow_one = functools.partial(follow, decoder, params)
    return advance(follow_one, state, stop_ids, sampling, max_new, state.done_B.shape[0]).out


def read(
    decoder: Decoder, params: Any, tokens_BT, length_B, capacity: int
) -> tuple[jax.Array, Past]:
    """Read right-padded prompts.

    Args:
      tokens_BT, length_B: see `decode`.
      capacity: slots of the cache, at least T.

    Returns:
      (logits float32 [B, V] of the first new token, the past).
    """
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    valid_BT = positions_BT < length_B[:, None]
    logits_B1V, kv = decoder.apply(
        {"params": params},
        tokens_BT,
        positions_BT,
        valid_BT,
        keep_kv=True,
        logits_at_BA=length_B[:, None] - 1,
    )
    return logits_B1V[:, 0], Past(cache_of(kv, capacity), length_B)


def cache_of(kv: tuple[jax.Array, jax.Array], capacity: int, slots_last: bool = False) -> Cache:
    """Lay keys and values [..., T, K, H] out as a cache of so many slots; see `Cache`."""
    keys, values = (jnp.swapaxes(x, -3, -2) for x in kv)
    if slots_last:
        keys = jnp.swapaxes(keys, -2, -1)
    cache = Cache(keys, values, slots_last)
    return with_room(cache, capacity - cache.slots)


def with_room(cache: Cache, room: int) -> Cache:
    """Return a cache with so many slots more."""

    def padded(x, axis):
        widths = [(0, 0)] * x.ndim
        widths[axis] = 0, room
        return jnp.pad(x, widths)

    keys = padded(cache.k, -1 if cache.slots_last else -2)
    return cache.replace(k=keys, v=padded(cache.v, -2))


def read_on(decoder: Decoder, params: Any, tokens_BT, past: Past) -> tuple[jax.Array, Cache]:
    """Read tokens after the past.

    Returns:
      (logits float32 [B, T, V], the cache with the tokens).
    """
    positions_BT = past.length_B[:, None] + jnp.arange(tokens_BT.shape[1])
    return decoder.apply(
        {"params": params},
        tokens_BT,
        positions_BT,
        jnp.ones_like(tokens_BT, bool),
        past.cache,
    )


def follow(decoder: Decoder, params: Any, token_B, past: Past) -> tuple[jax.Array, Past]:
    """Read one more token of each sequence.

    Returns:
      (logits float32 [B, V] of the token after it, the past with it).
    """
    logits_B1V, cache = read_on(decoder, params, token_B[:, None], past)
    return logits_B1V[:, 0], Past(cache, past.length_B + 1)


def first_state(logits_BV: jax.Array, past: Any, stop_ids, sampling, max_new: int) -> State:
    """Return the state in which each sequence has its first token."""
    state = idle(logits_BV.shape[0], max_new, False, past)
    state = state._replace(done_B=~state.done_B, key=sampling and sampling["key"])
    return emit(logits_BV, state, stop_ids, sampling)


def emit(
    logits_BV: jax.Array, state: State, stop_ids, sampling: Mapping[str, jax.Array] | None
) -> State:
    """Choose the next token of each sequence that has not ended."""
    token_B = _choose(logits_BV, state.key, state.count_B, sampling)
    room = state.out.shape[1]
    here_BN = (jnp.arange(room) == state.count_B[:, None]) & ~state.done_B[:, None]
    count_B = state.count_B + ~state.done_B
    ended_B = jnp.any(token_B[:, None] == stop_ids[None], axis=-1) | (count_B >= room)
    return state._replace(
        token_B=token_B,
        count_B=count_B,
        done_B=state.done_B | ended_B,
        out=jnp.where(here_BN, token_B[:, None], state.out),
    )


def advance(
    follow_one: Callable[[jax.Array, Any], tuple[jax.Array, Any]],
    state: State,
    stop_ids,
    sampling,
    steps,
    enough,
) -> State:
    """Continue by so many tokens, or until so many sequences have ended.

    Args:
      follow_one: maps (token [B], past) to (logits [B, V] to choose the next one from, past).
      steps, enough: int32 scalars.
      stop_ids, sampling: see `decode`; the keys are in the state.
    """

    def running(carry):
        step, state = carry
        # Written so that a plan reads the trips of the loop off the first comparison.
        left = state.done_B.shape[0] - enough
        return (step < steps) & (jnp.sum(~state.done_B) > left)

    def one(carry):
        step, state = carry
        logits_BV, past = follow_one(state.token_B, state.past)
        return step + 1, emit(logits_BV, state._replace(past=past), stop_ids, sampling)

    return lax.while_loop(running, one, (jnp.int32(0), state))[1]


@dataclasses.dataclass(frozen=True)
class Whole:
    """Continues sequences by programs of the whole decoder, whose blocks are a loop over stacked
    weights: for devices that read the weights where they lie.

    Args:
      decoder: the model.
      params: nested parameter dictionary.
    """

    decoder: Decoder
    params: Any
    shrinks = False  # a step takes as long for few sequences
    groups = 4  # reading a group reads all weights

    def idle(self, rows: int, capacity: int, max_new: int, sampled: bool) -> State:
        """Return a state of so many sequences that have ended, with a cache of `capacity` slots."""
        return _idle(self.decoder, rows, capacity, max_new, sampled)

    def admit(self, state: State, prompts, rows_G, stop_ids, sampling) -> State:
        """Read prompts and put them in place of sequences that have ended.

        Args:
          state: donated.
          prompts: `Prompts`; here without a prefix.
          rows_G: into which row each goes; those past the end are dropped.
          stop_ids, sampling: see `decode`; keys [G, 2].
        """
        if prompts.prefix_1P is not None:
            raise ValueError("prompts with a prefix are read on one CPU device alone (`ByBlock`).")
        return _admit(self.decoder, self.params, state, prompts, rows_G, stop_ids, sampling)

    def advance(self, state: State, stop_ids, sampling, steps: int, enough: int) -> State:
        """Continue (see `advance`); the state is donated."""
        steps, enough = jnp.int32(steps), jnp.int32(enough)
        return _advance(self.decoder, self.params, state, stop_ids, sampling, steps, enough)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _idle(decoder: Decoder, rows: int, capacity: int, max_new: int, sampled: bool) -> State:
    config = decoder.config
    shape = config.num_layers, rows, config.num_kv_heads, capacity, config.head_dim
    past = Past(
        Cache(jnp.zeros(shape, decoder.dtype), jnp.zeros(shape, decoder.dtype)),
        jnp.zeros(rows, jnp.int32),
    )
    return _laid_out(decoder, idle(rows, max_new, sampled, past))


def _laid_out(decoder: Decoder, state: State) -> State:
    """Cut the state of a stacked cache over the mesh, the same way after each program."""
    if decoder.sharder is None:
        return state
    constrain = decoder.sharder.constrain
    cache, length_B = state.past
    axes = "layers", "batch", "kv_heads", "layers", "head_dim"
    cache = cache.replace(k=constrain(cache.k, *axes), v=constrain(cache.v, *axes))
    state = state._replace(past=length_B)  # small: whole on each device
    state = jax.tree.map(lambda x: constrain(x, *["layers"] * x.ndim), state)
    return state._replace(past=Past(cache, state.past))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _admit(decoder: Decoder, params: Any, state: State, prompts, rows_G, stop_ids, sampling):
    tokens_GT, length_G, _ = prompts
    cache, length_B = state.past
    logits_GV, past = read(decoder, params, tokens_GT, length_G, tokens_GT.shape[1])
    first = first_state(logits_GV, length_G, stop_ids, sampling, state.out.shape[1])
    state = placed(state._replace(past=length_B), first, rows_G)
    cache = placed_slots(cache, past.cache, rows_G)
    return _laid_out(decoder, state._replace(past=Past(cache, state.past)))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _advance(decoder: Decoder, params: Any, state: State, stop_ids, sampling, steps, enough):
    follow_one = functools.partial(follow, decoder, params)
    state = advance(follow_one, state, stop_ids, sampling, steps, enough)
    return _laid_out(decoder, state)


def placed(state: State, first: State, rows_G) -> State:
    """Return a state in which some rows are those of another; of the past both hold the lengths
    alone."""
    return jax.tree.map(lambda old, new: old.at[rows_G].set(new, mode="drop"), state, first)


def placed_slots(cache: Cache, new: Cache, rows_G) -> Cache:
    """Return a cache [..., B, K, S, H] whose some rows hold what [..., G, K, T, H] does, and then
    zeros: a NaN of the sequence before would be seen through its weight of 0."""
    new = with_room(new, cache.slots - new.slots)
    return jax.tree.map(lambda old, x: old.at[..., rows_G, :, :, :].set(x, mode="drop"), cache, new)


def _choose(
    logits_BV: jax.Array, key: jax.Array | None, step_B, sampling: Mapping[str, jax.Array] | None
) -> jax.Array:
    """Return the next token of each sequence, number `step` of its new ones, int32 [B].

    Sampling divides the logits by the temperature, keeps the most likely tokens that together reach
    top_p (one at least; Holtzman et al. 2020), and draws with random numbers of the sequence's key
    and the step alone.
    """
    if sampling is None:
        return jnp.argmax(logits_BV, -1).astype(jnp.int32)
    logits_BV = logits_BV / sampling["temperature"]
    sorted_BV = jnp.flip(jnp.sort(logits_BV, axis=-1), axis=-1)
    share_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(share_BV, axis=-1) - share_BV
    least_B = jnp.min(jnp.where(before_BV < sampling["top_p"], sorted_BV, jnp.inf), axis=-1)

    def draw(key, step):
        own_key = jax.random.fold_in(jax.random.wrap_key_data(key), step)
        return jax.random.gumbel(own_key, logits_BV.shape[-1:])

    noise_BV = jax.vmap(draw)(key, step_B)
    noisy_BV = jnp.where(logits_BV >= least_B[:, None], logits_BV + noise_BV, -jnp.inf)
    return jnp.argmax(noisy_BV, -1).astype(jnp.int32)
