"""Sequences of a batch that begin with the same tokens, as those of a chat template's system
message: what they share is computed once.

They run as one row [1, P + B T]: the prefix, then what is left of each sequence. To all parts of a
block but attention, tokens are tokens. Gradients are those of whole sequences: the prefix gets the
sum over all that look back at it. For programs on one device: a row cannot be cut over a mesh.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Prefixed(NamedTuple):
    """The shape of such a row: P tokens of the prefix, B sequences of T tokens after it."""

    prefix: int
    rows: int
    length: int

    def row(self, x_1P: jax.Array, x_BT: jax.Array) -> jax.Array:
        """Return [1, P + B T, ...] of the prefix [1, P, ...] and of what follows [B, T, ...]."""
        return jnp.concatenate([x_1P, x_BT.reshape(1, -1, *x_BT.shape[2:])], axis=1)

    def parts(self, x_1N: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return what `row` was made of."""
        shape = self.rows, self.length, *x_1N.shape[2:]
        return x_1N[:, : self.prefix], x_1N[:, self.prefix :].reshape(shape)

    def whole(self, x_1N: jax.Array) -> jax.Array:
        """Return whole sequences [B, P + T, ...]."""
        x_1P, x_BT = self.parts(x_1N)
        x_BP = jnp.broadcast_to(x_1P, (self.rows, *x_1P.shape[1:]))
        return jnp.concatenate([x_BP, x_BT], axis=1)
