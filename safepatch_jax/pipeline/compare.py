"""SafePatching and its rivals on one backbone, the same data and the same judge: each method made, answered, measured, tabled.

WORKDIR/answers/METHOD/[seed-N/]MEASURE.jsonl and the verdicts beside lie as `answering` has it; derived models and scores of a
seed are in WORKDIR/seeds/N while the comparison is under way. What is answered is not done again.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import shutil
import time
from typing import Any, Collection, Mapping, Sequence

import jax

from safepatch_jax import files, processes
from safepatch_jax.console import say, some
from safepatch_jax.data.records import load_records
from safepatch_jax.evaluation.engine import Contrasted, Engine, Sampling
from safepatch_jax.evaluation.measures import NotFinite
from safepatch_jax.evaluation.suites import Measure, load_suite
from safepatch_jax.methods.bench import Bench, Made, Method, NotMade
from safepatch_jax.methods.registry import METHODS, parse_methods
from safepatch_jax.patching.statistics import BadSettings
from safepatch_jax.pipeline import answering, compare_report, environment, metrics
from safepatch_jax.pipeline.answering import JUDGED, Lines, Sources, lines_of
from safepatch_jax.pipeline.job import PLACE, Job
from safepatch_jax.pipeline.stages import versions
from safepatch_jax.settings import Settings, read_config

ANSWERS, SEEDS, NOTES, CLAIM = "answers", "seeds", "notes", "comparison.json"
TIMED = ("patching", "decoding")  # groups whose ATGR is measured; of the others it is 1 by construction
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
        """Read COMPARE of a config file; without it the defaults. Raises ValueError for an unknown name."""
        given = read_config(path).get("COMPARE", {})
        fields = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(given.keys() - fields):
            raise ValueError(f"{path}: COMPARE has no '{unknown[0]}'; there are {', '.join(sorted(fields))}.")
        return cls(**{name: tuple(value) if name == "seeds" else value for name, value in given.items()})

    def replaced(self, given: Mapping[str, str]) -> Options:
        """Return these options with some replaced by what flags say. Raises ValueError for seeds that are no whole numbers."""
        given = dict(given)
        if "seeds" in given:
            try:
                given["seeds"] = tuple(map(int, given["seeds"].split(",")))
            except ValueError:
                raise ValueError(f"--seeds takes whole numbers with commas between, such as 0,1,2; got '{given['seeds']}'.") from None
        return dataclasses.replace(self, **given)

    def of(self, method: Method, settings: Settings) -> Settings:
        """Return the settings of a method.

        Raises:
          ValueError: a setting that is not the method's, or a bad value.
        """
        own = self.settings.get(method.name, {})
        if strange := [name for name in own if not method.takes(name)]:
            may = ", ".join(f"{name}*" if name.endswith(".") else name for name in method.options) or "none"
            raise ValueError(f"COMPARE, settings of {method.name}: {strange[0]} is not one that it takes alone ({may}). Give it for "
                             "all methods, in CONFIG or as a flag.")
        return settings.override(dict(method.settings), method.name).override(dict(own), f"COMPARE, settings of {method.name}")


def compare(settings: Settings, workdir: str | pathlib.Path, options: Options = Options(), command: Sequence[str] = (),
            ) -> dict[str, Any]:
    """Bring a comparison up to date and write its report; return the content of its report.

    Args:
      settings: of backbone, data, training, scores, and of SafePatching's own patch.
      workdir: of one comparison; more methods and seeds may be asked for later.
      options: see `Options`.
      command: with which it was started; it is noted.

    Raises:
      ValueError: bad settings, data, suite or method; a workdir of another comparison; or, after the report on all others, methods
        that could not be made.
    """
    workdir, suite, methods = pathlib.Path(workdir).expanduser().absolute(), load_suite(options.suite), parse_methods(options.methods)
    _check(settings, options, suite)
    for name in {*methods, *options.settings}:
        options.of(METHODS[name], settings)
    judges = answering.open_judges([options.judge], suite, mesh=settings.mesh.shape, compute_dtype=settings.model.compute_dtype,
                                   batch_size=settings.evaluate.batch_size)
    grader = answering.open_grader(options.grader, suite, options.suite)
    processes.agree({"--methods": methods, "--suite": [dataclasses.asdict(m) for m in suite], "--seeds": options.seeds,
                     "--judge": options.judge, "settings of methods": files.text_hash(options.settings)[:16],
                     "--workdir": str(workdir)}, "Start every process with the same command.")
    processes.on_first(lambda: _refuse_strangers(workdir))
    processes.shared(workdir)
    with processes.claimed(workdir):
        comparison = Comparison(settings, workdir, options, suite)
        processes.on_first(lambda: environment.write(workdir, command, comparison.base.context.sharder))
        failed = comparison.answer(methods)
        content = comparison.report(judges, grader, methods)
        comparison.clear()
    if failed:
        raise ValueError(f"{len(failed)} of {len(methods)} methods are not in the table for the reasons said above: {some(failed)}. "
                         "Leave them out of --methods, or change their settings.")
    return content


class Comparison:
    """A comparison that is under way, in a workdir that is claimed.

    Raises:
      ValueError: the workdir is of another comparison.
    """

    def __init__(self, settings: Settings, workdir: pathlib.Path, options: Options, suite: Sequence[Measure]):
        self.settings, self.workdir, self.options, self.suite = settings, workdir, options, tuple(suite)
        self._read = functools.cache(load_records)  # all seeds see the same records
        self.base = _Job(settings, workdir / SEEDS / "backbone", read=self._read)
        self.sources = Sources(settings.data.manual_dir, str(self.base.context.cache_dir / "datasets"))
        self.items = {m.name: self.sources.items(m) for m in suite if m.kind in (*answering.ROLES, "mt_bench")}
        self.backbone = self._backbone()
        processes.on_first(self._claim)

    def runs(self, method: Method) -> tuple[int | None, ...]:
        """Return the seeds with which a method is made; None for one without a draw."""
        return self.options.seeds if method.seeded else (None,)

    def measures(self, method: Method) -> list[Measure]:
        """Return what a method is measured on; a decoding rule has no part in likelihoods."""
        return [m for m in self.suite if method.group != "decoding" or m.kind in WRITTEN]

    def answer(self, methods: Sequence[str]) -> list[str]:
        """Make the methods and let them answer what is left; return the labels of those that could not be made."""
        todo, failed = [(METHODS[name], run) for name in methods for run in self.runs(METHODS[name])], {}
        left = sum(bool(self._left(method, run)) for method, run in todo)
        say(f"Compare: {len(methods)} methods on {', '.join(m.name for m in self.suite)}; {len(todo)} models, {left} with something "
            "left to do.")
        for number, (method, run) in enumerate(todo, 1):
            title = f"[{number}/{len(todo)}] {method.label}" + ("" if run is None else f", seed {run}")
            if method.name in failed:
                continue
            if not self._left(method, run):
                say(f"{title}: answered before")
                continue
            say(title)
            begun = time.monotonic()
            if reason := self._answered(method, run, title):
                failed[method.name] = method.label
                say(f"{title}: NOT MADE: {reason}")
            else:
                seconds = time.monotonic() - begun
                self._lines(method, "notes", run).add({"id": "made", "seconds": round(seconds, 1)})
                say(f"{title}: done in {seconds:.0f} s")
        return list(failed.values())

    def report(self, judges: dict[str, Any], grader: Any, methods: Sequence[str]) -> dict[str, Any]:
        """Judge all answers and write the report on the methods that were asked for, and on others that are there."""
        there = [m for m in METHODS.values() if (m.name in methods or processes.on_first((self.workdir / ANSWERS / m.name).is_dir))
                 and not any(self._left(m, run) for run in self.runs(m))]
        judged = [(m.name, x, run) for m in there for x in self.measures(m) if x.kind in JUDGED for run in self.runs(m)]
        ((text, judge),) = judges.items()
        processes.on_first(lambda: answering.claim_judges([text], self.workdir))
        verdicts = answering.judge_answers(text, judge, judged, self.items, self.workdir)
        grades = {(m.name, x.name): [answering.grade_answers(grader, x, self.items[x.name], m.name, run, self.workdir)
                                     for run in self.runs(m)]
                  for m in there for x in self.measures(m) if x.kind == "mt_bench"}
        answers = {(m.name, x.name): [lines_of(self.workdir, ANSWERS, m.name, x, run).rows for run in self.runs(m)]
                   for m in there for x in self.measures(m)}
        notes = {m.name: [self._lines(m, "notes", run).rows for run in self.runs(m)] for m in there}
        about = {
            "settings": _told(self.settings), "overrides": {m.name: self._own(m) for m in there}, "suite": self.options.suite,
            "seeds": list(self.options.seeds), "judge": text, "grader": grader.name if grader else "", "versions": versions(),
            "data": {role: len(records) for role, records in self.base.context.records.items()}}
        content = compare_report.gather(there, [(m, self.measures) for m in self.suite], self.items, answers, verdicts, grades, notes,
                                        about)
        processes.on_first(lambda: compare_report.write(content, self.workdir))
        for line in compare_report.summary(content):
            say(line)
        say(f"Report: {self.workdir / compare_report.FILES[0]}")
        return content

    def clear(self) -> None:
        """Delete derived models and scores, and the answers of jailbroken models, unless the run keeps scratch."""
        if self.settings.run.keep_scratch:
            say(f"Derived models and scores are kept in {self.workdir / SEEDS}: jailbroken and broken models, handle with care.")
            return
        processes.on_first(lambda: shutil.rmtree(self.workdir / SEEDS, ignore_errors=True))
        for method in (m for m in METHODS.values() if m.jailbroken):
            for run in self.runs(method):
                for measure in (m for m in self.suite if m.kind in JUDGED):
                    if processes.on_first((self.workdir / ANSWERS / method.name).is_dir):
                        lines_of(self.workdir, ANSWERS, method.name, measure, run).blank("answer")
        say("Deleted: derived models, scores, and the answers of the OSM patch alone (keep with --run.keep_scratch). The answers of "
            f"the others are in {self.workdir / ANSWERS}: some of these models are broken or harmful; handle with care.")

    # -- one method -----------------------------------------------------------------------------------------------------

    def _left(self, method: Method, run: int | None) -> list[Measure]:
        """Return the measures that a method has not wholly answered; each once more where its time is not taken."""
        if not processes.on_first((self.workdir / ANSWERS / method.name).is_dir):
            return self.measures(method)
        return [m for m in self.measures(method) if not answering.is_done(
            m, self.items.get(m.name, {}), lines_of(self.workdir, ANSWERS, method.name, m, run))]

    def _answered(self, method: Method, run: int | None, title: str) -> str | None:
        """Make a method and let it answer; return why it cannot be made, the same in all processes."""
        reason = None
        try:
            self._answer(method, run, title)
        except (NotMade, NotFinite, BadSettings) as error:
            reason = str(error)
        return next(filter(None, processes.everyones(reason)), None)

    def _answer(self, method: Method, run: int | None, title: str) -> None:
        job, steps = self._job(self.options.seeds[0] if run is None else run), self.workdir / SEEDS / "steps" / method.name / str(run)
        bench = Bench(job, self.options.of(method, job.settings), steps, self.workdir / NOTES)
        made = method.make(bench)
        backbone = bench.engine()
        engine = self._engine(backbone, made)
        for measure in self._left(method, run):
            lines = lines_of(self.workdir, ANSWERS, method.name, measure, run)
            other = backbone if measure.kind == "text" else None
            answering.answer(measure, self.items.get(measure.name, {}), lines, engine, other, self.sources, Sampling(),
                             f"{title}: {measure.name}")
        notes = self._lines(method, "notes", run)
        if "atgr" not in notes.rows and run in (None, self.options.seeds[0]) and method.group in TIMED:
            params = None if made.params is None else engine.params
            new = max(m.max_new for m in self.suite if m.kind in JUDGED)
            ratio, least, most = backbone.atgr(made.rule, made.expert, new, _REPEATS, params=params)
            notes.add({"id": "atgr", "ratio": ratio, "least": least, "most": most})
        processes.on_first(lambda: shutil.rmtree(steps, ignore_errors=True))

    def _engine(self, backbone: Engine, made: Made) -> Engine | Contrasted:
        if made.rule is not None:
            return Contrasted(backbone, made.rule, made.expert)
        if made.params is None:
            return backbone
        kept = self.settings.export.dtype
        stored = jax.tree.map(lambda x, own: x.astype(own.dtype if kept == "keep" else kept), made.params, backbone.params)
        return Engine(backbone.config, stored, self.backbone, self.base.context.sharder, self.settings.model.compute_dtype,
                      self.settings.evaluate.batch_size)

    def _backbone(self) -> pathlib.Path:
        """Bring the backbone into place: imported, and aligned where the settings say so."""
        self.base.runner.finish(["import"] + (["align"] if self.settings.align.enabled else []))
        return self.base.backbone

    @functools.cache
    def _job(self, seed: int) -> Job:
        settings = self.settings.override({"model.source": f"hf:{self.backbone}", "align.enabled": False, "run.seed": seed})
        return _Job(settings, self.workdir / SEEDS / str(seed), read=self._read)

    def _lines(self, method: Method, name: str, run: int | None) -> Lines:
        folder = self.workdir / NOTES / method.name
        return Lines(folder / f"{name}.jsonl" if run is None else folder / f"seed-{run}" / f"{name}.jsonl")

    def _own(self, method: Method) -> dict[str, Any]:
        """Return the settings in which a method differs from the run's."""
        return {**method.settings, **self.options.settings.get(method.name, {})}

    def _claim(self) -> None:
        """Write down what the workdir is for, or compare with what is there."""
        told = _told(self.settings)
        wanted = {
            "backbone": answering.fingerprint(self.backbone), "settings": {k: v for k, v in told.items() if k != "run.seed"},
            "suite": [dataclasses.asdict(m) for m in self.suite], "items": files.text_hash(self.items),
            "records": dict(self.base.context.data_hashes), "methods": {m.name: self._own(m) for m in METHODS.values()}}
        if fixed := {m.name: self.sources.hash(m) for m in self.suite if m.name not in self.items}:
            wanted["data"] = fixed
        path = self.workdir / CLAIM
        found = files.read_json(path) if path.is_file() else {}
        done = {name for name in found.get("methods", {}) if (self.workdir / ANSWERS / name).is_dir()}
        if found and (changed := _differences(found, json.loads(json.dumps(wanted)), done)):
            raise ValueError(f"{self.workdir} is a comparison with other {some(changed)}. Give another --workdir, or delete it.")
        files.write_json(path, wanted | {"versions": versions()})


class _Job(Job):
    """The stages of a backbone and a seed, in a comparison's workdir, which is claimed as a whole."""

    def _claim_workdir(self, update: bool) -> None:
        self.workdir.mkdir(parents=True, exist_ok=True)


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any], done: Collection[str]) -> list[str]:
    """Say in what two claims differ: of settings, and of the methods that are done, which; of the others the name alone."""
    lines = []
    for name, value in wanted.items():
        old = found.get(name)
        if old == value:
            continue
        if name in ("settings", "methods") and isinstance(old, dict):
            lines += [f"{name} ({key}: {old.get(key)} there, {value.get(key)} here)" for key in {**old, **value}
                      if old.get(key) != value.get(key) and (name == "settings" or key in done)]
        else:
            lines.append(name)
    return lines


def _told(settings: Settings) -> dict[str, Any]:
    return {k: v for k, v in settings.flat().items() if not k.startswith(PLACE)}


def _check(settings: Settings, options: Options, suite: Sequence[Measure]) -> None:
    """Raise ValueError for what else would show only after some models were made."""
    if not settings.model.source:
        raise ValueError("No model given. Set --model.source to a Hugging Face folder, a .gguf file, or 'smollm2'.")
    if settings.patch.merge != "safepatching":
        raise ValueError(f"patch.merge is {settings.patch.merge}, and the comparison has the baselines beside SafePatching: leave it "
                         "out, and pick methods with --methods.")
    if not options.seeds or len(set(options.seeds)) < len(options.seeds) or min(options.seeds) < 0:
        raise ValueError(f"--seeds must be different whole numbers, 0 at least, got '{','.join(map(str, options.seeds))}'.")
    if unknown := sorted(options.settings.keys() - METHODS.keys()):
        raise ValueError(f"COMPARE, settings: there is no method '{unknown[0]}'; there are {', '.join(METHODS)}.")
    if not any(m.kind == "harm" for m in suite) or not any(m.kind == "refusal" for m in suite):
        raise ValueError(f"suite {options.suite}: a comparison needs a measure of kind harm and one of kind refusal.")
    answering.check_names(suite, options.suite)


def _refuse_strangers(workdir: pathlib.Path) -> None:
    """Raise ValueError if a folder holds what no comparison has put there."""
    ours = {ANSWERS, SEEDS, NOTES, CLAIM, "verdicts", "grades", files.LOCK, environment.FILE, metrics.FILE, *compare_report.FILES}
    found = {p.name for p in workdir.iterdir()} if workdir.is_dir() else set()
    if strange := sorted(name for name in found - ours if not files.half_written(name)):
        raise ValueError(f"{workdir} holds files that are not of a comparison ({some(strange, ', ')}); use a new or empty --workdir.")
