"""Derived models and their scores: the two patches before anything is selected."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from safepatch_jax.api.session import Model, Session, refuse_upstream
from safepatch_jax.api.shown import Shown
from safepatch_jax.patching import PATCH_ROLES
from safepatch_jax.run.job import Job

_DERIVE = ("derive", "data", "run", "mesh")
_SCORE = ("score", "run")
_ROLES = {"se": "SE: safety enhancement, ascent", "osm": "OSM: over-safety mitigation, descent"}


@dataclasses.dataclass(frozen=True)
class Training:
    """How a derived model was trained.

    Attributes:
      nll: of the harmful answers before each step, nats a token.
      stopped_by: what ended it.
    """

    nll: tuple[float, ...]
    stopped_by: str

    @property
    def steps(self) -> int:
        return len(self.nll)


@dataclasses.dataclass(frozen=True, repr=False)
class Pair(Shown):
    """The two derived models, see `derive`. Handle with care: OSM is a jailbroken model and SE a
    broken one.

    As a context manager it deletes them at the end of the block.

    Attributes:
      model: what they were derived from.
      session: settings and folder.
      se, osm: how each was trained.
      keys: of their stages.
    """

    model: Model
    session: Session
    se: Training
    osm: Training
    keys: Mapping[str, str] = dataclasses.field(repr=False)

    @property
    def folders(self) -> dict[str, pathlib.Path]:
        """Where each lies; empty once scratch is deleted."""
        runner = self.session.job().runner
        return {role: runner.folder(f"derive_{role}") for role in PATCH_ROLES}

    def delete(self) -> list[str]:
        """Delete derived models, scores and all other scratch of the workdir, of whatever settings;
        return the names of the stages."""
        return self.session.delete_scratch()

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        self.delete()

    def _title(self) -> str:
        return f"Two models derived from {self.model.source}"

    def _head(self) -> Sequence[str]:
        return ("", "steps", "answer NLL", "stopped by")

    def _rows(self) -> Iterable[Sequence[str]]:
        for role, title in _ROLES.items():
            training: Training = getattr(self, role)
            nll = f"{training.nll[0]:.2f} -> {training.nll[-1]:.2f}"
            yield title, str(training.steps), nll, training.stopped_by


@dataclasses.dataclass(frozen=True, repr=False)
class Scores(Shown):
    """The importance of every weight in the patch scope for both patches, see `score`.

    Attributes:
      pair: the derived models.
      session: settings and folder.
      samples: over how many harmful pairs each was taken.
      keys: of their stages.
    """

    pair: Pair
    session: Session
    samples: Mapping[str, int]
    keys: Mapping[str, str] = dataclasses.field(repr=False)

    def delete(self) -> list[str]:
        """Delete scores and derived models, see `Pair.delete`."""
        return self.session.delete_scratch()

    def _title(self) -> str:
        return f"SNIP scores of the patches of {self.pair.model.source}"

    def _rows(self) -> Iterable[Sequence[str]]:
        yield "scope", self.session.settings.patch.scope
        for role, count in self.samples.items():
            yield f"samples, {role.upper()}", str(count)


def derive(
    model: Model,
    *,
    harmful: Any = None,
    lookalike: Any = None,
    ordinary: Any = None,
    **settings: Any,
) -> Pair:
    """Derive the SE model (gradient ascent) and the OSM model (descent) from harmful pairs.

    They are scratch: `patch` deletes them when it has made its patch, unless keep_scratch=True;
    `Pair.delete`, or the end of a `with` block, deletes them at any time.

    Args:
      model: of `load`.
      harmful: harmful requests with answers: a file, 'builtin', 'set:NAME', or a list of records.
      lookalike, ordinary: the other two roles: over-refusal and utility are measured on them.
      settings: by keyword: those of derive, data and run first, see docs/api.md.

    Raises:
      ValueError: bad settings or data; no room on the disk; another call at work in the workdir.
    """
    values = {"harmful": harmful, "lookalike": lookalike, "ordinary": ordinary} | settings
    session = model.session.with_keywords(values, _DERIVE, "derive")
    job = session.job()
    names = [f"derive_{role}" for role in PATCH_ROLES]
    job.make(names)
    trained = {}
    for role in PATCH_ROLES:
        result = job.runner.result(f"derive_{role}")
        trained[role] = Training(tuple(result["nll"]), result["stopped_by"])
    model = dataclasses.replace(model, session=session)  # the backbone follows from all settings
    return Pair(model, session, **trained, keys=keys_of(job, names))


def score(pair: Pair, *, samples: int | None = None, **settings: Any) -> Scores:
    """Score every weight in the patch scope by SNIP, |W * dNLL/dW| summed over harmful pairs.

    Args:
      pair: of `derive`.
      samples: how many harmful pairs.
      settings: by keyword: those of score first. patch.scope is given to `derive`.

    Raises:
      ValueError: as `derive`; a setting that changes what `derive` made.
    """
    session = pair.session.with_keywords({"samples": samples} | settings, _SCORE, "score")
    job = session.job()
    refuse_upstream(pair.keys, job, settings, "score", "derive")
    names = [f"score_{role}" for role in PATCH_ROLES]
    job.make(names)
    counts = {role: job.runner.result(f"score_{role}")["samples"] for role in PATCH_ROLES}
    return Scores(pair, session, counts, keys_of(job, names))


def keys_of(job: Job, names: Iterable[str]) -> dict[str, str]:
    """Return the keys of stages by name."""
    return {name: job.runner.key(name) for name in names}
