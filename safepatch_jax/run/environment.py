"""Where and with what a run was done, so that a stranger can do it again."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
from collections.abc import Sequence

from safepatch_jax.mesh import Sharder
from safepatch_jax.runtime import files, processes

FILE = "environment.json"
_VARIABLES = (
    "JAX_",
    "XLA_",
    "LIBTPU_",
    "TPU_",
    "CUDA_VISIBLE",
    "OMP_",
    "TFDS_",
)  # that may change results


def write(folder: pathlib.Path, command: Sequence[str], sharder: Sharder) -> None:
    """Write, or bring up to date, a run's environment.json; earlier starts stay in its list."""
    path = folder / FILE
    try:
        starts = list(json.loads(path.read_text(encoding="utf-8"))["starts"])
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
    ):  # the first start, or a file that says nothing
        starts = []
    device = sharder.mesh.devices.flat[0]
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    files.write_json(
        path,
        {
            "starts": [
                *starts,
                {
                    "time": now,
                    "command": shlex.join(command),
                    "python": platform.python_version(),
                    "platform": platform.platform(),
                    "processors": os.cpu_count(),
                    "devices": {
                        "kind": device.device_kind,
                        "platform": device.platform,
                        "number": sharder.mesh.size,
                        "mesh": dict(sharder.mesh.shape),
                        "processes": processes.count(),
                    },
                    "variables": {
                        name: value
                        for name, value in sorted(os.environ.items())
                        if name.startswith(_VARIABLES)
                    },
                    "packages": dict(
                        sorted(
                            {d.name: d.version for d in importlib.metadata.distributions()}.items()
                        )
                    ),
                },
            ]
        },
    )
