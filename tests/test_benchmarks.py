"""The train step benchmark: its floor by hand, and that both sides do the same work. No time is
asserted."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from benchmarks.common import needed_flops, raw_config
from safepatch_jax.models.config import config_from_hf
from safepatch_jax.models.table import param_table

ROOT = pathlib.Path(__file__).parents[1]
SMALL = ["--batch=2", "--length=16", "--answer=4", "--repeats=1", "--threads=1"]


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.train_step", *map(str, arguments), *SMALL],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=600,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


def test_needed_flops_by_hand():
    config = config_from_hf(raw_config("tiny", None))
    hidden, mlp, heads, kv_heads, head_dim, vocab, layers = 64, 176, 4, 2, 16, 512, 2
    weights = layers * (
        2 * hidden * heads * head_dim + 2 * hidden * kv_heads * head_dim + 3 * hidden * mlp
    )
    pairs = 16 * 17 // 2
    forward = 2 * weights * 16 + 2 * vocab * hidden * 4 + layers * heads * 2 * 2 * head_dim * pairs
    # The backward pass takes twice the forward pass's.
    assert needed_flops(config, 5, 16, 4) == 5 * 3 * forward


def test_shapes_have_the_parameters_of_their_names():
    for shape, least, most in (("7b", 6.7e9, 6.8e9), ("8b", 8.0e9, 8.1e9)):
        assert least < param_table(config_from_hf(raw_config(shape, None))).size < most


@pytest.mark.parametrize("shared", [0, 8])
def test_both_sides_agree(tiny, shared):
    pytest.importorskip("torch", reason="the other side is torch")
    done = run(f"--model={tiny}", f"--shared={shared}")
    assert done.returncode == 0, done.stderr
    assert f", {shared} computed once," in done.stdout
    losses = dict(re.findall(r"^NLL, (ours|torch): (.*)$", done.stdout, re.M))
    assert len(losses["ours"].split()) == len(losses["torch"].split()) == 2
    assert "The losses differ by" in done.stdout and "| floor" in done.stdout


def test_random_weights_of_a_shape():
    done = run("--shape=tiny", "--layers=1", "--dtype=bfloat16")
    assert done.returncode == 0, done.stderr
    assert "| ours |" in done.stdout and "torch" not in done.stdout


@pytest.mark.parametrize(
    "arguments, says",
    [
        ((), "either --model=DIR or --shape"),
        (("--shape=tiny", "--device=gpu"), "JAX has no gpu"),
        (("--model=x", "--layers=2"), "--layers goes with --shape"),
    ],
)
def test_mistakes(arguments, says):
    done = run(*arguments)
    assert done.returncode and says in done.stdout + done.stderr
