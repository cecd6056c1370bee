"""How a link's model is made from its parent's: by SafePatching, or by a method of the registry
that it is compared with."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from safepatch_jax.data.records import Record
from safepatch_jax.io.folder import stored_dtypes
from safepatch_jax.io.hf import save_model
from safepatch_jax.methods.bench import Bench, Method
from safepatch_jax.methods.registry import METHODS
from safepatch_jax.models.config import read_hf_config
from safepatch_jax.run.job import Job
from safepatch_jax.runtime import files, processes
from safepatch_jax.settings import Settings
from safepatch_jax.studies.continual.measures import ANSWERS, Measures


@dataclasses.dataclass(frozen=True)
class Task:
    """A link to be made.

    Attributes:
      settings: of the link: model.source is the parent, data.harmful and data.category are the
        link's, nothing is aligned.
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


class TaskJob(Job):
    """The run of a task, on the records that the chain has read."""

    def __init__(self, task: Task):
        self._task = task
        super().__init__(task.settings, task.work, update=True, read=task.read)


class LinkJob(TaskJob):
    """The run of a link. What the chain measures is taken from there, so that no model is measured
    twice."""

    def _evaluate(self, variant: str, out: pathlib.Path) -> Mapping[str, Any]:
        folder = {"backbone": self.backbone, "safepatching": self.folder("export")}.get(variant)
        if folder is None:  # a derived model, of this link alone
            return super()._evaluate(variant, out)
        measures, answers = self._task.measures.of_run(folder, self._task.name)
        processes.on_first(
            lambda: files.write_text(
                out / ANSWERS, "".join(json.dumps(a, ensure_ascii=False) + "\n" for a in answers)
            )
        )
        return measures


def safepatching(task: Task) -> pathlib.Path:
    """Run the whole job on the parent; its patch file and report stay in the link's folder."""
    job = LinkJob(task)
    job.run(task.command)
    return job.folder("export")


def beside(method: Method, task: Task) -> pathlib.Path:
    """Make the link's model by another method of the registry; return its folder."""
    job = TaskJob(dataclasses.replace(task, work=task.work / "run"))
    settings = task.settings.override(dict(method.settings), method.name)
    params = method.make(Bench(job, settings, task.work / "steps", task.work / "notes")).params
    save_model(
        task.out / "model",
        params,
        read_hf_config(job.backbone),
        job.backbone,
        stored=stored_dtypes(job.backbone),
    )
    return task.out / "model"


# SafePatching makes the chain; the models of the others are made beside it, measured and deleted. A
# rule of decoding leaves no model, and a chain keeps the answers.
CHAINED = {
    name: method
    for name, method in METHODS.items()
    if method.group not in ("backbone", "decoding") and not method.jailbroken
}
