"""launch.compile_gpu: the manual, mistakes, and cards that CPU devices stand for."""

import functools
import json
import subprocess
import sys

from safepatch_jax.testing import tiny_config
from tests import calls

call = functools.partial(calls.call, "launch.compile_gpu")


def test_help_is_a_manual():
    result = call("--help_all")
    assert "python -m launch.compile_gpu --config=configs/llama2_7b_one_h100.py" in result.stdout
    assert "--topology\n" in result.stdout and "--suggest" in result.stdout


def test_an_unknown_card_ends_with_one_clear_line():
    result = call("--config=configs/llama2_7b_chat.py", "--topology=b900:1")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "Unknown topology 'b900:1'" in result.stderr and "h200:1" in result.stderr


def test_without_the_compiler_devices_stand_for_the_cards(tmp_path):
    """The pass block by block, over two cards."""
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    out = tmp_path / "figures.json"
    script = (
        "import sys, runpy; import importlib.util as u; find = u.find_spec; "
        "u.find_spec = lambda name, *a: None if 'jax_plugins' in name else find(name, *a); "
        "sys.argv[0] = 'compile_gpu'; runpy.run_module('launch.compile_gpu', run_name='__main__')"
    )
    args = [
        f"--model.source={tmp_path}",
        "--topology=l4:2",
        "--mesh=fsdp:2",
        "--derive.train=scope",
        "--derive.backward=layerwise",
        "--score.in_flight=2",
        f"--json={out}",
    ]
    result = subprocess.run(
        [sys.executable, "-c", script, *args],
        cwd=calls.ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "l4:2: 2 x L4, by XLA's compiler for CPU (that for CUDA: pip install" in result.stdout
    assert "Verdict: fits." in result.stdout
    assert "Pool: JAX takes 75% of a card of itself" in result.stdout
    runs = {p["title"]: p["runs"] for p in json.loads(out.read_text())["programs"]}
    assert runs["train forward"] == 2 and runs["train backward"] == 4  # clipped: twice
    assert runs["score backward"] == 2 and runs["decode"] == 1
