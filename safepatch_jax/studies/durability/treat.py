"""Both models, treated alike: parameter by parameter, or trained further on ordinary answers."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from safepatch_jax.data.pipeline import training_batches
from safepatch_jax.models.config import read_hf_config
from safepatch_jax.models.table import Param, ParamTable, unnest
from safepatch_jax.run.state import Run
from safepatch_jax.runtime import processes
from safepatch_jax.runtime.console import progress, some
from safepatch_jax.studies.durability.options import DurabilityOptions, Treatment
from safepatch_jax.studies.durability.quantise import dequantised
from safepatch_jax.training.journal import Recipe

Weights = Mapping[str, jax.Array]


class Overflow(ValueError):
    """A number of the model is beyond the range of the dtype that it is cast to."""


def treated_row(treatment: Treatment, row: Param, x: jax.Array, quantised: bool) -> jax.Array:
    """Return one parameter as a quantisation or a cast leaves it: quantised matrices float32, what
    is kept as it is stored, a cast in its dtype.

    Args:
      row, x: the parameter.
      quantised: whether a quantisation takes it.
    """
    if treatment.dtype:
        return _cast(x, treatment.dtype)
    if treatment.scheme and quantised:
        return dequantised(row, x, treatment.scheme)
    return x


@functools.partial(jax.jit, static_argnames="dtype")
def _cast(x: jax.Array, dtype: str) -> jax.Array:
    return x.astype(dtype)


def treated(
    treatment: Treatment,
    table: ParamTable,
    quantised: Collection[str],
    weights: Weights,
    title: str,
) -> Weights:
    """Return a model's parameters as a quantisation or a cast leaves them.

    Args:
      table: of the architecture.
      quantised: paths of what a quantisation takes.
      weights: before.
      title: of the progress bar.

    Raises:
      Overflow: names the tensors that do not fit the dtype.
    """
    result, beyond = {}, []
    with progress(table.size, f"{title}: weights", "weight") as bar:
        for row in table:
            x = weights[row.path]
            result[row.path] = treated_row(treatment, row, x, row.path in quantised)
            if treatment.dtype:
                beyond += _beyond(row, x, result[row.path])
            bar.update(x.size)
    if beyond:
        raise Overflow(
            f"{title}: {len(beyond)} tensors hold numbers beyond the range of {treatment.dtype} "
            f"({float(jnp.finfo(treatment.dtype).max):,.0f}): {some(beyond, ', ', 4)}"
        )
    return result


def _beyond(row: Param, x: jax.Array, cast: jax.Array) -> list[str]:
    """Name the tensors of a parameter that were finite and are not."""
    lost, largest = map(processes.fetch, _overflow(row.as_matrices(x), row.as_matrices(cast)))
    names = []
    for layer, name in enumerate(row.hf_names):
        if lost[layer]:
            names.append(f"{name} ({lost[layer]:,} entries, the largest {largest[layer]:,.0f})")
    return names


@jax.jit
def _overflow(x: jax.Array, cast: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return by layer how many finite entries became infinite, and the largest magnitude."""
    axes = tuple(range(1, x.ndim))
    lost = jnp.isfinite(x) & ~jnp.isfinite(cast)
    return jnp.sum(lost, axis=axes), jnp.max(jnp.abs(x.astype(jnp.float32)), axis=axes)


def finetuned(
    run: Run, weights: Weights, options: DurabilityOptions, title: str
) -> tuple[dict[str, jax.Array], list[float]]:
    """Tune a model on ordinary answers of the training split, with the train step of the patches.

    Args:
      run: its settings (those of derive.* that say how a step is taken), data and devices.
      weights: of the model; they are copied.
      options: steps, rates, seed: both models see the same batches.
      title: of the progress bar.

    Returns:
      (all parameters, trained ones float32; NLL of each step's batch, nats a token).

    Raises:
      ValueError: the loss or a gradient is not finite.
    """
    context, folder = run.context, run.imported
    examples = context.encoded(folder, "ordinary", "train").examples
    local = None
    if processes.several():
        local = context.sharder.local_rows(options.batch_size)
    scope = run.settings.derive.train == "scope"
    trainer = context.trainer(read_hf_config(folder), None, scope)
    batches = training_batches(
        [(examples, options.batch_size)],
        options.seed,
        run.settings.data.length_buckets,
        local,
        trainer.compact,
    )
    recipe = Recipe(1.0, options.steps, options.learning_rate, weight_decay=options.weight_decay)
    tuned, outcome = trainer.run(weights, batches, recipe, title)
    flat = unnest(tuned)
    every = {path: flat[path] if path in flat else weights[path] for path in weights}
    return every, list(outcome.nll)


def training_key(run: Run, options: DurabilityOptions) -> dict[str, Any]:
    """Return what the fine-tuned models depend on, beside model and data."""
    settings, names = run.settings.flat(), ("train", "backward", "optimizer", "loss", "clip_norm")
    key = {f"derive.{name}": settings[f"derive.{name}"] for name in names}
    for name in ("max_prompt_tokens", "max_answer_tokens", "train_limit", "length_buckets"):
        key[f"data.{name}"] = settings[f"data.{name}"]
    for name in ("model.compute_dtype", "model.attention", "patch.scope"):
        key[name] = settings[name]
    return key | options.finetuning()
