"""Batches of training on the mesh, whole and cut into micro-batches."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from safepatch_jax.data.chat import HARMFUL
from safepatch_jax.mesh import Sharder


def cuts_evenly(rows: int, accumulate: int, ways: int) -> bool:
    """Return whether micro-batches of a batch of so many rows cut evenly over so many devices; a
    batch that is whole need not."""
    return accumulate == 1 or rows % (accumulate * ways) == 0


def check_batch(name: str, rows: int, accumulate: int, sharder: Sharder) -> None:
    """Raise ValueError if micro-batches of a batch of so many rows would not cut evenly over the
    mesh."""
    ways = sharder.batch_ways
    if not cuts_evenly(rows, accumulate, ways):
        raise ValueError(
            f"{name} of {rows} sequences cannot be cut into {accumulate} micro-batches "
            f"(derive.accumulate) of whole sequences on each of data*fsdp = {ways} devices. Use a "
            f"multiple of {accumulate * ways}, or a smaller derive.accumulate."
        )


def put_batch(batch: dict[str, np.ndarray], sharder: Sharder) -> dict[str, jax.Array]:
    """Place a batch, which every process holds, on the mesh, cut along its first axis where that
    divides; a prefix is whole everywhere."""
    axes = batch_layout(next(iter(batch.values())).shape[0], sharder)
    layouts = dict.fromkeys(batch, axes) | {"prefix": ("layers", "length")}
    return {name: sharder.place(x, *layouts[name][: x.ndim]) for name, x in batch.items()}


def batch_layout(rows: int, sharder: Sharder) -> tuple[str, str]:
    """Return the logical axes of a batch's arrays; rows that the mesh does not divide are whole on
    every device ("layers" is never cut)."""
    return "batch" if rows % sharder.batch_ways == 0 else "layers", "length"


def micro_batches(
    batch: Mapping[str, jax.Array], accumulate: int, sharder: Sharder
) -> dict[str, jax.Array]:
    """Cut a batch into micro-batches, within a program: [B, ...] to [accumulate, B / accumulate,
    ...]. Raises ValueError for one with a prefix."""
    if "prefix" in batch:
        raise ValueError(
            "a batch with a prefix of all its sequences is not cut into micro-batches. Lay it out "
            "without (`training_batch(..., prefix=0)`)."
        )
    micros = {}
    for name, x in batch.items():
        # Micro-batch i takes rows i, i + n, ...: each device's rows stay where they are.
        parts = x.reshape(-1, accumulate, x.shape[1]).swapaxes(0, 1)
        micros[name] = sharder.constrain(parts, "layers", *batch_layout(parts.shape[1], sharder))
    return micros


def reported(batch: Mapping[str, jax.Array], x_BA: jax.Array) -> jax.Array:
    """Keep what belongs to the rows whose NLL is reported: the harmful ones where the batch has
    parts, else all."""
    return jnp.where(batch["part"] == HARMFUL, x_BA, 0.0) if "part" in batch else x_BA
