"""GA + Mismatch (Yao et al. 2023, arXiv 2310.10683)."""

from __future__ import annotations

import dataclasses

import numpy as np

from safepatch_jax.data.chat import BENIGN, HARMFUL, MISMATCH, Pair
from safepatch_jax.methods.bench import Bench, Product
from safepatch_jax.training.losses import Mismatch


def ga_mismatch(bench: Bench) -> Product:
    """Ascend on harmful answers, learn random benign answers to harmful prompts, stay near the
    backbone on benign text.

    Each of the three parts has derive.batch_size rows of a batch.
    """
    parts = {
        HARMFUL: bench.examples(),
        MISMATCH: bench.encode(_mismatches(bench)),
        BENIGN: bench.examples("ordinary"),
    }
    pools = []
    for part, encoded in parts.items():
        examples = [dataclasses.replace(example, part=part) for example in encoded.examples]
        pools.append((examples, bench.settings.derive.batch_size))
    return Product(bench.tuned(Mismatch(), pools, "GA + Mismatch"))


def _mismatches(bench: Bench) -> list[Pair]:
    """Return the harmful training prompts, each with a random ordinary answer."""
    records = bench.context.split("harmful", "train")
    answers = [record.answer for record in bench.context.split("ordinary", "train")]
    random = np.random.default_rng(bench.settings.run.seed)
    draws = random.integers(len(answers), size=len(records))
    return [(record.prompt, answers[i], record.turns) for record, i in zip(records, draws)]
