"""The two sides of a gate: a model that is asked, or the stored answers of an evaluation."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from safepatch_jax.evaluation import answers
from safepatch_jax.evaluation.answers import JUDGE, ROLES
from safepatch_jax.evaluation.engine import Engine
from safepatch_jax.evaluation.lines import Lines, lines_of, verdicts_of
from safepatch_jax.evaluation.suites import Measure
from safepatch_jax.io import hub
from safepatch_jax.runtime import files, processes
from safepatch_jax.runtime.addresses import is_address
from safepatch_jax.runtime.console import some
from safepatch_jax.runtime.paths import readable, resolve
from safepatch_jax.studies.evaluate.models import check_model, open_model
from safepatch_jax.studies.evaluate.options import EvaluationOptions
from safepatch_jax.studies.evaluate.study import RECORD
from safepatch_jax.studies.gate.checks import SIDES
from safepatch_jax.studies.record import difference

Items = Mapping[str, Mapping[str, Any]]  # by prompt
_FIX = "Copy the evaluation's folder back from a backup, or give the model folder instead."
_FREE = ("name", "limit")  # of a measure: answers to a prompt do not depend on these


def is_stored(folder: str) -> bool:
    """Tell whether a folder is the output of launch.evaluate."""
    if is_address(folder):
        folder = readable(folder)
    return (resolve(folder) / RECORD).is_file()


class Asked:
    """A model that answers what is asked and not answered yet.

    Args:
      side: 'candidate' or 'against'.
      text: of the flag.
      options: see `EvaluationOptions`.
    """

    def __init__(self, side: str, text: str, options: EvaluationOptions):
        self._side, self._options = side, options
        self.folder = hub.folder_of(text)

    def check(self, suite: Sequence[Measure]) -> None:
        """Raise ValueError for what can be seen of the model before it is loaded."""
        asks = any(measure.kind in ROLES for measure in suite)
        check_model(self.folder, self._options.date, self._options.formats.values(), asks)

    @functools.cached_property
    def record(self) -> Any:
        return answers.fingerprint(self.folder)

    def has(self, measure: Measure) -> set[str] | None:
        """Return the prompts of a measure that can be had; None for all."""
        return None

    def answer(
        self, wanted: Sequence[tuple[Measure, Items]], out: pathlib.Path, judge: str
    ) -> None:
        """Add to the folder what it lacks of some measures; the model is not loaded if that is
        nothing."""
        load = functools.cache(self._open)  # released on return
        for measure, items in wanted:
            lines = lines_of(out, "answers", self._side, measure, None)
            if not answers.is_done(measure, items, lines):
                options, title = self._options, f"{self._side}: {measure.name}"
                answers.answer(
                    measure,
                    items,
                    lines,
                    load(),
                    None,
                    options.sources,
                    options.sampling(None),
                    title,
                )

    def _open(self) -> Engine:
        return open_model(self.folder, self._options, self._options.formats[""])


class Stored:
    """Answers of an evaluation that was made earlier; they are copied, with their verdicts.

    Args:
      side: 'candidate' or 'against'.
      text: of the flag: the evaluation's folder.
      who: 'model' or 'against', of the evaluation.
      options: with which the answers must have been given.
    """

    def __init__(self, side: str, text: str, who: str, options: EvaluationOptions):
        self._side, self._who, self._options = side, who, options
        self.folder = str(resolve(text))
        self._stored = processes.on_first(files.read_json, resolve(text) / RECORD, _FIX)
        if who not in self._stored["models"]:
            raise ValueError(
                f"--{side}={text}: that evaluation has no second model. Give two evaluations, or "
                "a model folder as --against."
            )
        self._measures: dict[str, Measure] = {}

    @property
    def record(self) -> Any:
        return self._stored["models"][self._who]

    def check(self, suite: Sequence[Measure]) -> None:
        """Raise ValueError unless all of the suite was measured, with the same options."""
        options, problems = self._options.deciding(), []
        if self._stored["options"] != options:
            problems.append(difference("options", self._stored["options"], options))
        known = {}
        for entry in self._stored["suite"]:
            measure = Measure(**entry)
            known[_key(measure)] = measure
        for measure in suite:
            if _key(measure) in known:
                self._measures[measure.name] = known[_key(measure)]
            else:
                problems.append(f"no measure like '{measure.name}'")
        if problems:
            raise ValueError(
                f"--{self._side}={self.folder}: the answers there do not fit ({some(problems)}). "
                "Give the suite and the options of that evaluation, or a model folder."
            )

    def has(self, measure: Measure) -> set[str] | None:
        """Return the prompts of a measure that are answered."""
        return set(self._lines(measure, "answers").rows)

    def _lines(self, measure: Measure, kind: str) -> Lines:
        return lines_of(
            pathlib.Path(self.folder), kind, self._who, self._measures[measure.name], None
        )

    def answer(
        self, wanted: Sequence[tuple[Measure, Items]], out: pathlib.Path, judge: str
    ) -> None:
        """Copy what the folder lacks of some measures, with the verdicts of a judge."""
        processes.on_first(self._copy_note, out, verdicts_of(judge))
        for measure, items in wanted:
            for kind in ("answers", verdicts_of(judge)):
                place = pathlib.Path(self.folder) / kind
                if not processes.on_first(place.is_dir):
                    continue
                lines = lines_of(out, kind, self._side, measure, None)
                for i, row in self._lines(measure, kind).rows.items():
                    if (i in items or measure.kind not in ROLES) and i not in lines.rows:
                        lines.add(row)

    def _copy_note(self, out: pathlib.Path, kind: str) -> None:
        """Copy what is noted of the judge, or compare with what is noted of the other side's."""
        note, copy = pathlib.Path(self.folder) / kind / JUDGE, out / kind / JUDGE
        if not note.is_file():
            return
        if not copy.is_file():
            files.write_text(copy, note.read_text(encoding="utf-8"))
        elif files.read_json(copy, _FIX) != files.read_json(note, _FIX):
            raise ValueError(
                f"{note} is not that of the other side's judge: its verdicts come from other "
                f"files. Judge both with one judge, or delete {note.parent}."
            )


def _key(measure: Measure) -> tuple[Any, ...]:
    """Return on what a measure's answers depend."""
    values = {name: getattr(measure, name) for name in measure.__dataclass_fields__}
    return tuple(value for name, value in values.items() if name not in _FREE)


def open_sides(
    candidate: str, against: str, options: EvaluationOptions
) -> dict[str, Asked | Stored]:
    """Return the two sides; an evaluation of two models that is given twice is both.

    Raises:
      ValueError: no such folder or model, or an evaluation of one model given twice.
    """
    texts = dict(zip(SIDES, (candidate, against)))
    twice = resolve(candidate) == resolve(against) if is_stored(candidate) else False
    sides: dict[str, Asked | Stored] = {}
    for side, text in texts.items():
        if is_stored(text):
            who = "against" if twice and side == SIDES[1] else "model"
            sides[side] = Stored(side, text, who, options)
        else:
            sides[side] = Asked(side, text, options)
    return sides
