"""Libraries are used without lines of their own."""

import os
import subprocess
import sys

import pytest

from tests.calls import ROOT

_DEVICES = (
    "from safepatch_jax.runtime import libraries; libraries.quiet_jax(); "
    "import jax; print(jax.devices()[0].platform, jax.config.jax_platforms)"
)


@pytest.mark.parametrize("chosen", ["", "cpu"])
def test_jax_finds_its_devices_without_lines_of_libtpu(chosen):
    """libtpu may be installed on a host without a TPU, to compile for one."""
    environment = {name: x for name, x in os.environ.items() if name != "JAX_PLATFORMS"}
    if chosen:
        environment["JAX_PLATFORMS"] = chosen
    call = [sys.executable, "-c", _DEVICES]
    done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True)
    platform, platforms = done.stdout.split()
    assert done.stderr == "" and platform in ("cpu", "gpu", "tpu")
    assert platforms in (chosen, "cpu", "None")
