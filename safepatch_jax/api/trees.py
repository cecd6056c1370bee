"""Applying a patch file to a live tree of JAX arrays, and taking it off again.

The tree is the parameter table's (`io.hf.load_params` gives one): each layer of a stacked array is
a checkpoint's tensor, row by row. All tensors are compared with the patch, by SHA-256, before
anything is changed; then each array is flipped where it lies, every device its own part.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from safepatch_jax.models.config import DecoderConfig
from safepatch_jax.models.table import Param, nest, param_table, unnest
from safepatch_jax.patch_file.apply import AFTER, BEFORE
from safepatch_jax.patch_file.entries import gathered, opened
from safepatch_jax.patch_file.file import BITS, RUN, PatchFile
from safepatch_jax.patch_file.live import compare
from safepatch_jax.runtime.console import some

Tree = dict[str, Any]
_WHERE = "the tree"
_UNSIGNED = {2: jnp.uint16, 4: jnp.uint32}  # by bytes of an element


def apply_tree(
    patch: str | os.PathLike[str],
    params: Mapping[str, Any],
    config: DecoderConfig,
    donate: bool = False,
) -> Tree:
    """Patch a live tree.

    Args:
      patch: the patch file.
      params: nested dictionary of arrays, in the dtypes of the checkpoint, sharded in any way.
      config: the architecture.
      donate: change the tree itself: each array is replaced in its dictionary by one that takes
        over its memory, so that no second copy is held; the old arrays cannot be used any more.

    Returns:
      the patched tree, in the same shardings; arrays that the patch leaves alone are shared with
      `params`. With `donate` it is `params`.

    Raises:
      ValueError: another model, dtype or shape, a tensor that is neither as in the backbone nor as
        patched, or a damaged patch; nothing was changed.
    """
    return _move(opened(patch), params, config, AFTER, donate)


def revert_tree(
    patch: str | os.PathLike[str],
    params: Mapping[str, Any],
    config: DecoderConfig,
    donate: bool = False,
) -> Tree:
    """Give a patched tree the backbone's bits back; see `apply_tree`."""
    return _move(opened(patch), params, config, BEFORE, donate)


def _move(
    patch: PatchFile, params: Mapping[str, Any], config: DecoderConfig, goal: str, donate: bool
) -> Tree:
    rows = param_table(config)
    flat = unnest(params)
    _check_tree(flat, rows)
    views = {}
    for name, (row, layer) in rows.hf_names().items():
        views[name] = _Layer(row, flat[row.path], layer)
    moved, _ = compare(patch, views, _WHERE, goal)
    layers: dict[str, dict[int, str]] = {}
    for name in moved:
        row, layer = rows.hf_names()[name]
        layers.setdefault(row.path, {})[layer] = name
    if donate:
        _flip_in_place(patch, params, rows, layers)
        return params
    for path, names in layers.items():
        flat[path] = _flip_row(patch, rows[path], flat[path], names, donate=False)
    return nest(flat)


def _check_tree(flat: Mapping[str, Any], rows) -> None:
    """Raise ValueError unless the tree has the table's arrays; all that differ are collected."""
    problems = [f"{path} is missing" for path in rows.by_path if path not in flat]
    for path, x in flat.items():
        if path not in rows.by_path:
            problems.append(f"{path} is not in the parameter table")
        elif not isinstance(x, jax.Array):
            problems.append(f"{path} is {type(x).__name__}, not a JAX array")
        elif x.is_deleted():
            problems.append(f"{path} was donated elsewhere")
        elif x.shape != rows[path].shape:
            problems.append(f"{path} has shape {x.shape}, expected {rows[path].shape}")
    if problems:
        raise ValueError(
            f"A patch goes onto a tree of the parameter table: {some(problems)}. Nothing was "
            "changed. Give the tree of load_params, and the config that came with it."
        )


class _Layer:
    """One layer of an array as the checkpoint's tensor; see `patch_file.live.View`."""

    def __init__(self, row: Param, x: jax.Array, layer: int):
        self._row, self._x, self._layer = row, x, layer
        self.dtype = x.dtype.name
        self.shape = row.hf_shape
        self.nbytes = int(np.prod(self.shape)) * x.dtype.itemsize

    def runs(self) -> Iterator[np.ndarray]:
        """Yield its storage bits; one layer is held by the host at a time."""
        part = np.asarray(_whole(self._x, self._layer, self._row.stacked))
        bits = part.reshape(-1).view(BITS[self.dtype])
        for start in range(0, len(bits), RUN):
            yield bits[start : start + RUN]


def _whole(x: jax.Array, layer: int, stacked: bool) -> jax.Array:
    """Return one layer of an array, on every device whole."""
    return _gatherer(_everywhere(x.sharding), stacked)(x, layer)


def _everywhere(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """Return the sharding in which each device of another one has all."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec())
    return sharding


@functools.lru_cache(maxsize=64)
def _gatherer(sharding: jax.sharding.Sharding, stacked: bool):
    def one_layer(x, layer):
        return jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) if stacked else x

    return jax.jit(one_layer, out_shardings=sharding)


def _flip_in_place(
    patch: PatchFile, params: Mapping[str, Any], rows, layers: Mapping[str, dict[int, str]]
) -> None:
    """Replace arrays of the tree one by one; after an error those that were replaced are flipped
    back."""
    done: list[str] = []

    def replace(path: str) -> None:
        *parents, leaf = path.split("/")
        node = params
        for parent in parents:
            node = node[parent]
        node[leaf] = _flip_row(patch, rows[path], node[leaf], layers[path], donate=True)

    try:
        for path in layers:
            replace(path)
            done.append(path)
    except BaseException as error:
        try:
            while done:
                replace(done[-1])
                done.pop()
        except BaseException as second:
            raise RuntimeError(
                f"Changing {_WHERE} failed ({error!r:.200}), and so did taking it back "
                f"({second!r:.200}): {some(done, ', ')} changed, the others did not. Each tensor "
                "is whole: the same call again finishes, the other one undoes; or load it again."
            ) from error
        raise


def _flip_row(
    patch: PatchFile, row: Param, x: jax.Array, names: Mapping[int, str], donate: bool
) -> jax.Array:
    """Return an array with the patch's flips in these of its layers, in the same sharding."""
    columns, bits = [], []
    for layer, name in names.items():
        indices, flips = gathered(patch, name)
        axes = np.unravel_index(indices, row.layer_shape)
        if row.stacked:
            axes = (np.full(len(indices), layer), *axes)
        columns.append(np.stack(axes).astype(np.int32))
        bits.append(flips)
    flip = _flipper(x.sharding, x.dtype, x.ndim, donate)
    return flip(x, np.concatenate(columns, axis=1), np.concatenate(bits))


@functools.lru_cache(maxsize=64)
def _flipper(sharding: jax.sharding.Sharding, dtype, ndim: int, donate: bool):
    """Compile the flip of an array: (x, coordinates [axes, n], flips [n]) -> x."""
    unsigned = _UNSIGNED[dtype.itemsize]

    def flip(x, coordinates, flips, starts=None):
        bits = jax.lax.bitcast_convert_type(x, unsigned)
        if starts is not None:
            coordinates = _local(coordinates, starts, x.shape)
        place = tuple(coordinates)
        old = bits.at[place].get(mode="fill", fill_value=0)
        bits = bits.at[place].set(old ^ flips, mode="drop", unique_indices=starts is None)
        return jax.lax.bitcast_convert_type(bits, x.dtype)

    if isinstance(sharding, NamedSharding):
        mesh, spec = sharding.mesh, sharding.spec

        def on_device(x, coordinates, flips):
            return flip(x, coordinates, flips, _starts(mesh, spec, x.shape))

        specs = (spec, PartitionSpec(), PartitionSpec())
        flip_all = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=spec)
        return jax.jit(flip_all, out_shardings=sharding, donate_argnums=(0,) if donate else ())
    return jax.jit(flip, out_shardings=sharding, donate_argnums=(0,) if donate else ())


def _starts(mesh: jax.sharding.Mesh, spec: PartitionSpec, shape: tuple[int, ...]) -> list[Any]:
    """Return where this device's part begins, by axis."""
    starts: list[Any] = [0] * len(shape)
    for axis, names in enumerate(spec):
        if names is not None:
            starts[axis] = jax.lax.axis_index(names) * shape[axis]
    return starts


def _local(coordinates, starts: list[Any], shape: tuple[int, ...]):
    """Turn coordinates into those within a device's part; what lies elsewhere goes beyond its end,
    where nothing is written."""
    moved = jnp.stack([coordinates[axis] - start for axis, start in enumerate(starts)])
    sizes = jnp.array(shape, moved.dtype)[:, None]
    inside = jnp.all((moved >= 0) & (moved < sizes), axis=0)
    return jnp.where(inside, moved, sizes)
