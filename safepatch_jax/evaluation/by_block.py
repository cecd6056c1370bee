"""A model that is run block by block from the host: on a CPU, where a program of stacked weights
copies each block's weights before it multiplies, and one of all blocks takes long to compile."""

from __future__ import annotations

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from safepatch_jax.evaluation.generate import (
    Past,
    Prompts,
    State,
    cache_of,
    emit,
    first_state,
    idle,
    placed,
    placed_slots,
)
from safepatch_jax.models.cache import Cache
from safepatch_jax.models.decoder import Begin, Decoder, OneBlock, Readout
from safepatch_jax.models.layerwise import LAYERS
from safepatch_jax.models.prefix import Prefixed
from safepatch_jax.models.rope import layer_kinds


class ByBlock:
    """Continues sequences; see `generate.Whole` for methods and arguments.

    One program is compiled for each shape of a block and used for all blocks. The host asks whether
    sequences have ended one token late, so that it never waits for the token it has just asked for.

    Args:
      decoder: the model.
      params: nested parameter dictionary on one CPU device, best in the dtype of the arithmetic:
        others are cast at every use. A block's weight is looked at where it lies (but for one that
        begins at no multiple of 64 bytes), and is not freed before this is.
    """

    shrinks = True  # a step takes as long as it has sequences
    groups = 8

    def __init__(self, decoder: Decoder, params: Any):
        self.decoder, self._programs = decoder, _programs_of(decoder)
        self._ends = {name: part for name, part in params.items() if name != LAYERS}
        self.blocks = _unstacked({LAYERS: params[LAYERS]}, decoder.config.num_layers)
        kinds = layer_kinds(decoder.config)
        numbers = range(len(self.blocks))
        self._kinds = [jax.tree.map(operator.itemgetter(i), kinds) for i in numbers]

    def idle(self, rows: int, capacity: int, max_new: int, sampled: bool) -> State:
        config, here = self.decoder.config, self.decoder.sharder.replicated()
        heads, size = config.num_kv_heads, config.head_dim

        def empty(*shape: int) -> jax.Array:
            return jnp.zeros(shape, self.decoder.dtype, device=here)

        # Anew for each block: a donated array must not be another block's too.
        caches = [
            Cache(empty(rows, heads, size, capacity), empty(rows, heads, capacity, size), True)
            for _ in self.blocks
        ]
        state = idle(rows, max_new, sampled, Past(None, jnp.zeros(rows, jnp.int32)))
        # On the mesh, as what programs return is: else each is compiled twice.
        state = jax.device_put(state, here)
        return state._replace(past=state.past._replace(cache=caches))

    def admit(self, state: State, prompts, rows_G, stop_ids, sampling) -> State:
        caches, length_B = state.past
        x_GTD, written = self._programs.enter(self._ends, prompts), []
        for block, kind, cache in zip(self.blocks, self._kinds, caches):
            x_GTD, cache = self._programs.read(block, kind, x_GTD, prompts, cache, rows_G)
            written.append(cache)
        state = state._replace(past=length_B)
        inputs = x_GTD, state, prompts, rows_G, stop_ids, sampling
        state = self._programs.placed(self._ends, *inputs)
        return state._replace(past=Past(written, state.past))

    def advance(self, state: State, stop_ids, sampling, steps: int, enough: int) -> State:
        for _ in range(steps):
            done_B = state.done_B
            state = self._step(state, stop_ids, sampling)
            if np.sum(np.asarray(done_B)) >= enough:
                break
        return state

    def _step(self, state: State, stop_ids, sampling) -> State:
        caches, length_B = state.past
        x_B1D, written = self._programs.begin(self._ends, state.token_B[:, None]), []
        for block, kind, cache in zip(self.blocks, self._kinds, caches):
            x_B1D, cache = self._programs.follow(block, kind, x_B1D, length_B, cache)
            written.append(cache)
        state = state._replace(past=length_B)
        state = self._programs.emit(self._ends, x_B1D, state, stop_ids, sampling)
        return state._replace(past=Past(written, state.past))

    def take(self, state: State, rows) -> State:
        """Return the state of some rows; the given one must not be used any more."""
        caches, length_B = state.past
        for i, cache in enumerate(caches):  # one by one: the whole one is freed
            caches[i] = _take(cache, rows)
        state = _take(state._replace(past=length_B), rows)
        return state._replace(past=Past(caches, state.past))


def _unstacked(stacked: Any, layers: int) -> list[Any]:
    """Return the parameters of each block."""

    def of_block(x: jax.Array, layer: int) -> jax.Array:
        # Without a copy: the device's memory is the host's.
        return jax.device_put(np.asarray(x)[layer], *x.devices())

    return [
        jax.tree.map(functools.partial(of_block, layer=layer), stacked) for layer in range(layers)
    ]


class _Programs:
    """What is compiled for a decoder. Programs of an instance: a decoder as an argument would be
    hashed at every call, which takes longer than the call."""

    def __init__(self, decoder: Decoder):
        attributes = decoder.config, decoder.dtype, decoder.sharder
        self._block, self._readout = OneBlock(*attributes), Readout(*attributes)
        self._embed = Begin(*attributes)
        self.begin, self.enter = jax.jit(self._begin), jax.jit(self._enter)
        self.read = jax.jit(self._read, donate_argnames="cache")
        self.follow = jax.jit(self._follow, donate_argnames="cache")
        self.placed, self.emit = jax.jit(self._placed), jax.jit(self._emit)

    def _begin(self, ends: Any, tokens_BT):
        return self._embed.apply({"params": ends}, tokens_BT)

    def _enter(self, ends: Any, prompts):
        """Return what enters the first block of prompts, [G, T, D], with a prefix as one row."""
        tokens, prefixed = prompts.tokens_GT, _prefixed(prompts)
        if prefixed is not None:
            tokens = prefixed.row(prompts.prefix_1P, tokens)
        return self._begin(ends, tokens)

    def _read(self, block: Any, kind, x_GTD, prompts, cache: Cache, rows_G):
        """Return (what leaves a block that reads prompts, the cache with them in some rows)."""
        prefixed, positions_1T = _prefixed(prompts), jnp.arange(prompts.tokens_GT.shape[1])[None]
        valid_GT = positions_1T < prompts.length_G[:, None]
        inputs = x_GTD, kind, positions_1T, valid_GT
        module = self._block.clone(prefixed=prefixed)
        x_GTD, kv = module.apply({"params": block}, *inputs)
        if prefixed is not None:
            kv = jax.tree.map(prefixed.whole, kv)
        new = cache_of(kv, kv[0].shape[1], slots_last=True)
        return x_GTD, placed_slots(cache, new, rows_G)

    def _follow(self, block: Any, kind, x_B1D, length_B, cache: Cache):
        """Return (what leaves a block that reads one token more, the cache with it)."""
        here_B1 = jnp.ones((x_B1D.shape[0], 1), bool)
        inputs = x_B1D, kind, length_B[:, None], here_B1, cache
        return self._block.apply({"params": block}, *inputs)

    def _placed(self, ends: Any, x_GTD, state: State, prompts, rows_G, stop_ids, sampling):
        """Return the state with the first tokens of prompts that have been read."""
        prefixed, length_G, before = _prefixed(prompts), prompts.length_G, 0
        if prefixed is not None:
            before, (_, x_GTD) = prefixed.prefix, prefixed.parts(x_GTD)
        x_G1D = jnp.take_along_axis(x_GTD, length_G[:, None, None] - 1, axis=1)
        logits_G1V = self._readout.apply({"params": ends}, x_G1D)
        first = first_state(
            logits_G1V[:, 0], before + length_G, stop_ids, sampling, state.out.shape[1]
        )
        return placed(state, first, rows_G)

    def _emit(self, ends: Any, x_B1D, state: State, stop_ids, sampling):
        """Return the state with one token more."""
        logits_B1V = self._readout.apply({"params": ends}, x_B1D)
        return emit(logits_B1V[:, 0], state._replace(past=state.past + 1), stop_ids, sampling)


def _prefixed(prompts: Prompts) -> Prefixed | None:
    """Return the shape of prompts with a prefix, None for those without."""
    if prompts.prefix_1P is None:
        return None
    return Prefixed.of(prompts.prefix_1P, prompts.tokens_GT)


_programs_of = functools.lru_cache(maxsize=4)(_Programs)  # engines of one model share them


@jax.jit
def _take(tree: Any, rows):
    return jax.tree.map(lambda x: x[rows], tree)
