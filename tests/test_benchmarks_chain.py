"""The benchmark of a chain: killed, a link taken out, a link taken off; it compares bits itself."""

import os
import subprocess
import sys

from safepatch_jax.runtime.files import read_json
from tests.calls import ROOT


def test_a_short_chain(tmp_path):
    links = ["--links=3", "--gate=none", "--kills=1", "--remove=1", "--revert=1"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.chain", f"--folder={tmp_path / 'out'}", *links],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=900,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    content = read_json(tmp_path / "out" / "chain.json")
    assert content["kills"][0]["exit"] == -9 and content["different"] == []
    assert content["removal"]["equal"] and content["revert"]["equal"]
    assert len(content["links"]) == 4  # the start, too
