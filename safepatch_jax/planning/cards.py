"""GPUs that are absent: what XLA's CUDA compiler must know of a card, to compile for it."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
HOST = 8  # cards that NVLink joins in one host


@dataclasses.dataclass(frozen=True)
class Card:
    """A vendor's figures of one GPU, beside those of `chips.Chip`.

    Attributes:
      capability: CUDA's compute capability.
      cores: streaming multiprocessors.
      lanes: float32 units of each.
      threads: that can be resident on each.
      shared, block: bytes of shared memory of each, and the most that a block can ask for.
      cache: bytes of the second level's.
      clock: GHz, boost.
    """

    capability: tuple[int, int]
    cores: int
    lanes: int
    threads: int
    shared: int
    block: int
    cache: int
    clock: float


# NVIDIA's data sheets and architecture papers (Hopper, Ampere, Ada); shared memory and threads: the
# CUDA programming guide's table of compute capabilities.
_HOPPER = Card((9, 0), 132, 128, 2048, 228 << 10, 227 << 10, 50 << 20, 1.98)
_AMPERE = Card((8, 0), 108, 64, 2048, 164 << 10, 163 << 10, 40 << 20, 1.41)
CARDS = {
    "h100": _HOPPER,
    "h200": _HOPPER,
    "a100-40": _AMPERE,
    "a100-80": _AMPERE,
    "l4": Card((8, 9), 58, 128, 1536, 100 << 10, 99 << 10, 48 << 20, 2.04),
}


def installed() -> bool:
    """Return whether JAX's CUDA plugin, which brings the compiler, is there."""
    if importlib.util.find_spec("jax_plugins") is None:
        return False
    return any(importlib.util.find_spec(name) for name in PLUGINS)


def target_config(card: Card, kind: str, memory: int, bandwidth: float) -> str:
    """Return the text of XLA's GpuTargetConfigProto for a card.

    Args:
      card: its figures.
      kind: how JAX names it.
      memory: bytes.
      bandwidth: of it, bytes/s.
    """
    major, minor = card.capability
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "threads_per_core_limit": card.threads,
        "core_count": card.cores,
        "fpus_per_core": card.lanes,
        "shared_memory_per_block": 48 << 10,
        "shared_memory_per_core": card.shared,
        "shared_memory_per_block_optin": card.block,
        "registers_per_core_limit": 1 << 16,
        "registers_per_block_limit": 1 << 16,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "memory_bandwidth": int(bandwidth),
        "device_memory_size": memory,
        "l2_cache_size": card.cache,
        "clock_rate_ghz": card.clock,
    }
    lines = [f"  {name}: {value}" for name, value in fields.items()]
    lines.append(f"  cuda_compute_capability {{ major: {major} minor: {minor} }}")
    return "\n".join(
        [
            "gpu_device_info {",
            *lines,
            "}",
            'platform_name: "CUDA"',
            "dnn_version_info { major: 9 minor: 10 }",
            f'device_description_str: "{kind}"',
        ]
    )


def absent(config: str, number: int) -> list[Any]:
    """Return the descriptors of so many GPUs of one host, for which programs can be compiled.

    Args:
      config: see `target_config`.
      number: of cards, at most HOST.
    """
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="cuda", target_config=config, topology=f"1x1x{number}"
    )
    return list(topology.devices)
