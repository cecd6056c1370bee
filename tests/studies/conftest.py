"""Settings of sweeps and comparisons in seconds."""

import json

import pytest

from safepatch_jax.settings import Settings
from safepatch_jax.testing import write_tiny_model
from tests.jobs import FAST, write_data


@pytest.fixture(scope="package")
def settings(tmp_path_factory):
    """Of a model whose patched matrices have one shape, so that there is little to compile."""
    folder = tmp_path_factory.mktemp("studies")
    square = write_tiny_model(folder / "model", num_key_value_heads=4, intermediate_size=32)
    own = {
        "model.source": str(square),
        "run.cache_dir": str(folder / "cache"),
        "run.seed": 3,
        "patch.beta": 4.0,
        "patch.alpha": 3.0,
    }
    return Settings().override(FAST | write_data(folder) | own)


@pytest.fixture(scope="package")
def suite(settings, tmp_path_factory):
    """The file of a suite on the records of these settings."""
    path = tmp_path_factory.mktemp("suite") / "mine.json"
    measures = []
    for name, kind, role in (
        ("harm", "harm", "harmful"),
        ("look", "refusal", "lookalike"),
        ("text", "text", "ordinary"),
    ):
        source = settings.flat()[f"data.{role}"]
        measures.append(
            {"name": name, "kind": kind, "source": source, "split": "report", "max_new": 5}
        )
    path.write_text(json.dumps(measures))
    return str(path)
