"""Published figures of chips, and devices without their hardware: a TPU topology's, GPUs of XLA's
CUDA compiler, or CPU devices that stand for them."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import re
from typing import Any

import jax

from safepatch_jax.mesh import Sharder, make_mesh
from safepatch_jax.planning.cards import CARDS, HOST, absent, installed, target_config

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A vendor's figures of one chip.

    Attributes:
      name: as people call it.
      kinds: how JAX names such a device.
      hbm: memory in bytes that programs can use.
      flops: peak of bfloat16 products, dense, FLOP/s.
      bandwidth: of that memory, bytes/s.
      link: interconnect, bytes/s that a chip can send over all its links at once.
      network: data centre network, bytes/s a chip can send; what several slices have between them.
      dims: of a topology.
    """

    name: str
    kinds: tuple[str, ...]
    hbm: int
    flops: float
    bandwidth: float
    link: float
    network: float
    dims: int = 0

    @property
    def platform(self) -> str:
        return "tpu" if self.dims else "gpu"


# TPU: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e (2025): peak bf16, HBM bandwidth, "bidirectional
# ICI bandwidth per chip", half of which is sent; DCN by pod or by chip. What these pages lack of v4
# is in jax-ml.github.io/scaling-book. HBM is 32, 16, 95 and 32 GB by the data sheet; the table has
# what XLA gives to programs, as its refusal of one that does not fit says (libtpu 0.0.42).
# GPU: NVIDIA's data sheets: dense bf16; NVLink 900 GB/s both ways (H100 SXM, H200 SXM), 600 (A100
# SXM), PCIe 4.0 x16 64 GB/s (L4); one 400 Gbit/s adapter a GPU (A100: 200, L4: 100).
CHIPS = {
    "v4": Chip("TPU v4", ("TPU v4",), int(30.75 * GIB), 275e12, 1.2e12, 300e9, 6.25e9, 3),
    "v5e": Chip(
        "TPU v5e", ("TPU v5 lite", "TPU v5e"), int(15.75 * GIB), 197e12, 819e9, 200e9, 3.125e9, 2
    ),
    "v5p": Chip(
        "TPU v5p", ("TPU v5", "TPU v5p"), int(95.74 * GIB), 459e12, 2.765e12, 600e9, 6.25e9, 3
    ),
    "v6e": Chip(
        "TPU v6e", ("TPU v6 lite", "TPU v6e"), int(31.25 * GIB), 918e12, 1.638e12, 400e9, 12.5e9, 2
    ),
    "h100": Chip("H100 SXM", ("NVIDIA H100 80GB HBM3",), 80 * 10**9, 989e12, 3.35e12, 450e9, 50e9),
    "h200": Chip("H200 SXM", ("NVIDIA H200",), 141 * 10**9, 989e12, 4.8e12, 450e9, 50e9),
    "a100-40": Chip(
        "A100 40 GB", ("NVIDIA A100-SXM4-40GB",), 40 * 10**9, 312e12, 1.555e12, 300e9, 25e9
    ),
    "a100-80": Chip(
        "A100 80 GB", ("NVIDIA A100-SXM4-80GB",), 80 * 10**9, 312e12, 2.039e12, 300e9, 25e9
    ),
    "l4": Chip("L4", ("NVIDIA L4",), 24 * 10**9, 121e12, 300e9, 32e9, 12.5e9),
}
POOL = 0.92  # of a card's memory, what JAX can be given (XLA_CLIENT_MEM_FRACTION)
OWN_POOL = 0.75  # of a card's memory, what JAX takes of itself
# libtpu must not look for a metadata server or for chips, nor claim them against other processes.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
FORMS = (
    "v4:2x2x2, v5e:4x4, v5p:2x2x2, v6e:2x4 (generation, then chips along each axis: whole hosts "
    "of 2x2 chips, or one "
    "chip, v5e:1x1); GPUs by the buffers of XLA's compiler for CPU: h100:1, h200:1, a100-40:1, "
    "a100-80:4, l4:1"
)


@dataclasses.dataclass(frozen=True)
class Target:
    """The devices that programs are compiled for.

    Attributes:
      title: for people.
      devices: descriptors or devices, all of one kind.
      chip: its figures, None where the table has none (a CPU).
      memory: bytes that programs can use on each device, None where that is not known.
    """

    title: str
    devices: tuple[Any, ...]
    chip: Chip | None
    memory: int | None

    @property
    def capability(self) -> tuple[int, int] | None:
        """CUDA's compute capability of absent GPUs; None where the devices are no such."""
        names = [name for name, chip in CHIPS.items() if chip is self.chip]
        if not names or self.devices[0].platform != "gpu" or names[0] not in CARDS:
            return None
        return CARDS[names[0]].capability

    @property
    def slices(self) -> int:
        """Number of TPU slices that the devices belong to."""
        return len({getattr(device, "slice_index", None) for device in self.devices})

    def sharder(self, mesh: str) -> Sharder:
        """Lay the devices out. Raises ValueError as `make_mesh` does."""
        return Sharder(make_mesh(mesh, list(self.devices)))


def topology(text: str, slices: int = 1) -> Target:
    """Return the chips of a TPU topology, for which programs can be compiled without the hardware;
    or CPU devices that stand for GPUs.

    JAX itself is set to run on the CPU, unless JAX_PLATFORMS says otherwise.

    Args:
      text: such as ``v5e:4x4``, or ``h100:2``.
      slices: number of such topologies, joined by the data centre network.

    Raises:
      ValueError: libtpu, which brings the compiler, is not installed; unknown generation or form;
        no such layout.
    """
    if match := re.fullmatch(r"([\w-]+):(\d+)", text.strip()):
        return _cards(text, *match.groups(), slices)
    match = re.fullmatch(r"(v\w+):(\d+(?:x\d+)+)", text.strip())
    chip = CHIPS.get(match.group(1)) if match else None
    if chip is None or chip.platform != "tpu" or match.group(2).count("x") + 1 != chip.dims:
        raise ValueError(f"Unknown topology '{text}'. Forms: {FORMS}.")
    if slices < 1:
        raise ValueError(f"--num_slices must be at least 1, got {slices}.")
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "The TPU compiler, libtpu, is not installed. No TPU is needed for it: "
            "pip install -e '.[tpu-aot]' (700 MB)."
        )
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if chip is CHIPS["v4"]:
        options["chip_config_name"] = "megacore"  # both cores of a chip as one device
    if set(match.group(2).split("x")) == {"1"}:
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=text.strip(), **options
        ).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"libtpu knows no topology '{text}': {reason} Forms: {FORMS}.") from error
    times = f" x {slices} slices" if slices > 1 else ""
    title = f"{text.strip()}{times}: {len(devices)} x {chip.name}"
    return Target(title, tuple(devices), chip, chip.hbm)


def _cards(text: str, name: str, number: str, slices: int) -> Target:
    """Return so many GPUs of a kind, with the memory that JAX can have of each: those of XLA's CUDA
    compiler, or, where its plugin is absent, CPU devices in their place. What is compiled for these
    has the GPU's arrays, and other temporaries and kernels."""
    chip = CHIPS.get(name)
    if chip is None or chip.platform != "gpu" or not int(number) or slices != 1:
        raise ValueError(f"Unknown topology '{text}'. Forms: {FORMS}.")
    if not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")
    title, memory = f"{text.strip()}: {number} x {chip.name}", int(POOL * chip.hbm)
    if installed():
        if int(number) > HOST:
            raise ValueError(f"'{text}': NVLink joins {HOST} cards of a host; take {HOST} or less.")
        config = target_config(CARDS[name], chip.kinds[0], chip.hbm, chip.bandwidth)
        return Target(title, tuple(absent(config, int(number))), chip, memory)
    with contextlib.suppress(RuntimeError):  # JAX runs: there are as many as there are
        jax.config.update("jax_num_cpu_devices", int(number))
    devices = jax.devices("cpu")[: int(number)]
    if len(devices) < int(number):
        raise ValueError(
            f"'{text}' needs {number} simulated devices, and JAX runs with {len(devices)}. Set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={number}."
        )
    title += ", by XLA's compiler for CPU (that for CUDA: pip install -e '.[gpu-aot]')"
    return Target(title, tuple(devices), chip, memory)


def present(sharder: Sharder, chip: Chip | None = None) -> Target:
    """Return the devices of a mesh as a target; the memory is theirs, or that of the table where
    they do not report it."""
    devices = tuple(sharder.mesh.devices.flat)
    kind = devices[0].device_kind
    chip = chip or next((c for c in CHIPS.values() if kind in c.kinds), None)
    own = next((d for d in devices if d.process_index == jax.process_index()), None)
    stats = own.memory_stats() if own is not None and own.platform != "cpu" else None
    memory = (stats or {}).get("bytes_limit") or (chip.hbm if chip else None)
    return Target(f"{len(devices)} x {kind}", devices, chip, memory)
