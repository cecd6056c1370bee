"""Settings of sweeps and comparisons in seconds."""

import pytest

from safepatch_jax.settings import Settings
from tests.jobs import FAST, write_data


@pytest.fixture(scope="package")
def settings(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("studies")
    own = {
        "model.source": str(tiny),
        "run.cache_dir": str(folder / "cache"),
        "run.seed": 3,
        "patch.beta": 4.0,
        "patch.alpha": 3.0,
    }
    return Settings().override(FAST | write_data(folder) | own)
