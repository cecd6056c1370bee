"""The decoder: Flax (linen) modules that read the parameter table's plain dictionary.

linen and not NNX: it returns and reads the plain nested dictionary that import, patching,
checkpoints and export share, and it ran without warnings in every JAX version we support. No
parameter is declared here: a module asks the table for its row.

Dimension key: B batch, T query position, S key position, D model, F feed-forward, N query heads, K
KV heads, G = N / K, H head dimension, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from safepatch_jax.mesh import Sharder
from safepatch_jax.models.cache import Cache
from safepatch_jax.models.config import DecoderConfig
from safepatch_jax.models.kernels import fused_attention, kernel_for
from safepatch_jax.models.rope import LayerKind, layer_kinds, rotary_angles, rotate
from safepatch_jax.models.table import Param, param_table

# What the backward pass may keep of a block; the rest is computed again.
REMAT = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}

_FEW = 64  # sequences


class _Module(nn.Module):
    """A module whose parameters are the table's rows below its own path."""

    config: DecoderConfig
    dtype: Any
    sharder: Sharder | None
    tap: Callable[[jax.Array, Param], jax.Array] | None = None

    def weight(self, name: str) -> jax.Array:
        """Return a parameter in the arithmetic's dtype, sharded as it is stored."""
        row = param_table(self.config)["/".join((*self.path, name))]
        weight = self.param(name, row.layer_initializer(), row.layer_shape, jnp.float32)
        if self.tap is not None and row.stacked:
            weight = self.tap(weight, row)
        # Constrained after the cast, so that a mesh gathers the fewer bytes of the narrower dtype.
        return self.constrain(weight.astype(self.dtype), *row.layer_axes)

    def constrain(self, x, *axes):
        return x if self.sharder is None else self.sharder.constrain(x, *axes)

    @property
    def platform(self) -> str:
        return jax.default_backend() if self.sharder is None else self.sharder.platform

    def product(self, equation, x, weight, dtype=None):
        """Return jnp.einsum(equation, x [B, T, ...], weight ), over the last dimensions of
        both."""
        if self.platform != "cpu":
            return jnp.einsum(equation, x, weight, preferred_element_type=dtype)
        # As a product of two matrices. XLA on CPU transposes a weight with two dimensions to sum
        # over, and for a weight's gradient, which sums over batch and length, all that led to it.
        rows, length = x.shape[:2]
        x_MK = x.reshape(rows * length, -1)
        weight_OK = weight.reshape(-1, x_MK.shape[1])
        if length == 1 and 1 < rows <= _FEW:
            # One token of each sequence: up to twice as fast with the large factor first. The
            # barrier keeps XLA from turning the product round again.
            y_OM = jnp.einsum("OK,MK->OM", weight_OK, x_MK, preferred_element_type=dtype)
            y_MO = jax.lax.optimization_barrier(y_OM).T
        else:
            y_MO = jnp.einsum("MK,OK->MO", x_MK, weight_OK, preferred_element_type=dtype)
        return y_MO.reshape(rows, length, *weight.shape[: weight.ndim + 2 - x.ndim])

    def child(self, kind, name):
        return kind(self.config, self.dtype, self.sharder, self.tap, name=name)


class Embedder(_Module):
    def setup(self):
        self.embedding = self.weight("embedding")

    def __call__(self, tokens_BT):
        x_BTD = self.embedding[tokens_BT]
        if self.config.embed_multiplier != 1.0:
            x_BTD = x_BTD * jnp.asarray(self.config.embed_multiplier, self.dtype)
        return self.constrain(x_BTD, "batch", "length", "features")

    def attend(self, x_BTD):
        """Return logits by the embedding, for a tied head."""
        return self.product("BTD,VD->BTV", x_BTD, self.embedding, jnp.float32)


class RMSNorm(_Module):
    """Root-mean-square norm over the last `dimensions` of its input, as many as its weight has."""

    dimensions: int = 1

    @nn.compact
    def __call__(self, x_BTD):
        x32_BTD = x_BTD.astype(jnp.float32)
        over = tuple(range(-self.dimensions, 0))
        mean_square_BT1 = jnp.mean(jnp.square(x32_BTD), axis=over, keepdims=True)
        normed_BTD = x32_BTD * jax.lax.rsqrt(mean_square_BT1 + self.config.norm_eps)
        scale_D = self.weight("scale")
        if self.config.norm_offset:  # added and multiplied in float32, before the cast
            return (normed_BTD * (1.0 + scale_D.astype(jnp.float32))).astype(self.dtype)
        if self.config.norm_float32:
            return (normed_BTD * scale_D.astype(jnp.float32)).astype(self.dtype)
        return scale_D * normed_BTD.astype(self.dtype)


def silu(x: jax.Array) -> jax.Array:
    """Return x * sigmoid(x). Written with exp: XLA's logistic costs parity with torch half a digit
    on CPU."""
    return x / (1.0 + jnp.exp(-jnp.maximum(x, -80.0)))  # the bound keeps the gradient finite


def visible(
    positions_BT: jax.Array, valid_BT: jax.Array, cache: Cache | None
) -> tuple[jax.Array, jax.Array]:
    """Return which keys a query may look at, without regard to windows, and how many positions back
    each key lies.

    Returns:
      (mask bool [B, T, S], distances int32 [B, T, S]); S runs over the cache's slots, if there is
      one, else over the present.
    """
    if cache is not None:
        distance_BTS = positions_BT[:, :, None] - jnp.arange(cache.slots)
        return distance_BTS >= 0, distance_BTS
    length = positions_BT.shape[1]
    mask_BTS = jnp.tril(jnp.ones((length, length), bool))[None] & valid_BT[:, None, :]
    return mask_BTS, positions_BT[:, :, None] - positions_BT[:, None, :]


class Attention(_Module):
    """Grouped-query attention over the causal present, or over a cache that it is written to.

    `window` is the layer's entry of DecoderConfig.windows (a traced scalar), or None if no layer
    has a window.
    """

    attention: str = "xla"

    def projection(self, x_BTD, name, equation, heads, normed=False):
        y_BTNH = self.product(equation, x_BTD, self.weight(name))
        if self.config.qkv_bias:
            y_BTNH = y_BTNH + self.weight(name + "_bias")
        if normed:
            over = 2 if self.config.qk_norm == "projection" else 1
            norm = RMSNorm(
                self.config, self.dtype, self.sharder, self.tap, over, name=name + "_norm"
            )
            y_BTNH = norm(y_BTNH)
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
        kernel = kernel_for(self.attention, config, self.dtype, x_BTD.shape[1], self.platform)
        if kernel != "xla" and cache is None:
            # All layers have the same window, or none that matters (see `kernel_for`).
            static = max(config.windows, default=0) or None
            if config.attention_scale is not None:  # the kernels divide by sqrt(head size)
                q_BTNH = q_BTNH * jnp.asarray(scale * config.head_dim**0.5, q_BTNH.dtype)
            mixed_BTNH = fused_attention(kernel, q_BTNH, k_BTKH, v_BTKH, static, self.sharder)
            return self.out(mixed_BTNH), cache, (k_BTKH, v_BTKH)

        keys, values, key_axes, value_axes = k_BTKH, v_BTKH, "BSKH", "BSKH"
        if cache is not None:
            cache = cache.write(k_BTKH, v_BTKH, layer, start_B, self.sharder)
            (keys, values), value_axes = cache.of_block(layer), "BKSH"
            key_axes = "BKHS" if cache.slots_last else "BKSH"
        if window is not None:
            mask_BTS = mask_BTS & ((distance_BTS < window) | (window == 0))

        if cache is None and self.platform == "cpu":
            mixed_BTNH = self.mixed_on_cpu(q_BTNH, k_BTKH, v_BTKH, mask_BTS, scale)
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

    def mixed_on_cpu(self, q_BTNH, k_BTKH, v_BTKH, mask_BTS, scale):
        """Return attention over the present, by products of matrices of one KV head each. What
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


def capped(x: jax.Array, cap: float) -> jax.Array:
    """Return x drawn smoothly into -cap .. cap; a cap of 0 is none."""
    return jnp.tanh(x / cap) * cap if cap else x


class Mlp(_Module):
    """Gated feed-forward layer (SwiGLU, or GeGLU for Gemma)."""

    @nn.compact
    def __call__(self, x_BTD):
        gate_BTF = self.product("BTD,FD->BTF", x_BTD, self.weight("gate"))
        up_BTF = self.product("BTD,FD->BTF", x_BTD, self.weight("up"))
        activation = {"silu": silu, "gelu_tanh": jax.nn.gelu}[self.config.activation]
        hidden_BTF = self.constrain(activation(gate_BTF) * up_BTF, "batch", "length", "mlp")
        return self.product("BTF,DF->BTD", hidden_BTF, self.weight("down"))


class Block(_Module):
    """One transformer block; in a scan over layers, what is carried is (x, cache or None), and
    `keep_kv` decides whether keys and values are returned."""

    keep_kv: bool = False
    attention: str = "xla"

    @nn.compact
    def __call__(self, carry, kind, layer, angles_BTh, mask_BTS, distance_BTS, start_B):
        x_BTD, cache = carry
        if kind.frequencies is not None:
            angles_BTh = angles_BTh * kind.frequencies
        attend = Attention(
            self.config, self.dtype, self.sharder, self.tap, self.attention, name="attention"
        )
        attended_BTD, cache, kv = attend(
            self.before("attention", x_BTD),
            angles_BTh,
            mask_BTS,
            distance_BTS,
            kind.window,
            cache,
            layer,
            start_B,
        )
        x_BTD = self.added("attention", x_BTD, attended_BTD)
        mlp_BTD = self.child(Mlp, "mlp")(self.before("mlp", x_BTD))
        return (self.added("mlp", x_BTD, mlp_BTD), cache), kv if self.keep_kv else None

    def before(self, part: str, x_BTD):
        """Return what enters attention or feed-forward layer."""
        if self.config.norms == "post":
            return x_BTD
        return self.child(RMSNorm, part + "_norm")(x_BTD)

    def added(self, part: str, x_BTD, y_BTD):
        """Return the sum of what entered a part and what leaves it."""
        if self.config.norms != "pre":
            y_BTD = self.child(RMSNorm, part + "_post_norm")(y_BTD)
        if self.config.residual_multiplier != 1.0:
            y_BTD = y_BTD * jnp.asarray(self.config.residual_multiplier, self.dtype)
        return self.constrain(x_BTD + y_BTD, "batch", "length", "features")


class Head(_Module):
    @nn.compact
    def __call__(self, x_BTD):
        return self.product("BTD,VD->BTV", x_BTD, self.weight("kernel"), jnp.float32)


class Decoder(_Module):
    """Maps tokens to logits or to hidden states, from which `Readout` makes logits.

    Attributes:
      config: architecture.
      dtype: arithmetic; parameters are cast to it where they are used.
      sharder: mesh, or None for a program on one device.
      tap: applied to each weight of a block, in its stored dtype, before it is used.
      remat: what the backward pass computes again: 'none', 'dots' (all but products with weights)
        or 'full' (each block).
      attention: 'xla'; or 'auto' / 'fused' (see `kernels`), for right-padded sequences without a
        cache.
    """

    remat: str = "none"
    attention: str = "xla"

    @nn.compact
    def __call__(
        self,
        tokens_BT,
        positions_BT,
        valid_BT,
        cache: Cache | None = None,
        keep_kv: bool = False,
        logits_at_BA: jax.Array | None = None,
        hidden: bool = False,
    ):
        """Run the decoder.

        Args:
          tokens_BT: token ids, int32.
          positions_BT: position of each token in its sequence, int32 (padding: anything).
          valid_BT: False for padding; with a cache nothing, for padding comes last.
          cache: what was read before, [L, ...]; positions go on from there one by one.
          keep_kv: also return keys and values [L, B, T, K, H] of these positions, without a cache.
          logits_at_BA: indices into T; the head is run there alone.
          hidden: return what enters the final norm, in place of logits.

        Returns:
          (logits float32 [B, A, V], or [B, T, V] without `logits_at_BA`, or hidden states [B, A or
          T, D]; the cache with these tokens, or keys and values, or None).
        """
        embedder = self.child(Embedder, "embedder")
        x_BTD = embedder(tokens_BT)
        angles_BTh = rotary_angles(self.config, positions_BT)
        block = Block
        if self.remat != "none":
            block = nn.remat(Block, prevent_cse=False, policy=REMAT[self.remat])
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.config.num_layers,
            in_axes=(0, 0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
            out_axes=0,
        )(self.config, self.dtype, self.sharder, self.tap, keep_kv, self.attention, name="layers")
        mask_BTS, distance_BTS = visible(positions_BT, valid_BT, cache)
        kinds, layers_L, start_B = layer_kinds(self.config), None, None
        if kinds.window is None:
            distance_BTS = None
        if cache is not None:
            layers_L, start_B = jnp.arange(self.config.num_layers), positions_BT[:, 0]
        seen = angles_BTh, mask_BTS, distance_BTS, start_B
        (x_BTD, cache), kv = layers((x_BTD, cache), kinds, layers_L, *seen)
        if logits_at_BA is not None:
            x_BTD = jnp.take_along_axis(x_BTD, logits_at_BA[..., None], axis=1)
        if not hidden:
            x_BTD = _read_out(self, embedder, x_BTD)
        return x_BTD, kv if cache is None else cache


class Begin(_Module):
    """The decoder's begin alone: maps tokens [B, T] to what enters the first block [B, T, D]; reads
    the same dictionary."""

    @nn.compact
    def __call__(self, tokens_BT):
        return self.child(Embedder, "embedder")(tokens_BT)


class OneBlock(_Module):
    """One block alone. It reads the dictionary that the decoder's blocks read, of one layer, so
    without the axis of layers.

    `kind` is the layer's of `layer_kinds`; the rest is as in `Decoder`, with a cache of one block.
    Returns (x [B, T, D], the cache with these tokens, or keys and values [B, T, K, H]).
    """

    attention: str = "xla"

    @nn.compact
    def __call__(self, x_BTD, kind: LayerKind, positions_BT, valid_BT, cache: Cache | None = None):
        angles_BTh = rotary_angles(self.config, positions_BT)
        mask_BTS, distance_BTS = visible(positions_BT, valid_BT, cache)
        if kind.window is None:
            distance_BTS = None
        block = Block(
            self.config, self.dtype, self.sharder, self.tap, True, self.attention, name="layers"
        )
        seen = angles_BTh, mask_BTS, distance_BTS, positions_BT[:, 0]
        (x_BTD, cache), kv = block((x_BTD, cache), kind, None, *seen)
        return x_BTD, kv if cache is None else cache


class Readout(_Module):
    """The decoder's end alone: maps hidden states [B, A, D] to logits float32 [B, A, V]; reads the
    same dictionary."""

    @nn.compact
    def __call__(self, x_BAD):
        embedder = self.child(Embedder, "embedder") if self.config.tied_head else None
        return _read_out(self, embedder, x_BAD)


def _read_out(module: _Module, embedder: Embedder | None, x_BTD: jax.Array) -> jax.Array:
    """Return logits [B, T, V]; the embedder is used where the head is tied to it."""
    x_BTD = module.child(RMSNorm, "final_norm")(x_BTD)
    if module.config.tied_head:
        logits_BTV = embedder.attend(x_BTD)
    else:
        logits_BTV = module.child(Head, "head")(x_BTD)
    if module.config.logit_divisor != 1.0:
        logits_BTV = logits_BTV / module.config.logit_divisor
    logits_BTV = capped(logits_BTV, module.config.logit_cap)
    return module.constrain(logits_BTV, "batch", "length", "vocab")
