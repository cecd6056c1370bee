"""Negative preference optimisation on harmful answers."""

from __future__ import annotations

from safepatch_jax.methods.bench import Bench, Product
from safepatch_jax.training.losses import NPO, SimNPO
from safepatch_jax.training.reference import with_reference


def npo(bench: Bench) -> Product:
    """NPO (Zhang et al. 2024) with the backbone as the reference."""
    rows, decoder = bench.settings.derive.batch_size, bench.context.decoder(bench.config)
    examples = bench.examples().examples
    examples = with_reference(decoder, bench.backbone(), examples, rows, decoder.sharder)
    return Product(bench.tuned(NPO(), [(examples, rows)], "NPO"))


def simnpo(bench: Bench) -> Product:
    """SimNPO (Fan et al. 2024), which needs no reference."""
    pool = (bench.examples().examples, bench.settings.derive.batch_size)
    return Product(bench.tuned(SimNPO(), [pool], "SimNPO"))
