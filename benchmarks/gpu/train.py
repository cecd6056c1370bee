"""The train step, in one of its ways, at as many blocks as fit."""

from __future__ import annotations

import statistics
import time
from typing import Any

from benchmarks.common import needed_flops
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.parts import MODES
from safepatch_jax.data.chat import training_batch
from safepatch_jax.models.table import param_table
from safepatch_jax.planning.programs import abstract_batch
from safepatch_jax.training.step import Recipe, Trainer

WARM = 2  # steps before those that are timed: the first compiles, the second is read a step late
RECIPE = {"sign": 1.0, "learning_rate": 1e-5}


class Same:
    """Training batches that are all the same."""

    def __init__(self, batch: dict[str, Any]):
        self._batch = batch

    def __next__(self) -> dict[str, Any]:
        return self._batch

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        pass


def run(bench: Bench, mode: str) -> None:
    """Time steps of `Trainer.run` with random weights and one batch."""
    sizes = bench.sizes
    shape = sizes.length, sizes.answer
    settings = bench.settings(MODES[mode].settings | {"derive.batch_size": sizes.batch})
    bench.rates()
    bench.note(batch=sizes.batch, length=sizes.length, answer=sizes.answer, dtype=sizes.dtype)

    def compiled(layers: int) -> Trainer:
        scope = settings.derive.train == "scope"
        trainer = bench.context(settings).trainer(bench.config(layers), None, scope)
        bench.compiled(trainer.parts(abstract_batch(sizes.batch, shape, bench.sharder)))
        return trainer

    def predicted(layers: int) -> int:
        compiled(layers)
        return bench.predicted

    def attempt(layers: int) -> None:
        config, trainer = bench.config(layers), compiled(layers)
        bench.note(
            parameters=param_table(config).size,
            needed_flops=needed_flops(config, sizes.batch, *shape),
        )
        rows = bench.examples(config, sizes.batch, *shape)
        moments: list[float] = []

        def record(step: int, values: Any) -> None:
            moments.append(time.perf_counter())
            seconds = [b - a for a, b in zip(moments[WARM - 1 :], moments[WARM:])]
            if seconds:
                bench.note(step_seconds=seconds, median=statistics.median(seconds))

        recipe = Recipe(steps=WARM + sizes.steps, **RECIPE)
        batches = Same(training_batch(rows, *shape))
        # Not named here, so that the run may let them go.
        trainer.run(bench.params(config, "bfloat16"), batches, recipe, mode, record=record)

    bench.as_many_layers(predicted, attempt)
