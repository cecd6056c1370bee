"""A comparison that is under way: methods made, answered, timed and reported in one workdir."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import shutil
import statistics
import time
from collections.abc import Sequence
from typing import Any

from safepatch_jax.data.cells import key
from safepatch_jax.data.records import load_records
from safepatch_jax.evaluation import answers
from safepatch_jax.evaluation.answers import JUDGED, Sources
from safepatch_jax.evaluation.contrasted import Contrasted
from safepatch_jax.evaluation.decoding import Rule
from safepatch_jax.evaluation.engine import Engine
from safepatch_jax.evaluation.generate import Sampling
from safepatch_jax.evaluation.lines import Lines, blank, lines_of, verdicts_of
from safepatch_jax.evaluation.suites import Measure
from safepatch_jax.evaluation.timing import atgr
from safepatch_jax.methods.bench import Bench, Method, Product
from safepatch_jax.methods.registry import METHODS
from safepatch_jax.methods.stored import as_stored
from safepatch_jax.models.table import param_table, unnest
from safepatch_jax.outcome import outcome_settings
from safepatch_jax.run import notes
from safepatch_jax.run.job import open_run
from safepatch_jax.run.metrics import Metrics
from safepatch_jax.run.stages import versions
from safepatch_jax.run.state import Run
from safepatch_jax.runtime import files, processes
from safepatch_jax.runtime.console import duration, say
from safepatch_jax.settings import Settings
from safepatch_jax.studies.compare import record, report
from safepatch_jax.studies.compare.attempt import not_made
from safepatch_jax.studies.compare.options import ComparisonOptions
from safepatch_jax.studies.compare.record import ANSWERS, NOTES, STEPS

SEEDS = "seeds"
TIMED = ("patching", "decoding")  # groups whose ATGR is measured; of others it is 1 by construction
WRITTEN = ("harm", "refusal", "mt_bench")  # kinds of measures that a decoding rule changes
_REPEATS = 5  # of the ATGR


class Comparison:
    """A comparison that is under way, in a workdir that is claimed.

    Args:
      methods: those that will be asked for.
      recorded: where training is recorded.
      others: see `compare`.

    Raises:
      ValueError: the workdir is of another comparison; prompts that are trained on; a batch that
        does not fit the mesh.
    """

    def __init__(
        self,
        settings: Settings,
        workdir: pathlib.Path,
        options: ComparisonOptions,
        suite: Sequence[Measure],
        methods: Sequence[str] = (),
        recorded: Metrics | None = None,
    ):
        self.settings, self.workdir, self.options = settings, workdir, options
        self.suite, self._metrics = tuple(suite), recorded
        self._read = functools.cache(load_records)  # all seeds see the same records
        self.base = open_run(settings, workdir / SEEDS / "backbone", read=self._read)
        self.base.metrics = recorded
        data_dir = str(self.base.context.cache_dir / "datasets")
        self.sources = Sources(settings.data.manual_dir, data_dir)
        self.items = {}
        for measure in suite:
            if measure.kind in (*answers.ROLES, "mt_bench"):
                self.items[measure.name] = self.sources.items(measure)
        self._refuse_trained_prompts()
        for name in methods:
            self._check_batches(METHODS[name])
        # Before hours of alignment; the backbone's hash is compared after it.
        processes.on_first(self._check_record)
        notes.tell(self.base)
        self.backbone = self._make_backbone()
        processes.on_first(self._write_record)
        self._runs: dict[int, Run] = {}

    def runs(self, method: Method) -> tuple[int | None, ...]:
        """Return the seeds with which a method is made; None for one without a draw."""
        return self.options.seeds if method.seeded else (None,)

    def measures(self, method: Method) -> list[Measure]:
        """Return what a method is measured on; a decoding rule does not change likelihoods."""
        if method.group != "decoding":
            return list(self.suite)
        return [measure for measure in self.suite if measure.kind in WRITTEN]

    def answer(self, methods: Sequence[str]) -> list[str]:
        """Make the methods and let them answer what is missing; return the labels of those that
        could not be made."""
        todo = []
        for name in methods:
            for seed in self.runs(METHODS[name]):
                todo.append((METHODS[name], seed))
        missing = sum(self._is_unfinished(method, seed) for method, seed in todo)
        say(
            f"Compare: {len(methods)} methods on {'; '.join(m.name for m in self.suite)}. "
            f"{len(todo)} models, {missing} with something left to do."
        )
        failures: dict[str, str] = {}
        seconds: list[float] = []
        for number, (method, seed) in enumerate(todo, 1):
            title = f"[{number}/{len(todo)}] {method.label}"
            if seed is not None:
                title += f", seed {seed}"
            if method.name in failures:
                continue
            if not self._is_unfinished(method, seed):
                say(f"{title}: answered before")
                continue
            say(title)
            missing -= 1
            begun = time.monotonic()
            reason = not_made(method, functools.partial(self._answer, method, seed, title))
            if reason:
                failures[method.name] = method.label
                say(f"{title}: NOT MADE: {reason}")
                continue
            seconds.append(time.monotonic() - begun)
            self._note_time(method, seed, seconds[-1])
            pace = f"{title}: done in {seconds[-1]:.0f} s"
            if missing:
                pace += f", {duration(missing * statistics.median(seconds))} left"
            say(pace)
        return list(failures.values())

    def report(self, judges: dict[str, Any], grader: Any, methods: Sequence[str]) -> dict[str, Any]:
        """Judge all answers and write the report on the methods that were asked for, and on others
        that are there."""
        rows = self._complete(methods)
        ((text, judge),) = judges.items()
        processes.on_first(answers.claim_judges, {text: judge}, self.workdir)
        judged, given, grades, notes = [], {}, {}, {}
        for method in rows:
            seeds = self.runs(method)
            for measure in self.measures(method):
                key = (method.name, measure.name)
                if measure.kind in JUDGED:
                    judged += [(method.name, measure, seed) for seed in seeds]
                if measure.kind == "mt_bench":
                    grades[key] = [self._grades(grader, method, measure, seed) for seed in seeds]
        verdicts = answers.judge_answers(text, judge, judged, self.items, self.workdir)
        for method in rows:
            seeds = self.runs(method)
            for measure in self.measures(method):
                lines = [
                    lines_of(self.workdir, ANSWERS, method.name, measure, seed) for seed in seeds
                ]
                given[method.name, measure.name] = [x.rows for x in lines]
            times = [self._notes(method, seed).rows.get("made", {}) for seed in seeds]
            notes[method.name] = {
                "seconds": [row.get("seconds") for row in times],
                "atgr": self._atgr(method),
            }
        about = self._about(rows, text, grader) | {"judge_sees_content": judge.tells_content}
        suite = [(measure, self.measures) for measure in self.suite]
        content = report.gather(rows, suite, self.items, given, verdicts, grades, notes, about)
        processes.on_first(report.write, content, self.workdir)
        for line in report.summary(content):
            say(line)
        say(f"Report: {self.workdir / report.FILES[0]}")
        return content

    def _complete(self, methods: Sequence[str]) -> list[Method]:
        """Return the methods that have answered everything with every seed, and name the others."""
        rows, lacking = [], []
        for method in METHODS.values():
            begun = processes.on_first((self.workdir / ANSWERS / method.name).is_dir)
            if method.name not in methods and not begun:
                continue
            if not any(self._missing(method, seed) for seed in self.runs(method)):
                rows.append(method)
            elif method.name not in methods:
                lacking.append(method.label)
        if lacking:
            seeds = ", ".join(map(str, self.options.seeds))
            say(
                f"Not in the table, as they are not there with all of seeds {seeds}: "
                f"{', '.join(lacking)}. Ask for them with --methods, or for fewer seeds."
            )
        return rows

    def _grades(
        self, grader: Any, method: Method, measure: Measure, seed: int | None
    ) -> dict[str, Any]:
        questions = self.items[measure.name]
        return answers.grade_answers(grader, measure, questions, method.name, seed, self.workdir)

    def _about(self, rows: Sequence[Method], judge: str, grader: Any) -> dict[str, Any]:
        """Return what the report says of settings, seeds, judge and versions."""
        records = self.base.context.records
        return {
            "settings": outcome_settings(self.settings),
            "overrides": {method.name: self.options.differences(method) for method in rows},
            "suite": self.options.suite,
            "seeds": list(self.options.seeds),
            "judge": judge,
            "grader": grader.name if grader else "",
            "versions": versions(),
            "data": {role: len(of_role) for role, of_role in records.items()},
        }

    def clear(self) -> None:
        """Delete derived models and scores, and the answers of jailbroken models, unless the run
        keeps scratch."""
        if self.settings.run.keep_scratch:
            say(
                f"Derived models and scores are kept in {self.workdir / SEEDS}: jailbroken and "
                "broken models, handle with care."
            )
            return
        processes.on_first(self._delete)
        say(
            "Deleted: derived models, scores, and the answers of the OSM patch alone (keep with "
            f"--run.keep_scratch). The answers of the others are in {self.workdir / ANSWERS}: some "
            "of these models are broken or harmful; handle with care."
        )

    def _delete(self) -> None:
        record.delete_seeds(self.workdir / SEEDS)
        for method in METHODS.values():
            if method.jailbroken:
                folder = self.workdir / ANSWERS / method.name
                for path in sorted(folder.rglob("*.jsonl")):  # of all seeds
                    files.refuse_link(path, self.workdir)
                    blank(path, "answer")

    def _missing(self, method: Method, seed: int | None) -> list[Measure]:
        """Return the measures that a method has not wholly answered."""
        measures = self.measures(method)
        if not processes.on_first((self.workdir / ANSWERS / method.name).is_dir):
            return measures
        missing = []
        for measure in measures:
            items = self.items.get(measure.name, {})
            if not answers.is_done(measure, items, self._answers(method, measure, seed)):
                missing.append(measure)
        return missing

    def _is_unfinished(self, method: Method, seed: int | None) -> bool:
        return bool(self._missing(method, seed)) or self._is_untimed(method, seed)

    def _is_untimed(self, method: Method, seed: int | None) -> bool:
        """Tell whether the time of a method's token is still to be taken; one seed is enough."""
        if method.group not in TIMED or seed not in (None, self.options.seeds[0]):
            return False
        return self._atgr(method) is None

    def _answers(self, method: Method, measure: Measure, seed: int | None) -> Lines:
        """Return the answers that are there, without those that were deleted before this judge
        judged them."""
        lines = lines_of(self.workdir, ANSWERS, method.name, measure, seed)
        if method.jailbroken and measure.kind in JUDGED:
            kind = verdicts_of(self.options.judge)
            judged = lines_of(self.workdir, kind, method.name, measure, seed).rows
            rows = {}
            for i, row in lines.rows.items():
                if "answer" in row or "left_out" in row or i in judged:
                    rows[i] = row
            lines.rows = rows
        return lines

    def _answer(self, method: Method, seed: int | None, title: str) -> None:
        """Make a method and let it answer."""
        run = self._run(self.options.seeds[0] if seed is None else seed)
        settings = self.options.settings_of(method, run.settings)
        digest = files.text_hash(settings.flat())[:16]
        steps = self.workdir / SEEDS / STEPS / f"{method.name}-{seed}-{digest}"
        bench = Bench(run, settings, steps, self.workdir / NOTES)
        made = method.make(bench)  # training needs the room that the backbone takes
        backbone = bench.engine()
        made = Product(
            self._as_stored(made.params, backbone, run.settings.run.seed),
            made.rule,
            self._as_stored(made.expert, backbone, run.settings.run.seed),
        )
        engine = self._engine(backbone, made)
        for measure in self._missing(method, seed):
            other = backbone if measure.kind == "text" else None
            answers.answer(
                measure,
                self.items.get(measure.name, {}),
                self._answers(method, measure, seed),
                engine,
                other,
                self.sources,
                Sampling(),
                f"{title}: {measure.name}",
            )
        if self._is_untimed(method, seed):
            self._time(method, seed, backbone, made)
        processes.on_first(shutil.rmtree, steps, True)

    def _time(self, method: Method, seed: int | None, backbone: Engine, made: Product) -> None:
        """Measure the ATGR of a method and note it."""
        new = max(measure.max_new for measure in self.suite if measure.kind in JUDGED)
        params = None if made.rule else made.params
        ratio, least, most = atgr(backbone, made.rule, made.expert, new, _REPEATS, params=params)
        row = {"id": "atgr", "ratio": ratio, "least": least, "most": most}
        self._notes(method, seed).add(row)

    def _as_stored(self, params: Any, backbone: Engine, seed: int) -> Any:
        """Return weights as they would be exported; None stays."""
        if params is None:
            return None
        export = self.settings.export
        dtypes = {path: x.dtype for path, x in unnest(backbone.params).items()}
        if export.dtype != "keep":
            dtypes = dict.fromkeys(dtypes, export.dtype)
        return as_stored(params, param_table(backbone.config), dtypes, export.rounding, seed)

    def _engine(self, backbone: Engine, made: Product) -> Engine | Contrasted:
        rule: Rule | None = made.rule
        if rule is not None:
            return Contrasted(backbone, rule, made.expert)
        if made.params is None:
            return backbone
        return self.base.context.engine(self.backbone, made.params)

    def _make_backbone(self) -> pathlib.Path:
        """Bring the backbone into place: imported, and aligned where the settings say so."""
        stages = [name for name in ("import", "align") if name in self.base.runner.stages]
        self.base.runner.finish(stages)
        return self.base.backbone

    def _source(self) -> str:
        """Return the backbone as the runs of the seeds are given it."""
        if self.base.source.origin and not self.settings.align.enabled:
            return self.base.source.origin
        return f"hf:{self.backbone}"

    def _run(self, seed: int) -> Run:
        """Return the run that makes derived models and scores of a seed."""
        if seed not in self._runs:
            settings = self.settings.override(
                {
                    "model.source": self._source(),
                    "align.enabled": False,
                    "run.seed": seed,
                }
            )
            folder = self.workdir / SEEDS / str(seed)
            self._runs[seed] = open_run(settings, folder, read=self._read)
            if self._metrics is not None:
                self._runs[seed].metrics = self._metrics.labelled(f"seed-{seed}")
        return self._runs[seed]

    def _notes(self, method: Method, seed: int | None) -> Lines:
        """Return what is noted of a method made with a seed: how long it took, its ATGR."""
        folder = self.workdir / NOTES / method.name
        if seed is not None:
            folder /= f"seed-{seed}"
        return Lines(folder / "notes.jsonl")

    def _note_time(self, method: Method, seed: int | None, seconds: float) -> None:
        notes = self._notes(method, seed)
        before = notes.rows.get("made", {}).get("seconds", 0.0)
        notes.add({"id": "made", "seconds": round(before + seconds, 1)})

    def _atgr(self, method: Method) -> dict[str, Any] | None:
        """Return the ATGR that was measured with some seed."""
        return processes.on_first(_read_atgr, self.workdir / NOTES / method.name)

    def _check_batches(self, method: Method) -> None:
        settings = self.options.settings_of(method, self.settings)
        try:
            self.base.context.with_settings(settings).check_batches()
        except ValueError as error:
            raise ValueError(f"{method.label}: {error}") from error

    def _refuse_trained_prompts(self) -> None:
        """Raise ValueError if a measure holds prompts on which models are trained."""
        trained = set()
        for role in ("harmful", "ordinary"):
            trained |= {record.key for record in self.base.context.split(role, "train")}
        for measure in self.suite:
            if measure.kind not in answers.ROLES:
                continue
            items = self.items[measure.name].values()
            count = sum(key(item["prompt"], item.get("turns", ())) in trained for item in items)
            if count:
                raise ValueError(
                    f"suite {self.options.suite}: {count} of the {len(items)} prompts of "
                    f'\'{measure.name}\' are trained on. Give the measure "split": "report", or '
                    "other data."
                )

    def _record(self) -> dict[str, Any]:
        """Return what the workdir is for, but for the backbone's hash."""
        settings = outcome_settings(self.settings)
        if not self.settings.align.enabled:
            del settings["run.seed"]  # each seed is a run of its own
        wanted = {
            "settings": settings,
            "suite": [dataclasses.asdict(measure) for measure in self.suite],
            "items": files.text_hash(self.items),
            "records": dict(self.base.context.data_hashes),
            "methods": {name: self.options.differences(m) for name, m in METHODS.items()},
        }
        fixed = {}
        for measure in self.suite:
            if measure.name not in self.items:
                fixed[measure.name] = self.sources.hash(measure)
        if fixed:
            wanted["data"] = fixed
        return wanted

    def _check_record(self) -> None:
        record.check(self.workdir, self._record())

    def _write_record(self) -> None:
        wanted = self._record() | {"backbone": answers.fingerprint(self.backbone)}
        record.write(self.workdir, wanted, self.base.context.sharder)


def _read_atgr(folder: pathlib.Path) -> dict[str, Any] | None:
    for path in sorted(folder.rglob("notes.jsonl")):
        if row := Lines(path).rows.get("atgr"):
            return row
    return None
