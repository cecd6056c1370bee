"""Evaluation of a model, beside another one.

Answers, verdicts and grades lie in OUT as `evaluation.answers` has it, of 'model' and 'against',
with several seeds a run for each of what is sampled, with several templates all in each of them;
report.md, report.json and report.png follow from these.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from safepatch_jax.data.prompt_format import PromptFormat
from safepatch_jax.evaluation import answers
from safepatch_jax.evaluation.answers import JUDGED, ROLES, companions
from safepatch_jax.evaluation.engine import Engine
from safepatch_jax.evaluation.lines import Lines, check_names, lines_of
from safepatch_jax.evaluation.suites import GENERATED, Measure, load_suite
from safepatch_jax.evaluation.timing import seconds_per_token
from safepatch_jax.io import hub
from safepatch_jax.mesh import make_mesh
from safepatch_jax.models.config import read_hf_config, same_architecture
from safepatch_jax.reporting import charts
from safepatch_jax.run.stages import versions
from safepatch_jax.runtime import files, processes
from safepatch_jax.runtime.console import say
from safepatch_jax.runtime.paths import resolve
from safepatch_jax.runtime.workdir import Workdir
from safepatch_jax.studies.evaluate import report, side_by_side
from safepatch_jax.studies.evaluate.models import check_model, open_model
from safepatch_jax.studies.evaluate.options import EvaluationOptions
from safepatch_jax.studies.record import refuse_other

RECORD = "evaluation.json"
_FIX = (
    "Copy it back from a backup, give another --out, or delete the folder: all is answered again."
)
_REPORT = ("report.md", "report.json", "report*.png")
_NAMES = (RECORD, "answers", "verdicts", "grades", *_REPORT)


def evaluate(
    model: str,
    out: str | pathlib.Path,
    options: EvaluationOptions = EvaluationOptions(),
    against: str = "",
) -> dict[str, Any]:
    """Evaluate a model, and another one on the same items.

    Args:
      model: a Hugging Face folder or a checkpoint of launch.convert.
      out: the evaluation's folder; one that was begun with the same models and options is resumed.
      options: see `EvaluationOptions`.
      against: the model to compare with, such as the backbone; '' for none.

    Returns:
      the content of report.json.

    Raises:
      ValueError: bad suite, data, model or judge; a folder of another evaluation, or one in which
        another process is at work.
    """
    charts.check()
    suite = load_suite(options.suite)
    folders = {"model": hub.folder_of(model)}
    if against:
        folders["against"] = hub.folder_of(against)
    evaluation = _Evaluation(resolve(out), folders, suite, options)
    folder = Workdir(
        out,
        "an evaluation",
        RECORD,
        _NAMES,
        "--out",
        evaluation.check_record,
        declared=(RECORD, answers.JUDGE),
    )
    with folder.claimed():
        return evaluation.run()


def inputs(
    folders: Mapping[str, str],
    suite: Sequence[Measure],
    options: EvaluationOptions,
    items: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return what an evaluation is of: models, measures and their data, by hash, and options.

    Args:
      folders: of the models, by what they are called.
      suite, options: see `evaluate`.
      items: by measure, see `_items`; read where they are not given.
    """
    record = {
        "models": {who: answers.fingerprint(folder) for who, folder in folders.items()},
        "suite": [dataclasses.asdict(measure) for measure in suite],
        "options": options.deciding(),
        "items": files.text_hash(_items(suite, options) if items is None else items),
    }
    data = {}
    for measure in suite:
        if measure.kind not in ROLES:
            data[measure.name] = options.sources.hash(measure)
    return record | ({"data": data} if data else {})


def _items(suite: Sequence[Measure], options: EvaluationOptions) -> dict[str, Any]:
    """Return the records of the measures that are asked prompt by prompt."""
    return {m.name: options.sources.items(m) for m in suite if m.kind in ROLES}


class _Evaluation:
    """An evaluation of one or two models in a folder.

    Judges and data are opened and checked at once, before hours of answering.
    """

    def __init__(
        self,
        out: pathlib.Path,
        folders: Mapping[str, str],
        suite: Sequence[Measure],
        options: EvaluationOptions,
    ):
        self._out, self._folders = out, dict(folders)
        self._suite, self._options = suite, options
        texts = [options.judge]
        if options.second_judge:
            texts.append(options.second_judge)
        self._judges = answers.open_judges(
            texts,
            suite,
            mesh=options.mesh,
            compute_dtype=options.compute_dtype,
            batch_size=options.batch_size,
        )
        self._of_content = [text for text, x in self._judges.items() if x.tells_content]
        self._grader = answers.open_grader(options.grader, suite, options.suite)
        _check(suite, folders, options)
        self._items = _items(suite, options)

    @functools.cached_property
    def _record(self) -> dict[str, Any]:
        """What the folder is for; later calls of the command must fit it."""
        return inputs(self._folders, self._suite, self._options, self._items)

    def check_record(self) -> None:
        """Raise ValueError if the folder is of an evaluation of something else."""
        refuse_other(self._out / RECORD, self._record, "an evaluation", "--out", _FIX)

    def _write_record(self) -> None:
        if not (self._out / RECORD).is_file():
            files.write_json(self._out / RECORD, self._record | {"versions": versions()})
        answers.claim_judges(self._judges, self._out)

    def run(self) -> dict[str, Any]:
        """Answer, judge and grade what is missing; write the report and return its content."""
        processes.on_first(self._write_record)
        for measure in self._suite:
            if measure.kind == "mt_bench":
                self._items[measure.name] = self._options.sources.items(measure)
        conditions = self._conditions()
        for who in reversed(self._folders):
            self._answer(who, conditions)
        content = self._gather()
        processes.on_first(side_by_side.write, content, self._out)
        for line in side_by_side.result(content):
            say(line)
        say(f"Report: {self._out / 'report.md'}")
        return content

    def _gather(self) -> dict[str, Any]:
        judged, grades, given, speeds = [], {}, {}, {}
        for label in self._options.formats:
            for who in self._folders:
                place = self._options.place(who, label)
                for measure in self._suite:
                    seeds, key = self._options.runs(measure), (place, measure.name)
                    if measure.kind in JUDGED:
                        judged += [(place, measure, seed) for seed in seeds]
                    if measure.kind == "mt_bench":
                        grades[key] = [self._grades(place, measure, seed) for seed in seeds]
                    given[key] = [self._lines(place, measure, seed).rows for seed in seeds]
                speeds[who] = self._speed(who).rows.get("speed")
        names, verdicts = list(self._judges), {}
        for text in names:
            judge = self._judges.pop(text)  # so that its memory is free before the next one's
            verdicts[text] = answers.judge_answers(text, judge, judged, self._items, self._out)
            del judge
        contents = {}
        for label in self._options.formats:
            parts = given, *verdicts.values(), grades
            given_here, *verdicts_here, grades_here = (self._of(label, part) for part in parts)
            contents[label] = report.gather(
                self._suite,
                self._items,
                given_here,
                dict(zip(names, verdicts_here)),
                speeds,
                self._about(names, label),
                grades_here,
            )
        return side_by_side.merge(contents)

    def _of(self, label: str, by_place: Mapping[tuple[str, str], Any]) -> dict[Any, Any]:
        """Return what is of one template, by (model, measure)."""
        result = {}
        for who in self._folders:
            place = self._options.place(who, label)
            for measure in self._suite:
                if (place, measure.name) in by_place:
                    result[who, measure.name] = by_place[place, measure.name]
        return result

    def _about(self, names: Sequence[str], label: str) -> dict[str, Any]:
        """Return what a report says of models, options and versions; `names` are the judges'."""
        about = {
            "models": report.labels(self._folders),
            "options": {"suite": self._options.suite} | self._options.deciding(),
            "judges": names,
            "judges_of_content": self._of_content,
            "versions": versions(),
        }
        if self._options.seeds:
            about["seeds"] = list(self._options.seeds)
        if self._grader:
            about["grader"] = self._grader.name
        prompt_format = self._options.formats[label]
        if label or prompt_format.key():
            about["prompts"] = prompt_format.describe()
        return about

    def _lines(self, place: str, measure: Measure, seed: int | None) -> Lines:
        return lines_of(self._out, "answers", place, measure, seed)

    def _grades(self, place: str, measure: Measure, seed: int | None) -> dict[str, Any]:
        questions = self._items[measure.name]
        return answers.grade_answers(self._grader, measure, questions, place, seed, self._out)

    def _speed(self, who: str) -> Lines:
        return Lines(self._out / "answers" / who / "speed.jsonl")

    def _conditions(self) -> dict[str, Any] | None:
        """Return how models are timed now; None where nothing is timed, or all was: then no model
        is loaded for it."""
        judged = any(measure.kind in JUDGED for measure in self._suite)
        if not judged or all("speed" in self._speed(who).rows for who in self._folders):
            return None
        mesh = make_mesh(self._options.mesh)
        return {
            "batch_size": self._options.batch_size,
            "mesh": dict(mesh.shape),
            "device": mesh.devices.flat[0].device_kind,
        }

    def _answer(self, who: str, conditions: Mapping[str, Any] | None) -> None:
        """Let one model do what is not done yet, and time it unless that was done under these
        conditions; it is not loaded if nothing is missing."""
        load = functools.cache(self._open)  # released on return
        for label in self._options.formats:
            self._answer_in(who, label, functools.cache(functools.partial(self._in, label, load)))
        speed = self._speed(who)
        if conditions and report.conditions(speed.rows.get("speed", {})) != conditions:
            seconds = seconds_per_token(load(self._folders[who]))
            speed.add({"id": "speed", "seconds_per_token": seconds, **conditions})

    def _answer_in(self, who: str, label: str, engine: Callable[[str], Engine]) -> None:
        """Let one model do what is not done yet in one template; `engine` returns the model of a
        folder."""
        folder, against = self._folders[who], self._folders.get("against", "")
        place = self._options.place(who, label)
        for measure in self._suite:
            for seed in self._options.runs(measure):
                lines, items = self._lines(place, measure, seed), self._items.get(measure.name, {})
                if answers.is_done(measure, items, lines):
                    continue
                title = f"{who}: {measure.name}"
                if label:
                    title += f", template {label}"
                if seed is not None:
                    title += f", seed {seed}"
                other = None
                if against and who == "model" and measure.kind == "text":
                    other = engine(against)
                answers.answer(
                    measure,
                    items,
                    lines,
                    engine(folder),
                    other,
                    self._options.sources,
                    self._options.sampling(seed),
                    title,
                )

    def _in(self, label: str, load: Callable[[str], Engine], folder: str) -> Engine:
        """Return a model that is asked in one template; its weights are loaded once for all."""
        engine = load(folder)
        return engine.with_format(self._options.formats[label]) if label else engine

    def _open(self, folder: str) -> Engine:
        prompt_format = self._options.formats.get("", PromptFormat())
        return open_model(folder, self._options, prompt_format)


def _check(
    suite: Sequence[Measure], folders: Mapping[str, str], options: EvaluationOptions
) -> None:
    """Raise ValueError for what else would show only after some answers."""
    options.check_seeds(any(measure.kind in GENERATED for measure in suite))
    check_names(suite, options.suite, {"speed": "the time of a token"})
    asks = any(measure.kind in (*ROLES, "mt_bench") for measure in suite)
    for folder in folders.values():
        check_model(folder, options.date, options.formats.values(), asks)
    texts = [measure.name for measure in suite if measure.kind == "text"]
    if texts:
        configs = [read_hf_config(companions(folder)) for folder in folders.values()]
        if not same_architecture(configs[0], configs[-1]):
            raise ValueError(
                f"'{texts[0]}' compares predictions, and {' and '.join(folders.values())} are of "
                "different architectures. Give --against the model that was patched, or a suite "
                "without kind 'text'."
            )
