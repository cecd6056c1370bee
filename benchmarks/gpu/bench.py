"""What a part works with: device, shapes, the machine's own speeds, and where its figures go."""

from __future__ import annotations

import pathlib
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import rated_flops, raw_config
from benchmarks.gpu.parts import Sizes, layers_that_fit
from benchmarks.gpu.records import Record
from safepatch_jax.data.chat import Example
from safepatch_jax.mesh import Sharder, make_mesh
from safepatch_jax.models.config import DecoderConfig, config_from_hf
from safepatch_jax.models.layerwise import Part
from safepatch_jax.models.table import param_table
from safepatch_jax.planning.chips import present
from safepatch_jax.planning.compile import peak_bytes
from safepatch_jax.planning.flops import count_flops
from safepatch_jax.run.context import Context
from safepatch_jax.runtime.programs import shortage
from safepatch_jax.settings import Settings

MESH = "data:1"
GENERATOR = "unsafe_rbg"  # the device's own: compiles in a moment, and the same each time
FILLED = 0.94  # of the memory: what a program may take, for the allocator's gaps


class Bench:
    """One part at work.

    Args:
      sizes: the shapes.
      record: takes the figures.
      scratch: a folder for files, deleted after the part.
    """

    def __init__(self, sizes: Sizes, record: Record, scratch: pathlib.Path):
        self.sizes, self.scratch, self._record = sizes, scratch, record
        self.device = jax.devices()[0]
        self.sharder = Sharder(make_mesh(MESH, [self.device]))

    def note(self, **figures: Any) -> None:
        """Write figures, with the memory's peak so far: what a part that is cut leaves."""
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self._record.note(peak_bytes=self.stats().get("peak_bytes_in_use"), host=host, **figures)

    @property
    def predicted(self) -> int:
        """The bytes of the program compiled last."""
        return self._record.figures["predicted_bytes"]

    def stats(self) -> dict[str, int]:
        """Return the device's account of its memory; empty on CPU, which keeps none."""
        stats = None if self.device.platform == "cpu" else self.device.memory_stats()
        return stats or {}

    def config(self, layers: int) -> DecoderConfig:
        """Return the architecture of the shape with so many blocks, stored in bfloat16."""
        return config_from_hf(raw_config(self.sizes.shape, layers, "bfloat16"))

    def settings(self, changes: dict[str, Any]) -> Settings:
        """Return the settings of a run, in this part's arithmetic."""
        base = {"mesh.shape": MESH, "model.compute_dtype": self.sizes.dtype}
        return Settings().override(base | changes)

    def context(self, settings: Settings) -> Context:
        """Return a run's context on this device alone."""
        context = Context(settings)
        context.sharder = self.sharder
        return context

    def params(self, config: DecoderConfig, dtype: str) -> dict[str, Any]:
        """Return random weights, nested, made on the device."""
        table = param_table(config)
        init = jax.jit(
            table.init, static_argnames="dtype", out_shardings=table.shardings(self.sharder)
        )
        return init(jax.random.key(0, impl=GENERATOR), dtype=jnp.dtype(dtype))

    def examples(self, config: DecoderConfig, number: int, length: int, answer: int):
        """Return pairs of random ids that fill T = length and A = answer."""
        ids = np.random.default_rng(0).integers(3, config.vocab_size, (number, length + 1))
        prompt = length + 1 - answer
        return [Example(tuple(row[:prompt]), tuple(row[prompt:])) for row in ids.tolist()]

    def rates(self) -> None:
        """Note the speeds of a copy on the device and of a product of matrices, and the data
        sheet's."""
        x = jnp.zeros(self.sizes.copy_bytes // 4, jnp.float32)
        copy = seconds_of(jax.jit(lambda x: x + 1), x)
        side = self.sizes.product
        matrix = jnp.ones((side, side), jnp.dtype(self.sizes.dtype))
        product = seconds_of(jax.jit(lambda x: x @ x), matrix)
        chip = present(self.sharder).chip
        self.note(
            copy_rate=2 * x.nbytes / copy,  # it is read and written
            product_rate=2 * side**3 / product,
            rated_flops=rated_flops(self.device.device_kind, self.sizes.dtype),
            rated_bandwidth=chip.bandwidth if chip else None,
        )

    def compiled(self, parts: Sequence[Part]) -> list[jax.stages.Compiled]:
        """Compile the programs of a step or a pass; note the FLOPs of a batch, and the bytes of the
        one that takes most. A call of the same jitted function does not compile it again."""
        begun, flops, most, result = time.perf_counter(), 0, 0, []
        for part in parts:
            traced = part.trace()
            result.append(traced.lower().compile())
            most = max(most, peak_bytes(result[-1].memory_analysis()) + part.resident)
            flops += part.runs * count_flops(traced.jaxpr)
        seconds = time.perf_counter() - begun
        self.note(predicted_bytes=most, compile_seconds=seconds, program_flops=flops)
        return result

    def as_many_layers(
        self, predicted: Callable[[int], int], attempt: Callable[[int], None]
    ) -> None:
        """Call `attempt` with as many blocks as fit by the prediction, and again with fewer where
        the device has no memory for them; on CPU with all."""
        layers, memory = self.sizes.layers, self.stats().get("bytes_limit")
        if memory:
            layers = layers_that_fit(predicted, int(FILLED * memory), layers)
        refused: list[int] = []
        while True:
            self.note(layers=layers, layers_refused=refused, memory=memory)
            try:
                attempt(layers)
                return
            except jax.errors.JaxRuntimeError as error:
                if not shortage(error) or layers == 1:
                    raise
            # Out of the handler, which holds the arrays of what failed.
            refused.append(layers)
            layers -= max(1, layers // 10)


def seconds_of(function: Callable[..., jax.Array], *arguments: Any, calls: int = 10) -> float:
    """Return the seconds of a call: the median of 3 times so many together, after one that
    compiles."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        for _ in range(calls):
            out = function(*arguments)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - begun) / calls)
    return statistics.median(times)
