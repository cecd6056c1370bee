"""The chain of another method, made beside SafePatching's: its models are measured and deleted."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from safepatch_jax.methods.bench import Method
from safepatch_jax.outcome import outcome_settings
from safepatch_jax.patch_file.log import folder_hash
from safepatch_jax.run.stages import FINISHED, Runner, Stage
from safepatch_jax.runtime import mirror, processes
from safepatch_jax.runtime.console import say
from safepatch_jax.settings import Settings
from safepatch_jax.studies.continual import report
from safepatch_jax.studies.continual.links import Link
from safepatch_jax.studies.continual.measures import COMMON, Measures, Model
from safepatch_jax.studies.continual.methods import Task, beside

METHODS_DIR = "methods"


class OtherChain:
    """The models of a method of the registry, one a link, each made from the one before.

    Args:
      method: of the registry.
      settings: of the chain.
      links: (label, link, what its model is measured on) of each link that SafePatching has made.
      workdir: where its models lie until they are measured.
      measures: of the chain.
      start: hashes of the starting model.
      start_folder: returns the folder of the starting model.
      task: makes a `Task` of (link, parent's folder, folder to work in, folder for the model).
      seeds: by the name of a link.
    """

    def __init__(
        self,
        method: Method,
        settings: Settings,
        links: Sequence[tuple[str, Link, Sequence[str]]],
        workdir: pathlib.Path,
        measures: Measures,
        start: Mapping[str, str],
        start_folder: Callable[[], pathlib.Path],
        task: Callable[[Link, pathlib.Path, pathlib.Path, pathlib.Path], Task],
        seeds: Mapping[str, int],
    ):
        self._method, self._settings, self._measures = method, settings, measures
        self._start_folder, self._task = start_folder, task
        self._parts = {name: parts for name, _, parts in links}
        stages, before = [], None
        for name, link, _ in links:
            sources = {"data": measures.data_hash(link.name)}
            if before is None:
                sources |= start
            stages.append(
                Stage(
                    name,
                    functools.partial(self._make, before, name, link),
                    (before,) if before else (),
                    self._stage_settings() | {"seed": seeds[link.name]},
                    sources,
                    scratch=True,
                )
            )
            before = name
        self._runner = Runner(stages, workdir, measures.context.cache_dir)

    def _stage_settings(self) -> dict[str, Any]:
        """Return the settings on which the method's models depend, each link's data aside."""
        groups = ["derive.", "model.", "data."]
        apart = ["model.source", "data.eval_limit"]
        apart += [f"data.{role}" for role in ("harmful", "lookalike", "ordinary")]
        if self._method.group == "training":  # of the two patches these take at most the SE patch
            apart.append("derive.osm_")
        else:
            groups += ["score.", "patch."]
        chosen = {}
        for name, value in outcome_settings(self._settings).items():
            if name.startswith(tuple(groups)) and not name.startswith(tuple(apart)):
                chosen[name] = value
        return chosen | dict(self._method.settings) | {"method": self._method.name}

    def _make(self, before: str | None, name: str, link: Link, out: pathlib.Path) -> dict[str, Any]:
        parent = self._start_folder()
        if before is not None:
            parent = self._runner.need(before) / "model"
        folder = beside(self._method, self._task(link, parent, self._runner.aside(name), out))
        return {"model": processes.on_first(folder_hash, folder)}

    def rows(self) -> list[dict[str, Any]]:
        """Make and measure the models; return a row of the report for each. Each is deleted once
        the next one is there, the last one after success."""
        label, rows, before = self._method.label, [], None
        try:
            for name in self._parts:
                rows.append(self._row(name))
                if before and not self._settings.run.keep_scratch:
                    processes.on_first(self._runner.delete_outputs, before)
                    self._forget(before)
                before = name
        except BaseException:
            if scratch := self._runner.scratch_left():
                say(
                    f"The comparison did not finish. Models of {label} lie in "
                    f"{', '.join(map(str, scratch))}: the same command resumes from there; else "
                    "delete them, they are broken models."
                )
            raise
        if not self._settings.run.keep_scratch:
            processes.on_first(self._runner.delete_scratch)
            for name in self._parts:
                self._forget(name)
            say(f"The models of {label} are deleted (keep with --run.keep_scratch).")
        return rows

    def _forget(self, name: str) -> None:
        """Delete the copy of a model that this process has from a bucket, if it is not the one that
        has deleted it there."""
        if not processes.first():
            mirror.forget(self._runner.folder(name))

    def _row(self, name: str) -> dict[str, Any]:
        runner = self._runner
        if runner.status(name) not in FINISHED:
            say(f"{self._method.label} {name}")
            runner.need(name)
        digest = runner.result(name)["model"]
        model = Model(digest, lambda: runner.need(name) / "model")
        self._measures.measure(model, self._parts[name])
        measures = self._measures.found(model, (*self._measures.names, *COMMON))
        return report.row(name, digest, measures)
