"""The machine that is measured: a process of its own, as JAX takes the memory of a GPU."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
from typing import Any

_PACKAGES = ("jax", "jaxlib", "flax", "torch", "transformers", "numpy")
_CUDA = ("jax-cuda", "nvidia-cudnn", "nvidia-cublas", "nvidia-cuda-nvcc")
_VARIABLES = ("JAX_", "XLA_", "CUDA_VISIBLE", "NVIDIA_TF32", "OMP_")


def facts() -> dict[str, Any]:
    """Return what JAX and the system say of devices, memory, versions and load."""
    import jax

    device = jax.devices()[0]
    stats = None if device.platform == "cpu" else device.memory_stats()
    versions = {}
    for item in importlib.metadata.distributions():
        name = item.name.lower().replace("_", "-")
        if name in _PACKAGES or name.startswith(_CUDA):
            versions[name] = item.version
    return {
        "platform": device.platform,
        "kind": device.device_kind,
        "devices": jax.device_count(),
        "capability": str(getattr(device, "compute_capability", "")),
        "memory": (stats or {}).get("bytes_limit"),
        "runtime": " ".join(device.client.platform_version.split()),
        "driver": _driver(),
        "host": platform.platform(),
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "host_memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load": list(os.getloadavg()),
        "versions": dict(sorted(versions.items())),
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES)},
    }


def _driver() -> str:
    """Return what nvidia-smi says of driver, clocks, power and other work on the GPUs; nothing
    without it."""
    if shutil.which("nvidia-smi") is None:
        return ""
    fields = "name,driver_version,memory.total,memory.used,clocks.max.sm,power.limit"
    done = subprocess.run(
        ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"],
        capture_output=True,
        text=True,
        timeout=30,
    )
    return done.stdout.strip()


def probe(environment: dict[str, str], log: pathlib.Path, seconds: float) -> dict[str, Any]:
    """Return the facts, found by a process of its own. Raises ValueError if it fails."""
    command = [sys.executable, "-m", "benchmarks.gpu.machine"]
    with open(log, "w") as errors:
        try:
            done = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                timeout=seconds,
                env=environment,
            )
        except subprocess.TimeoutExpired as error:
            raise ValueError(f"JAX found no device within {seconds:.0f} s; see {log}.") from error
    if done.returncode:
        raise ValueError(f"JAX could not say what device it has; see {log}.")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(facts()))
