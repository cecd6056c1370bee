"""Keys and values of the tokens that a decoder has read."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from safepatch_jax.mesh import Sharder


@flax.struct.dataclass
class Cache:
    """Keys, already rotated, and values of the tokens read so far, each in the slot of its
    position; the slots after them hold anything finite, and are written before they count.

    [L, B, K, S, H], or [B, K, S, H] of one block. With `slots_last` keys are [..., H, S]: on CPU
    the product of one query with many keys is then several times as fast.
    """

    k: jax.Array
    v: jax.Array
    slots_last: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def slots(self) -> int:
        """How many tokens have room."""
        return self.v.shape[-2]

    def write(
        self,
        k_BTKH: jax.Array,
        v_BTKH: jax.Array,
        layer,
        start_B: jax.Array,
        sharder: Sharder | None = None,
    ) -> Cache:
        """Return the cache with tokens in the slots from `start` on; those past the end would be
        shifted back.

        Args:
          k_BTKH, v_BTKH: of the tokens.
          layer: which block's; None in a cache of one block.
          start_B: slot of each sequence's first token.
          sharder: the mesh, on which each device then writes its own sequences and heads.
        """
        write = functools.partial(_written, last=self.slots_last)
        if sharder is not None and sharder.mesh.size > 1:
            # Left to the compiler all devices would exchange all rows.
            write = _on_each_device(write, sharder, k_BTKH.shape, layer)
        keys, values = write((self.k, self.v), (k_BTKH, v_BTKH), layer, start_B)
        return self.replace(k=keys, v=values)

    def of_block(self, layer) -> tuple[jax.Array, jax.Array]:
        """Return keys and values of one block."""
        if layer is None:
            return self.k, self.v
        take = functools.partial(jax.lax.dynamic_index_in_dim, index=layer, keepdims=False)
        return take(self.k), take(self.v)


Pair = tuple[jax.Array, jax.Array]  # keys and values


def _written(cache: Pair, new: Pair, layer, start_B: jax.Array, *, last: bool) -> Pair:
    """Return a cache, or a device's part of one, with tokens [B, T, K, H] written; see `Cache`."""
    keys, values = new
    place = functools.partial(_placed, layer=layer, start_B=start_B)
    keys = keys.transpose((0, 2, 3, 1) if last else (0, 2, 1, 3))
    keys = place(cache[0], keys, axis=-1 if last else -2)
    return keys, place(cache[1], values.transpose(0, 2, 1, 3), axis=-2)


def _placed(slots: jax.Array, new: jax.Array, *, layer, start_B: jax.Array, axis: int) -> jax.Array:
    """Return keys or values with new ones, [B, K, T, H] or [B, K, H, T]; `axis` is the slots'."""
    # The row is an index as the slot is, and no batch dimension of the scatter, as vmap has it:
    # XLA's CUDA compiler, for several devices, refuses that ("Repeated dimensions not allowed in
    # scatter_dims_to_operand_dims").
    where = [jnp.arange(start_B.size, dtype=start_B.dtype), start_B]
    if layer is not None:
        where.insert(0, jnp.full_like(start_B, layer))
    single = tuple(range(len(where) - 1))
    return jax.lax.scatter(
        slots,
        jnp.stack(where, axis=-1),
        new,
        jax.lax.ScatterDimensionNumbers(
            update_window_dims=(1, 2, 3),
            inserted_window_dims=single,
            scatter_dims_to_operand_dims=(*single, slots.ndim + axis),
        ),
        indices_are_sorted=True,
        unique_indices=True,
        mode=jax.lax.GatherScatterMode.CLIP,
    )


def _on_each_device(
    write: Callable[..., Pair], sharder: Sharder, shape_BTKH: tuple[int, ...], layer
) -> Callable[..., Pair]:
    """Return `_written` in which each device of a mesh writes to its own part of the cache."""

    def over(axis: str, size: int) -> tuple[str, ...] | None:
        """Return the mesh axes that cut a logical axis; None where they do not divide it."""
        axes = dict(sharder.rules)[axis]
        ways = math.prod(sharder.mesh.shape[name] for name in axes)
        return axes if axes and size % ways == 0 else None

    batch, heads = over("batch", shape_BTKH[0]), over("kv_heads", shape_BTKH[2])
    stack = () if layer is None else (None,)
    slots, new = PartitionSpec(*stack, batch, heads), PartitionSpec(batch, None, heads)
    return jax.shard_map(
        write,
        mesh=sharder.mesh,
        in_specs=((slots, slots), (new, new), PartitionSpec(), PartitionSpec(batch)),
        out_specs=(slots, slots),
        check_vma=False,
    )
