"""The parameter table: every parameter declared once.

A row holds a parameter's path in the nested parameter dictionary, its logical axes and shape, its
Hugging Face name, and its kind. Abstract shapes, initialisation, sharding, import, export, scoring
and patch scope read it.

Layout: a weight keeps Hugging Face's own order, ``[out, in]`` row-major; we only name the parts of
a side (the out side of ``q`` is heads x head_dim) and stack the blocks on a leading ``layers``
axis. So an HF tensor becomes a layer's part by a reshape to `layer_shape`, the way back is `to_hf`,
and an element's row-major position within a layer IS its flat index in the HF tensor.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from safepatch_jax.mesh import Sharder
from safepatch_jax.models.config import DecoderConfig

SCOPES = {
    "block_linear": ("linear",),
    "all_linear": ("linear", "head"),
    "all": ("linear", "head", "embedding", "norm", "bias"),
}


@dataclasses.dataclass(frozen=True)
class Param:
    """One parameter.

    Attributes:
      path: where it lives in the nested dictionary, e.g. ``layers/attention/q``.
      axes: logical axes; the first is ``layers`` for a stacked parameter.
      shape: sizes of these axes.
      hf_name: its name in the checkpoint, ``{layer}`` standing for the block number.
      out_axes: how many axes after ``layers`` make up the out side of the HF tensor.
      kind: linear, head, embedding, norm or bias; decides the patch scope.
      start: the constant of its initialisation; None for random values.
    """

    path: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    hf_name: str
    out_axes: int
    kind: str
    start: float | None = None

    @property
    def stacked(self) -> bool:
        return self.axes[0] == "layers"

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """Shape of one layer's part (of the whole, if not stacked)."""
        return self.shape[1:] if self.stacked else self.shape

    @property
    def layer_axes(self) -> tuple[str, ...]:
        """Logical axes of one layer's part."""
        return self.axes[1:] if self.stacked else self.axes

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """Shape of the HF tensor: [out, in], or [out] where there is no in side."""
        out, rest = self.layer_shape[: self.out_axes], self.layer_shape[self.out_axes :]
        return (math.prod(out), math.prod(rest)) if rest else (math.prod(out),)

    @property
    def num_layers(self) -> int:
        """Number of HF tensors behind this parameter."""
        return self.shape[0] if self.stacked else 1

    @property
    def hf_names(self) -> tuple[str, ...]:
        return tuple(self.hf_name.format(layer=i) for i in range(self.num_layers))

    def to_hf(self, x):
        """Turn one layer's part into the HF tensor."""
        return x.reshape(self.hf_shape)

    def as_matrices(self, x):
        """View the whole parameter as ``[layers, *hf_shape]``."""
        return x.reshape((self.num_layers, *self.hf_shape))

    def layer_initializer(self):
        """Initialiser of one layer's part, in the form ``fn(key, shape, dtype)``."""
        if self.start is not None:
            return jax.nn.initializers.constant(self.start)
        std = 0.02 if self.kind == "embedding" else self.hf_shape[-1] ** -0.5
        return jax.nn.initializers.normal(std)


class ParamTable:
    """All parameters of one architecture."""

    def __init__(self, rows: tuple[Param, ...]):
        self.rows = rows
        self.by_path = {row.path: row for row in rows}
        if len(self.by_path) != len(rows):
            raise ValueError("the parameter table declares a path twice")

    def __iter__(self) -> Iterator[Param]:
        return iter(self.rows)

    def __getitem__(self, path: str) -> Param:
        return self.by_path[path]

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(math.prod(row.shape) for row in self.rows)

    def scope(self, name: str) -> tuple[Param, ...]:
        """Return the rows that are scored and patched under a scope (see SCOPES)."""
        return tuple(row for row in self.rows if row.kind in SCOPES[name])

    def hf_names(self) -> dict[str, tuple[Param, int]]:
        """Map each HF tensor name to its row and layer number."""
        places = {}
        for row in self.rows:
            for layer, name in enumerate(row.hf_names):
                places[name] = row, layer
        return places

    def shardings(self, sharder: Sharder) -> dict[str, Any]:
        """Return the nested dictionary of NamedShardings.

        Raises:
          ValueError: a dimension does not divide, or a rule of the sharder is never used.
        """
        sharder.check_used(itertools.chain.from_iterable(row.axes for row in self.rows))
        return nest(
            {row.path: sharder.sharding(row.axes, row.shape, row.path) for row in self.rows}
        )

    def abstract(self, sharder: Sharder, dtype=jnp.float32) -> dict[str, Any]:
        """Return the nested dictionary of ShapeDtypeStructs with shardings."""
        flat = {}
        for row in self.rows:
            sharding = sharder.sharding(row.axes, row.shape, row.path)
            flat[row.path] = jax.ShapeDtypeStruct(row.shape, dtype, sharding=sharding)
        return nest(flat)

    def init(self, key: jax.Array, dtype=jnp.float32) -> dict[str, Any]:
        """Draw random parameters (for tests and dry runs)."""
        flat = {}
        for row, row_key in zip(self.rows, jax.random.split(key, len(self.rows))):
            flat[row.path] = row.layer_initializer()(row_key, row.shape, dtype)
        return nest(flat)


@functools.cache
def param_table(config: DecoderConfig) -> ParamTable:
    """Declare the parameters of a decoder."""
    sizes = {
        "layers": config.num_layers,
        "vocab": config.vocab_size,
        "embed": config.embed_dim,
        "mlp": config.mlp_dim,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
    }
    starts = {"norm": 0.0 if config.norm_offset else 1.0, "bias": 0.0}

    def row(path, axes, hf_name, kind, out_axes=1):
        names = tuple(axes.split())
        shape = tuple(sizes[axis] for axis in names)
        return Param(path, names, shape, hf_name, out_axes, kind, starts.get(kind))

    def block(path, axes, hf_name, kind, out_axes=1):
        return row(
            f"layers/{path}", f"layers {axes}", "model.layers.{layer}." + hf_name, kind, out_axes
        )

    def norms(part: str, before: str, after: str) -> list[Param]:
        """Declare the norms of a part of the block by their Hugging Face names."""
        names = []
        if config.norms != "post":
            names.append((f"{part}_norm/scale", before))
        if config.norms != "pre":
            names.append((f"{part}_post_norm/scale", after))
        return [block(path, "embed", f"{name}_layernorm.weight", "norm") for path, name in names]

    # Where both parts have two norms, the name of the second one's first is attention's second.
    before_mlp = "post_attention" if config.norms == "pre" else "pre_feedforward"
    rows = [
        row("embedder/embedding", "vocab embed", "model.embed_tokens.weight", "embedding"),
        *norms("attention", "input", "post_attention"),
        block("attention/q", "heads head_dim embed", "self_attn.q_proj.weight", "linear", 2),
        block("attention/k", "kv_heads head_dim embed", "self_attn.k_proj.weight", "linear", 2),
        block("attention/v", "kv_heads head_dim embed", "self_attn.v_proj.weight", "linear", 2),
        block("attention/o", "embed heads head_dim", "self_attn.o_proj.weight", "linear"),
        *norms("mlp", before_mlp, "post_feedforward"),
        block("mlp/gate", "mlp embed", "mlp.gate_proj.weight", "linear"),
        block("mlp/up", "mlp embed", "mlp.up_proj.weight", "linear"),
        block("mlp/down", "embed mlp", "mlp.down_proj.weight", "linear"),
        row("final_norm/scale", "embed", "model.norm.weight", "norm"),
    ]
    if config.qk_norm:
        q_axes, k_axes = "head_dim", "head_dim"
        if config.qk_norm == "projection":
            q_axes, k_axes = "heads head_dim", "kv_heads head_dim"
        rows += [
            block("attention/q_norm/scale", q_axes, "self_attn.q_norm.weight", "norm", 2),
            block("attention/k_norm/scale", k_axes, "self_attn.k_norm.weight", "norm", 2),
        ]
    if config.qkv_bias:
        rows += [
            block("attention/q_bias", "heads head_dim", "self_attn.q_proj.bias", "bias", 2),
            block("attention/k_bias", "kv_heads head_dim", "self_attn.k_proj.bias", "bias", 2),
            block("attention/v_bias", "kv_heads head_dim", "self_attn.v_proj.bias", "bias", 2),
        ]
    if not config.tied_head:
        rows.append(row("head/kernel", "vocab embed", "lm_head.weight", "head"))
    return ParamTable(tuple(rows))


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turn ``{"a/b": x}`` into ``{"a": {"b": x}}``."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def unnest(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Inverse of `nest`."""
    flat = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat |= unnest(value, path + "/")
        else:
            flat[path] = value
    return flat
