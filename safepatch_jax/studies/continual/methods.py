"""How a link's model is made from its parent's: by SafePatching, or by a method of the registry
that it is compared with."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

from safepatch_jax.evaluation.measures import ANSWERS
from safepatch_jax.io.folder import stored_dtypes
from safepatch_jax.io.hf import save_model
from safepatch_jax.methods.bench import Bench, Method
from safepatch_jax.methods.registry import METHODS
from safepatch_jax.models.config import read_hf_config
from safepatch_jax.run import steps
from safepatch_jax.run.job import Job, open_run
from safepatch_jax.run.state import Read, Run
from safepatch_jax.runtime import files, processes
from safepatch_jax.settings import Settings
from safepatch_jax.studies.continual.measures import Measures


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
      read: reads records, see `run.context.Context`: what the chain has read is not read again.
      command: with which the run was started.
    """

    settings: Settings
    name: str
    work: pathlib.Path
    out: pathlib.Path
    measures: Measures
    read: Read
    command: Sequence[str]

    def evaluate(self, run: Run, variant: str, out: pathlib.Path) -> steps.Result:
        """Measure a model of the link's report; what the chain measures is taken from there, so
        that no model is measured twice."""
        folders = {"backbone": run.backbone, "safepatching": run.folder("export")}
        if variant not in folders:  # a derived model, of this link alone
            return steps.evaluate(run, variant, out)
        result, answers = self.measures.of_run(folders[variant], self.name)
        processes.on_first(files.write_jsonl, out / ANSWERS, answers)
        return result


def link_job(task: Task) -> Job:
    """Return the whole job of a link; its patch file and report stay in the link's folder."""
    return Job(task.settings, task.work, update=True, read=task.read, evaluate=task.evaluate)


def safepatching(task: Task) -> pathlib.Path:
    """Patch the parent; return the folder of the link's model."""
    job = link_job(task)
    job.run(task.command)
    return job.state.folder("export")


def beside(method: Method, task: Task) -> pathlib.Path:
    """Make the link's model by another method of the registry; return its folder."""
    run = open_run(task.settings, task.work / "run", read=task.read)
    settings = task.settings.override(dict(method.settings), method.name)
    bench = Bench(run, settings, task.work / "steps", task.work / "notes")
    params = method.make(bench).params
    folder, backbone = task.out / "model", run.backbone
    config = read_hf_config(backbone)
    save_model(folder, params, config, backbone, stored=stored_dtypes(backbone))
    return folder


def _is_chained(method: Method) -> bool:
    """Tell whether a method leaves a model that a chain may keep the answers of."""
    return method.group not in ("backbone", "decoding") and not method.jailbroken


# SafePatching makes the chain; the models of the others are made beside it, measured and deleted.
CHAINED = {name: method for name, method in METHODS.items() if _is_chained(method)}


def parse_methods(text: str) -> tuple[str, ...]:
    """Read --methods, names between commas; SafePatching, which makes the chain, is always first.

    Raises:
      ValueError: an unknown method.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in CHAINED]
    if unknown:
        raise ValueError(
            f"--methods: there is no {', '.join(unknown)}. There are {', '.join(CHAINED)}."
        )
    return tuple(dict.fromkeys(("safepatching", *names)))
