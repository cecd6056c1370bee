"""Greedy decoding with the engine's program: prefill and all new tokens of a batch."""

from __future__ import annotations

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.prompts import prompt_ids
from safepatch_jax.data.chat import prompt_batch
from safepatch_jax.evaluation.engine import NO_STOP
from safepatch_jax.models.config import DecoderConfig
from safepatch_jax.models.layerwise import Part
from safepatch_jax.models.table import param_table
from safepatch_jax.planning.programs import programs
from safepatch_jax.training.batch import put_batch


def run(bench: Bench) -> None:
    """Time batches of the same ids as the other side's, with weights in the dtype of the
    arithmetic; no token stops a sequence."""
    sizes = bench.sizes
    bench.rates()
    bench.note(prompt=sizes.prompt, new=sizes.new, dtype=sizes.dtype, batches={})

    def compiled(layers: int, batch: int) -> jax.stages.Compiled:
        changes = {
            "evaluate.batch_size": batch,
            "evaluate.max_new_tokens": sizes.new,
            "data.max_prompt_tokens": sizes.prompt,
        }
        settings = bench.settings(changes)
        (program,) = programs(settings, bench.config(layers), bench.sharder, ("decode",))
        return bench.compiled([Part("", program.trace)])[0]

    def predicted(layers: int) -> int:
        compiled(layers, max(sizes.decode_batches))
        return bench.predicted

    def attempt(layers: int) -> None:
        config, batches = bench.config(layers), {}
        params = bench.params(config, sizes.dtype)
        stops = jnp.asarray(NO_STOP, jnp.int32)
        for number in sizes.decode_batches:
            decode = compiled(layers, number)
            ids = prompt_ids(config.vocab_size, number, sizes.prompt)
            batch = put_batch(prompt_batch(ids, sizes.prompt), bench.sharder)
            inputs = params, batch["tokens"], batch["lengths"], stops
            out = np.asarray(decode(*inputs))
            assert out.shape == (number, sizes.new) and out.min() >= 0
            seconds = []
            for _ in range(sizes.repeats):
                begun = time.perf_counter()
                jax.block_until_ready(decode(*inputs))
                seconds.append(time.perf_counter() - begun)
            size = jnp.dtype(sizes.dtype).itemsize
            least = size * numbers_read(config, number, sizes.prompt, sizes.new)
            batches[str(number)] = {
                "seconds": seconds,
                "tokens_per_second": number * sizes.new / statistics.median(seconds),
                "needed_bytes": sizes.new * least,
            }
            bench.note(batches=batches, parameters=param_table(config).size)

    bench.as_many_layers(predicted, attempt)


def numbers_read(config: DecoderConfig, batch: int, prompt: int, new: int) -> float:
    """Return how many numbers a new token of each sequence must read: the weights but the
    embedding's table, and keys and values, with half of the new tokens on average."""
    weights = param_table(config).size - config.vocab_size * config.embed_dim
    position = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return weights + batch * position * (prompt + new / 2)
