"""Keys and values of the tokens that a decoder has read."""

from __future__ import annotations

import functools

import flax.struct
import jax


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

    def write(self, k_BTKH: jax.Array, v_BTKH: jax.Array, layer, start_B: jax.Array) -> Cache:
        """Return the cache with tokens in the slots from `start` on; those past the end would be
        shifted back. `layer` is None in a cache of one block."""

        def write_row(slots, new_TKH, start, last=False):
            new = new_TKH.transpose((1, 2, 0) if last else (1, 0, 2))
            where = (0, 0, start) if last else (0, start, 0)
            if layer is None:
                return jax.lax.dynamic_update_slice(slots, new, where)
            return jax.lax.dynamic_update_slice(slots, new[None], (layer, *where))

        axis = 0 if layer is None else 1
        axes = {"in_axes": (axis, 0, 0), "out_axes": axis}
        write_keys = jax.vmap(functools.partial(write_row, last=self.slots_last), **axes)
        keys = write_keys(self.k, k_BTKH, start_B)
        values = jax.vmap(write_row, **axes)(self.v, v_BTKH, start_B)
        return self.replace(k=keys, v=values)

    def of_block(self, layer) -> tuple[jax.Array, jax.Array]:
        """Return keys and values of one block."""
        if layer is None:
            return self.k, self.v
        take = functools.partial(jax.lax.dynamic_index_in_dim, index=layer, keepdims=False)
        return take(self.k), take(self.v)
