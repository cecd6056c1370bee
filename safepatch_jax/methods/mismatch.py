"""GA + Mismatch (Yao et al. 2023, arXiv 2310.10683)."""

from __future__ import annotations

import dataclasses

import numpy as np

from safepatch_jax.data.chat import BENIGN, HARMFUL, MISMATCH
from safepatch_jax.methods.bench import Bench, Made
from safepatch_jax.training.losses import Mismatch


def ga_mismatch(bench: Bench) -> Made:
    """Ascend on harmful answers, learn random benign answers to harmful prompts, stay near the
    backbone on benign text.

    Each of the three parts has derive.batch_size rows of a batch.
    """
    harmful, benign = bench.examples(), bench.examples("ordinary")
    prompts, answers = (
        [getattr(r, field) for r in bench.context.split(role, "train")]
        for role, field in (("harmful", "prompt"), ("ordinary", "answer"))
    )
    drawn = np.random.default_rng(bench.settings.run.seed).integers(len(answers), size=len(prompts))
    mismatched = bench.encode([(prompt, answers[i]) for prompt, i in zip(prompts, drawn)])
    pools = [
        (
            [dataclasses.replace(e, part=part) for e in encoded.examples],
            bench.settings.derive.batch_size,
        )
        for part, encoded in ((HARMFUL, harmful), (MISMATCH, mismatched), (BENIGN, benign))
    ]
    return Made(bench.tuned(Mismatch(), pools, "GA + Mismatch"))
