"""Generation, greedy or sampled: prefill and cached decode in one compiled program, or in pieces
with a look at the text."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from safepatch_jax.models.decoder import Decoder, Past
from safepatch_jax.runtime import processes

PIECE = 32  # tokens between two looks for a stop text


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: the most likely one at temperature 0, else drawn (see `decode`).

    Raises:
      ValueError: a temperature below 0 or infinite, or top_p outside (0, 1].
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature >= 0 and 0 < self.top_p <= 1):
            raise ValueError(
                f"temperature must be 0 or more and top_p in (0, 1], got {self.temperature} and "
                f"{self.top_p}."
            )


class State(NamedTuple):
    """A batch that is being continued.

    Attributes:
      step: number of tokens emitted so far.
      token_B: the next token of each sequence.
      done_B: which sequences have ended.
      out: int32 [B, max_new], the tokens emitted.
      past: a Past, or one for each of the streams that are continued with the same tokens.
    """

    step: jax.Array
    token_B: jax.Array
    done_B: jax.Array
    out: jax.Array
    past: Any


@functools.partial(jax.jit, static_argnames=("decoder", "max_new"))
def decode(
    decoder: Decoder, params: Any, tokens_BT, valid_BT, stop_ids, sampling=None, *, max_new: int
) -> jax.Array:
    """Continue left-padded prompts.

    Args:
      decoder: the model.
      params: nested parameter dictionary.
      tokens_BT, valid_BT: prompts, LEFT padded, and which entries are real.
      stop_ids: int32 [n]; a sequence ends with the first of these that it emits.
      sampling: None for the most likely token; or {'temperature', 'top_p': float32 scalars, 'key':
        uint32 [B, 2], a key for each sequence}.
      max_new: number of tokens at most.

    Returns:
      int32 [B, max_new]; after a stop token the rest is -1.
    """
    state = _prefill(decoder, params, tokens_BT, valid_BT, sampling, max_new)
    return _advance(decoder, params, state, stop_ids, sampling, max_new).out


def decode_until(
    decoder: Decoder,
    params: Any,
    tokens_BT,
    valid_BT,
    stop_ids,
    sampling=None,
    *,
    max_new: int,
    finished: Callable[[np.ndarray], bool],
    piece: int = PIECE,
) -> np.ndarray:
    """Continue as `decode` does, in pieces, and end once each sequence has ended or holds all that
    is wanted of it.

    Args:
      finished: tells, from a sequence's tokens so far, int32 [n], whether what follows is not
        wanted; called after each piece.
      piece: tokens between two looks.
      others: see `decode`. The arithmetic of a step is that of `decode`: the room for all of
        `max_new` is there from the start.

    Returns:
      int32 [B, max_new], on the host; after a stop token, or the piece in which a sequence was
      finished, the rest is -1.
    """
    state = _begin(decoder, params, tokens_BT, valid_BT, sampling, max_new=max_new)
    for end in range(piece, max_new + piece, piece):
        state = _continue(decoder, params, state, stop_ids, sampling, np.int32(min(end, max_new)))
        # Copies: the state's own memory is used again by the next piece.
        out, done_B = (np.array(processes.fetch(x)) for x in (state.out, state.done_B))
        done_B |= [finished(row[row >= 0]) for row in out]
        if done_B.all():
            break
        state = state._replace(done_B=jax.device_put(done_B, state.done_B.sharding))
    return out


def _prefill(decoder: Decoder, params: Any, tokens_BT, valid_BT, sampling, max_new: int) -> State:
    logits_BV, past = read(decoder, params, tokens_BT, valid_BT, max_new)
    return first_state(logits_BV, past, sampling, max_new)


def _advance(decoder: Decoder, params: Any, state: State, stop_ids, sampling, until) -> State:
    """Continue until so many tokens are emitted, or all sequences have ended."""
    length = state.past.positions_BS.shape[1] - state.out.shape[1]
    return advance(
        lambda token_B, step, past: follow(decoder, params, token_B, length + step, past),
        state,
        stop_ids,
        sampling,
        until,
    )


def read(decoder: Decoder, params: Any, tokens_BT, valid_BT, room: int) -> tuple[jax.Array, Past]:
    """Read left-padded prompts.

    Args:
      tokens_BT, valid_BT: see `decode`.
      room: tokens that will follow at most.

    Returns:
      (logits float32 [B, V] of the first new token, the past [B, T + room], whose last `room` slots
      are empty).
    """
    batch, length = tokens_BT.shape
    positions_BT = jnp.maximum(jnp.cumsum(valid_BT, axis=1) - 1, 0)
    last_B1 = jnp.full((batch, 1), length - 1)
    logits_B1V, (k, v) = decoder.apply(
        {"params": params}, tokens_BT, positions_BT, valid_BT, keep_kv=True, logits_at_BA=last_B1
    )
    empty = ((0, 0), (0, 0), (0, room), (0, 0), (0, 0))
    later_BS = positions_BT[:, -1:] + 1 + jnp.arange(room)
    past = Past(
        jnp.pad(k, empty),
        jnp.pad(v, empty),
        jnp.concatenate([positions_BT, later_BS], axis=1),
        jnp.pad(valid_BT, ((0, 0), (0, room))),
    )
    return logits_B1V[:, 0], past


def follow(decoder: Decoder, params: Any, token_B, slot, past: Past) -> tuple[jax.Array, Past]:
    """Read one more token of each sequence into a slot of the past.

    Returns:
      (logits float32 [B, V] of the token after it, the past with it).
    """
    here_B1 = jnp.ones((token_B.shape[0], 1), bool)
    position_B1 = lax.dynamic_slice_in_dim(past.positions_BS, slot, 1, axis=1)
    logits_B1V, (k, v) = decoder.apply(
        {"params": params}, token_B[:, None], position_B1, here_B1, past, keep_kv=True
    )
    return logits_B1V[:, 0], Past(
        lax.dynamic_update_slice(past.k_LBSKH, k, (0, 0, slot, 0, 0)),
        lax.dynamic_update_slice(past.v_LBSKH, v, (0, 0, slot, 0, 0)),
        past.positions_BS,
        lax.dynamic_update_slice(past.valid_BS, here_B1, (0, slot)),
    )


def first_state(logits_BV: jax.Array, past: Any, sampling, max_new: int) -> State:
    """Return the state in which the first token is chosen and none emitted."""
    batch = logits_BV.shape[0]
    out = jnp.full((batch, max_new), -1, jnp.int32)
    return State(jnp.int32(0), _choose(logits_BV, sampling, 0), jnp.zeros(batch, bool), out, past)


def advance(
    read_on: Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]],
    state: State,
    stop_ids,
    sampling,
    until,
) -> State:
    """Continue until so many tokens are emitted, or all sequences have ended.

    Args:
      read_on: maps (token [B], its number among the new ones, past) to (logits [B, V] to choose the
        next one from, past).
      others: see `decode`.
    """

    def running(state):
        return (state.step < until) & ~jnp.all(state.done_B)

    def decode_one(state):
        step, token_B, done_B, out, past = state
        out = lax.dynamic_update_slice(out, jnp.where(done_B, -1, token_B)[:, None], (0, step))
        done_B = done_B | jnp.any(token_B[:, None] == stop_ids[None], axis=-1)
        logits_BV, past = read_on(token_B, step, past)
        return State(step + 1, _choose(logits_BV, sampling, step + 1), done_B, out, past)

    return lax.while_loop(running, decode_one, state)


_begin = jax.jit(_prefill, static_argnames=("decoder", "max_new"))
_continue = jax.jit(_advance, static_argnames="decoder", donate_argnames="state")


def _choose(logits_BV: jax.Array, sampling: dict[str, jax.Array] | None, step) -> jax.Array:
    """Return the next token of each sequence, int32 [B].

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

    def draw(key):
        own_key = jax.random.fold_in(jax.random.wrap_key_data(key), step)
        return jax.random.gumbel(own_key, logits_BV.shape[-1:])

    noise_BV = jax.vmap(draw)(sampling["key"])
    noisy_BV = jnp.where(logits_BV >= least_B[:, None], logits_BV + noise_BV, -jnp.inf)
    return jnp.argmax(noisy_BV, -1).astype(jnp.int32)
