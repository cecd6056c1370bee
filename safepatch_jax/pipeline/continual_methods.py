"""How a link's model is made from its parent's: SafePatching, and what it is compared with.

A method is a function of a `Task` that returns the folder of the new model. It finds the link's harmful data in the settings.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any, Callable, Mapping, Sequence

import jax.numpy as jnp

from safepatch_jax import files, processes
from safepatch_jax.console import say
from safepatch_jax.data.records import Record
from safepatch_jax.io.checkpoint import load_tree
from safepatch_jax.io.folder import stored_dtypes
from safepatch_jax.io.hf import save_model
from safepatch_jax.models.config import read_hf_config
from safepatch_jax.models.table import param_table
from safepatch_jax.pipeline.continual_measures import ANSWERS, Measures
from safepatch_jax.pipeline.context import Context
from safepatch_jax.pipeline.convert import Place
from safepatch_jax.pipeline.job import Job
from safepatch_jax.pipeline.work import Work
from safepatch_jax.settings import Settings
from safepatch_jax.training.losses import NPO, Loss, SimNPO
from safepatch_jax.training.reference import with_reference
from safepatch_jax.training.step import Recipe


@dataclasses.dataclass(frozen=True)
class Task:
    """A link to be made.

    Attributes:
      settings: of the link: model.source is the parent, data.harmful and data.category are the link's, nothing is aligned.
      name: of the link.
      work: the folder to work in; what is there survives a kill.
      out: an empty folder for a model that is measured and deleted.
      measures: of the chain.
      read: reads records, as `Context` takes it: what the chain has read is not read again.
      command: with which the run was started.
    """

    settings: Settings
    name: str
    work: pathlib.Path
    out: pathlib.Path
    measures: Measures
    read: Callable[..., Sequence[Record]]
    command: Sequence[str]


class TaskWork(Work):
    """The stages of a task's run, on the records that the chain has read."""

    _task: Task

    def __init__(self, settings: Settings):
        super().__init__(settings)
        self.context = Context(settings, self._task.read)


class TaskJob(Job, TaskWork):
    """The run of a task."""

    def __init__(self, task: Task):
        self._task = task
        super().__init__(task.settings, task.work, update=True)


class LinkJob(TaskJob):
    """The run of a link. What the chain measures is taken from there, so that no model is measured twice."""

    def _evaluate(self, variant: str, out: pathlib.Path) -> Mapping[str, Any]:
        folder = {"backbone": self.backbone, "safepatching": self.folder("export")}.get(variant)
        if folder is None:  # a derived model, of this link alone
            return super()._evaluate(variant, out)
        measures, answers = self._task.measures.of_run(folder, self._task.name)
        processes.on_first(lambda: files.write_text(
            out / ANSWERS, "".join(json.dumps(a, ensure_ascii=False) + "\n" for a in answers)))
        return measures


def safepatching(task: Task) -> pathlib.Path:
    """Run the whole job on the parent; its patch file and report stay in the link's folder."""
    job = LinkJob(task)
    job.run(task.command)
    return job.folder("export")


def gradient_ascent(task: Task) -> pathlib.Path:
    """Take the parent's ascent on the link's harmful answers as it is: the model that SafePatching derives its SE patch from."""
    job = TaskJob(task)
    derived, parent = job.runner.need("derive_se") / "params", job.backbone
    config = read_hf_config(parent)
    params = load_tree(derived, param_table(config).abstract(job.context.sharder, jnp.float32))
    save_model(task.out / "model", params, config, parent, stored=stored_dtypes(parent))
    return task.out / "model"


def negative_preference(task: Task) -> pathlib.Path:
    """Tune the parent by NPO, with itself as the reference, and the steps, rate and ceiling of the SE patch."""
    return _tuned(task, NPO(), "NPO", reference=True)


def simple_preference(task: Task) -> pathlib.Path:
    """Tune the parent by SimNPO, which needs no reference, likewise."""
    return _tuned(task, SimNPO(), "SimNPO", reference=False)


def _tuned(task: Task, loss: Loss, title: str, reference: bool) -> pathlib.Path:
    """Tune all weights of the parent by a loss on the link's harmful answers; return the folder of the result."""
    context = Context(task.settings, task.read)
    parent, derive = Place.parse(task.settings.model.source).path, task.settings.derive
    examples, config = context.encoded(parent, "harmful", "train").examples, read_hf_config(parent)
    if reference:
        decoder = context.decoder(config)
        examples = with_reference(decoder, context.load(parent)[1], examples, derive.batch_size, decoder.sharder)
    recipe = Recipe(1.0, derive.se_steps, derive.se_learning_rate, derive.se_nll_ceiling, derive.weight_decay)
    tuned, outcome = context.tune(parent, [(examples, derive.batch_size)], recipe, title, task.work / "steps", loss=loss)
    say(f"  stopped by {outcome.stopped_by}: answer NLL {outcome.nll[0]:.2f} -> {outcome.nll[-1]:.2f}")
    save_model(task.out / "model", tuned, config, parent, stored=stored_dtypes(parent))
    return task.out / "model"


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to make a link: its name in --methods, its label and colour in the report, and the function that does it."""

    name: str
    label: str
    colour: str
    make: Callable[[Task], pathlib.Path]


# SafePatching makes the chain; the models of the others are made beside it, measured and deleted.
METHODS = {method.name: method for method in (
    Method("safepatching", "SafePatching", "#4477aa", safepatching),
    Method("ga", "GA", "#ee6677", gradient_ascent),
    Method("npo", "NPO", "#228833", negative_preference),
    Method("simnpo", "SimNPO", "#aa3377", simple_preference))}
