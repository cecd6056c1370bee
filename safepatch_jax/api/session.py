"""A model and the run in which it is patched: settings, folders, stages."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from safepatch_jax.api.keywords import with_keywords
from safepatch_jax.api.shown import Shown
from safepatch_jax.io import hub
from safepatch_jax.models.config import read_hf_config
from safepatch_jax.run import manifests
from safepatch_jax.run.inputs import Inputs
from safepatch_jax.run.job import SETTINGS, Job
from safepatch_jax.run.pins import pinned
from safepatch_jax.run.place import Place
from safepatch_jax.run.state import Run, check_source
from safepatch_jax.runtime import files
from safepatch_jax.runtime.console import say
from safepatch_jax.runtime.paths import resolve
from safepatch_jax.settings import Settings, load_config

_RUN, _DATA = "run", "data"  # folders of a session
GROUPS = ("model", "data", "mesh", "run")  # which come first in `load`


@dataclasses.dataclass(frozen=True)
class Session:
    """Settings and the folder in which they are worked on; what handles have in common.

    Attributes:
      settings: of the run.
      workdir: absolute path; its folder 'run' is a workdir of `safepatch run`.
    """

    settings: Settings
    workdir: pathlib.Path

    def with_keywords(
        self, values: Mapping[str, Any], groups: Sequence[str], where: str
    ) -> Session:
        """Return the session with settings put in, see `keywords.with_keywords`."""
        data = self.workdir / _DATA
        settings = with_keywords(self.settings, values, groups, data, where)
        return dataclasses.replace(self, settings=settings)

    def job(self) -> Job:
        """Open the run; nothing is run."""
        settings = self.settings
        if settings.derive.memory == "auto":
            from safepatch_jax.planning.fitting import fitted

            settings = fitted(settings, self.workdir / _RUN)
        return Job(settings, self.workdir / _RUN, update=True)

    def delete_scratch(self) -> list[str]:
        """Delete what of derived models, scores and their answers lies in the run's folder, of
        whatever settings; return the names of the stages."""
        deleted, job = [], self.job()
        with job.at_work():
            for name, stage in job.runner.stages.items():
                folder = job.runner.folder(name)
                state, manifest = manifests.read(folder)
                if not stage.scratch or state != manifests.SOUND or manifest["deleted"]:
                    continue
                files.refuse_link(folder, self.workdir / _RUN)
                manifests.write(folder, {**manifest, "deleted": True})
                manifests.delete_outputs(folder, manifest)
                deleted.append(name)
            job.runner.delete_scratch()  # and what killed runs left half-made
        if deleted:
            say(f"Scratch deleted: {', '.join(deleted)} (keep with keep_scratch=True).")
        return deleted


@dataclasses.dataclass(frozen=True, repr=False)
class Model(Shown):
    """A model that can be patched, see `load`.

    Attributes:
      source: as it was given.
      session: settings and folder of its run.
    """

    source: str
    session: Session

    @property
    def workdir(self) -> pathlib.Path:
        """The folder in which all that is made of the model lies."""
        return self.session.workdir

    @property
    def settings(self) -> Settings:
        """Of the run."""
        return self.session.settings

    def folder(self) -> pathlib.Path:
        """Return the backbone's Hugging Face folder; what is no such folder is converted first, and
        a model that is to be aligned is."""
        job = self.session.job()
        job.make(["align" if self.settings.align.enabled else "import"])
        return job.state.backbone

    def _title(self) -> str:
        return f"Model {self.source}"

    def _rows(self) -> Iterable[Sequence[str]]:
        run = Run(self.settings, self.workdir)
        yield "kind", run.source.kind
        if run.source.kind == "hf":
            config = read_hf_config(run.source.path)
            yield "family", f"{config.family}, {config.num_layers} layers"
        align = self.settings.align
        if align.enabled:
            yield "aligned", f"first, for {align.steps} steps"
        yield "workdir", str(self.workdir)


def load(
    source: str | os.PathLike[str] = "",
    workdir: str | os.PathLike[str] | None = None,
    *,
    config: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> Model:
    """Name a model to be patched, and the folder in which that is done; nothing is computed yet.

    Args:
      source: a Hugging Face folder, org/name[@revision] of the Hub, a .gguf file, orbax:DIR,
        'smollm2': whatever --model.source takes; may be left out where `config` has it. A workdir
        stays with the commit of a model with which it was begun.
      workdir: where derived models, patches and evaluations lie; by default a folder of this model
        in the cache. What is done in it with the same settings is not done again.
      config: a config file or the name of a shipped one, such as 'demo': settings to begin with.
      settings: by keyword, see docs/api.md; those of later calls too.

    Raises:
      ValueError: no such model, an architecture that is not known, or a bad setting.
    """
    given = Settings() if config is None else load_config(config)
    values = dict(settings)
    if source:
        values["source"] = os.fspath(source)
    # Records that are given as lists lie in the workdir, whose default depends on the rest.
    rest = {name: value for name, value in values.items() if not isinstance(value, list | tuple)}
    placed = with_keywords(given, rest, GROUPS, pathlib.Path(), "load")
    if workdir is None:
        place = Inputs(placed).cache_dir / "sessions" / _name(placed.model.source)
    else:
        place = resolve(workdir)
    source = pinned(placed, place / _RUN / SETTINGS).model.source
    check_source(Run(placed.override({"model.source": source}), pathlib.Path()).source)
    session = Session(placed, place).with_keywords(values, GROUPS, "load")
    settings = session.settings.override({"model.source": source})
    return Model(source, Session(settings, place))


def _name(source: str) -> str:
    """Return a name of a model's default folder: its last part, and a hash of where it is; of a
    model of the Hub, that of all its commits."""
    if parts := hub.named(source.removeprefix("hf:")):
        kind, path = "hub", pathlib.PurePosixPath(parts[0])
    else:
        place = Place.local(source).absolute()
        kind, path = place.kind, place.path
    name = re.sub(r"[^A-Za-z0-9._-]", "_", path.name)[:60]
    return f"{name}-{files.text_hash([kind, str(path)])[:8]}"


def refuse_upstream(
    keys: Mapping[str, str], job: Job, keywords: Iterable[str], call: str, earlier: str
) -> None:
    """Raise ValueError if settings of a call change stages that an earlier call has made.

    Args:
      keys: of those stages, see `Runner.key`.
      job: of the call.
      keywords: what the call was given.
      call, earlier: names of the two.
    """
    if all(job.runner.key(name) == key for name, key in keys.items()):
        return
    given = ", ".join(keywords)
    raise ValueError(
        f"sp.{call}({given}): a setting among these changes what sp.{earlier} made. Give it to "
        f"sp.{earlier}, and what comes after it follows; or the model's files or the data were "
        f"changed since: call sp.{earlier} again."
    )
