"""Try patch settings on the search split without training again: deltas and scores are computed
once."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from safepatch_jax.numerics import NotFinite
from safepatch_jax.patching.statistics import BadSettings
from safepatch_jax.reporting.tables import share
from safepatch_jax.run import environment, metrics
from safepatch_jax.run.job import Job
from safepatch_jax.runtime import files, processes
from safepatch_jax.runtime.console import duration, say, some
from safepatch_jax.settings import Settings
from safepatch_jax.studies.sweep import analysis as sweep_analysis
from safepatch_jax.studies.sweep import report as sweep_report
from safepatch_jax.studies.sweep.points import Point, label, varied
from safepatch_jax.studies.sweep.rows import OPTIONS, read_rows

PARTS = ("evaluate_backbone", "derive_se", "derive_osm", "score_se", "score_osm")
ROWS, SETTINGS = "sweep.jsonl", "sweep_settings.json"


class _SweepJob(Job):
    """The stages up to the scores, in the workdir of a sweep: it holds no settings.json, as no one
    run made it."""

    def _claim_workdir(self, update: bool) -> None:
        claim(self.workdir)


def claim(workdir: pathlib.Path) -> None:
    """Refuse a workdir that is not a sweep's.

    Raises:
      ValueError: it holds a run, or files of someone else.
    """
    if (workdir / "settings.json").exists():
        raise ValueError(
            f"{workdir} holds a run, whose stages a sweep would replace; use another --workdir."
        )
    ours = {
        "stages",
        files.LOCK,
        ROWS,
        SETTINGS,
        environment.FILE,
        metrics.FILE,
        metrics.EVENTS,
        *sweep_report.FILES,
    }
    found = {p.name for p in workdir.iterdir()} if workdir.is_dir() else set()
    if strange := sorted(name for name in found - ours if not files.half_written(name)):
        raise ValueError(
            f"{workdir} holds files that are not of a sweep ({some(strange, ', ')}); use a new or "
            "empty --workdir."
        )


def plan(settings: Settings, workdir: str | pathlib.Path, points: Sequence[Point]) -> list[str]:
    """List the points, and which of them have a row already; reads no model and starts no device.

    Raises:
      ValueError: the workdir is not a sweep's, or its rows are damaged.
    """
    workdir = pathlib.Path(workdir).expanduser().absolute()
    claim(workdir)
    rows = read_rows(workdir / ROWS)
    there, title = {_key(row) for row in rows}, _titles(settings, points)
    left = [point for point in points if _key(_asked(point)) not in there]
    lines = [
        f"{i} {title[point]}{'' if point in left else ' (has a row)'}"
        for i, point in enumerate(points, 1)
    ]
    lines.append(
        f"{len(points)} points, {len(left)} without a row in {workdir / ROWS}"
        + (
            f"; those there took {statistics.median(row['seconds'] for row in rows):.0f} s each"
            if rows
            else ""
        )
        + ". A row counts if model, data, training and scores are the same."
    )
    return lines


def sweep(
    settings: Settings,
    workdir: str | pathlib.Path,
    points: Sequence[Point],
    command: Sequence[str] = (),
) -> pathlib.Path:
    """Evaluate points on the search split, one row each in ``sweep.jsonl``, and report on all rows
    of this model and training.

    Rows are written as they are made; points that have one are not computed again.

    Args:
      settings: of model, data, training and scores; its patch group is where the recommended flags
        lead away from.
      workdir: of sweeps alone.
      points: see `sweep_points.design`.

    Returns:
      The path of the report.

    Raises:
      ValueError: the workdir is not a sweep's, its rows are damaged, a stage fails; or, after the
        report on all others, some points gave no row, because their model overflows or is the
        backbone itself.
    """
    settings = settings.override({"evaluate.split": "search", "run.keep_scratch": True})
    asked = [_asked(point) for point in points]
    processes.agree(
        {"number of points": len(asked), "hash of the points": files.text_hash(asked)[:16]},
        "Start every process with the same command.",
    )
    job = _SweepJob(settings, workdir)
    for folder in (job.workdir, job.context.cache_dir):
        processes.shared(folder)
    with processes.claimed(job.workdir), metrics.Metrics(job.workdir) as job.metrics:
        there = processes.on_first(lambda: _begin(job, settings, command))
        rows, backbone, failed = _rows(job, points, there)
        if rows:
            processes.on_first(lambda: _report(settings, job.workdir, rows, backbone))
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(points)} points gave no row ({some(failed)}), for the reasons "
            "said above. "
            "They would give none again: leave them out."
        )
    return job.workdir / "sweep.md"


def _begin(job: Job, settings: Settings, command: Sequence[str]) -> list[dict[str, Any]]:
    """Clear what a killed sweep left half-written, read the rows, and write down with what the
    sweep is done."""
    claim(job.workdir)  # again: a run may have been at work here meanwhile
    for left in job.workdir.iterdir():
        if files.half_written(left.name):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    rows = read_rows(job.workdir / ROWS)
    files.write_json(job.workdir / SETTINGS, settings.to_dict())
    environment.write(job.workdir, command, job.context.sharder)
    return rows


def _rows(
    job: Job,
    points: Sequence[Point],
    rows: list[dict[str, Any]],
) -> tuple[list[dict[str, Any]], dict[str, Any], list[str]]:
    """Compute the rows that are not there yet, and add them to `rows` and to the file.

    Returns:
      (all rows of this model and training, the backbone's measures, the points that gave no row).
    """
    settings, path = job.settings, job.workdir / ROWS
    base = {name: job.runner.key(name) for name in PARTS} | {
        "dtype": settings.export.dtype,
        "rounding": settings.export.rounding,
    }
    known = {
        _key(row): row
        for row in rows
        if row["keys"] == base and row["patch"].keys() == set(OPTIONS)
    }
    left = sum(_key(_asked(point)) not in known for point in points)
    for name in PARTS if left else PARTS[:1]:
        job.runner.need(name)
    backbone = job.runner.result("evaluate_backbone")
    say(
        f"sweep: {len(points)} points on the search split, {left} to compute; backbone: "
        f"{describe(backbone)}"
    )
    title, taken, failed = _titles(settings, points), [], []
    for number, point in enumerate(points, 1):
        place, row, pace = (
            f"[{number}/{len(points)}] {title[point]}: ",
            known.get(_key(_asked(point))),
            "has a row",
        )
        if row is None:
            left -= 1
            found, reason = _measured(job, point)
            if reason:
                failed.append(title[point])
                say(f"{place}no row: {reason}")
                continue
            row = _asked(point) | {"keys": base} | found
            rows.append(row)
            known[_key(row)] = row
            processes.on_first(
                lambda: files.write_text(path, "".join(json.dumps(r) + "\n" for r in rows))
            )
            taken.append(row["seconds"])
            pace = f"{row['seconds']:.0f} s" + (
                f", {duration(left * statistics.median(taken))} left" if left else ""
            )
        say(f"{place}{describe(row['measures'])} | {pace}")
    return list(known.values()), backbone, failed


def _asked(point: Point) -> dict[str, Any]:
    return {"patch": dataclasses.asdict(point.patch), "seed": point.seed}


def _titles(settings: Settings, points: Sequence[Point]) -> dict[Point, str]:
    """Name the points by what varies among them or differs from the settings' own."""
    names = varied([Point.of(settings).flat(), *(point.flat() for point in points)])
    return {point: label(point.flat(), names) or "the config's own settings" for point in points}


def _key(row: Mapping[str, Any]) -> str:
    return files.text_hash([row["patch"], row["seed"]])


def _measured(job: Job, point: Point) -> tuple[dict[str, Any], str | None]:
    """Return (a point's measures and the seconds they took, None), or ({}, why it has none), the
    same in all processes.

    One model that is broken should not stop a sweep of many; errors that any point would meet are
    raised.
    """
    begun, found, reason = time.monotonic(), {}, None
    try:
        found = {"measures": job.try_patch(point.patch, point.seed)}
    except (NotFinite, BadSettings) as error:
        reason = str(error)
    reason = next(filter(None, processes.everyones(reason)), None)
    return (
        ({}, reason) if reason else (found | {"seconds": round(time.monotonic() - begun, 1)}, None)
    )


def _report(
    settings: Settings,
    workdir: pathlib.Path,
    rows: list[Mapping[str, Any]],
    backbone: Mapping[str, Any],
) -> None:
    content = sweep_analysis.gather(settings, rows, backbone)
    sweep_report.write(content, workdir)
    for line in sweep_report.summary(content):
        say(line)


def describe(measures: Mapping[str, Any]) -> str:
    """Say a model's measures in one line."""
    harm, look = measures["harmful"], measures["lookalike"]
    return (
        f"harmful complied {share(harm, 'complied'):4.0%} refused {share(harm, 'refused'):4.0%} | "
        "look-alike complied "
        f"{share(look, 'complied'):4.0%} refused {share(look, 'refused'):4.0%} | harmful NLL "
        f"{measures['harmful_nll']:.2f} | ordinary perplexity {measures['ordinary_perplexity']:.2f}"
    )
