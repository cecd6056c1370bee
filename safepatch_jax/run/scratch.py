"""Derived models and scores on disk, whole or half as large: weights, or their differences to the
backbone in bfloat16; sums of gradient magnitudes in float32 or bfloat16.

Whatever lies there, what is read is float32 (or what a use asks for).
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp

from safepatch_jax.io.checkpoint import StoredTree, load_tree, save_tree
from safepatch_jax.io.hf import StoredModel
from safepatch_jax.models.config import read_hf_config
from safepatch_jax.models.table import nest, param_table, unnest
from safepatch_jax.numerics import flushed
from safepatch_jax.run.manifests import DIFFERENCES, SCORES, WEIGHTS
from safepatch_jax.run.state import Run

Flat = dict[str, jax.Array]  # parameters by path


def save_derived(run: Run, weights: Flat, folder: pathlib.Path) -> None:
    """Write the trained weights of a derived model, as derive.store says.

    Args:
      weights: float32, flat; emptied, so that where the caller holds no others each goes as its
        difference comes.
      folder: of the stage.
    """
    if run.settings.derive.store == "float32":
        save_tree(folder / WEIGHTS, nest(weights))
        return
    backbone = StoredModel(run.backbone, run.context.sharder)
    differences = {}
    for path in sorted(weights):
        x = weights.pop(path)
        differences[path] = _difference(x, backbone[path], sharding=x.sharding)
        del x
    save_tree(folder / DIFFERENCES, nest(differences))


def save_scores(run: Run, sums: Flat, folder: pathlib.Path) -> None:
    """Write sums of gradient magnitudes, float32, flat, as score.store says; `sums` is emptied."""
    kept = {path: sums.pop(path).astype(run.settings.score.store) for path in sorted(sums)}
    save_tree(folder / SCORES, nest(kept))


def derived(run: Run, role: str, dtype: str = "float32") -> Flat:
    """Return the flat parameters of a derived model, whose stage must be in place: what it trained,
    and else the backbone's."""
    table = param_table(read_hf_config(run.backbone))
    abstract = unnest(table.abstract(run.context.sharder, jnp.dtype(dtype)))
    folder = run.runner.folder(f"derive_{role}")
    if run.settings.derive.train != "scope":
        return unnest(load_tree(folder / WEIGHTS, nest(abstract)))
    trained = {row.path for row in table.scope(run.settings.patch.scope)}
    backbone = StoredModel(run.backbone, run.context.sharder)  # weight by weight
    others: Flat = {}
    for path in backbone:
        if path not in trained:
            others[path] = backbone[path].astype(abstract.pop(path).dtype)
    if run.settings.derive.store == "float32":
        return unnest(load_tree(folder / WEIGHTS, nest(abstract))) | others
    return dict(Derived(folder, nest(abstract), backbone)) | others


def derived_weights(run: Run, role: str, abstract: dict, backbone: Mapping) -> Mapping:
    """Return a derived model's weights, float32, that are read when they are asked for.

    Args:
      abstract: ShapeDtypeStructs of the patch scope, float32, nested.
      backbone: its weights by path, in any dtype; one is looked up when it is asked for here.
    """
    folder = run.runner.folder(f"derive_{role}")
    if run.settings.derive.store == "float32":
        return StoredTree(folder / WEIGHTS, abstract)
    return Derived(folder, abstract, backbone)


def scores(run: Run, role: str, abstract: dict) -> StoredTree:
    """Return the scores of a derived model, float32, likewise."""
    # Not as score.store has them: XLA would keep float32 copies of both beside them.
    return StoredTree(run.runner.folder(f"score_{role}") / SCORES, abstract)


class Derived(Mapping[str, jax.Array]):
    """The trained weights of a derived model that is kept as differences, backbone + difference;
    each is read when it is looked up, and not kept.

    Args:
      folder: of the stage.
      abstract: ShapeDtypeStructs of the weights, nested: dtype and sharding of what is returned.
      backbone: its weights by path.
    """

    def __init__(self, folder: pathlib.Path, abstract: dict, backbone: Mapping[str, jax.Array]):
        self._abstract, self._backbone = unnest(abstract), backbone
        kept = {
            path: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding)
            for path, x in self._abstract.items()
        }
        self._differences = StoredTree(folder / DIFFERENCES, nest(kept))

    def __getitem__(self, path: str) -> jax.Array:
        wanted, difference = self._abstract[path], self._differences[path]
        return _sum(
            self._backbone[path], difference, dtype=str(wanted.dtype), sharding=wanted.sharding
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._abstract)

    def __len__(self) -> int:
        return len(self._abstract)


@functools.partial(jax.jit, static_argnames="sharding")
def _difference(weight: jax.Array, backbone: jax.Array, *, sharding) -> jax.Array:
    """Return weight - backbone, computed in float32, rounded to nearest bfloat16."""
    difference = flushed(weight - flushed(backbone.astype(jnp.float32)))
    return jax.lax.with_sharding_constraint(difference.astype(jnp.bfloat16), sharding)


@functools.partial(jax.jit, static_argnames=("dtype", "sharding"))
def _sum(backbone: jax.Array, difference: jax.Array, *, dtype: str, sharding) -> jax.Array:
    """Return backbone + difference, computed in float32, in a dtype."""
    whole = backbone.astype(jnp.float32) + difference.astype(jnp.float32)
    return jax.lax.with_sharding_constraint(flushed(whole).astype(dtype), sharding)
