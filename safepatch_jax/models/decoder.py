"""The decoder: Flax (linen) modules that read the parameter table's plain dictionary.

linen and not NNX: it returns and reads the plain nested dictionary that import, patching,
checkpoints and export share, and it ran without warnings in every JAX version we support. No
parameter is declared here: a module asks the table for its row.

Dimension key: B batch, T query position, S key position, D model, F feed-forward, N query heads, K
KV heads, G = N / K, H head dimension, V vocabulary, L layers; of a product of matrices M rows, O
columns; with a shared prefix P its tokens, R tokens of a row, W rows (see `prefix`).
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from safepatch_jax.models.attention import Attention, positional
from safepatch_jax.models.cache import Cache
from safepatch_jax.models.module import Module, RMSNorm, capped, times
from safepatch_jax.models.prefix import Prefixed
from safepatch_jax.models.rope import LayerKind, layer_kinds

# What the backward pass may keep of a block; the rest is computed again.
REMAT = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Embedder(Module):
    def setup(self):
        self.embedding = self.weight("embedding")

    def __call__(self, tokens_BT):
        x_BTD = self.embedding[tokens_BT]
        factor = self.config.embed_multiplier
        if self.config.rounds_embed_multiplier:
            factor = float(jnp.dtype(self.dtype).type(factor))
        if factor != 1.0:
            x_BTD = times(x_BTD, factor)
        return self.constrain(x_BTD, "batch", "length", "features")

    def attend(self, x_BTD):
        """Return logits by the embedding, for a tied head."""
        return self.product("BTD,VD->BTV", x_BTD, self.embedding, jnp.float32)


def silu(x: jax.Array) -> jax.Array:
    """Return x * sigmoid(x). Written with exp: XLA's logistic costs parity with torch half a digit
    on CPU."""
    return x / (1.0 + jnp.exp(-jnp.maximum(x, -80.0)))  # the bound keeps the gradient finite


class Mlp(Module):
    """Gated feed-forward layer (SwiGLU, or GeGLU for Gemma)."""

    @nn.compact
    def __call__(self, x_BTD):
        gate_BTF = self.product("BTD,FD->BTF", x_BTD, self.weight("gate"))
        up_BTF = self.product("BTD,FD->BTF", x_BTD, self.weight("up"))
        activation = {"silu": silu, "gelu_tanh": jax.nn.gelu}[self.config.activation]
        hidden_BTF = self.constrain(activation(gate_BTF) * up_BTF, "batch", "length", "mlp")
        return self.product("BTF,DF->BTD", hidden_BTF, self.weight("down"))


class Block(Module):
    """One transformer block; in a scan over layers, what is carried is (x, cache or None), and
    `keep_kv` decides whether keys and values are returned."""

    keep_kv: bool = False
    attention: str = "xla"
    prefixed: Prefixed | None = None

    @nn.compact
    def __call__(self, carry, kind, layer, angles_BTh, mask_BTS, distance_BTS, start_B):
        x_BTD, cache = carry
        if kind.frequencies is not None:
            angles_BTh = angles_BTh * kind.frequencies
        attend = self.child(Attention, "attention", self.attention, self.prefixed)
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
            y_BTD = times(y_BTD, self.config.residual_multiplier)
        return self.constrain(x_BTD + y_BTD, "batch", "length", "features")


class Head(Module):
    @nn.compact
    def __call__(self, x_BTD):
        return self.product("BTD,VD->BTV", x_BTD, self.weight("kernel"), jnp.float32)


class Decoder(Module):
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
        prefix_1P: jax.Array | None = None,
        order_BTT: jax.Array | None = None,
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
          prefix_1P: tokens that all sequences begin with, computed once (see `prefix`). `tokens_BT`
            are what follows them, and positions count from there. Neither `cache` nor `keep_kv`;
            attention is plain.
          order_BTT: which tokens come before each, or are it, where that is no line (bool, over
            queries, then keys); a prefix comes before all. Likewise.

        Returns:
          (logits float32 [B, A, V], or [B, T, V] without `logits_at_BA`, or hidden states [B, A or
          T, D]; the cache with these tokens, or keys and values, or None).
        """
        plain = prefix_1P is None and order_BTT is None
        if not plain and (cache is not None or keep_kv):
            raise ValueError("with a prefix or an order of tokens: neither cache nor keep_kv.")
        if order_BTT is not None and self.attention != "xla":
            raise ValueError("an order of tokens needs attention='xla'; no fused kernel knows it.")
        embedder, prefixed = self.child(Embedder, "embedder"), None
        if prefix_1P is not None:
            ways = 1 if self.sharder is None else self.sharder.batch_ways
            prefixed = Prefixed.of(prefix_1P, tokens_BT, ways)
            tokens_BT = prefixed.row(prefix_1P, tokens_BT)
        x_BTD = embedder(tokens_BT)
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
        )(
            self.config,
            self.dtype,
            self.sharder,
            self.tap,
            keep_kv,
            self.attention,
            prefixed,
            name="layers",
        )
        seen = positional(self.config, positions_BT, valid_BT, cache, prefixed, order_BTT)
        layers_L, start_B = None, None
        if cache is not None:
            layers_L, start_B = jnp.arange(self.config.num_layers), positions_BT[:, 0]
        kinds = layer_kinds(self.config)
        (x_BTD, cache), kv = layers((x_BTD, cache), kinds, layers_L, *seen, start_B)
        if prefixed is not None:
            _, x_BTD = prefixed.parts(x_BTD)
        if logits_at_BA is not None:
            x_BTD = jnp.take_along_axis(x_BTD, logits_at_BA[..., None], axis=1)
        if not hidden:
            x_BTD = _read_out(self, embedder, x_BTD)
        return x_BTD, kv if cache is None else cache


class Begin(Module):
    """The decoder's begin alone: maps tokens [B, T] to what enters the first block [B, T, D]; reads
    the same dictionary."""

    @nn.compact
    def __call__(self, tokens_BT):
        return self.child(Embedder, "embedder")(tokens_BT)


class OneBlock(Module):
    """One block alone. It reads the dictionary that the decoder's blocks read, of one layer, so
    without the axis of layers.

    `kind` is the layer's of `layer_kinds`; the rest is as in `Decoder`, with a cache of one block.
    With `prefixed` x, keys and values are rows as there; positions (which count from there) and
    valid are those of what follows the prefix. Returns (x [B, T, D], the cache with these tokens,
    or keys and values [B, T, K, H]).
    """

    attention: str = "xla"
    prefixed: Prefixed | None = None

    @nn.compact
    def __call__(self, x_BTD, kind: LayerKind, positions_BT, valid_BT, cache: Cache | None = None):
        block = self.child(Block, "layers", True, self.attention, self.prefixed)
        seen = positional(self.config, positions_BT, valid_BT, cache, self.prefixed)
        (x_BTD, cache), kv = block((x_BTD, cache), kind, None, *seen, positions_BT[:, 0])
        return x_BTD, kv if cache is None else cache


class Readout(Module):
    """The decoder's end alone: maps hidden states [B, A, D] to logits float32 [B, A, V]; reads the
    same dictionary."""

    @nn.compact
    def __call__(self, x_BAD):
        embedder = self.child(Embedder, "embedder") if self.config.tied_head else None
        return _read_out(self, embedder, x_BAD)


def _read_out(module: Module, embedder: Embedder | None, x_BTD: jax.Array) -> jax.Array:
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
