"""SafePatching and its rivals on one backbone, the same data and the same judge: each method made,
answered, measured, tabled.

WORKDIR/answers/METHOD/[seed-N/]MEASURE.jsonl and the verdicts beside lie as `evaluation.answers`
has them; derived models and scores of a seed are in WORKDIR/seeds/N while the comparison is under
way. What is answered is not done again.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from safepatch_jax.evaluation import answers
from safepatch_jax.evaluation.lines import check_names
from safepatch_jax.evaluation.suites import Measure, load_suite
from safepatch_jax.methods.registry import METHODS, parse_methods
from safepatch_jax.run import environment, metrics
from safepatch_jax.run.agreement import SAME_COMMAND
from safepatch_jax.run.pins import pinned
from safepatch_jax.runtime import files, processes
from safepatch_jax.runtime.console import say, some
from safepatch_jax.runtime.paths import resolve
from safepatch_jax.runtime.workdir import Workdir
from safepatch_jax.settings import Settings
from safepatch_jax.studies.compare import report
from safepatch_jax.studies.compare.comparison import SEEDS, Comparison
from safepatch_jax.studies.compare.options import ComparisonOptions
from safepatch_jax.studies.compare.record import ANSWERS, NOTES, RECORD

_NAMES = (
    ANSWERS,
    SEEDS,
    NOTES,
    RECORD,
    "verdicts",
    "grades",
    metrics.FILE,
    metrics.EVENTS,
    environment.FILE,
    *report.FILES,
)


def compare(
    settings: Settings,
    workdir: str | pathlib.Path,
    options: ComparisonOptions = ComparisonOptions(),
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """Bring a comparison up to date and write its report; return the content of its report.

    Args:
      settings: of backbone, data, training, scores, and of SafePatching's own patch.
      workdir: of one comparison; more methods and seeds may be asked for later.
      options: see `ComparisonOptions`.
      command: with which it was started; it is noted.

    Raises:
      ValueError: bad settings, data, suite or method; a workdir of another comparison; or, after
        the report on all others, methods that could not be made.
    """
    settings = pinned(settings, resolve(workdir) / RECORD)
    suite, methods = load_suite(options.suite), parse_methods(options.methods)
    _check(settings, options, suite)
    for name in dict.fromkeys((*methods, *options.settings)):
        options.settings_of(METHODS[name], settings)
    judges = answers.open_judges(
        [options.judge],
        suite,
        mesh=settings.mesh.shape,
        compute_dtype=settings.model.compute_dtype,
        batch_size=settings.evaluate.batch_size,
    )
    grader = answers.open_grader(options.grader, suite, options.suite)
    declared = (RECORD, environment.FILE)
    folder = Workdir(workdir, "a comparison", RECORD, _NAMES, declared=declared)
    flags = {
        "--methods": methods,
        "--suite": [dataclasses.asdict(measure) for measure in suite],
        "--seeds": options.seeds,
        "--judge": options.judge,
        "settings of methods": files.text_hash(options.settings)[:16],
        "--workdir": str(folder.path),
    }
    processes.agree(flags, SAME_COMMAND)
    with folder.claimed():
        try:
            with metrics.Metrics(folder.path) as recorded:
                comparison = Comparison(settings, folder.path, options, suite, methods, recorded)
                sharder = comparison.base.context.sharder
                processes.on_first(environment.write, folder.path, command, sharder)
                failures = comparison.answer(methods)
            content = comparison.report(judges, grader, methods)
        except BaseException:
            _warn_of_scratch(folder.path)
            raise
        comparison.clear()
    if failures:
        raise ValueError(
            f"{len(failures)} of {len(methods)} methods are not in the table for the reasons "
            f"above: {some(failures)}. Leave them out of --methods, or change their settings."
        )
    return content


def _warn_of_scratch(workdir: pathlib.Path) -> None:
    seeds = workdir / SEEDS
    if any(seeds.glob("*/stages/*/*")) or any((seeds / "steps").rglob("*")):
        say(
            f"The comparison did not finish. Derived models or scores lie in {seeds}, answers in "
            f"{workdir / ANSWERS}: the same command resumes from there; else delete them, they are "
            "of jailbroken or broken models."
        )


def _check(settings: Settings, options: ComparisonOptions, suite: Sequence[Measure]) -> None:
    """Raise ValueError for what else would show only after some models were made."""
    if settings.patch.merge != "safepatching":
        raise ValueError(
            f"patch.merge is {settings.patch.merge}, and the comparison has the baselines beside "
            "SafePatching: leave it out, and pick methods with --methods."
        )
    seeds = options.seeds
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError(
            "--seeds must be different whole numbers, 0 at least, got "
            f"'{','.join(map(str, seeds))}'."
        )
    if unknown := sorted(options.settings.keys() - METHODS.keys()):
        raise ValueError(
            f"COMPARE, settings: there is no method '{unknown[0]}'; there are {', '.join(METHODS)}."
        )
    kinds = {measure.kind for measure in suite}
    if not {"harm", "refusal"} <= kinds:
        raise ValueError(
            f"suite {options.suite}: a comparison needs a measure of kind harm and one of kind "
            "refusal."
        )
    check_names(suite, options.suite)
