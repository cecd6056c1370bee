"""Environments that have JAX and little else: what runs without grain, TFDS and others, and what is
said where they are needed."""

import os
import subprocess
import sys

import pytest

from safepatch_jax.run.job import Job
from safepatch_jax.settings import Settings
from safepatch_jax.testing import write_tiny_model
from tests.calls import ROOT, command
from tests.jobs import FAST, write_data

BLOCKED = "grain array_record tensorflow_datasets tensorboardX gguf portpicker"
# Python imports it before anything else.
SITE = f"""
import sys


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED.split()}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


sys.meta_path.insert(0, Absent())
"""
EVERY_MODULE = """
import importlib, pkgutil
import safepatch_jax

for module in pkgutil.walk_packages(safepatch_jax.__path__, "safepatch_jax."):
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        print(module.name, error.name)
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The variables of an environment without those packages."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "sitecustomize.py").write_text(SITE)
    return os.environ | {"PYTHONPATH": str(folder)}


def called(bare, launcher, *args):
    return subprocess.run(
        command(launcher, *args), cwd=ROOT, env=bare, capture_output=True, text=True, timeout=300
    )


def test_what_needs_the_packages_alone_imports_them(bare):
    result = subprocess.run(
        [sys.executable, "-c", EVERY_MODULE], cwd=ROOT, env=bare, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    failed = set(result.stdout.splitlines())
    # The other is the adapter to lm_eval, a package that is not among those of this project.
    assert failed - {"safepatch_jax.evaluation.lm_eval_model None"} == {
        "safepatch_jax.data.tfds_sets tensorflow_datasets"
    }


def test_the_main_job_gives_the_same_bytes(bare, one_device, tmp_path):
    model = write_tiny_model(
        tmp_path / "model", num_hidden_layers=1, num_key_value_heads=4, intermediate_size=32
    )
    own = {"model.source": str(model), "run.cache_dir": str(tmp_path / "cache")}
    settings = FAST | write_data(tmp_path) | own
    flags = [f"--{name}={value}" for name, value in settings.items()]
    result = called(bare, "launch.safepatch", f"--workdir={tmp_path / 'bare'}", *flags)
    assert result.returncode == 0, result.stderr
    assert "tensorboardX is not installed: metrics.jsonl is written" in result.stdout
    assert not (tmp_path / "bare" / "tensorboard").exists()
    assert (tmp_path / "bare" / "metrics.jsonl").read_text().count("\n") == 4
    Job(Settings().override(settings), tmp_path / "usual").make(["export"])
    model = "stages/export/model/model.safetensors"
    usual, other = ((tmp_path / name / model).read_bytes() for name in ("usual", "bare"))
    assert usual == other


def test_a_model_that_needs_a_package_names_it(bare, tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + bytes(60))
    result = called(
        bare, "launch.convert", f"--source=gguf:{file}", f"--target=hf:{tmp_path / 'out'}"
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "needs gguf, not installed here. Run: pip install 'gguf>=0.17'" in result.stderr
