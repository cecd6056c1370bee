"""SafePatching and its rivals on one backbone, the same data and the same judge: each method made,
answered, measured, tabled.

WORKDIR/answers/METHOD/[seed-N/]MEASURE.jsonl and the verdicts beside lie as `answering` has it;
derived models and scores of a seed are in WORKDIR/seeds/N while the comparison is under way. What
is answered is not done again.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import shutil
import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax

from safepatch_jax.data.records import load_records
from safepatch_jax.evaluation import answers as answering
from safepatch_jax.evaluation.answers import JUDGED, Sources
from safepatch_jax.evaluation.contrasted import Contrasted
from safepatch_jax.evaluation.decoding import Rule
from safepatch_jax.evaluation.engine import Engine
from safepatch_jax.evaluation.generate import Sampling
from safepatch_jax.evaluation.lines import Lines, blank, check_names, lines_of, verdicts_of
from safepatch_jax.evaluation.suites import Measure, load_suite
from safepatch_jax.evaluation.timing import atgr
from safepatch_jax.methods.bench import Bench, Method, NotMade
from safepatch_jax.methods.registry import METHODS, parse_methods
from safepatch_jax.numerics import NotFinite
from safepatch_jax.patching.statistics import BadSettings
from safepatch_jax.run import environment
from safepatch_jax.run.job import PLACE, Job
from safepatch_jax.run.stages import KEYED, versions
from safepatch_jax.runtime import files, processes
from safepatch_jax.runtime.console import duration, say, some
from safepatch_jax.settings import Settings, read_config
from safepatch_jax.studies.compare import report as compare_report

ANSWERS, SEEDS, NOTES, CLAIM = "answers", "seeds", "notes", "comparison.json"
TIMED = (
    "patching",
    "decoding",
)  # groups whose ATGR is measured; of the others it is 1 by construction
WRITTEN = ("harm", "refusal", "mt_bench")  # kinds that a decoding rule has a part in
_REPEATS = 5  # of the ATGR


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compared; a config file may hold them as a dictionary COMPARE.

    Attributes:
      methods: see `parse_methods`.
      suite: see `load_suite`.
      seeds: of training, scores and random retention; each seeded method is made once with each.
      judge, grader: see `open_judge` and `mt_bench.open_grader`.
      settings: {method: {'group.option': value}}: settings of one method alone.
    """

    methods: str = "all"
    suite: str = "quick"
    seeds: tuple[int, ...] = (0,)
    judge: str = "phrases"
    grader: str = ""
    settings: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, path: str | pathlib.Path) -> Options:
        """Read COMPARE of a config file; without it the defaults. Raises ValueError for an unknown
        name or another form."""
        given = read_config(path).get("COMPARE", {})
        texts = {
            name: (lambda x: isinstance(x, str), "a text")
            for name in ("methods", "suite", "judge", "grader")
        }
        forms = texts | {
            "seeds": (
                lambda x: isinstance(x, (list, tuple)) and all(type(v) is int for v in x),
                "whole numbers: (0, 1, 2)",
            ),
            "settings": (
                lambda x: isinstance(x, dict) and all(isinstance(v, dict) for v in x.values()),
                "{method: {'group.option': value}}",
            ),
        }
        if not isinstance(given, dict):
            raise ValueError(
                f"{path}: COMPARE must be a dictionary with {', '.join(forms)}, got {given!r}."
            )
        if unknown := sorted(map(str, given.keys() - forms.keys())):
            raise ValueError(
                f"{path}: COMPARE has no '{unknown[0]}'; there are {', '.join(sorted(forms))}."
            )
        for name, value in given.items():
            holds, form = forms[name]
            if not holds(value):
                raise ValueError(f"{path}: COMPARE, {name} must be {form}, got {value!r}.")
        return cls(
            **{name: tuple(value) if name == "seeds" else value for name, value in given.items()}
        )

    def replaced(self, given: Mapping[str, str]) -> Options:
        """Return these options with some replaced by what flags say. Raises ValueError for seeds
        that are no whole numbers."""
        given = dict(given)
        if "seeds" in given:
            text = given["seeds"]
            try:
                given["seeds"] = tuple(map(int, text.split(",")))
            except ValueError:
                raise ValueError(
                    f"--seeds takes whole numbers with commas between, such as 0,1,2; got '{text}'."
                ) from None
        return dataclasses.replace(self, **given)

    def of(self, method: Method, settings: Settings) -> Settings:
        """Return the settings of a method.

        Raises:
          ValueError: a setting that is not the method's, or a bad value.
        """
        own = self.settings.get(method.name, {})
        for name in (name for name in own if name not in method.options):
            settings.override(
                {name: own[name]}, f"COMPARE, settings of {method.name}"
            )  # raises where there is no such setting
            raise ValueError(
                f"COMPARE, settings of {method.name}: {name} is not one that it takes alone "
                f"({', '.join(method.options) or 'none'}). Give it for all methods, in CONFIG or "
                "as a flag."
            )
        return settings.override(dict(method.settings), method.name).override(
            dict(own), f"COMPARE, settings of {method.name}"
        )


def compare(
    settings: Settings,
    workdir: str | pathlib.Path,
    options: Options = Options(),
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """Bring a comparison up to date and write its report; return the content of its report.

    Args:
      settings: of backbone, data, training, scores, and of SafePatching's own patch.
      workdir: of one comparison; more methods and seeds may be asked for later.
      options: see `Options`.
      command: with which it was started; it is noted.

    Raises:
      ValueError: bad settings, data, suite or method; a workdir of another comparison; or, after
        the report on all others, methods that could not be made.
    """
    workdir = pathlib.Path(workdir).expanduser().absolute()
    suite, methods = load_suite(options.suite), parse_methods(options.methods)
    _check(settings, options, suite)
    for name in dict.fromkeys((*methods, *options.settings)):
        options.of(METHODS[name], settings)
    judges = answering.open_judges(
        [options.judge],
        suite,
        mesh=settings.mesh.shape,
        compute_dtype=settings.model.compute_dtype,
        batch_size=settings.evaluate.batch_size,
    )
    grader = answering.open_grader(options.grader, suite, options.suite)
    processes.agree(
        {
            "--methods": methods,
            "--suite": [dataclasses.asdict(m) for m in suite],
            "--seeds": options.seeds,
            "--judge": options.judge,
            "settings of methods": files.text_hash(options.settings)[:16],
            "--workdir": str(workdir),
        },
        "Start every process with the same command.",
    )
    processes.on_first(lambda: _refuse_strangers(workdir))
    processes.shared(workdir)
    with processes.claimed(workdir):
        try:
            comparison = Comparison(settings, workdir, options, suite, methods)
            processes.on_first(
                lambda: environment.write(workdir, command, comparison.base.context.sharder)
            )
            failed = comparison.answer(methods)
            content = comparison.report(judges, grader, methods)
        except BaseException:
            if any((workdir / SEEDS).glob("*/stages/*/*")) or any(
                (workdir / SEEDS / "steps").rglob("*")
            ):
                say(
                    "The comparison did not finish. Derived models or scores lie in "
                    f"{workdir / SEEDS}, answers in "
                    f"{workdir / ANSWERS}: the same command goes on from there; else delete them, "
                    "they are of jailbroken or broken "
                    "models."
                )
            raise
        comparison.clear()
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(methods)} methods are not in the table for the reasons said "
            "above: "
            f"{some(failed)}. Leave them out of --methods, or change their settings."
        )
    return content


class Comparison:
    """A comparison that is under way, in a workdir that is claimed.

    Args:
      methods: those that will be asked for.
      others: see `compare`.

    Raises:
      ValueError: the workdir is of another comparison; prompts that are trained on; a batch that
        does not fit the mesh.
    """

    def __init__(
        self,
        settings: Settings,
        workdir: pathlib.Path,
        options: Options,
        suite: Sequence[Measure],
        methods: Sequence[str] = (),
    ):
        self.settings, self.workdir, self.options, self.suite = (
            settings,
            workdir,
            options,
            tuple(suite),
        )
        self._read = functools.cache(load_records)  # all seeds see the same records
        self.base = _Job(settings, workdir / SEEDS / "backbone", read=self._read)
        self.sources = Sources(
            settings.data.manual_dir, str(self.base.context.cache_dir / "datasets")
        )
        self.items = {
            m.name: self.sources.items(m) for m in suite if m.kind in (*answering.ROLES, "mt_bench")
        }
        self._refuse_seen()
        for name in methods:
            self._check_batches(METHODS[name])
        processes.on_first(lambda: self._claim(None))  # before hours of alignment
        self.backbone = self._backbone()
        processes.on_first(lambda: self._claim(answering.fingerprint(self.backbone)))
        self._jobs: dict[int, Job] = {}

    def runs(self, method: Method) -> tuple[int | None, ...]:
        """Return the seeds with which a method is made; None for one without a draw."""
        return self.options.seeds if method.seeded else (None,)

    def measures(self, method: Method) -> list[Measure]:
        """Return what a method is measured on; a decoding rule has no part in likelihoods."""
        return [m for m in self.suite if method.group != "decoding" or m.kind in WRITTEN]

    def answer(self, methods: Sequence[str]) -> list[str]:
        """Make the methods and let them answer what is left; return the labels of those that could
        not be made."""
        todo, failed = (
            [(METHODS[name], run) for name in methods for run in self.runs(METHODS[name])],
            {},
        )
        left, taken = sum(self._unfinished(method, run) for method, run in todo), []
        say(
            f"Compare: {len(methods)} methods on {'; '.join(m.name for m in self.suite)}. "
            f"{len(todo)} models, {left} with "
            "something left to do."
        )
        for number, (method, run) in enumerate(todo, 1):
            title = f"[{number}/{len(todo)}] {method.label}" + (
                "" if run is None else f", seed {run}"
            )
            if method.name in failed:
                continue
            if not self._unfinished(method, run):
                say(f"{title}: answered before")
                continue
            say(title)
            begun, left = time.monotonic(), left - 1
            if reason := self._answered(method, run, title):
                failed[method.name] = method.label
                say(f"{title}: NOT MADE: {reason}")
            else:
                taken.append(time.monotonic() - begun)
                notes = self._notes(method, run)
                notes.add(
                    {
                        "id": "made",
                        "seconds": round(
                            notes.rows.get("made", {}).get("seconds", 0.0) + taken[-1], 1
                        ),
                    }
                )
                rest = f", {duration(left * statistics.median(taken))} left" if left else ""
                say(f"{title}: done in {taken[-1]:.0f} s{rest}")
        return list(failed.values())

    def report(self, judges: dict[str, Any], grader: Any, methods: Sequence[str]) -> dict[str, Any]:
        """Judge all answers and write the report on the methods that were asked for, and on others
        that are there."""
        begun = [
            m
            for m in METHODS.values()
            if m.name in methods or processes.on_first((self.workdir / ANSWERS / m.name).is_dir)
        ]
        there = [m for m in begun if not any(self._left(m, run) for run in self.runs(m))]
        if lacking := [m.label for m in begun if m not in there and m.name not in methods]:
            say(
                "Not in the table, as they are not there with all of seeds "
                f"{', '.join(map(str, self.options.seeds))}: "
                f"{', '.join(lacking)}. Ask for them with --methods, or for fewer seeds."
            )
        judged = [
            (m.name, x, run)
            for m in there
            for x in self.measures(m)
            if x.kind in JUDGED
            for run in self.runs(m)
        ]
        ((text, judge),) = judges.items()
        processes.on_first(lambda: answering.claim_judges([text], self.workdir))
        verdicts = answering.judge_answers(text, judge, judged, self.items, self.workdir)
        grades = {
            (m.name, x.name): [
                answering.grade_answers(grader, x, self.items[x.name], m.name, run, self.workdir)
                for run in self.runs(m)
            ]
            for m in there
            for x in self.measures(m)
            if x.kind == "mt_bench"
        }
        answers = {
            (m.name, x.name): [
                lines_of(self.workdir, ANSWERS, m.name, x, run).rows for run in self.runs(m)
            ]
            for m in there
            for x in self.measures(m)
        }
        notes = {
            m.name: {
                "seconds": [
                    self._notes(m, run).rows.get("made", {}).get("seconds") for run in self.runs(m)
                ],
                "atgr": self._atgr(m),
            }
            for m in there
        }
        about = {
            "settings": _told(self.settings),
            "overrides": {m.name: self._own(m) for m in there},
            "suite": self.options.suite,
            "seeds": list(self.options.seeds),
            "judge": text,
            "grader": grader.name if grader else "",
            "versions": versions(),
            "data": {role: len(records) for role, records in self.base.context.records.items()},
        }
        content = compare_report.gather(
            there,
            [(m, self.measures) for m in self.suite],
            self.items,
            answers,
            verdicts,
            grades,
            notes,
            about,
        )
        processes.on_first(lambda: compare_report.write(content, self.workdir))
        for line in compare_report.summary(content):
            say(line)
        say(f"Report: {self.workdir / compare_report.FILES[0]}")
        return content

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
            "--run.keep_scratch). The answers "
            f"of the others are in {self.workdir / ANSWERS}: some of these models are broken or "
            "harmful; handle with care."
        )

    def _delete(self) -> None:
        if (self.workdir / SEEDS).is_dir():
            shutil.rmtree(self.workdir / SEEDS)
        for method in (m for m in METHODS.values() if m.jailbroken):
            for path in sorted(
                (self.workdir / ANSWERS / method.name).rglob("*.jsonl")
            ):  # of all seeds
                blank(path, "answer")

    # -- one method
    # -----------------------------------------------------------------------------------------------------

    def _left(self, method: Method, run: int | None) -> list[Measure]:
        """Return the measures that a method has not wholly answered."""
        if not processes.on_first((self.workdir / ANSWERS / method.name).is_dir):
            return self.measures(method)
        return [
            m
            for m in self.measures(method)
            if not answering.is_done(m, self.items.get(m.name, {}), self._answers(method, m, run))
        ]

    def _unfinished(self, method: Method, run: int | None) -> bool:
        return bool(self._left(method, run)) or self._untimed(method, run)

    def _untimed(self, method: Method, run: int | None) -> bool:
        """Tell whether the time of a method's token is still to be taken; one seed is enough."""
        return (
            method.group in TIMED
            and run in (None, self.options.seeds[0])
            and self._atgr(method) is None
        )

    def _answers(self, method: Method, measure: Measure, run: int | None) -> Lines:
        """Return the answers that are there, without those that were deleted before this judge
        judged them."""
        lines = lines_of(self.workdir, ANSWERS, method.name, measure, run)
        if method.jailbroken and measure.kind in JUDGED:
            judged = lines_of(
                self.workdir, verdicts_of(self.options.judge), method.name, measure, run
            ).rows
            lines.rows = {
                i: row
                for i, row in lines.rows.items()
                if "answer" in row or "left_out" in row or i in judged
            }
        return lines

    def _answered(self, method: Method, run: int | None, title: str) -> str | None:
        """Make a method and let it answer; return why it cannot be made, the same in all
        processes."""
        reason = None
        try:
            self._answer(method, run, title)
        except (NotMade, NotFinite, BadSettings) as error:
            reason = str(error)
        return next(filter(None, processes.everyones(reason)), None)

    def _answer(self, method: Method, run: int | None, title: str) -> None:
        job = self._job(self.options.seeds[0] if run is None else run)
        settings = self.options.of(method, job.settings)
        steps = (
            self.workdir
            / SEEDS
            / "steps"
            / f"{method.name}-{run}-{files.text_hash(settings.flat())[:16]}"
        )
        bench = Bench(job, settings, steps, self.workdir / NOTES)
        made = [method.make(bench)]
        backbone, rule = bench.engine(), made[0].rule
        expert = self._stored(made[0].expert, backbone)
        engine = self._engine(
            backbone, rule, expert, self._stored(made.pop().params, backbone)
        )  # those in float32 are let go
        for measure in self._left(method, run):
            other = backbone if measure.kind == "text" else None
            answering.answer(
                measure,
                self.items.get(measure.name, {}),
                self._answers(method, measure, run),
                engine,
                other,
                self.sources,
                Sampling(),
                f"{title}: {measure.name}",
            )
        if self._untimed(method, run):
            new = max(m.max_new for m in self.suite if m.kind in JUDGED)
            ratio, least, most = atgr(
                backbone, rule, expert, new, _REPEATS, params=None if rule else engine.params
            )
            self._notes(method, run).add(
                {"id": "atgr", "ratio": ratio, "least": least, "most": most}
            )
        processes.on_first(lambda: shutil.rmtree(steps, ignore_errors=True))

    def _stored(self, params: Any, backbone: Engine) -> Any:
        """Return weights in the dtype in which they would be exported."""
        dtype = self.settings.export.dtype
        return params and jax.tree.map(
            lambda x, own: x.astype(own.dtype if dtype == "keep" else dtype),
            params,
            backbone.params,
        )

    def _engine(
        self, backbone: Engine, rule: Rule | None, expert: Any, params: Any
    ) -> Engine | Contrasted:
        if rule is not None:
            return Contrasted(backbone, rule, expert)
        if params is None:
            return backbone
        return Engine(
            backbone.config,
            params,
            self.backbone,
            self.base.context.sharder,
            self.settings.model.compute_dtype,
            self.settings.evaluate.batch_size,
        )

    def _backbone(self) -> pathlib.Path:
        """Bring the backbone into place: imported, and aligned where the settings say so."""
        self.base.runner.finish(["import"] + (["align"] if self.settings.align.enabled else []))
        return self.base.backbone

    def _job(self, seed: int) -> Job:
        if seed not in self._jobs:
            settings = self.settings.override(
                {"model.source": f"hf:{self.backbone}", "align.enabled": False, "run.seed": seed}
            )
            self._jobs[seed] = _Job(settings, self.workdir / SEEDS / str(seed), read=self._read)
        return self._jobs[seed]

    def _notes(self, method: Method, run: int | None) -> Lines:
        """Return what is noted of a run of a method: how long it took, its ATGR."""
        return Lines(
            self.workdir
            / NOTES
            / method.name
            / ("." if run is None else f"seed-{run}")
            / "notes.jsonl"
        )

    def _own(self, method: Method) -> dict[str, Any]:
        """Return the settings in which a method differs from the run's."""
        return {**method.settings, **self.options.settings.get(method.name, {})}

    def _atgr(self, method: Method) -> dict[str, Any] | None:
        """Return the ATGR that was measured with some seed."""
        return processes.on_first(
            lambda: next(
                (
                    row
                    for path in sorted((self.workdir / NOTES / method.name).rglob("notes.jsonl"))
                    for row in files.read_jsonl(path)
                    if row["id"] == "atgr"
                ),
                None,
            )
        )

    def _check_batches(self, method: Method) -> None:
        try:
            self.base.context.with_settings(self.options.of(method, self.settings)).check_batches()
        except ValueError as error:
            raise ValueError(f"{method.label}: {error}") from error

    def _refuse_seen(self) -> None:
        """Raise ValueError if a measure holds prompts on which models are trained."""
        roles = ("harmful", "ordinary")
        trained = {r.prompt for role in roles for r in self.base.context.split(role, "train")}
        for measure in (m for m in self.suite if m.kind in answering.ROLES):
            if seen := sum(item["prompt"] in trained for item in self.items[measure.name].values()):
                raise ValueError(
                    f"suite {self.options.suite}: {seen} of the {len(self.items[measure.name])} "
                    "prompts of "
                    f'\'{measure.name}\' are trained on. Give the measure "split": "report", or '
                    "other data."
                )

    def _claim(self, backbone: str | None) -> None:
        """Write down what the workdir is for, or compare with what is there; without a backbone
        compare alone.

        A method counts as done when one of its runs is wholly answered; what others left of other
        settings is deleted.
        """
        told = _told(self.settings)
        wanted = {
            "settings": {
                k: v for k, v in told.items() if k != "run.seed" or self.settings.align.enabled
            },
            "suite": [dataclasses.asdict(m) for m in self.suite],
            "items": files.text_hash(self.items),
            "records": dict(self.base.context.data_hashes),
            "methods": {m.name: self._own(m) for m in METHODS.values()},
        }
        if fixed := {m.name: self.sources.hash(m) for m in self.suite if m.name not in self.items}:
            wanted["data"] = fixed
        if backbone:
            wanted["backbone"] = backbone
        wanted, path = json.loads(json.dumps(wanted)), self.workdir / CLAIM
        found = files.read_json(path) if path.is_file() else {}
        made = {
            name
            for name in found.get("methods", {})
            if any(
                row["id"] == "made"
                for x in (self.workdir / NOTES / name).rglob("notes.jsonl")
                for row in files.read_jsonl(x)
            )
        }
        if found and (changed := _differences(found, wanted, made)):
            raise ValueError(
                f"{self.workdir} is a comparison with other {some(changed)}. Give another "
                "--workdir, or delete it."
            )
        if not backbone:
            return
        for name, own in found.get("methods", {}).items():
            if name not in made and own != wanted["methods"].get(name):
                for kind in (ANSWERS, NOTES, "verdicts/*", "grades/*"):
                    for left in self.workdir.glob(f"{kind}/{name}"):
                        shutil.rmtree(left)
        mesh = self.base.context.sharder.mesh
        where = {
            "mesh": dict(mesh.shape),
            "devices": mesh.devices.flat[0].device_kind,
            "versions": {name: versions()[name] for name in KEYED},
        }
        before = found.get("where", {})
        if any(where.get(name) != value for name, value in before.items()):
            say(
                f"NOTE: this comparison was begun on {before}; what is trained now, on {where}, "
                "may differ from that in the last "
                "bits."
            )
        files.write_json(path, wanted | {"where": found.get("where", where)})


class _Job(Job):
    """The stages of a backbone and a seed, in a comparison's workdir, which is claimed as a
    whole."""

    def _claim_workdir(self, update: bool) -> None:
        self.workdir.mkdir(parents=True, exist_ok=True)


def _differences(
    found: Mapping[str, Any], wanted: Mapping[str, Any], done: Collection[str]
) -> list[str]:
    """Say in what two claims differ: of settings, and of the methods that are done, which; of the
    others the name alone."""
    lines = []
    for name, value in wanted.items():
        old = found.get(name)
        if old == value:
            continue
        if name in ("settings", "methods") and isinstance(old, dict):
            lines += [
                f"{name} ({key}: {old.get(key)} there, {value.get(key)} here)"
                for key in {**old, **value}
                if old.get(key) != value.get(key) and (name == "settings" or key in done)
            ]
        else:
            lines.append(name)
    return lines


def _told(settings: Settings) -> dict[str, Any]:
    return {k: v for k, v in settings.flat().items() if not k.startswith(PLACE)}


def _check(settings: Settings, options: Options, suite: Sequence[Measure]) -> None:
    """Raise ValueError for what else would show only after some models were made."""
    if not settings.model.source:
        raise ValueError(
            "No model given. Set --model.source to a Hugging Face folder, a .gguf file, or "
            "'smollm2'."
        )
    if settings.patch.merge != "safepatching":
        raise ValueError(
            f"patch.merge is {settings.patch.merge}, and the comparison has the baselines beside "
            "SafePatching: leave "
            "it out, and pick methods with --methods."
        )
    if not options.seeds or len(set(options.seeds)) < len(options.seeds) or min(options.seeds) < 0:
        raise ValueError(
            "--seeds must be different whole numbers, 0 at least, got "
            f"'{','.join(map(str, options.seeds))}'."
        )
    if unknown := sorted(options.settings.keys() - METHODS.keys()):
        raise ValueError(
            f"COMPARE, settings: there is no method '{unknown[0]}'; there are {', '.join(METHODS)}."
        )
    if not any(m.kind == "harm" for m in suite) or not any(m.kind == "refusal" for m in suite):
        raise ValueError(
            f"suite {options.suite}: a comparison needs a measure of kind harm and one of kind "
            "refusal."
        )
    check_names(suite, options.suite)


def _refuse_strangers(workdir: pathlib.Path) -> None:
    """Raise ValueError if a folder holds what no comparison has put there."""
    ours = {
        ANSWERS,
        SEEDS,
        NOTES,
        CLAIM,
        "verdicts",
        "grades",
        files.LOCK,
        environment.FILE,
        *compare_report.FILES,
    }
    found = {p.name for p in workdir.iterdir()} if workdir.is_dir() else set()
    if strange := sorted(name for name in found - ours if not files.half_written(name)):
        raise ValueError(
            f"{workdir} holds files that are not of a comparison ({some(strange, ', ')}); use a "
            "new or empty "
            "--workdir."
        )
