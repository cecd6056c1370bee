"""Try patch settings on the search split without training again: the patches and their
sensitivities are computed once."""

from __future__ import annotations

import json
import pathlib
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from safepatch_jax.numerics import NotFinite
from safepatch_jax.patching.statistics import BadSettings
from safepatch_jax.reporting.tables import share
from safepatch_jax.run import environment, metrics, models, notes
from safepatch_jax.run.agreement import SAME_COMMAND
from safepatch_jax.run.job import open_run
from safepatch_jax.run.margins import MarginMeter
from safepatch_jax.run.pins import pinned
from safepatch_jax.run.state import Run
from safepatch_jax.runtime import files, processes
from safepatch_jax.runtime.console import duration, say, some
from safepatch_jax.runtime.paths import resolve
from safepatch_jax.settings import PatchSettings, Settings
from safepatch_jax.studies.sweep import analysis, by_margins, report, scratch
from safepatch_jax.studies.sweep.merging import Merger
from safepatch_jax.studies.sweep.plan import (
    ROWS,
    SETTINGS,
    choice,
    key_of,
    measure_of,
    open_workdir,
    titles,
)
from safepatch_jax.studies.sweep.points import ANSWERS, MARGINS, Point
from safepatch_jax.studies.sweep.rows import OPTIONS, read_rows

PARTS = ("evaluate_backbone", "derive_se", "derive_osm", "score_se", "score_osm")


def sweep(
    settings: Settings,
    workdir: str | pathlib.Path,
    points: Sequence[Point],
    command: Sequence[str] = (),
    measure: str = MARGINS,
    run_command: Sequence[str] = (),
) -> pathlib.Path:
    """Evaluate points on the search split, one row each in ``sweep.jsonl``, and report on all rows
    of this model and training.

    By margins a point costs forward passes over the prompts alone; only the models of the Pareto
    front, and the recommended one, then write answers.

    Rows are written as they are made; points that have one are not computed again.

    Args:
      settings: of model, data, training and scores; its patch group is where the recommended flags
        lead away from.
      workdir: of sweeps alone.
      points: see `sweep.points.design`.
      command: with which it was started; it is noted.
      measure: 'margins', or 'answers' where every point writes and is judged.
      run_command: starts a run in this workdir with all else as here; it is shown at the end, with
        the flags of the choice.

    Returns:
      The path of the report.

    Raises:
      ValueError: the workdir is not a sweep's, its rows are damaged, a stage fails; or, after the
        report on all others, some points gave no row, because their model overflows or is the
        backbone itself.
    """
    given = settings.model.source
    settings = settings.override({"evaluate.split": "search", "run.keep_scratch": True})
    settings = pinned(settings, resolve(workdir) / SETTINGS)
    if run_command and settings.model.source != given:  # a branch of the Hub may move
        run_command = [*run_command, f"--model.source={settings.model.source}"]
    choices = [choice(point) for point in points]
    processes.agree(
        {
            "number of points": len(choices),
            "hash of the points": files.text_hash(choices)[:16],
            "measure": measure,
        },
        SAME_COMMAND,
    )
    folder = open_workdir(workdir)
    run = open_run(settings, folder.path)
    with folder.claimed(run.context.cache_dir), scratch.announced(run):
        with metrics.Metrics(folder.path) as run.metrics:
            earlier = processes.on_first(_begin, run, command)
            meter = by_margins.margin_meter(run) if measure == MARGINS else None
            merger = Merger(run)
            rows, backbone, failures = _compute(merger, points, earlier, meter)
            if rows:
                _finish(merger, rows, backbone, meter is not None, run_command)
    if failures:
        raise ValueError(
            f"{len(failures)} of {len(points)} points gave no row ({some(failures)}), for the "
            "reasons above. They would give none again: leave them out."
        )
    return folder.path / "sweep.md"


def _begin(run: Run, command: Sequence[str]) -> list[dict[str, Any]]:
    """Read the rows, and write down with what the sweep is done."""
    rows = read_rows(run.workdir / ROWS)
    files.write_json(run.workdir / SETTINGS, run.settings.to_dict())
    environment.write(run.workdir, command, run.context.sharder)
    return rows


def _compute(
    merger: Merger, points: Sequence[Point], rows: list[dict[str, Any]], meter: MarginMeter | None
) -> tuple[list[dict[str, Any]], dict[str, Any], list[str]]:
    """Compute the missing rows, and add them to `rows` and to the file.

    Returns:
      (all rows of this model and training, the backbone's measures, the points without a row).
    """
    run, export = merger.run, merger.run.settings.export
    base = {name: run.runner.key(name) for name in PARTS}
    base |= {"dtype": export.dtype, "rounding": export.rounding}
    if meter is not None:
        base |= by_margins.measure_keys(run, meter)
    known = {}
    for row in rows:
        if row["keys"] == base and row["patch"].keys() == set(OPTIONS):
            known[key_of(row)] = row
    new = [point for point in points if key_of(choice(point)) not in known]
    missing = len(new)
    merger.expect(new)
    measure = ANSWERS if meter is None else MARGINS
    others = sum(measure_of(row) != measure for row in rows)
    if others:
        say(
            f"{others} of {len(rows)} rows there are not by {measure} (--measure) and do not count."
        )
    if missing:
        notes.tell(run)
    for name in PARTS if missing else PARTS[:1]:
        run.runner.need(name)
    backbone = run.runner.result("evaluate_backbone")
    if meter is not None:
        backbone = by_margins.backbone_measures(run, meter) | {"answers": backbone}
    say(
        f"sweep: {len(points)} points on the search split, {missing} to compute; backbone: "
        f"{describe(backbone)}"
    )
    names, seconds, failures = titles(run.settings, points), [], []
    for number, point in enumerate(points, 1):
        place = f"[{number}/{len(points)}] {names[point]}: "
        row, pace = known.get(key_of(choice(point))), "has a row"
        if row is None:
            missing -= 1
            result, reason = _measured(merger, point, meter, _by_weights(known.values()))
            if reason:
                failures.append(names[point])
                say(f"{place}no row: {reason}")
                continue
            row = choice(point) | {"keys": base} | result
            rows.append(row)
            known[key_of(row)] = row
            processes.on_first(_write_rows, run.workdir / ROWS, rows)
            seconds.append(row["seconds"])
            pace = f"{row['seconds']:.0f} s"
            if missing:
                pace += f", {duration(missing * statistics.median(seconds))} left"
        say(f"{place}{describe(row['measures'])} | {pace}")
    return list(known.values()), backbone, failures


def _write_rows(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    files.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _measured(
    merger: Merger, point: Point, meter: MarginMeter | None, done: Mapping[str, Any]
) -> tuple[dict[str, Any], str | None]:
    """Return (a point's measures, the seconds they took and the hash of its weights, None), or
    ({}, why it has none), the same in all processes.

    Settings that have no part in a merge give the same weights: then the measures are those in
    `done`, see `_by_weights`.

    One model that is broken should not stop a sweep of many; errors that any point would meet are
    raised.
    """
    begun, weights, measures, reason = time.monotonic(), "", {}, None
    try:
        flat = merger.merged(point)
        weights = models.weights_hash(flat)
        measures = done.get(weights) or _measures(merger.run, flat, meter)
    except (NotFinite, BadSettings) as error:
        reason = str(error)
    reasons = [reason for reason in processes.everyones(reason) if reason]
    if reasons:
        return {}, reasons[0]
    seconds = round(time.monotonic() - begun, 1)
    return {"measures": measures, "seconds": seconds, "weights": weights}, None


def _by_weights(
    rows: Iterable[Mapping[str, Any]], field: str = "measures"
) -> dict[str, dict[str, Any]]:
    """Return what rows hold in a field, by the hash of their weights; rows without either are left
    out."""
    return {row["weights"]: row[field] for row in rows if row.get("weights") and field in row}


def _measures(run: Run, flat: models.Flat, meter: MarginMeter | None) -> dict[str, Any]:
    """Return a model's measures by answers, or by margins where there is a meter."""
    if meter is None:
        return models.measure(run, flat, "patched")[0]
    return meter.measures(meter.engine(flat), "patched")


def _finish(
    merger: Merger,
    rows: list[dict[str, Any]],
    backbone: Mapping[str, Any],
    front_answers: bool,
    run_command: Sequence[str],
) -> None:
    """Let the models of the front write answers, where points did not, and report."""
    if front_answers:
        _answer_front(merger, rows, backbone)
    processes.on_first(_report, merger.run, rows, backbone, run_command)


def _answer_front(merger: Merger, rows: list[dict[str, Any]], backbone: Mapping[str, Any]) -> None:
    """Let the models of the front, and the recommended one, write answers; keep them with their
    rows. A model that overflows in one of them gets none."""
    run = merger.run
    missing = by_margins.unanswered(rows, analysis.gather(run.settings, rows, backbone))
    points = [Point(PatchSettings(**row["patch"]), row["seed"]) for row in missing]
    merger.expect(points)
    for name in PARTS if missing else ():
        run.runner.need(name)
    for number, (row, point) in enumerate(zip(missing, points), 1):
        result, reason = _measured(merger, point, None, _by_weights(rows, "answers"))
        text = f"none: {reason}"
        if reason is None:
            row["answers"] = result["measures"]
            processes.on_first(_keep_answers, run.workdir / ROWS, row)
            text = describe(row["answers"])
        say(f"answers of the front [{number}/{len(missing)}] {text}")


def _keep_answers(path: pathlib.Path, row: Mapping[str, Any]) -> None:
    """Write a row's answers into the file, in which rows of other models may be too."""
    every = read_rows(path)
    for other in every:
        if other["keys"] == row["keys"] and key_of(other) == key_of(row):
            other["answers"] = row["answers"]
    _write_rows(path, every)


def _report(
    run: Run,
    rows: list[Mapping[str, Any]],
    backbone: Mapping[str, Any],
    run_command: Sequence[str],
) -> None:
    content = analysis.gather(run.settings, rows, backbone)
    report.write(content, run.workdir)
    for line in report.summary(content):
        say(line)
    if run_command:
        scratch.say_run(run_command, content["recommended"]["flags"])


def describe(measures: Mapping[str, Any]) -> str:
    """Say a model's measures in one line."""
    harm, look = measures["harmful"], measures["lookalike"]
    return (
        f"harmful complied {share(harm, 'complied'):4.0%} refused {share(harm, 'refused'):4.0%} | "
        f"look-alike complied {share(look, 'complied'):4.0%} refused "
        f"{share(look, 'refused'):4.0%} | harmful NLL {measures['harmful_nll']:.2f} | ordinary "
        f"perplexity {measures['ordinary_perplexity']:.2f}{_beside(measures.get('margins'))}"
    )


def _beside(margins: Mapping[str, Any] | None) -> str:
    """Say what margins tell besides."""
    if margins is None:
        return ""
    text = f" | AUROC {margins['auroc']['value']:.3f}"
    if margins["content_nll"] is not None:
        text += f" | content NLL {margins['content_nll']:.2f}"
    return text
