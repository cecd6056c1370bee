"""One mesh vocabulary, one table from logical axes to mesh axes."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. "features" is the model width of activations, "embed" that of weights.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "length": (),
    "features": (),
    "layers": (),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
}


@dataclasses.dataclass(frozen=True)
class Sharder:
    """Turns logical axes into shardings on one mesh; hashable, so that jitted programs may close over it."""

    mesh: Mesh

    def sharding(self, axes: tuple[str, ...], shape: tuple[int, ...] | None = None, name: str = "array") -> NamedSharding:
        """Return the NamedSharding of an array with these logical axes.

        Args:
          axes: one logical axis for each dimension.
          shape: if given, each dimension must divide by the mesh axes it is laid over.
          name: what the array is called in an error.

        Raises:
          ValueError: unknown logical axis, a mesh axis used twice, or a dimension that does not divide.
        """
        used: list[str] = []
        spec = []
        for dim, axis in enumerate(axes):
            if axis not in RULES:
                raise ValueError(f"{name}: unknown logical axis '{axis}'; known are {', '.join(RULES)}.")
            over = RULES[axis]
            if set(over) & set(used):
                raise ValueError(f"{name}: axes {axes} lay two dimensions over the same mesh axis {over}.")
            used.extend(over)
            ways = math.prod(self.mesh.shape[m] for m in over)
            if shape is not None and shape[dim] % ways:
                fits = math.gcd(shape[dim], ways)
                raise ValueError(
                    f"{name} {tuple(shape)}: dimension '{axis}' of {shape[dim]} does not divide by mesh axes "
                    f"{'*'.join(over)} = {ways}. Use a mesh whose {'*'.join(over)} divides {shape[dim]} (nearest: {fits}).")
            spec.append(None if not over else over[0] if len(over) == 1 else over)
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def constrain(self, x: jax.Array, *axes: str) -> jax.Array:
        """Constrain an intermediate array inside a jitted program."""
        return jax.lax.with_sharding_constraint(x, self.sharding(axes))

    @property
    def batch_ways(self) -> int:
        """Number of parts into which the batch axis is cut."""
        return math.prod(self.mesh.shape[m] for m in RULES["batch"])


def make_mesh(shape: str, devices=None) -> Mesh:
    """Build a mesh from text such as ``data:1,fsdp:-1,tensor:4``.

    Raises:
      ValueError: unknown or repeated axis, more than one -1, or sizes that do not multiply to the device count.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = dict.fromkeys(MESH_AXES, 1)
    seen = set()
    for part in shape.split(","):
        axis, colon, size = part.strip().partition(":")
        if axis not in sizes or axis in seen or not colon:
            raise ValueError(f"mesh '{shape}': '{part}' is not one of data:N, fsdp:N, tensor:N, each at most once.")
        seen.add(axis)
        try:
            sizes[axis] = int(size)
        except ValueError as error:
            raise ValueError(f"mesh '{shape}': '{size}' is not a whole number.") from error
    free = [a for a, n in sizes.items() if n == -1]
    fixed = math.prod(n for n in sizes.values() if n != -1)
    if len(free) > 1 or fixed < 1 or any(n < -1 or n == 0 for n in sizes.values()):
        raise ValueError(f"mesh '{shape}': sizes must be at least 1, and -1 ('all that are left') may stand once.")
    if free:
        sizes[free[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(f"mesh '{shape}' needs {fixed if free else math.prod(sizes.values())} devices"
                         f"{' (or a multiple)' if free else ''}, but there are {len(devices)}. "
                         f"Change --mesh.shape so that the sizes multiply to {len(devices)}.")
    grid = np.asarray(devices).reshape([sizes[a] for a in MESH_AXES])
    if len(devices) > 1 and devices[0].platform == "tpu":
        from jax.experimental import mesh_utils  # orders chips by their physical neighbours

        grid = mesh_utils.create_device_mesh(grid.shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
