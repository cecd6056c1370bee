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


def test_event_files_need_neither_torch_nor_clients_of_object_stores(tmp_path):
    """Which are there as before for who imports them afterwards."""
    pytest.importorskip("tensorboardX", reason="events need tensorboardX: pip install tensorboardX")
    script = """
import sys
from safepatch_jax.runtime import libraries
with libraries.event_writer()(sys.argv[1]) as events:
    events.add_scalar("answer_nll", 2.5, 1)
assert not {"torch", "boto3", "google.cloud.storage"} & sys.modules.keys()
"""
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path], cwd=ROOT, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    assert b"answer_nll" in path.read_bytes()
