"""Attention over the causal present, over a cache, or over sequences that share a prefix.

Dimension key: see `decoder`.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from safepatch_jax.models.cache import Cache
from safepatch_jax.models.config import DecoderConfig
from safepatch_jax.models.kernels import fused_attention, kernel_for
from safepatch_jax.models.module import Module, RMSNorm, capped
from safepatch_jax.models.prefix import Prefixed
from safepatch_jax.models.rope import rotary_angles, rotate


def visible(
    positions_BT: jax.Array,
    valid_BT: jax.Array,
    cache: Cache | None,
    order_BTT: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return which keys a query may look at, without regard to windows, and how many positions back
    each key lies.

    Args:
      order_BTT: which of the present come before a query, or are it; by default all up to it.

    Returns:
      (mask bool [B, T, S], distances int32 [B, T, S]); S runs over the cache's slots, if there is
      one, else over the present.
    """
    if cache is not None:
        distance_BTS = positions_BT[:, :, None] - jnp.arange(cache.slots)
        return distance_BTS >= 0, distance_BTS
    length = positions_BT.shape[1]
    if order_BTT is None:
        order_BTT = jnp.tril(jnp.ones((length, length), bool))[None]
    return order_BTT & valid_BT[:, None, :], positions_BT[:, :, None] - positions_BT[:, None, :]


def positional(
    config: DecoderConfig,
    positions_BT: jax.Array,
    valid_BT: jax.Array,
    cache: Cache | None,
    prefixed: Prefixed | None,
    order_BTT: jax.Array | None = None,
) -> tuple[jax.Array, Any, Any]:
    """Return what attention needs of positions (see `Decoder`): rotation angles (see
    `rotary_angles`), and of `visible` mask and distances; the distances are None where no layer has
    a window. For `order_BTT` see `visible`.

    With a prefix positions count from its end, angles are of rows [W, R], mask and distances are
    pairs: of the prefix [1, P, P], and of what follows it [B, T, P + T].
    """
    if prefixed is None:
        seen = visible(positions_BT, valid_BT, cache, order_BTT)
        angles_BTh = rotary_angles(config, positions_BT)
    else:
        length = prefixed.prefix
        of_prefix = jnp.arange(length)[None], jnp.ones((1, length), bool)
        shape = prefixed.rows, prefixed.length
        following = length + jnp.broadcast_to(positions_BT, shape), valid_BT
        if order_BTT is not None:  # the prefix comes before all
            order_BTT = jnp.pad(order_BTT, ((0, 0), (length, 0), (length, 0)), constant_values=True)
        rows = list(map(prefixed.row, of_prefix, following))
        whole = visible(*map(prefixed.whole, rows), None, order_BTT)
        angles_BTh = rotary_angles(config, rows[0])
        seen = tuple(zip(visible(*of_prefix, None), (x[:, length:] for x in whole)))
    return angles_BTh, seen[0], seen[1] if config.windows else None


class Attention(Module):
    """Grouped-query attention over the causal present, or over a cache that it is written to.
    With `prefixed` what enters are rows as there, and mask and distances are pairs, see
    `positional`.

    `window` is the layer's entry of DecoderConfig.windows (a traced scalar), or None if no layer
    has a window.
    """

    attention: str = "xla"
    prefixed: Prefixed | None = None

    def projection(self, x_BTD, name, equation, heads, normed=False):
        y_BTNH = self.product(equation, x_BTD, self.weight(name))
        if self.config.qkv_bias:
            y_BTNH = y_BTNH + self.weight(name + "_bias")
        if normed:
            over = 2 if self.config.qk_norm == "projection" else 1
            y_BTNH = self.child(RMSNorm, name + "_norm", over)(y_BTNH)
        return self.constrain(y_BTNH, "batch", "length", heads, "head_dim")

    @nn.compact
    def __call__(
        self,
        x_BTD,
        angles_BTh,
        mask_BTS,
        distance_BTS,
        window=None,
        cache=None,
        layer=None,
        start_B=None,
    ):
        config = self.config
        q_BTNH = self.projection(x_BTD, "q", "BTD,NHD->BTNH", "heads", config.qk_norm)
        k_BTKH = self.projection(x_BTD, "k", "BTD,KHD->BTKH", "kv_heads", config.qk_norm)
        v_BTKH = self.projection(x_BTD, "v", "BTD,KHD->BTKH", "kv_heads")
        turn = jnp.sin(angles_BTh), jnp.cos(angles_BTh)
        if self.platform == "cpu":  # once, and not again for each head that is turned
            turn = jax.lax.optimization_barrier(turn)
        q_BTNH, k_BTKH = rotate(q_BTNH, *turn), rotate(k_BTKH, *turn)

        scale = config.attention_scale
        if scale is None:
            scale = config.head_dim**-0.5
        if window is not None:

            def near(mask, distance):
                return mask & ((distance < window) | (window == 0))

            mask_BTS = jax.tree.map(near, mask_BTS, distance_BTS)
        kernel = kernel_for(self.attention, config, self.dtype, x_BTD.shape[1], self.platform)
        if self.prefixed is not None:
            mixed_WRNH = self.mixed_of_rows(q_BTNH, k_BTKH, v_BTKH, mask_BTS, scale)
            return self.out(mixed_WRNH), cache, (k_BTKH, v_BTKH)

        if kernel != "xla" and cache is None:
            # All layers have the same window, or none that matters (see `kernel_for`).
            static = max(config.windows, default=0) or None
            inputs = q_BTNH, k_BTKH, v_BTKH
            mixed_BTNH = fused_attention(kernel, *inputs, static, self.sharder, scale=scale)
            return self.out(mixed_BTNH), cache, (k_BTKH, v_BTKH)

        keys, values, key_axes, value_axes = k_BTKH, v_BTKH, "BSKH", "BSKH"
        if cache is not None:
            cache = cache.write(k_BTKH, v_BTKH, layer, start_B, self.sharder)
            (keys, values), value_axes = cache.of_block(layer), "BKSH"
            key_axes = "BKHS" if cache.slots_last else "BKSH"
        if cache is None and self.platform == "cpu":
            mixed_BTNH = self.mixed_by_kv_head(q_BTNH, k_BTKH, v_BTKH, mask_BTS, scale)
            return self.out(mixed_BTNH), cache, (k_BTKH, v_BTKH)

        # One query a sequence is a dimension less: XLA's CPU compiler then takes faster products.
        one = key_axes == "BKHS" and x_BTD.shape[1] == 1
        t = "" if one else "T"
        groups = config.num_heads // config.num_kv_heads
        lengths = q_BTNH.shape[: 1 if one else 2]
        q_BTKGH = q_BTNH.reshape(*lengths, config.num_kv_heads, groups, config.head_dim)
        logits_BKGTS = jnp.einsum(
            f"B{t}KGH,{key_axes}->BKG{t}S", q_BTKGH, keys, preferred_element_type=jnp.float32
        )
        mask_BKGTS = mask_BTS[:, :, None] if one else mask_BTS[:, None, None]
        weights_BKGTS = self.attention_weights(logits_BKGTS, mask_BKGTS, scale)
        if one:  # else it is computed within the product, again for each of its sums
            weights_BKGTS = jax.lax.optimization_barrier(weights_BKGTS)
        mixed_BTKGH = jnp.einsum(f"BKG{t}S,{value_axes}->B{t}KGH", weights_BKGTS, values)
        return self.out(mixed_BTKGH.reshape(q_BTNH.shape)), cache, (k_BTKH, v_BTKH)

    def mixed_of_rows(self, q_WRNH, k_WRKH, v_WRKH, masks, scale):
        """Return attention within the prefix, and of what follows over the prefix and itself."""
        of_prefix, following = zip(*map(self.prefixed.parts, (q_WRNH, k_WRKH, v_WRKH)))
        whole = map(self.prefixed.whole, (k_WRKH, v_WRKH))
        return self.prefixed.row(
            self.mixed_by_kv_head(*of_prefix, masks[0], scale),
            self.mixed_by_kv_head(following[0], *whole, masks[1], scale),
        )

    def mixed_by_kv_head(self, q_BTNH, k_BTKH, v_BTKH, mask_BTS, scale):
        """Return attention of queries over keys, by products of matrices of one KV head each. What
        enters is laid out for them by the loops that make it, which the barriers see to: XLA's CPU
        compiler would else copy it, with the positions last."""
        batch, length, heads, size = q_BTNH.shape
        groups = heads // k_BTKH.shape[2]  # a KV head's queries: M = G T
        q_BKGTH = q_BTNH.reshape(batch, length, -1, groups, size).transpose(0, 2, 3, 1, 4)
        laid_out = q_BKGTH, k_BTKH.transpose(0, 2, 1, 3), v_BTKH.transpose(0, 2, 1, 3)
        q_BKGTH, k_BKSH, v_BKSH = jax.lax.optimization_barrier(laid_out)
        q_BKMH = q_BKGTH.reshape(*k_BKSH.shape[:2], -1, size)
        logits_BKMS = jnp.einsum(
            "BKMH,BKSH->BKMS", q_BKMH, k_BKSH, preferred_element_type=jnp.float32
        )
        logits_BKGTS = logits_BKMS.reshape(*q_BKGTH.shape[:4], -1)
        weights_BKGTS = self.attention_weights(logits_BKGTS, mask_BTS[:, None, None], scale)
        weights_BKMS = weights_BKGTS.reshape(logits_BKMS.shape)
        mixed_BKMH = jnp.einsum("BKMS,BKSH->BKMH", weights_BKMS, v_BKSH)
        mixed_BKGTH = jax.lax.optimization_barrier(mixed_BKMH.reshape(q_BKGTH.shape))
        return mixed_BKGTH.transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape)

    def attention_weights(self, logits, mask, scale):
        """Return the weights of keys, over the last dimension of both."""
        logits = capped(logits * scale, self.config.attention_cap)
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
        return jax.nn.softmax(logits, axis=-1).astype(self.dtype)

    def out(self, mixed_BTNH):
        return self.product("BTNH,DNH->BTD", mixed_BTNH, self.weight("o"))
