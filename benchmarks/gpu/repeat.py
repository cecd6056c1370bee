"""Training twice from the same weights and batches: the same bits?"""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import numpy as np

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.train import RECIPE, Same
from safepatch_jax.data.chat import training_batch
from safepatch_jax.models.config import DecoderConfig
from safepatch_jax.models.kernels import kernel_for
from safepatch_jax.training.step import Recipe

ATTENTIONS = ("auto", "xla")  # cuDNN's where it can be, and XLA's
RUNS = 2


def run(bench: Bench) -> None:
    """Take a few steps, with each attention twice; note the NLL of each step, exact, and SHA-256 of
    the weights after the last."""
    sizes = bench.sizes
    config = bench.config(sizes.exact_layers)
    shape = sizes.exact_length, sizes.exact_length // 4
    batch = training_batch(bench.examples(config, sizes.batch, *shape), *shape)
    bench.note(layers=sizes.exact_layers, steps=sizes.exact_steps, length=sizes.exact_length)
    found: dict[str, Any] = {}
    for attention in _attentions(bench, config):
        changes = {"model.attention": attention, "derive.batch_size": sizes.batch}
        trainer = bench.context(bench.settings(changes)).trainer(config)
        runs = found.setdefault(attention, [])
        for _ in range(RUNS):
            recipe = Recipe(steps=sizes.exact_steps, **RECIPE)
            params, outcome = trainer.run(
                bench.params(config, "bfloat16"), Same(batch), recipe, f"attention {attention}"
            )
            runs.append({"weights": _hash(params), "nll": [x.hex() for x in outcome.nll]})
            bench.note(attentions=found)


def _attentions(bench: Bench, config: DecoderConfig) -> tuple[str, ...]:
    """Return the settings that choose different kernels here."""
    sizes = bench.sizes
    inputs = config, sizes.dtype, sizes.exact_length, bench.device.platform
    return tuple({kernel_for(name, *inputs): name for name in ATTENTIONS}.values())


def _hash(params: Any) -> str:
    digest = hashlib.sha256()
    for x in jax.tree.leaves(params):
        digest.update(np.asarray(x).tobytes())
    return digest.hexdigest()
