"""A model with random weights for the benchmarks that read and write files."""

from __future__ import annotations

import pathlib

import numpy as np

from benchmarks.common import raw_config
from safepatch_jax.io.safetensors_file import Planned, write_shards
from safepatch_jax.io.stored import DTYPES
from safepatch_jax.models.config import config_from_hf
from safepatch_jax.models.table import param_table
from safepatch_jax.runtime import files

SHARD_BYTES = 500_000_000


def write_model(folder: pathlib.Path, layers: int) -> None:
    """Write the model's folder: random bfloat16 weights."""
    rng = np.random.default_rng(0)
    rows = param_table(config_from_hf(raw_config("1b", layers, "bfloat16"))).hf_names()
    plan = {name: Planned(row.hf_shape, "bfloat16") for name, (row, _) in rows.items()}
    folder.mkdir(parents=True)
    files.write_json(folder / "config.json", raw_config("1b", layers, "bfloat16"))
    write_shards(
        folder,
        plan,
        lambda name: (0.02 * rng.standard_normal(plan[name].shape, np.float32)).astype(
            DTYPES["bfloat16"]
        ),
        SHARD_BYTES,
    )
