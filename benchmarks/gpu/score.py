"""The score pass: samples a second, at as many blocks as fit."""

from __future__ import annotations

import math
import statistics
import time

import jax

from benchmarks.gpu.bench import Bench
from safepatch_jax.models.config import DecoderConfig
from safepatch_jax.models.table import param_table, unnest
from safepatch_jax.patching.sensitivity import SensitivityMeter
from safepatch_jax.planning.needs import train_flops
from safepatch_jax.planning.programs import abstract_batch

# Of a weight of the scope, float32, for each sample: read forward and backward, its sum read and
# written. With several samples in flight (score.in_flight) weights are read once for all of them.
SCOPE_BYTES = 16
HEAD_BYTES = 8  # read forward and backward


def run(bench: Bench) -> None:
    """Time `SensitivityMeter.measure` with random weights and samples of one length."""
    sizes, settings = bench.sizes, bench.settings({})
    bench.rates()
    bench.note(length=sizes.score[0], answer=sizes.score[1], dtype=sizes.dtype)

    def compiled(layers: int) -> SensitivityMeter:
        meter = bench.context(settings).meter(bench.config(layers))
        batch = abstract_batch(meter.in_flight, sizes.score, bench.sharder)
        bench.compiled(meter.parts(batch, sizes.samples))
        return meter

    def predicted(layers: int) -> int:
        compiled(layers)
        return bench.predicted

    def attempt(layers: int) -> None:
        config, meter = bench.config(layers), compiled(layers)
        bench.note(parameters=param_table(config).size, **least(config, *sizes.score))
        examples = bench.examples(config, sizes.samples, *sizes.score)
        # `measure` takes the weights over.
        meter.measure(unnest(bench.params(config, "float32")), examples[:2], [sizes.score], "warm")
        seconds = []
        for _ in range(sizes.repeats):
            params = jax.block_until_ready(unnest(bench.params(config, "float32")))
            begun = time.perf_counter()
            total = meter.measure(params, examples, [sizes.score], "score")
            for x in total.values():
                x.block_until_ready()
            seconds.append((time.perf_counter() - begun) / len(examples))
            del total, x  # the next pass has sums of its own
            bench.note(sample_seconds=seconds, median=statistics.median(seconds))

    bench.as_many_layers(predicted, attempt)


def least(config: DecoderConfig, length: int, answer: int) -> dict[str, float]:
    """Return the FLOPs and the bytes of weights and sums that a sample cannot do without, one
    sample at a time."""
    head = config.vocab_size * config.embed_dim
    scope = sum(math.prod(row.shape) for row in param_table(config).scope("block_linear"))
    return {
        "needed_flops": train_flops(config, 1, length, answer, head=False),
        "needed_bytes": SCOPE_BYTES * scope + HEAD_BYTES * head,
    }
