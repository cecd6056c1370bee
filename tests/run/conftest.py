"""One finished run on eight devices for all tests of runs."""

import shutil

import pytest

from safepatch_jax.run.job import Job
from safepatch_jax.settings import Settings
from tests.jobs import FAST, write_data


@pytest.fixture(scope="package")
def settings(tiny, tmp_path_factory):
    """Settings of a whole run, with a cache of its own."""
    folder = tmp_path_factory.mktemp("job")
    own = {
        "model.source": str(tiny),
        "run.cache_dir": str(folder / "cache"),
        "run.certify": "logits",
        "align.enabled": True,
        "mesh.shape": "fsdp:8",
    }
    return Settings().override(FAST | write_data(folder) | own)


@pytest.fixture(scope="package")
def kept(settings, tmp_path_factory):
    """A run with its derived models and scores; read only."""
    settings = settings.override({"run.keep_scratch": True})
    job = Job(settings, tmp_path_factory.mktemp("kept") / "work")
    job.run()
    return job


@pytest.fixture(scope="package")
def finished(kept, settings, tmp_path_factory):
    """The same run, without derived models and scores."""
    folder = tmp_path_factory.mktemp("finished") / "work"
    job = Job(settings, shutil.copytree(kept.workdir, folder))
    job.run()
    return job
