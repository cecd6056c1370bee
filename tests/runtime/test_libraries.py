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
    """Who imports one of them before or afterwards has it."""
    pytest.importorskip("tensorboardX", reason="events need tensorboardX: pip install tensorboardX")
    for name in ("torch", "boto3"):
        (tmp_path / "stubs" / name).mkdir(parents=True)
        (tmp_path / "stubs" / name / "__init__.py").write_text(f"print({name!r})\n")
    script = """
import sys
sys.path.insert(0, sys.argv[1])
import boto3
from safepatch_jax.runtime import libraries
with libraries.event_writer()(sys.argv[2]) as events:
    events.add_scalar("answer_nll", 2.5, 1)
print("written")
import torch
assert sys.modules["boto3"] is boto3 and sys.modules["torch"] is torch
"""
    folders = tmp_path / "stubs", tmp_path / "events"
    done = subprocess.run(
        [sys.executable, "-c", script, *folders], cwd=ROOT, text=True, capture_output=True
    )
    assert done.stdout.split() == ["boto3", "written", "torch"], done.stderr
    (path,) = folders[1].iterdir()
    assert b"answer_nll" in path.read_bytes()
