"""One train step for alignment, ascent and descent: the sign of the objective is a traced
scalar."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from safepatch_jax.io.hf import StoredModel
from safepatch_jax.mesh import Sharder, local_bytes
from safepatch_jax.models.decoder import Decoder
from safepatch_jax.models.layerwise import Part, joined
from safepatch_jax.models.table import Param, ParamTable, nest, unnest
from safepatch_jax.runtime import stopping
from safepatch_jax.runtime.console import progress, say
from safepatch_jax.training.batch import check_batch, micro_batches, put_batch, reported
from safepatch_jax.training.checkpoints import Checkpoints
from safepatch_jax.training.journal import CONTINUE, END, SAVE, Journal, Recipe, Recorder, ignore
from safepatch_jax.training.layerwise import LayerwiseStep, check_layerwise, layer_moments
from safepatch_jax.training.losses import Likelihood, Loss, row_weights
from safepatch_jax.training.objective import answer_divergences, answer_logprobs
from safepatch_jax.training.optimizers import OPTIMIZERS, scaled_to_norm, updated
from safepatch_jax.training.scratch import InScratch, Reusing, gradients_and_kept


@dataclasses.dataclass(frozen=True)
class Saving:
    """Where the checkpoints of a tuning run are, and the minutes between two of them (0: one is
    written at SIGTERM only)."""

    folder: pathlib.Path
    minutes: float


class Batches(Protocol):
    """An endless iterator of training batches whose position can be stored and restored
    (`data.pipeline.training_batches`)."""

    def __next__(self) -> dict[str, np.ndarray]: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


@dataclasses.dataclass(frozen=True)
class TrainingOutcome:
    """Answer NLL of each step (nats a token, before its update; of the harmful rows, where a batch
    has parts) and why the run ended."""

    nll: tuple[float, ...]
    stopped_by: str


class Trainer:
    """Compiles the train step once and runs any number of recipes with it.

    State is ``{params, moments, stopped}`` of the trained parameters, float32, sharded as the table
    says, donated at each step; the others stay as they are, in the dtype in which they come.
    Updates stop inside the program from the first step whose NLL is above the recipe's ceiling, so
    that the host may read the metrics one step late without changing the result.

    Args:
      decoder: the model; its remat and attention hold for the step.
      table: its parameters.
      sharder: the mesh.
      loss: see `safepatch_jax.training.losses`.
      clip_norm: gradients with a larger global norm are scaled down to it; 0: none is.
      optimizer: 'adamw' or 'adafactor', see OPTIMIZERS.
      accumulate: micro-batches into which a batch is cut; their gradients are summed.
      chunk: see `answer_logprobs`.
      rows: the trained parameters; by default all.
      layerwise: one block's gradient exists at a time, see `safepatch_jax.training.layerwise`; the
        same update but for rounding.

    Raises:
      ValueError: what the layerwise pass cannot do.
    """

    def __init__(
        self,
        decoder: Decoder,
        table: ParamTable,
        sharder: Sharder,
        *,
        loss: Loss = Likelihood(),
        clip_norm: float = 1.0,
        optimizer: str = "adamw",
        accumulate: int = 1,
        chunk: int = 64,
        rows: Sequence[Param] | None = None,
        layerwise: bool = False,
    ):
        self._optimizer = OPTIMIZERS[optimizer](stacked=not layerwise)
        self._layerwise = layerwise
        trained = table if rows is None else rows
        if layerwise:
            check_layerwise(trained, loss)
        if clip_norm and not layerwise:
            self._optimizer = optax.chain(scaled_to_norm(clip_norm), self._optimizer)
        self._decoder, self._loss, self._sharder = decoder, loss, sharder
        self._accumulate, self._chunk = accumulate, chunk
        table.shardings(sharder)  # refuses a mesh that does not divide them
        whole = unnest(table.abstract(sharder))
        self._trained = frozenset(row.path for row in trained)
        params, self._frozen = self._parted(nest(whole))
        moments = jax.eval_shape(self._first_moments, params)
        self._shardings = {
            "params": jax.tree.map(lambda p: p.sharding, params),
            "stopped": sharder.replicated(),
            # A moment of a parameter's shape is laid out as the parameter; factors are small.
            "moments": optax.tree.map_params(
                self._optimizer,
                lambda m, p: p.sharding if m.shape == p.shape else sharder.replicated(),
                moments,
                params,
                transform_non_params=lambda _: sharder.replicated(),
            ),
        }
        self._init = jax.jit(self._init_state, out_shardings=self._shardings)
        others = {name: x for name, x in self._shardings.items() if name != "params"}
        self._others = jax.jit(self._init_others, out_shardings=others)
        if layerwise:
            self._step = LayerwiseStep(
                decoder,
                tuple(row for row in table if row.path in self._trained),
                sharder,
                loss,
                self._optimizer,
                clip_norm,
                chunk,
                accumulate,
                self._shardings,
            )
        else:
            self._step = jax.jit(
                self._train_step,
                donate_argnums=0,
                out_shardings=(self._shardings, sharder.replicated()),
            )
        self._in_scratch = None
        if sharder.one_cpu and not layerwise and accumulate == 1:
            here = sharder.replicated()
            self._in_scratch = InScratch(self._with_scratch, self._shardings, here)
        self._abstract = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            jax.eval_shape(self._init_state, params),
            self._shardings,
        )

    @property
    def compact(self) -> bool:
        """Whether batches are best laid out as `training_batches` does with `compact`."""
        return self._in_scratch is not None

    def trace(
        self, batch: Mapping[str, jax.ShapeDtypeStruct], reference: Any = None
    ) -> jax.stages.Traced:
        """Return the whole tree's step traced for a batch (and reference) of these shapes and
        shardings; nothing is run. The layerwise pass has several programs, see `parts`."""
        scalars = [jax.ShapeDtypeStruct((), jnp.float32)] * 4
        return self._step.trace(self._abstract, self._stored(), batch, *scalars, reference)

    def stepper(self) -> Callable[..., tuple[Any, Any]]:
        """Return what takes steps: maps (state, frozen, batch, sign, learning rate, weight decay,
        ceiling, reference) to (state, metrics). What it holds between steps is freed with it."""
        return Reusing(self._in_scratch) if self._in_scratch else self._step

    def parts(self, batch: Mapping[str, jax.ShapeDtypeStruct]) -> list[Part]:
        """Return the programs of a step for a batch of these shapes and shardings: one, or those of
        the layerwise pass."""
        if self._layerwise:
            return self._step.parts(self._abstract, self._stored(), batch)
        return [Part("", functools.partial(self.trace, batch))]

    def holds(self, batch: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, int]:
        """Return the bytes that each device holds in a step, by purpose; without what the compiler
        needs beside them, as the activations of the whole tree's backward pass."""
        weights = self._abstract["params"]
        holds = {
            "trained weights": local_bytes(weights),
            "moments": local_bytes(self._abstract["moments"]),
            "other weights": local_bytes(self._stored()),
        }
        if self._layerwise:
            return holds | self._step.holds(self._abstract, batch)
        gradients = 1 if self._accumulate == 1 else 2
        return holds | {"gradients": gradients * local_bytes(weights)}

    def _stored(self):
        """Return what is not trained, in the model's dtype."""
        dtype = jnp.dtype(self._decoder.config.dtype)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), self._frozen
        )

    def _parted(self, params: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return (trained, frozen), nested, of a model's nested parameters."""
        trained, frozen = {}, {}
        for path, x in unnest(params).items():
            (trained if path in self._trained else frozen)[path] = x
        return nest(trained), nest(frozen)

    def _first_moments(self, params):
        if self._layerwise:
            return layer_moments(self._optimizer, params)
        return self._optimizer.init(params)

    def _init_state(self, params):
        params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
        return {"params": params} | self._init_others(params)

    def _init_others(self, params):
        return {"moments": self._first_moments(params), "stopped": jnp.zeros((), bool)}

    def _first_state(self, take: Callable[[str], jax.Array]) -> dict[str, Any]:
        """Return what `_init` does, of weights that are asked for one by one, the largest first."""
        shardings = unnest(self._shardings["params"])
        sizes = {path: x.size for path, x in unnest(self._abstract["params"]).items()}
        params = {}
        for path in sorted(sizes, key=lambda path: (-sizes[path], path)):
            params[path] = _copied(take(path), sharding=shardings[path])
        params = nest({path: params[path] for path in shardings})
        return {"params": params} | self._others(params)

    def _gradients(self, params, frozen, reference, batch, sign, rows):
        """Return the gradient of this (micro-)batch's share of the objective over `rows` sequences,
        its summed log p, and what `gradients_and_kept` returns beside."""

        def objective(params):
            params = joined(params, frozen)
            if self._loss.compares:
                logprobs_BA, *kl = answer_divergences(
                    self._decoder, params, reference, batch, self._chunk
                )
            else:
                logprobs_BA, kl = answer_logprobs(self._decoder, params, batch, self._chunk), ()
            share = sign * jnp.sum(self._loss(logprobs_BA, batch, *kl)) / rows
            return share, jnp.sum(reported(batch, logprobs_BA))

        return gradients_and_kept(objective, params, self._decoder.config.num_layers)

    def _train_step(self, *inputs):
        """Return (state, metrics), see `_stepped`."""
        return self._stepped(*inputs)[:2]

    def _with_scratch(self, *inputs):
        """Return (state, scratch, metrics), see `InScratch`."""
        state, metrics, *scratch = self._stepped(*inputs)
        return state, scratch, metrics

    def _stepped(
        self, state, frozen, batch, sign, learning_rate, weight_decay, nll_ceiling, reference=None
    ):
        """Return (state, metrics, gradients, what was kept for the backward pass)."""
        if "part" in batch:
            # Before the batch is cut: a micro-batch may have its parts in other shares.
            batch = batch | {"row_weights": row_weights(batch["part"])}
        tokens = jnp.sum(reported(batch, batch["weights"]))

        params = state["params"]
        gradients, logprob, kept = self._whole_gradients(params, frozen, reference, batch, sign)
        nll = -logprob / tokens
        updates, moments = self._optimizer.update(gradients, state["moments"], params)
        stopped = state["stopped"] | (nll > nll_ceiling)
        params = updated(params, updates, stopped, learning_rate, weight_decay)
        metrics = {
            "nll": nll,
            "gradient_norm": optax.tree.norm(gradients),
            "stopped": stopped,
        }
        state = {"params": params, "moments": moments, "stopped": stopped}
        return state, metrics, gradients, kept

    def _whole_gradients(self, params, frozen, reference, batch, sign):
        """Return what `_gradients` does, over a batch."""
        rows = batch["tokens"].shape[0]
        if self._accumulate == 1:
            return self._gradients(params, frozen, reference, batch, sign, rows)

        def add(total, micro):
            *share, _ = self._gradients(params, frozen, reference, micro, sign, rows)
            return jax.tree.map(jnp.add, total, tuple(share)), None

        zeros = jax.tree.map(
            lambda p, s: jax.lax.with_sharding_constraint(jnp.zeros_like(p), s),
            params,
            self._shardings["params"],
        )
        micros = micro_batches(batch, self._accumulate, self._sharder)
        return *jax.lax.scan(add, (zeros, jnp.float32(0)), micros)[0], ()

    def run(
        self,
        params: Any,
        batches: Batches,
        recipe: Recipe,
        title: str,
        saving: Saving | None = None,
        record: Recorder = ignore,
        reference: Any = None,
    ) -> tuple[Any, TrainingOutcome]:
        """Tune a copy of `params`.

        Args:
          params: nested parameter dictionary, any float dtype, not donated; or a model on disk,
            whose weights are read one by one, so that two copies of it never lie on the devices.
          batches: endless iterator of training batches.
          recipe: sign, steps, rates.
          title: shown at the progress bar.
          saving: where and how often checkpoints are written; a run that finds some resumes from
            the last that is intact. At SIGTERM one is written after the step, and the process ends.
          record: called with the number of steps done and the measures of the last: answer_nll
            (nats a token, before its update) and gradient_norm.
          reference: nested parameters of the model that the loss compares with, where it compares;
            any float dtype.

        Returns:
          (tuned parameters float32, of the trained ones alone; outcome).

        Raises:
          ValueError: the loss or a gradient became NaN or infinite (names the step and what to
            change); a batch that `accumulate` and the mesh do not divide; a loss that compares
            without a reference, or the other way round.
          OSError: a checkpoint could not be written.
        """
        self._check_reference(title, reference)
        with contextlib.ExitStack() as stack:
            store, restored, seconds = None, None, 0.0
            if saving:
                store = stack.enter_context(Checkpoints(saving.folder, self._abstract))
                restored, seconds = store.restore(), 60 * saving.minutes
            # The state holds copies: the caller's arrays can be freed, if the caller lets them go.
            weights = params if isinstance(params, StoredModel) else unnest(params)
            take = getattr(weights, "pop", weights.__getitem__)
            del params
            if restored:
                state, facts = restored
                batches.set_state(facts["data"])
                say(f"  {title}: resumed after step {len(facts['nll'])} of {recipe.steps}")
            else:
                state, facts = self._first_state(take), {"nll": []}
            frozen = nest({path: take(path) for path in unnest(self._frozen)})
            del weights, take, restored
            bar = stack.enter_context(progress(recipe.steps, title, "step", done=len(facts["nll"])))
            stack.enter_context(stopping.listening())
            journal = Journal(facts["nll"], bar, title, recipe, record)
            journal.stopped = bool(state["stopped"])
            inputs = frozen, reference
            state = self._loop(state, inputs, batches, recipe, journal, store, seconds)
            request = self._sharder.maximum(END if stopping.requested() else CONTINUE)
            if max(journal.request, int(request)) == END:
                self._end(state, batches, journal, store)
        reason = f"step limit {recipe.steps}"
        if journal.stopped:
            reason = f"answer NLL above {recipe.nll_ceiling:g}"
        return state["params"], TrainingOutcome(tuple(journal.nll), reason)

    def _check_reference(self, title: str, reference: Any) -> None:
        name = type(self._loss).__name__
        if self._loss.compares and reference is None:
            raise ValueError(
                f"{title}: the loss {name} compares with a reference model and none was given. "
                "Give its parameters as `reference`."
            )
        if not self._loss.compares and reference is not None:
            raise ValueError(
                f"{title}: the loss {name} compares with no reference model and one was given. "
                "Leave out `reference`."
            )

    def _loop(
        self,
        state: Any,
        inputs: tuple[Any, Any],
        batches: Batches,
        recipe: Recipe,
        journal: Journal,
        store: Checkpoints | None,
        seconds: float,
    ) -> Any:
        """Take the remaining steps, with a checkpoint every so many seconds; return the state.
        `inputs` are the parameters that are not trained, and the reference."""
        frozen, reference = inputs
        rates = recipe.sign, recipe.learning_rate, recipe.weight_decay, recipe.nll_ceiling
        scalars, step = list(map(jnp.float32, rates)), self.stepper()
        pending = None  # read one step late, so that the devices need not wait for the host
        saved = time.monotonic()
        for done in range(len(journal.nll) + 1, 0 if journal.stopped else recipe.steps + 1):
            batch = put_batch(next(batches), self._sharder)
            check_batch("A batch", batch["tokens"].shape[0], self._accumulate, self._sharder)
            state, metrics = step(state, frozen, batch, *scalars, reference)
            due = seconds > 0 and time.monotonic() - saved > seconds
            request = SAVE if due else CONTINUE
            if stopping.requested():
                request = END
            # One process's clock or signal is enough, and all processes see it at the same step.
            metrics["request"] = self._sharder.maximum(request)
            if pending:
                journal.read(pending)
            if journal.stopped:
                return state
            pending = metrics
            if journal.request != CONTINUE:
                journal.read(pending)
                if journal.stopped:
                    return state
                pending = None
                if journal.request == END:
                    return state
                if store and done < recipe.steps:
                    store.save(done, state, {"nll": journal.nll, "data": batches.get_state()})
                journal.request, saved = CONTINUE, time.monotonic()
        if pending:
            journal.read(pending)
        return state

    def _end(
        self, state: Any, batches: Batches, journal: Journal, store: Checkpoints | None
    ) -> None:
        """End the process after SIGTERM, with a checkpoint if there is a store."""
        consequence = "The same command starts this stage anew."
        if store:
            store.save(len(journal.nll), state, {"nll": journal.nll, "data": batches.get_state()})
            store.wait()
            consequence = "A checkpoint is written; the same command resumes from it."
        say(f"  SIGTERM: ends after step {len(journal.nll)}. {consequence}")
        stopping.stop()


@functools.partial(jax.jit, static_argnames="sharding")
def _copied(x: jax.Array, *, sharding: Any) -> jax.Array:
    """Return a float32 copy; of float32 too, since the state is donated."""
    return jax.lax.with_sharding_constraint(jnp.copy(x).astype(jnp.float32), sharding)
