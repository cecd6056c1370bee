"""The cache's write: beside a loop over rows, and on a mesh, where each device writes its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safepatch_jax.mesh import Sharder, make_mesh
from safepatch_jax.models.cache import Cache
from safepatch_jax.planning.work import read_work

LAYERS, ROWS, HEADS, SLOTS, SIZE = 3, 4, 2, 6, 5
STARTS = (0, 3, 5, 2)
RNG = np.random.default_rng(0)


def cache_and_tokens(layer, slots_last, tokens):
    stack = () if layer is None else (LAYERS,)
    k, v = RNG.normal(size=(2, *stack, ROWS, HEADS, SLOTS, SIZE))
    if slots_last:
        k = k.swapaxes(-1, -2)
    return Cache(jnp.array(k), jnp.array(v), slots_last), *RNG.normal(
        size=(2, ROWS, tokens, HEADS, SIZE)
    )


def by_hand(slots, new_BTKH, layer):
    """Write row by row into [..., B, K, S, H]; what has no room is shifted back."""
    slots, tokens = np.array(slots), new_BTKH.shape[1]
    whole = slots if layer is None else slots[layer]
    for row, start in enumerate(STARTS):
        start = min(start, SLOTS - tokens)
        whole[row, :, start : start + tokens] = new_BTKH[row].swapaxes(0, 1)
    return slots


@pytest.mark.parametrize("mesh", ["", "data:2,tensor:2", "data:8", "fsdp:2,tensor:2"])
@pytest.mark.parametrize(
    "layer, slots_last, tokens", [(None, False, 1), (None, True, 1), (1, False, 1), (2, False, 3)]
)
def test_rows_are_written_each_at_its_own_slot(layer, slots_last, tokens, mesh):
    cache, k, v = cache_and_tokens(layer, slots_last, tokens)
    sharder = sharder_over(mesh) if mesh else None
    write = jax.jit(lambda cache, k, v, start: cache.write(k, v, layer, start, sharder))
    written = write(cache, k, v, jnp.array(STARTS))
    keys = written.k.swapaxes(-1, -2) if slots_last else written.k
    before = cache.k.swapaxes(-1, -2) if slots_last else cache.k
    np.testing.assert_array_equal(keys, by_hand(before, k, layer).astype(np.float32))
    np.testing.assert_array_equal(written.v, by_hand(cache.v, v, layer).astype(np.float32))


def test_on_a_mesh_nothing_is_exchanged_or_copied():
    sharder = sharder_over("data:2,tensor:2")
    place = functools.partial(struct, sharder)
    slots = place((LAYERS, 64, 4, 512, 8), "layers", "batch", "kv_heads", "layers", "head_dim")
    new = place((64, 1, 4, 8), "batch", "length", "kv_heads", "head_dim")
    start = place((64,), "batch", dtype=jnp.int32)
    layer = jax.ShapeDtypeStruct((), jnp.int32)

    def write(cache, new, layer, start):
        return cache.write(new, new, layer, start, sharder)

    compiled = jax.jit(write, donate_argnums=0).lower(Cache(slots, slots), new, layer, start)
    compiled = compiled.compile()
    memory = compiled.memory_analysis()
    part = 2 * np.prod(slots.shape) * 4 // 4  # keys and values, float32, on 4 devices
    assert memory.alias_size_in_bytes == part and memory.temp_size_in_bytes < part // 50
    assert not read_work(compiled.as_text()).collectives


def struct(sharder, shape, *axes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharder.sharding(axes))


def sharder_over(mesh):
    """Return a sharder as an engine has: its batch is cut over the data axis alone."""
    ways = [int(part.split(":")[1]) for part in mesh.split(",")]
    devices = jax.devices()[: int(np.prod(ways))]
    return Sharder(make_mesh(mesh, devices)).with_rules(batch=("data",))
