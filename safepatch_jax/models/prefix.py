"""Sequences of a batch that begin with the same tokens, as those of a chat template's system
message: what they share is computed once.

They run as one row of R = P + B T tokens: the P of the prefix, then the T that are left of each
sequence. To all parts of a block but attention, tokens are tokens. Gradients are those of whole
sequences: the prefix gets the sum over all that look back at it. Where a batch is cut over devices
in W ways, each has such a row of its own: [W, R], R = P + B / W T.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Prefixed(NamedTuple):
    """The shape of such rows: P tokens of the prefix, B sequences of T tokens after it, W ways in
    which they are cut."""

    prefix: int
    rows: int
    length: int
    ways: int = 1

    @classmethod
    def of(cls, prefix_1P: jax.Array, tokens_BT: jax.Array, ways: int = 1) -> Prefixed:
        """Return the shape for a prefix and what follows it. Raises ValueError if the sequences
        cannot be cut in so many ways."""
        rows, length = tokens_BT.shape
        if rows % ways:
            raise ValueError(
                f"{rows} sequences with a prefix cannot be cut evenly over {ways} devices. Lay "
                "them out without (`training_batch(..., prefix=0)`), or fill the batch up."
            )
        return cls(prefix_1P.shape[1], rows, length, ways)

    def row(self, x_1P: jax.Array, x_BT: jax.Array) -> jax.Array:
        """Return [W, R, ...] of the prefix, [1, P, ...] or of each way, and of what follows
        [B, T, ...]."""
        x_WP = jnp.broadcast_to(x_1P, (self.ways, *x_1P.shape[1:]))
        return jnp.concatenate([x_WP, x_BT.reshape(self.ways, -1, *x_BT.shape[2:])], axis=1)

    def parts(self, x_WR: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the prefix of each way [W, P, ...], and what follows [B, T, ...]."""
        shape = self.rows, self.length, *x_WR.shape[2:]
        return x_WR[:, : self.prefix], x_WR[:, self.prefix :].reshape(shape)

    def whole(self, x_WR: jax.Array) -> jax.Array:
        """Return whole sequences [B, P + T, ...]."""
        x_WP, x_BT = self.parts(x_WR)
        x_BP = jnp.repeat(x_WP, self.rows // self.ways, axis=0)
        return jnp.concatenate([x_BP, x_BT], axis=1)
