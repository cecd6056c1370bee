"""The margin map of a model, beside another one: forward passes over all prompts of a suite.

OUT holds the openings, and the rows of 'model' and 'against' as JSONL, from which a killed map is
resumed: margins of the suite's harmful and harmless prompts, the NLL of harmful contents and of
ordinary answers. report.md, report.json and report.png follow from these.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from safepatch_jax.data import cells
from safepatch_jax.data.chat import Example
from safepatch_jax.evaluation.answers import JUDGED, ROLES, Sources, fingerprint, too_long
from safepatch_jax.evaluation.engine import Engine
from safepatch_jax.evaluation.jailbreaks import FORMS
from safepatch_jax.evaluation.likelihoods import answer_likelihoods
from safepatch_jax.evaluation.lines import Lines, check_names, lines_of
from safepatch_jax.evaluation.margins import margins
from safepatch_jax.evaluation.openings import WRITTEN, Openings, find_openings, some_of
from safepatch_jax.evaluation.suites import Measure, load_suite
from safepatch_jax.io import hub
from safepatch_jax.run.stages import versions
from safepatch_jax.runtime import files, processes
from safepatch_jax.runtime.console import say
from safepatch_jax.runtime.paths import resolve
from safepatch_jax.runtime.workdir import Workdir
from safepatch_jax.studies.evaluate.models import check_model, open_model
from safepatch_jax.studies.evaluate.report import labels
from safepatch_jax.studies.margins import report
from safepatch_jax.studies.margins.options import MarginOptions
from safepatch_jax.studies.record import refuse_other

RECORD, OPENINGS = "margin_map.json", "openings.json"
_NAMES = (RECORD, OPENINGS, "margins", "contents", *report.FILES)
_FIX = "Give another --out, or delete the folder: all is computed again."


def margin_map(
    model: str,
    out: str | pathlib.Path,
    options: MarginOptions = MarginOptions(),
    against: str = "",
) -> dict[str, Any]:
    """Map the margins of a model, and of another one on the same prompts with the same openings.

    Args:
      model: a Hugging Face folder or a checkpoint of launch.convert.
      out: the map's folder; one that was begun with the same models and options is resumed.
      options: see `MarginOptions`.
      against: the model before it was patched, whose openings are taken; '' for none.

    Returns:
      the content of report.json.

    Raises:
      ValueError: bad suite, data or model; a suite without harmful or harmless prompts; a folder of
        something else.
    """
    folders = {"model": hub.folder_of(model)}
    if against:
        folders["against"] = hub.folder_of(against)
    study = _MarginMap(resolve(out), folders, options)
    folder = Workdir(
        out, "a margin map", RECORD, _NAMES, "--out", study.check_record, declared=(RECORD,)
    )
    with folder.claimed():
        return study.run()


class _MarginMap:
    """The margin map of one or two models in a folder."""

    def __init__(self, out: pathlib.Path, folders: Mapping[str, str], options: MarginOptions):
        self._out, self._folders, self._options = out, dict(folders), options
        self._suite = [m for m in load_suite(options.suite) if m.kind in ROLES]
        check_names(self._suite, options.suite)
        plain = {measure.kind for measure in self._suite if measure.form == "plain"}
        for kind, what in (("harm", "harmful"), ("refusal", "harmless")):
            if kind not in plain:
                raise ValueError(
                    f"suite {options.suite} has no measure of kind {kind} and form plain: a margin "
                    f"map compares {what} prompts with the others. Add one, as in --suite=gate."
                )
        for folder in folders.values():
            check_model(folder, options.date, [options.prompt_format], asks=True)
        sources = Sources(options.manual_dir, options.data_dir)
        self._items = {measure.name: sources.items(measure) for measure in self._suite}

    @functools.cached_property
    def _record(self) -> dict[str, Any]:
        """What the folder is for; later calls of the command must fit it."""
        return {
            "models": {who: fingerprint(folder) for who, folder in self._folders.items()},
            "suite": [dataclasses.asdict(measure) for measure in self._suite],
            "options": self._options.deciding(),
            "items": files.text_hash(self._items),
        }

    def check_record(self) -> None:
        """Raise ValueError if the folder is of a margin map of something else."""
        refuse_other(self._out / RECORD, self._record, "a margin map", "--out", _FIX)

    def run(self) -> dict[str, Any]:
        """Compute what is missing; write the report and return its content."""
        processes.on_first(self._write_record)
        for who in reversed(self._folders):  # the openings are those of the model before
            self._read(who)
        content = report.gather(
            self._suite,
            self._rows("margins", JUDGED),
            self._rows("contents", tuple(ROLES)),
            {
                "models": labels(self._folders),
                "options": {"suite": self._options.suite} | self._options.deciding(),
                "openings": processes.on_first(files.read_json, self._out / OPENINGS, _FIX),
                "versions": versions(),
            },
        )
        processes.on_first(report.write, content, self._out)
        say(f"Report: {self._out / 'report.md'}")
        return content

    def _write_record(self) -> None:
        if not (self._out / RECORD).is_file():
            files.write_json(self._out / RECORD, self._record | {"versions": versions()})

    def _rows(self, kind: str, measures: Sequence[str]) -> dict[tuple[str, str], dict[str, Any]]:
        rows = {}
        for who in self._folders:
            for measure in self._suite:
                if measure.kind in measures:
                    rows[who, measure.name] = self._lines(kind, who, measure).rows
        return rows

    def _lines(self, kind: str, who: str, measure: Measure) -> Lines:
        return lines_of(self._out, kind, who, measure, None)

    def _read(self, who: str) -> None:
        """Let one model read what it has not read yet; it is not loaded if nothing is missing."""
        engine = functools.cache(functools.partial(self._open, self._folders[who]))
        for measure in self._suite:
            items, title = self._items[measure.name], f"{who}: {measure.name}"
            if measure.kind in JUDGED:
                lines = self._lines("margins", who, measure)
                missing = {i: item for i, item in items.items() if i not in lines.rows}
                if missing:
                    openings = self._openings(engine())
                    self._margins(engine(), measure, missing, openings, lines, title)
            lines = self._lines("contents", who, measure)
            missing = {}
            for i, item in items.items():
                if i not in lines.rows and item["answer"]:
                    missing[i] = item
            if missing:
                self._contents(engine(), measure, missing, lines, f"{title}, answers")

    def _open(self, folder: str) -> Engine:
        return open_model(folder, self._options, self._options.prompt_format)

    def _openings(self, engine: Engine) -> Openings:
        """Return the openings, of the first model that is asked for them."""
        path = self._out / OPENINGS
        if processes.on_first(path.is_file):
            return Openings.from_dict(processes.on_first(files.read_json, path, _FIX))
        if any(self._rows("margins", JUDGED).values()):
            raise ValueError(f"{path} is gone, with whose openings margins were taken. {_FIX}")
        prompts = []
        for kind in JUDGED:
            measure = next(m for m in self._suite if m.kind == kind)
            for item in some_of(list(self._items[measure.name].values())):
                ids = engine.ask_talk(_talk(measure, item))
                if len(ids) + WRITTEN <= engine.config.max_length:
                    prompts.append(ids)
        openings = find_openings(engine, prompts, "openings")
        processes.on_first(files.write_json, path, openings.to_dict(engine.decode))
        return openings

    def _margins(
        self,
        engine: Engine,
        measure: Measure,
        items: Mapping[str, Any],
        openings: Openings,
        lines: Lines,
        title: str,
    ) -> None:
        prompts = {}
        for i, item in items.items():
            ids = engine.ask_talk(_talk(measure, item))
            if len(ids) + openings.longest <= engine.config.max_length:
                prompts[i] = ids
            else:
                lines.add(too_long(i))
        names = list(prompts)

        def keep(k: int, row: Mapping[str, float]) -> None:
            lines.add({"id": names[k]} | row)

        margins(engine, list(prompts.values()), openings, title, keep)

    def _contents(
        self,
        engine: Engine,
        measure: Measure,
        items: Mapping[str, Any],
        lines: Lines,
        title: str,
    ) -> None:
        forced = 0 if measure.kind == "text" else self._options.forced
        examples: dict[str, Example] = {}
        for i, item in items.items():
            pair = FORMS[measure.form](item["prompt"]), item["answer"], item.get("turns", ())
            whole = engine.needed_chat().encode(*pair)
            example = dataclasses.replace(
                whole, answer_ids=whole.answer_ids[: self._options.longest]
            )
            if example.length + 1 > engine.config.max_length:
                lines.add(too_long(i))
            elif len(example.answer_ids) <= forced:
                lines.add({"id": i, "left_out": "no token after the opening"})
            else:
                examples[i] = example
        names = list(examples)

        def keep(k: int, row: Mapping[str, float]) -> None:
            lines.add({"id": names[k]} | row)

        if examples:
            answer_likelihoods(engine, list(examples.values()), None, title, keep, forced)


def _talk(measure: Measure, item: Mapping[str, Any]) -> Any:
    return cells.talk(FORMS[measure.form](item["prompt"]), item.get("turns", ()))
