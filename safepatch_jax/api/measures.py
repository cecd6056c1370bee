"""Measures of models: one beside another, and SafePatching beside its rivals."""

from __future__ import annotations

import dataclasses
import operator
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from safepatch_jax.api.patches import Patch
from safepatch_jax.api.session import Model, Session
from safepatch_jax.api.shown import Picture, Shown
from safepatch_jax.io import hub
from safepatch_jax.option import nearest
from safepatch_jax.run.inputs import Inputs
from safepatch_jax.runtime import files, paths
from safepatch_jax.settings import Settings
from safepatch_jax.studies.evaluate.options import EvaluationOptions

_PLACES = ("model", "against")
_TASKS = ("mmlu", "gsm8k")
_COMPARE = ("patch", "derive", "score", "data", "run")


@dataclasses.dataclass(frozen=True)
class Value:
    """What was measured of one model.

    Attributes:
      value: a share of answers (harm, over-refusal, right answers), a mean grade, or the perplexity
        of given answers; None where nothing could be told.
      low, high: its 95 % interval; None where there is none.
      n: items.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int


@dataclasses.dataclass(frozen=True)
class Measured:
    """One measure of a suite.

    Attributes:
      name: in the suite.
      kind: harm, refusal, text, mmlu, gsm8k or mt_bench.
      model, against: of the model, and of the one beside it, if there is one.
      p: of the paired test of both, where there is one.
    """

    name: str
    kind: str
    model: Value
    against: Value | None
    p: float | None


@dataclasses.dataclass(frozen=True, repr=False)
class Evaluation(Shown):
    """What an evaluation measured, see `evaluate`.

    Attributes:
      content: of report.json.
      folder: report.md, report.json, report.png and answers. Those of a jailbroken model: handle
        with care.
      measures: in the suite's order.
      names: what is called 'model' and, if there is one, 'against'.
    """

    content: Mapping[str, Any]
    folder: pathlib.Path
    measures: tuple[Measured, ...]
    names: Mapping[str, str]

    @property
    def harm(self) -> dict[str, Value]:
        """By measure, the share of harmful requests complied with; lower is better."""
        return self._of("harm")

    @property
    def over_refusal(self) -> dict[str, Value]:
        """By measure, the share of harmless requests refused; lower is better."""
        return self._of("refusal")

    @property
    def utility(self) -> dict[str, Value]:
        """By measure, right answers or grades (higher is better), or the perplexity of given
        answers (lower is better)."""
        return self._of("text", "mt_bench", *_TASKS)

    def _of(self, *kinds: str) -> dict[str, Value]:
        return {m.name: m.model for m in self.measures if m.kind in kinds}

    @property
    def picture(self) -> Picture:
        """The report's picture."""
        return Picture(self.folder / "report.png")

    def _title(self) -> str:
        return f"Evaluation of {' beside '.join(self.names.values())}"

    def _head(self) -> Sequence[str]:
        beside = (self.names["against"], "p") if "against" in self.names else ()
        return ("measure", self.names["model"], *beside)

    def _rows(self) -> Iterable[Sequence[str]]:
        for m in self.measures:
            row = [f"{m.name} ({m.kind})", _text(m.kind, m.model)]
            if "against" in self.names:
                row.append("-" if m.against is None else _text(m.kind, m.against))
                row.append("-" if m.p is None else f"{m.p:.2g}")
            yield row


def _text(kind: str, x: Value) -> str:
    if x.value is None:
        return "-"
    if kind in ("text", "mt_bench"):
        form, scale = "{:.2f}", 1
    else:
        form, scale = "{:.0f} %", 100
    text = form.format(scale * x.value)
    if x.low is None or x.high is None:
        return text
    return f"{text} [{scale * x.low:.3g}-{scale * x.high:.3g}]"


def evaluate(
    model: str | os.PathLike[str] | Model | Patch,
    against: str | os.PathLike[str] | Model | Patch | None = None,
    out: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Evaluation:
    """Measure harm, over-refusal and utility of a model, and of another one on the same items.

    Args:
      model: a Hugging Face folder or org/name of the Hub, a model of `load`, or a patch, which
        stands for the patched model.
      against: the model beside it; of a patch by default its backbone.
      out: the evaluation's folder; by default one of these models, measures, data and options in
        the workdir, or in the cache. What is answered there is not answered again.
      options: by keyword, those of `safepatch evaluate`: suite, judge, temperature and so on.

    Raises:
      ValueError: an unknown option, bad models, data, suite or judge.
    """
    if against is None and isinstance(model, Patch):
        against = model.model
    known = {field.name for field in dataclasses.fields(EvaluationOptions)}
    for name in options:
        if name not in known:
            raise ValueError(
                f"evaluate has no option '{name}'{nearest(name, sorted(known))}. There are "
                f"{', '.join(sorted(known))}."
            )
    session = _session(model)
    values = _shared(session) | options
    for name in ("suite", "judge"):
        if isinstance(values.get(name), os.PathLike):
            values[name] = os.fspath(values[name])
    values["seeds"] = _seeds(values.get("seeds", ()))
    values["templates"] = _templates(values.get("templates", ()))
    chosen = EvaluationOptions(**values)
    folders = {who: _folder(x) for who, x in zip(_PLACES, (model, against)) if x is not None}
    # Imported here: patches are applied without JAX.
    from safepatch_jax.studies.evaluate.study import evaluate as measure

    place = _default_place(session, folders, chosen) if out is None else paths.resolve(out)
    content = measure(folders["model"], place, chosen, folders.get("against", ""))
    names = {who: _name(x) for who, x in zip(_PLACES, (model, against)) if x is not None}
    return Evaluation(content, place, tuple(_measures(content)), names)


def _seeds(given: Any) -> tuple[int, ...]:
    """Return the seeds of a sequence, or of a text as the launcher takes it."""
    seeds = given.split(",") if isinstance(given, str) else given
    try:
        return tuple(operator.index(int(x) if isinstance(x, str) else x) for x in seeds if x != "")
    except (TypeError, ValueError):
        raise ValueError(
            f"seeds are whole numbers in a sequence, such as seeds=(0, 1, 2), got {given!r}."
        ) from None


def _templates(given: Any) -> tuple[str, ...]:
    """Return the templates of a sequence, or of a text as the launcher takes it."""
    templates = given.split(",") if isinstance(given, str) else given
    try:
        return tuple(os.fspath(x) for x in templates if x != "")
    except TypeError:
        raise ValueError(
            f"templates are several names or paths, such as templates=('own', 'plain'), got "
            f"{given!r}."
        ) from None


def _name(model: Any) -> str:
    if isinstance(model, Patch):
        return f"{model.model.source}, patched" if model.model else "patched"
    return model.source if isinstance(model, Model) else os.fspath(model)


def _session(model: Any) -> Session | None:
    if isinstance(model, Patch):
        model = model.model
    return model.session if isinstance(model, Model) else None


def _shared(session: Session | None) -> dict[str, Any]:
    """Return the options that a session's settings say."""
    if session is None:
        return {}
    s = session.settings
    return {
        "mesh": s.mesh.shape,
        "compute_dtype": s.model.compute_dtype,
        "manual_dir": s.data.manual_dir,
        "data_dir": str(Inputs(s).cache_dir / "datasets"),
        "date": s.data.date,
        "template": s.data.template,
        "system": s.data.system,
        "template_kwargs": s.data.template_kwargs,
        "thinking": s.evaluate.thinking,
        "think_tokens": s.evaluate.think_tokens,
    }


def _folder(model: Any) -> str:
    if isinstance(model, Patch):
        if model.folder is None:
            raise ValueError(
                "This patch was read from a file, which is no model. Apply it to its backbone, and "
                "give the folder."
            )
        return str(model.folder)
    return str(model.folder()) if isinstance(model, Model) else hub.folder_of(os.fspath(model))


def _default_place(
    session: Session | None, folders: Mapping[str, str], options: EvaluationOptions
) -> pathlib.Path:
    from safepatch_jax.evaluation.suites import load_suite
    from safepatch_jax.studies.evaluate.study import inputs

    # A suite that was edited, or data that were, make another evaluation.
    record = inputs(folders, load_suite(options.suite), options)
    key = files.text_hash([record, options.seeds])[:16]
    parent = Inputs(Settings()).cache_dir if session is None else session.workdir
    return parent / "evaluations" / key


def _measures(content: Mapping[str, Any]) -> Iterable[Measured]:
    # With several templates the first one's stand for all; the report has each.
    for part in list(content.get("templates", {"": content}).values())[:1]:
        for measure in part["measures"]:
            values = {who: _value(measure["kind"], x) for who, x in measure["models"].items()}
            yield Measured(
                measure["name"],
                measure["kind"],
                values["model"],
                values.get("against"),
                measure.get("paired", {}).get("p"),
            )


def _value(kind: str, x: Mapping[str, Any]) -> Value:
    if kind == "text":  # its interval is of answers' NLL, not of the perplexity over tokens
        return Value(x["perplexity"], None, None, x["n"])
    low, high = x["interval"] or (None, None)
    return Value(x["mean" if kind == "mt_bench" else "rate"], low, high, x["n"])


@dataclasses.dataclass(frozen=True, repr=False)
class Comparison(Shown):
    """SafePatching and its rivals, see `compare`.

    Attributes:
      content: of compare.json.
      folder: compare.md, compare.json, compare.png and answers: handle with care.
    """

    content: Mapping[str, Any]
    folder: pathlib.Path

    @property
    def picture(self) -> Picture:
        """The comparison's picture."""
        return Picture(self.folder / "compare.png")

    def _title(self) -> str:
        return "Comparison, means over measures"

    def _head(self) -> Sequence[str]:
        return ("method", "harm", "over-refusal")

    def _rows(self) -> Iterable[Sequence[str]]:
        for row in self.content["methods"].values():
            means = row["means"]
            shown = ["-" if x is None else f"{100 * x:.0f} %" for x in means.values()]
            yield row["label"], *shown


def compare(
    model: Model,
    methods: str | Sequence[str] = "all",
    workdir: str | os.PathLike[str] | None = None,
    *,
    suite: str | os.PathLike[str] = "quick",
    seeds: Sequence[int] = (0,),
    judge: str | os.PathLike[str] = "phrases",
    **settings: Any,
) -> Comparison:
    """Make SafePatching and its rivals from one model and the same data, and measure them.

    Args:
      model: of `load`.
      methods: names or groups, see `safepatch compare --help`; backbone and safepatching are always
        among them.
      workdir: of the comparison; by default a folder 'comparison' in the model's. One that was
        begun is continued.
      suite, seeds, judge: as of `safepatch compare`.
      settings: by keyword; those of patch and derive first, see docs/api.md.

    Raises:
      ValueError: an unknown method, bad settings, data or suite; a workdir of another comparison.
    """
    from safepatch_jax.studies.compare import study
    from safepatch_jax.studies.compare.options import ComparisonOptions

    session = model.session.with_keywords(settings, _COMPARE, "compare")
    names = methods if isinstance(methods, str) else ",".join(methods)
    options = ComparisonOptions(names, os.fspath(suite), _seeds(seeds), os.fspath(judge))
    place = session.workdir / "comparison" if workdir is None else paths.resolve(workdir)
    return Comparison(study.compare(session.settings, place, options), place)
