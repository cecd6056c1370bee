"""Where and with what a run was done, so that a stranger can do it again."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import pathlib
import platform
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from safepatch_jax.io import hub_access
from safepatch_jax.reporting import charts
from safepatch_jax.runtime import files, processes
from safepatch_jax.runtime.console import say
from safepatch_jax.runtime.records import read_record
from safepatch_jax.runtime.text import without_user

if TYPE_CHECKING:
    from safepatch_jax.mesh import Sharder

FILE = "environment.json"
# Beginnings of the names of environment variables that may change results.
_VARIABLES = ("JAX_", "XLA_", "LIBTPU_", "TPU_", "CUDA_VISIBLE", "OMP_", "TFDS_", "HF_ENDPOINT")


def write(folder: pathlib.Path, command: Sequence[str], sharder: Sharder | None) -> None:
    """Write, or bring up to date, a run's environment.json; earlier starts stay in its list.

    Without a sharder nothing is computed, and no devices are named.

    Raises:
      ValueError: a package that the report at the end of the run needs is not installed.
    """
    charts.check()
    path = folder / FILE
    starts = [*_starts(path), _describe_start(command, sharder)]
    files.write_json(path, {"starts": starts})


def _starts(path: pathlib.Path) -> list[Any]:
    """Return the earlier starts; none where the file is absent, or damaged, which is said."""
    if not path.is_file():
        return []
    try:
        return read_record(path, {"starts": list}, "It begins anew.")["starts"]
    except ValueError as error:
        say(f"NOTE: {error} Earlier starts are no longer listed.")
        return []


def _describe_start(command: Sequence[str], sharder: Sharder | None) -> dict[str, Any]:
    variables = sorted(name for name in os.environ if name.startswith(_VARIABLES))
    packages = {item.name: item.version for item in importlib.metadata.distributions()}
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(command),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "devices": None if sharder is None else _devices(sharder),
        "variables": {name: _shown(os.environ[name]) for name in variables},
        "hub": hub_access.taken(),
        "packages": dict(sorted(packages.items())),
    }


def _shown(value: str) -> str:
    """Return a variable's value without user and password: a proxy's address may begin with them,
    where others have a scheme before."""
    return without_user(f"//{value}").removeprefix("//")


def _devices(sharder: Sharder) -> dict[str, Any]:
    device = sharder.mesh.devices.flat[0]
    return {
        "kind": device.device_kind,
        "platform": device.platform,
        "number": sharder.mesh.size,
        "mesh": dict(sharder.mesh.shape),
        "processes": processes.count(),
    }
