"""Nested dictionaries of arrays on disk, through orbax: sharded, and restored onto any mesh."""

from __future__ import annotations

import pathlib
from typing import Any

import orbax.checkpoint as ocp


def save_tree(path: str | pathlib.Path, tree: dict[str, Any]) -> None:
    """Write a nested dictionary of arrays; the folder appears whole or not at all."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(pathlib.Path(path).absolute(), tree)


def load_tree(path: str | pathlib.Path, abstract: dict[str, Any]) -> dict[str, Any]:
    """Read a nested dictionary of arrays.

    Args:
      abstract: ShapeDtypeStructs with shardings; says onto which mesh and in which dtype.

    Raises:
      ValueError: the checkpoint is absent, damaged, or of another structure.
    """
    path = pathlib.Path(path).absolute()
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path, abstract)
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise ValueError(f"Cannot restore the checkpoint {path}: {error}") from error
