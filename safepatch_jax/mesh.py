"""One mesh vocabulary, one table from logical axes to mesh axes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from safepatch_jax.runtime import processes

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. "features" is the model width of activations, "embed" that of weights.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "length": (),
    "features": (),
    "layers": (),  # the stack of blocks; also any other dimension that is never cut
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
}
# The other logical axes are those of parameters.
ACTIVATION_AXES = ("batch", "length", "features")


@dataclasses.dataclass(frozen=True)
class Sharder:
    """Turns logical axes into shardings on one mesh; hashable, for jitted programs close over it.

    Attributes:
      mesh: devices, named by MESH_AXES.
      rules: (logical axis, mesh axes) pairs; RULES by default.

    Raises:
      ValueError: a rule names an unknown mesh axis.
    """

    mesh: Mesh
    rules: tuple[tuple[str, tuple[str, ...]], ...] = tuple(RULES.items())

    def __post_init__(self):
        for axis, over in self.rules:
            for name in over:
                if name not in self.mesh.shape:
                    raise ValueError(
                        f"The rule of '{axis}' names the mesh axis '{name}'; the mesh has "
                        f"{', '.join(self.mesh.shape)}."
                    )
            if len(set(over)) < len(over):
                raise ValueError(
                    f"The rule of '{axis}' names a mesh axis twice: {', '.join(over)}."
                )

    def with_rules(self, **changes: tuple[str, ...]) -> Sharder:
        """Return a sharder of the same mesh with other rules for some axes."""
        return Sharder(self.mesh, tuple((dict(self.rules) | changes).items()))

    def check_used(self, axes: Iterable[str]) -> None:
        """Raise ValueError if a rule's logical axis is neither one of these (a parameter's) nor an
        activation's."""
        if unused := sorted(dict(self.rules).keys() - set(axes) - set(ACTIVATION_AXES)):
            raise ValueError(
                f"The rules of {', '.join(unused)} are never used: no parameter and no activation "
                "has such an axis. Remove them, or correct their names."
            )

    def sharding(
        self, axes: tuple[str, ...], shape: tuple[int, ...] | None = None, name: str = "array"
    ) -> NamedSharding:
        """Return the NamedSharding of an array with these logical axes.

        Args:
          axes: one logical axis for each dimension.
          shape: if given, each dimension must divide by the mesh axes it is laid over.
          name: what the array is called in an error.

        Raises:
          ValueError: unknown logical axis, a mesh axis used twice, or a dimension that does not
            divide.
        """
        rules = dict(self.rules)
        used: list[str] = []
        spec = []
        for dim, axis in enumerate(axes):
            if axis not in rules:
                raise ValueError(
                    f"{name}: unknown logical axis '{axis}'; known are {', '.join(rules)}."
                )
            over = rules[axis]
            if twice := set(over) & set(used):
                raise ValueError(
                    f"{name}: axes {axes} lay two dimensions over the same mesh axis "
                    f"{', '.join(sorted(twice))}."
                )
            used.extend(over)
            ways = self._ways(over)
            if shape is not None and shape[dim] % ways:
                raise ValueError(
                    f"{name} {tuple(shape)}: dimension '{axis}' of {shape[dim]} does not divide by "
                    f"mesh axes {'*'.join(over)} = {ways}. Nearest mesh that divides it: "
                    f"{self._nearest(shape[dim], over)}."
                )
            spec.append(over or None)
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    def _ways(self, over: tuple[str, ...]) -> int:
        return math.prod(self.mesh.shape[m] for m in over)

    def _nearest(self, size: int, over: tuple[str, ...]) -> str:
        """Return a mesh of as many devices in which `over` divides a size; another axis gets the
        rest of the devices."""
        sizes = dict(self.mesh.shape)
        other = next((m for m in ("fsdp", "data", "tensor") if m not in over), over[-1])
        for axis in over:
            kept = math.gcd(size, sizes[axis])
            sizes[other] *= sizes[axis] // kept
            sizes[axis], size = kept, size // kept
        return "--mesh=" + ",".join(f"{axis}:{n}" for axis, n in sizes.items())

    @property
    def one_cpu(self) -> bool:
        """Whether this is one CPU device: programs are then best small, and called by the host."""
        return self.platform == "cpu" and self.mesh.size == 1

    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def constrain(self, x: jax.Array, *axes: str) -> jax.Array:
        """Constrain an intermediate array inside a jitted program."""
        return jax.lax.with_sharding_constraint(x, self.sharding(axes))

    def place(self, x: np.ndarray, *axes: str) -> jax.Array:
        """Place a host array that every process holds; each process copies only the parts of its
        own devices."""
        return jax.make_array_from_callback(
            x.shape, self.sharding(axes, x.shape), lambda index: x[index]
        )

    def local_rows(self, rows: int) -> list[int]:
        """Return which rows of a batch of so many this process's devices hold: all, where the mesh
        does not divide it."""
        if rows % self.batch_ways:
            return list(range(rows))
        local: set[int] = set()
        parts = self.sharding(("batch",)).addressable_devices_indices_map((rows,))
        for (part,) in parts.values():
            local.update(range(*part.indices(rows)))
        return sorted(local)

    def maximum(self, value: int) -> int | jax.Array:
        """Return the largest of the processes' values; with several processes an array, the same on
        each."""
        if not processes.several():
            return value
        sharding = NamedSharding(self.mesh, PartitionSpec(MESH_AXES))
        values = jax.make_array_from_callback(
            (self.mesh.size,), sharding, lambda index: np.full(1, value, np.int32)
        )
        return jax.jit(jnp.max, out_shardings=self.replicated())(values)

    @property
    def batch_axes(self) -> tuple[str, ...]:
        """Return the mesh axes over which the batch is cut."""
        return dict(self.rules)["batch"]

    @property
    def batch_ways(self) -> int:
        """Return the number of parts into which the batch axis is cut."""
        return self._ways(self.batch_axes)

    @property
    def platform(self) -> str:
        """Return the devices' platform: cpu, gpu or tpu."""
        return self.mesh.devices.flat[0].platform


def local_bytes(arrays: Any) -> int:
    """Return the bytes that each device holds of a tree of arrays, or of their shapes with
    shardings."""
    size = 0
    for x in jax.tree.leaves(arrays):
        size += math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize
    return size


def make_mesh(shape: str, devices=None) -> Mesh:
    """Build a mesh from text such as ``data:1,fsdp:-1,tensor:4``.

    Over several TPU slices the data axis is laid across the slices, whose links are the slowest.

    Raises:
      ValueError: unknown or repeated axis, more than one -1, sizes that do not multiply to the
        device count, or a data axis that several slices do not divide.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = dict.fromkeys(MESH_AXES, 1) | _parse_sizes(shape)
    free = [a for a, n in sizes.items() if n == -1]
    fixed = math.prod(n for n in sizes.values() if n != -1)
    if len(free) > 1 or fixed < 1 or any(n < -1 or n == 0 for n in sizes.values()):
        raise ValueError(
            f"mesh '{shape}': sizes must be at least 1, and -1 ('all that are left') may stand "
            "once."
        )
    if free:
        sizes[free[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        multiple = " (or a multiple)" if free else ""
        raise ValueError(
            f"mesh '{shape}' needs {fixed} devices{multiple}, but there are {len(devices)}. Change "
            f"--mesh so that the sizes multiply to {len(devices)}."
        )
    grid = np.asarray(devices).reshape([sizes[a] for a in MESH_AXES])
    if len(devices) > 1 and devices[0].platform == "tpu":
        grid = _by_neighbours(grid.shape, devices, shape)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _parse_sizes(shape: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in shape.split(","):
        axis, colon, size = part.strip().partition(":")
        if axis not in MESH_AXES or axis in sizes or not colon:
            raise ValueError(
                f"mesh '{shape}': '{part}' is not one of data:N, fsdp:N, tensor:N, each at most "
                "once."
            )
        try:
            sizes[axis] = int(size)
        except ValueError as error:
            raise ValueError(f"mesh '{shape}': '{size}' is not a whole number.") from error
    return sizes


def _by_neighbours(sizes: tuple[int, ...], devices: list, shape: str) -> np.ndarray:
    """Order chips so that neighbours in the mesh are neighbours in the machine."""
    from jax.experimental import mesh_utils

    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    if sizes[0] % slices:
        raise ValueError(
            f"mesh '{shape}': there are {slices} slices, so the data axis must be a multiple of "
            f"{slices}: data:{slices},fsdp:-1."
        )
    return mesh_utils.create_hybrid_device_mesh(
        (sizes[0] // slices, *sizes[1:]), (slices, 1, 1), devices, allow_split_physical_axes=True
    )
