"""Flags of whole runs in seconds."""

import pytest

from safepatch_jax.testing import write_tiny_model
from tests.jobs import ROLES, SPLITS, write_table


@pytest.fixture(scope="package")
def flags(tmp_path_factory):
    """Few shapes to compile for, and no torch."""
    folder = tmp_path_factory.mktemp("launch")
    model = write_tiny_model(
        folder / "model", num_hidden_layers=1, num_key_value_heads=4, intermediate_size=32
    )
    return [
        f"--model.source={model}",
        f"--data={write_data(folder)}",
        f"--run.cache_dir={folder / 'cache'}",
        "--run.certify=hashes",
        "--derive.batch_size=4",
        "--derive.se_steps=3",
        "--derive.osm_steps=3",
        "--derive.se_learning_rate=1e-3",
        "--derive.osm_learning_rate=1e-3",
        "--score.samples=3",
        "--evaluate.max_new_tokens=4",
    ]


def write_data(folder):
    """Write one data file for all roles; return what --data takes."""
    rows = [f"prompt {i},the answer {i},{split}" for i, split in enumerate(SPLITS)]
    path = write_table(folder / "data.csv", rows)
    return ",".join(f"{role}:{path}" for role in ROLES)
