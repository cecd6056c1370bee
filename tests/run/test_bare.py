"""Environments that have JAX and little else: what runs without grain, TFDS and others, and what is
said where they are needed."""

import os
import subprocess
import sys

import pytest

from safepatch_jax.run.inspect_stage import inspect_stage
from safepatch_jax.settings import Settings
from tests.calls import ROOT, command
from tests.jobs import stages_run

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
    return os.environ | {"PYTHONPATH": str(folder), "JAX_NUM_CPU_DEVICES": "8"}


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


def test_the_main_job_gives_the_same_bytes(bare, kept, tmp_path):
    """As the run of the other tests here, whose aligned model and certificate are in the cache."""
    default, work = Settings().flat(), tmp_path / "work"
    given = kept.settings.flat()
    flags = [f"--{name}={value}" for name, value in given.items() if value != default[name]]
    result = called(bare, "launch.safepatch", f"--workdir={work}", *flags)
    assert result.returncode == 0, result.stderr
    assert "tensorboardX is not installed: metrics.jsonl is written" in result.stdout
    assert (work / "metrics.jsonl").is_file() and not (work / "tensorboard").exists()
    assert {"align", "derive_se", "score_osm"} & set(stages_run(result.stdout)) == {
        "derive_se",
        "score_osm",
    }
    for name in ("derive_se", "derive_osm", "score_se", "score_osm", "patch", "export"):
        assert inspect_stage(str(work), name, other=str(kept.workdir)), name


def test_a_model_that_needs_a_package_names_it(bare, tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + bytes(60))
    result = called(
        bare, "launch.convert", f"--source=gguf:{file}", f"--target=hf:{tmp_path / 'out'}"
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "needs gguf, not installed here. Run: pip install 'gguf>=0.17'" in result.stderr
