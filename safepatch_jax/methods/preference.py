"""Negative preference optimisation on harmful answers."""

from __future__ import annotations

from safepatch_jax.methods.bench import Bench, Made
from safepatch_jax.training.losses import NPO, SimNPO
from safepatch_jax.training.reference import with_reference


def npo(bench: Bench) -> Made:
    """NPO (Zhang et al. 2024) with the backbone as the reference."""
    rows, decoder = bench.settings.derive.batch_size, bench.context.decoder(bench.config)
    examples = with_reference(
        decoder, bench.backbone(), bench.examples().examples, rows, decoder.sharder
    )
    return Made(bench.tuned(NPO(), [(examples, rows)], "NPO"))


def simnpo(bench: Bench) -> Made:
    """SimNPO (Fan et al. 2024), which needs no reference."""
    return Made(
        bench.tuned(
            SimNPO(), [(bench.examples().examples, bench.settings.derive.batch_size)], "SimNPO"
        )
    )
