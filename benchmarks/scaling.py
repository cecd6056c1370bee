"""How each stage grows with the model: seconds and peak of resident memory of training, scoring,
patching and decoding, at 135M, 362M and 1.1B random weights.

  python -m benchmarks.scaling                            # a table; 2 cores, half an hour
  python -m benchmarks.scaling --shapes=135m --stages=patch,decode

Each figure comes from a process of its own, so that its peak is its own (VmHWM). A figure is the
median of `--repeats` steps, samples or calls after the first, which compiles. A stage that would
need more memory than the machine has left is skipped, and its line says so.

  adamw      a train step of all weights, the whole tree at once (the defaults)
  adafactor  a train step of the patch scope, block by block, no bound on the gradient's norm
  score      SNIP's sensitivities over 8 samples, which run together
  patch      selection, merge and statistics of the whole scope; models and scores are written
             weight by weight, as a run reads them, and that time counts
  decode     16 prompts of 32 tokens, 32 new ones

The floor: needed products at the speed of a 2048 x 2048 product of the same process (train, score),
the arrays once at the speed of reading memory (patch), the weights once a token (decode).
"""

from __future__ import annotations

import functools
import json
import math
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
from absl import app, flags

from benchmarks.common import available, machine, needed_flops, raw_config, read_speed, spread

# Bytes a parameter that a stage takes at least: it is skipped where they are not there.
STAGES = {"adamw": 18.0, "adafactor": 10.5, "score": 9.0, "patch": 9.0, "decode": 5.0}
_SHAPES = flags.DEFINE_list("shapes", ["135m", "362m", "1b"], "Shapes of the model.")
_STAGES = flags.DEFINE_list("stages", list(STAGES), "What is measured.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Steps, samples or calls.", lower_bound=1)
_PART = flags.DEFINE_string("part", None, "Used by the benchmark itself: SHAPE:STAGE.")

BATCH, LENGTH, ANSWER = 8, 128, 32  # of a train step; a sample is one sequence
PROMPTS, PROMPT, NEW = 16, 32, 32  # of decoding
ROLES = ("se", "osm")


class Bench:
    """A model with random weights, and a call for each stage.

    Each stage returns (a call, a function that measures the seconds of its floor); a call returns
    the seconds that are not the stage's (of scores, in which the model is made anew).
    """

    def __init__(self, shape: str):
        import jax

        from safepatch_jax.data.chat import Example
        from safepatch_jax.mesh import Sharder, make_mesh
        from safepatch_jax.models.config import config_from_hf
        from safepatch_jax.models.table import param_table

        self.raw = raw_config(shape, None) | {"vocab_size": 49152}
        self.config = config_from_hf(self.raw)
        self.sharder = Sharder(make_mesh("data:1", jax.devices()[:1]))
        self.table = param_table(self.config)
        self.rows = self.table.scope("block_linear")
        shardings = self.table.shardings(self.sharder)
        self.init = jax.jit(self.table.init, out_shardings=shardings)
        self.params = self.init(jax.random.key(0))
        self.examples = []
        for i in range(BATCH):
            ids = [3 + (7919 * i + 31 * place) % 49000 for place in range(LENGTH + 1)]
            self.examples.append(Example(tuple(ids[:-ANSWER]), tuple(ids[-ANSWER:])))

    def decoder(self, remat: str):
        import jax.numpy as jnp

        from safepatch_jax.models.decoder import Decoder

        return Decoder(self.config, jnp.float32, self.sharder, remat=remat, attention="auto")

    def multiplied(self, rows: int) -> float:
        """Return the seconds that the needed products of so many sequences take."""
        return needed_flops(self.config, rows, LENGTH, ANSWER) / product_speed()

    def read(self, size: int) -> float:
        """Return the seconds in which so many bytes are read."""
        return size / read_speed()

    def adamw(self):
        from safepatch_jax.settings import ModelSettings

        return self._train(ModelSettings().remat, optimizer="adamw")

    def adafactor(self):
        options = {"optimizer": "adafactor", "clip_norm": 0.0, "layerwise": True}
        return self._train("full", rows=self.rows, **options)

    def _train(self, remat: str, **options):
        import jax

        from safepatch_jax.data.chat import training_batch
        from safepatch_jax.training.batch import put_batch
        from safepatch_jax.training.step import Trainer

        trainer = Trainer(self.decoder(remat), self.table, self.sharder, **options)
        trained, frozen = trainer._parted(self.params)
        held, step = {"state": trainer._init(trained)}, trainer.stepper()
        del trained, self.params
        batch = put_batch(training_batch(self.examples, LENGTH, ANSWER), self.sharder)
        scalars = [jax.numpy.float32(x) for x in (1.0, 1e-6, 0.0, np.inf)]

        def call():
            held["state"], _ = step(held["state"], frozen, batch, *scalars)
            jax.block_until_ready(held["state"])
            return 0.0

        return call, functools.partial(self.multiplied, BATCH)

    def score(self):
        import jax

        from safepatch_jax.models.table import unnest
        from safepatch_jax.patching.sensitivity import SensitivityMeter

        meter = SensitivityMeter(self.decoder("dots"), self.rows, self.sharder)
        held = {"params": self.params}
        del self.params

        def call():
            begun = time.perf_counter()
            if not held:  # it was taken over by the call before
                held["params"] = jax.block_until_ready(self.init(jax.random.key(0)))
            made = time.perf_counter() - begun
            params = unnest(held.pop("params"))
            shapes = [(LENGTH, ANSWER)]
            jax.block_until_ready(meter.measure(params, self.examples, shapes, "score"))
            return made

        return call, functools.partial(self.multiplied, BATCH)

    def patch(self):
        import jax

        from safepatch_jax.models.table import unnest
        from safepatch_jax.patching.merge import apply_patching
        from safepatch_jax.patching.settings import PatchSettings

        params, rows = unnest(self.params), {row.path: row for row in self.rows}
        self.params = None
        held = {path: params[path] for path in rows}
        del params

        def call():
            trees = dict.fromkeys(ROLES, Repeated(rows))
            merged, _ = apply_patching(
                held, trees, trees, self.rows, PatchSettings(), 0, self.sharder, "patch"
            )
            held.update(jax.block_until_ready(merged))
            return 0.0

        size = sum(math.prod(row.shape) for row in self.rows)
        return call, functools.partial(self.read, 24 * size)  # five arrays in, one out

    def decode(self):
        from safepatch_jax.evaluation.engine import Engine
        from safepatch_jax.io import gguf
        from safepatch_jax.io.gguf_tokenizer import write_tokenizer

        with tempfile.TemporaryDirectory() as folder:
            write_tokenizer(gguf.read_gguf(gguf.find_smollm2())[0], pathlib.Path(folder))
            (pathlib.Path(folder) / "config.json").write_text(json.dumps(self.raw))
            engine = Engine(self.config, self.params, folder, self.sharder, batch_size=PROMPTS)
        engine.stop_ids = (-2,)  # every answer has all its tokens
        prompts = [list(example.prompt_ids[:PROMPT]) for example in self.examples] * 2

        def call():
            answers = engine.complete_ids(prompts[:PROMPTS], NEW)
            if {len(ids) for ids in answers} != {NEW}:
                raise RuntimeError("an answer has ended early")
            return 0.0

        return call, functools.partial(self.read, 4 * self.table.size * NEW)


class Repeated(Mapping):
    """Arrays of a million random numbers over and over, written when they are asked for, as a run
    reads them from its scratch; that time counts."""

    def __init__(self, rows: Mapping[str, Any]):
        self._rows, self._asked = rows, 0
        self._numbers = np.random.default_rng(0).random((1 << 20) + 1, np.float32)

    def __getitem__(self, path: str):
        import jax

        from safepatch_jax.io.stored import aligned_empty

        self._asked += 1
        numbers = np.roll(self._numbers, 7919 * self._asked)  # no two arrays are alike
        x = aligned_empty(self._rows[path].shape, numbers.dtype)
        flat = x.reshape(-1)
        for start in range(0, len(flat), len(numbers)):
            part = flat[start : start + len(numbers)]
            part[:] = numbers[: len(part)]
        return jax.device_put(x)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def product_speed(size: int = 2048) -> float:
    """Return the FLOP/s of a large product, the best of five."""
    import jax
    import jax.numpy as jnp

    x, multiply = jnp.ones((size, size)), jax.jit(jnp.matmul)
    seconds = []
    for _ in range(6):
        begun = time.perf_counter()
        multiply(x, x).block_until_ready()
        seconds.append(time.perf_counter() - begun)
    return 2 * size**3 / min(seconds[1:])


def measure(part: str) -> dict[str, Any]:
    """Measure a stage in this process."""
    shape, stage = part.split(":")
    bench = Bench(shape)
    call, floor = getattr(bench, stage)()
    seconds = timed(call)
    status = pathlib.Path("/proc/self/status").read_text()
    peak = 1024 * int(re.search(r"VmHWM:\s+(\d+)", status).group(1))
    return {"size": bench.table.size, "peak": peak, "floor": floor(), "seconds": seconds}


def timed(call: Callable[[], float]) -> list[float]:
    """Return the seconds of each call after the first, less what it says it spent on making what it
    reads."""
    seconds = []
    for _ in range(_REPEATS.value + 1):
        begun = time.perf_counter()
        spent = call()
        seconds.append(time.perf_counter() - begun - spent)
    return seconds[1:]


def line(shape: str, stage: str, size: int) -> str:
    """Measure a stage in a process of its own; return a line of the table."""
    needed = STAGES[stage] * size
    if needed > available():
        return f"| {shape} | {stage} | skipped: needs about {needed / 2**30:.0f} GiB | | | |"
    command = [sys.executable, "-m", "benchmarks.scaling", f"--part={shape}:{stage}"]
    command.append(f"--repeats={_REPEATS.value}")
    out = subprocess.run(command, capture_output=True, text=True)
    if out.returncode:
        return f"| {shape} | {stage} | failed: {out.stderr.strip()[-200:]!r} | | | |"
    x = json.loads(out.stdout.splitlines()[-1])
    times = statistics.median(x["seconds"]) / x["floor"]
    return (
        f"| {shape} | {stage} | {x['peak'] / 2**30:.1f} | {x['peak'] / x['size']:.1f} | "
        f"{spread(x['seconds'], '.2f')} | {x['floor']:.2f} ({times:.1f} times) |"
    )


def parameters(shape: str) -> int:
    from safepatch_jax.models.config import config_from_hf
    from safepatch_jax.models.table import param_table

    return param_table(config_from_hf(raw_config(shape, None) | {"vocab_size": 49152})).size


def main(argv) -> None:
    del argv
    if _PART.value:
        print(json.dumps(measure(_PART.value)))
        return
    print(
        f"{machine()}; median of {_REPEATS.value} (least - most)\n\n| model | stage | peak, GiB | "
        "bytes a parameter | seconds | floor, seconds |\n|---|---|---|---|---|---|"
    )
    for shape in _SHAPES.value:
        for stage in _STAGES.value:
            print(line(shape, stage, parameters(shape)), flush=True)


if __name__ == "__main__":
    app.run(main)
