"""One train step for alignment, ascent and descent: the sign of the objective is a traced scalar."""

from __future__ import annotations

import dataclasses
from typing import Any, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from safepatch_jax.console import progress
from safepatch_jax.data.chat import Example, training_batch
from safepatch_jax.mesh import Sharder
from safepatch_jax.models.decoder import Decoder
from safepatch_jax.models.table import ParamTable
from safepatch_jax.training.objective import answer_logprobs, sequence_nll


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a tuning run does; `sign` is +1 to lower the NLL (descent) and -1 to raise it (ascent)."""

    sign: float
    steps: int
    learning_rate: float
    nll_ceiling: float = float("inf")
    weight_decay: float = 0.0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Per-step answer NLL (nats a token, before each update) and why the run ended."""

    nll: tuple[float, ...]
    stopped_by: str


class Trainer:
    """Compiles the train step once and runs any number of recipes with it.

    State is ``{params, moments, stopped}``, float32, sharded as the table says, donated at each step. Updates stop
    inside the program from the first step whose NLL is above the recipe's ceiling, so that the host may read the
    metrics one step late without changing the result.
    """

    def __init__(self, decoder: Decoder, table: ParamTable, sharder: Sharder, *, loss: str = "mean",
                 clip_norm: float = 1.0):
        self._optimizer = optax.chain(optax.clip_by_global_norm(clip_norm), optax.scale_by_adam())
        self._decoder, self._loss, self._sharder = decoder, loss, sharder
        params = table.shardings(sharder)
        abstract = jax.eval_shape(self._optimizer.init, table.abstract(sharder))
        moments = optax.tree.map_params(
            self._optimizer, lambda _, sharding: sharding, abstract, params,
            transform_non_params=lambda _: sharder.replicated())
        self._shardings = {"params": params, "moments": moments, "stopped": sharder.replicated()}
        self._init = jax.jit(self._init_state, out_shardings=self._shardings)
        self._step = jax.jit(self._train_step, donate_argnums=0, out_shardings=(self._shardings, sharder.replicated()))

    def _init_state(self, params):
        params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
        return {"params": params, "moments": self._optimizer.init(params), "stopped": jnp.zeros((), bool)}

    def _train_step(self, state, batch, sign, learning_rate, weight_decay, nll_ceiling):
        def objective(params):
            logprobs_BA = answer_logprobs(self._decoder, params, batch)
            per_sequence_B = sequence_nll(logprobs_BA, batch["weights"], self._loss)
            token_nll = -jnp.sum(logprobs_BA) / jnp.sum(batch["weights"])
            return sign * jnp.mean(per_sequence_B), token_nll

        gradients, token_nll = jax.grad(objective, has_aux=True)(state["params"])
        updates, moments = self._optimizer.update(gradients, state["moments"], state["params"])
        stopped = state["stopped"] | (token_nll > nll_ceiling)
        rate = jnp.where(stopped, 0.0, learning_rate)
        params = jax.tree.map(lambda p, u: p - rate * (u + weight_decay * p), state["params"], updates)
        metrics = {"nll": token_nll, "gradient_norm": optax.tree.norm(gradients), "stopped": stopped}
        return {"params": params, "moments": moments, "stopped": stopped}, metrics

    def run(self, params: Any, batches: Iterator[dict[str, np.ndarray]], recipe: Recipe, title: str) -> tuple[Any, Outcome]:
        """Tune a copy of `params`.

        Args:
          params: nested parameter dictionary, any float dtype; not donated.
          batches: endless iterator of training batches of one shape.
          recipe: sign, steps, rates.
          title: shown at the progress bar.

        Returns:
          (tuned parameters float32, outcome).

        Raises:
          ValueError: the loss or a gradient became NaN or infinite; names the step and what to change.
        """
        state = self._init(params)
        history: list[float] = []
        stopped = False

        def read(step, metrics):
            nll, norm = float(metrics["nll"]), float(metrics["gradient_norm"])
            if not (np.isfinite(nll) and np.isfinite(norm)):
                raise ValueError(
                    f"{title}: answer NLL {nll}, gradient norm {norm} at step {step + 1}. Lower the learning rate "
                    f"({recipe.learning_rate:g}), or check the weights of the model for NaN.")
            history.append(nll)
            bar.set_postfix_str(f"answer NLL {nll:.3f}", refresh=False)
            bar.update()
            return bool(metrics["stopped"])

        scalars = [jnp.float32(x) for x in (recipe.sign, recipe.learning_rate, recipe.weight_decay, recipe.nll_ceiling)]
        with progress(recipe.steps, title, "step") as bar:
            pending = None
            for step in range(recipe.steps):
                batch = put_batch(next(batches), self._sharder)
                state, metrics = self._step(state, batch, *scalars)
                if pending is not None and (stopped := read(*pending)):
                    break
                pending = (step, metrics)
            if not stopped:
                stopped = read(*pending)
        reason = f"answer NLL above {recipe.nll_ceiling:g}" if stopped else f"step limit {recipe.steps}"
        return state["params"], Outcome(tuple(history), reason)


def put_batch(batch: dict[str, np.ndarray], sharder: Sharder) -> dict[str, jax.Array]:
    """Place a batch on the mesh, cut along its first axis where that divides."""
    axes = ("batch", "length")
    rows = next(iter(batch.values())).shape[0]
    sharding = sharder.sharding(axes) if rows % sharder.batch_ways == 0 else sharder.replicated()
    return {name: jax.device_put(x, sharding) for name, x in batch.items()}


def endless_batches(pools: Sequence[tuple[Sequence[Example], int]], shape: tuple[int, int], seed: int) -> Iterator[dict]:
    """Yield batches for ever: from each pool so many rows, each pool reshuffled whenever it is used up.

    Args:
      pools: (examples, rows a batch) pairs.
      shape: T and A of the batches.
      seed: order of the examples.
    """
    rng = np.random.default_rng(seed)
    streams = [_endless(examples, rng.spawn(1)[0]) for examples, rows in pools]
    while True:
        chosen = [next(stream) for stream, (_, rows) in zip(streams, pools) for _ in range(rows)]
        yield training_batch(chosen, *shape)


def _endless(examples: Sequence[Example], rng: np.random.Generator) -> Iterator[Example]:
    while True:
        for i in rng.permutation(len(examples)):
            yield examples[i]
