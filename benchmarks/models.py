"""A model with random weights for the benchmarks that read and write files."""

from __future__ import annotations

import pathlib

import numpy as np

from safepatch_jax.io.safetensors_file import Planned, write_shards
from safepatch_jax.io.stored import DTYPES
from safepatch_jax.models.config import config_from_hf
from safepatch_jax.models.table import param_table
from safepatch_jax.runtime import files

SHARD_BYTES = 500_000_000


def config(layers: int) -> dict:
    """Return the config.json of TinyLlama-1.1B, with so many blocks."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def write_model(folder: pathlib.Path, layers: int) -> None:
    """Write the model's folder: random bfloat16 weights."""
    rng = np.random.default_rng(0)
    rows = param_table(config_from_hf(config(layers))).hf_names()
    plan = {name: Planned(row.hf_shape, "bfloat16") for name, (row, _) in rows.items()}
    folder.mkdir(parents=True)
    files.write_json(folder / "config.json", config(layers))
    write_shards(
        folder,
        plan,
        lambda name: (0.02 * rng.standard_normal(plan[name].shape, np.float32)).astype(
            DTYPES["bfloat16"]
        ),
        SHARD_BYTES,
    )
