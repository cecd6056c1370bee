"""launch.compile_tpu: the manual and mistakes, with or without the TPU compiler."""

import functools
import json
import subprocess
import sys

import pytest

from safepatch_jax.testing import tiny_config
from tests import calls

call = functools.partial(calls.call, "launch.compile_tpu")


def test_help_is_a_manual():
    result = call("--help_all")
    assert (
        "python -m launch.compile_tpu --config=configs/llama2_7b_chat.py --topology=v5e:4x4"
        in result.stdout
    )
    assert "--derive.accumulate\n" in result.stdout and "--topology\n" in result.stdout


@pytest.mark.parametrize(
    "args, message",
    [
        (
            ["--config=configs/llama2_7b_chat.py", "--topology=v9:2x2"],
            "Unknown topology 'v9:2x2'. Forms: v4:2x2x2, v5e:4x4",
        ),
        (
            ["--config=configs/demo.py", "--topology=v5e:4x4"],
            "The architecture is not known: model.source 'smollm2'",
        ),
        (
            ["--model.architecture=absent.json", "--topology=v5e:4x4"],
            "No file 'absent.json' (model.architecture)",
        ),
        (["--topology=v5e:4x4", "--derive.optimiser=adam"], "Did you mean --derive.optimizer"),
    ],
)
def test_mistakes_end_with_one_clear_line(args, message):
    result = call(*args)
    assert result.returncode != 0 and message in result.stderr and "Traceback" not in result.stderr


def test_without_the_compiler_it_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    script = (
        "import sys, runpy; import importlib.util as u; find = u.find_spec; "
        "u.find_spec = lambda name, *a: None if name == 'libtpu' else find(name, *a); "
        "sys.argv[0] = 'compile_tpu'; runpy.run_module('launch.compile_tpu', run_name='__main__')"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, f"--model.source={tmp_path}", "--topology=v5e:4x4"],
        cwd=calls.ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 2 and "pip install -e '.[tpu-aot]'" in result.stderr
