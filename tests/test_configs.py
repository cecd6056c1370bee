"""The configs that ship: each is valid, says how to run it, and its memory figure is that of the model's table."""

import pathlib
import re
import runpy

import pytest

from safepatch_jax.models.config import config_from_hf
from safepatch_jax.models.table import param_table
from safepatch_jax.settings import load_config

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.py") if path.name != "common.py")
# The public shape of each model.
SHAPES = {
    "llama2_7b_chat": ("llama", 32000, 4096, 11008, 32, 32, 32),
    "llama2_13b_chat": ("llama", 32000, 5120, 13824, 40, 40, 40),
    "llama3_8b_instruct": ("llama", 128256, 4096, 14336, 32, 32, 8),
    "gemma_1_1_7b_it": ("gemma", 256000, 3072, 24576, 28, 16, 16),
    "mistral_7b_instruct_v0_1": ("mistral", 32000, 4096, 14336, 32, 32, 8),
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_valid_and_says_how_to_run_it(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = load_config(path)
    manual = runpy.run_path(str(path))["__doc__"]
    assert settings.model.source and f"--config=configs/{path.name}" in manual
    for part in ("Hardware:", "Time:"):
        assert part in manual, part


@pytest.mark.parametrize("name", SHAPES)
def test_memory_figure(name):
    keys = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads")
    size = param_table(config_from_hf(dict(zip(keys, SHAPES[name])))).size
    manual = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["__doc__"]
    assert f"{size / 1e9:.2f}e9 parameters" in manual
    said = int(re.search(r"stored backbone\), (\d+) GB", manual.replace("\n", " ")).group(1))
    assert abs(said - 20 * size / 1e9) < 1


def test_every_config_of_a_backbone_is_checked():
    assert {path.stem for path in CONFIGS} == {*SHAPES, "demo"}
