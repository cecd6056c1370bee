"""Block by block beside the whole tree: seconds of a train step and of scoring a sample, and what
XLA's buffers hold for them.

  python -m benchmarks.layerwise --model=DIR     # a Hugging Face folder

Every way has the same weights, batch and arithmetic (float32), in one process; they take turns, a
step or a pass each, and the first of each is not counted. Trained is the patch scope. A step
without a bound on the gradient's norm has one backward pass; with it, block by block, two. Scores
of `--samples` samples are summed block by block, and by the whole tree's gradient of each: both
must agree to 1e-5 of the largest sum of each weight.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.common import spread
from safepatch_jax.data.chat import Example, training_batch
from safepatch_jax.io.hf import load_params
from safepatch_jax.mesh import Sharder, make_mesh
from safepatch_jax.models.decoder import Decoder
from safepatch_jax.models.table import param_table, unnest
from safepatch_jax.patching.sensitivity import SensitivityMeter
from safepatch_jax.planning.compile import peak_bytes
from safepatch_jax.planning.programs import abstract_batch
from safepatch_jax.training.batch import put_batch
from safepatch_jax.training.step import Trainer

_MODEL = flags.DEFINE_string("model", None, "Hugging Face folder.", required=True)
_BATCH = flags.DEFINE_integer("batch", 8, "Sequences of a step.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 128, "Tokens of a sequence.", lower_bound=8)
_ANSWER = flags.DEFINE_integer("answer", 32, "Answer tokens at its end.", lower_bound=1)
_SAMPLES = flags.DEFINE_integer("samples", 8, "Samples that are scored.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Times each figure is taken.", lower_bound=1)

# Name, remat, options of the trainer.
STEPS = {
    "whole tree, remat dots": ("dots", {"clip_norm": 1.0}),
    "whole tree, remat full": ("full", {"clip_norm": 1.0}),
    "block by block, not clipped": ("full", {"clip_norm": 0.0, "layerwise": True}),
    "block by block, clipped": ("full", {"clip_norm": 1.0, "layerwise": True}),
}
AGREE = 1e-5


class Bench:
    """The model and what is measured on it."""

    def __init__(self):
        self.sharder = Sharder(make_mesh("data:1", jax.devices()[:1]))
        self.config, self.params = load_params(_MODEL.value, self.sharder)
        self.rows = param_table(self.config).scope("block_linear")
        length, answer = _LENGTH.value, _ANSWER.value
        number = max(_BATCH.value, _SAMPLES.value)
        ids = np.random.default_rng(0).integers(3, self.config.vocab_size, (number, length + 1))
        prompt = length + 1 - answer
        self.examples = []
        for row in ids.tolist():
            self.examples.append(Example(tuple(row[:prompt]), tuple(row[prompt:])))
        self.shape = length, answer

    def decoder(self, remat: str) -> Decoder:
        return Decoder(self.config, jnp.float32, self.sharder, remat=remat, attention="xla")

    def step(self, optimizer: str, remat: str, options: dict[str, Any]) -> tuple[Callable, int]:
        """Return (a function that takes a step, the bytes that a device needs for it)."""
        trainer = Trainer(
            self.decoder(remat),
            param_table(self.config),
            self.sharder,
            rows=self.rows,
            optimizer=optimizer,
            **options,
        )
        trained, frozen = trainer._parted(self.params)
        held, step = {"state": trainer._init(trained)}, trainer.stepper()
        batch = put_batch(training_batch(self.examples[: _BATCH.value], *self.shape), self.sharder)
        scalars = [jnp.float32(x) for x in (1.0, 1e-6, 0.0, np.inf)]

        def take():
            held["state"], _ = step(held["state"], frozen, batch, *scalars)
            jax.block_until_ready(held["state"])

        return take, needed(trainer.parts(abstract_batch(_BATCH.value, self.shape, self.sharder)))

    def score(self, whole: bool) -> tuple[Callable, int]:
        """Return (a function that sums magnitudes over all samples, the bytes for it), by the whole
        tree's gradients or block by block."""
        meter = SensitivityMeter(self.decoder("dots"), self.rows, self.sharder)
        samples = self.examples[: _SAMPLES.value]
        if whole:
            meter._blocks, meter._in_flight = None, 1

        def measure():
            params = {path: jnp.copy(x) for path, x in unnest(self.params).items()}
            params = {path: x.astype(jnp.float32) for path, x in params.items()}
            return jax.block_until_ready(meter.measure(params, samples, [self.shape], "score"))

        batch = abstract_batch(meter.in_flight, self.shape, self.sharder)
        return measure, needed(meter.parts(batch, len(samples)))


def needed(parts) -> int:
    most = 0
    for part in parts:
        memory = part.trace().lower().compile().memory_analysis()
        most = max(most, peak_bytes(memory) + part.resident)
    return most


def timed(ways: dict[str, Callable]) -> dict[str, list[float]]:
    """Return the seconds of each way; they take turns."""
    for take in ways.values():
        take()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(_REPEATS.value):
        for name, take in ways.items():
            begun = time.perf_counter()
            take()
            seconds[name].append(time.perf_counter() - begun)
    return seconds


def table(title: str, made: dict[str, tuple[Callable, int]], share: int = 1) -> None:
    """Time and print; `share`: samples of a call."""
    seconds = timed({name: take for name, (take, _) in made.items()})
    first = statistics.median(next(iter(seconds.values())))
    print(f"\n| {title} | seconds | of the first | bytes needed, GiB |\n|---|---|---|---|")
    for name, (_, size) in made.items():
        each = [s / share for s in seconds[name]]
        ratio = statistics.median(seconds[name]) / first
        print(f"| {name} | {spread(each, '.2f')} | {ratio:.2f} | {size / 2**30:.2f} |", flush=True)


def main(argv) -> None:
    del argv
    bench = Bench()
    for optimizer in ("adamw", "adafactor"):
        made = {name: bench.step(optimizer, *way) for name, way in STEPS.items()}
        table(f"train step, {optimizer}", made)
        del made
    made = {"whole tree": bench.score(True), "block by block": bench.score(False)}
    table("score, a sample", made, _SAMPLES.value)
    sums = [take() for take, _ in made.values()]
    for path, x in sums[0].items():
        for other in sums[1:]:
            assert float(jnp.max(jnp.abs(x - other[path]))) < AGREE * float(jnp.max(x)), path


if __name__ == "__main__":
    app.run(main)
