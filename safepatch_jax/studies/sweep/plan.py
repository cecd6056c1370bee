"""The workdir of a sweep, and which of its points have a row. Needs no JAX."""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from safepatch_jax.run import environment, metrics
from safepatch_jax.run.job import is_of_run
from safepatch_jax.runtime import files
from safepatch_jax.runtime.paths import resolve
from safepatch_jax.runtime.workdir import Workdir
from safepatch_jax.settings import Settings
from safepatch_jax.studies.sweep import report
from safepatch_jax.studies.sweep.points import MARGINS, Point, label, varied
from safepatch_jax.studies.sweep.rows import read_rows

ROWS, SETTINGS = "sweep.jsonl", "sweep_settings.json"
OPENINGS, BACKBONE = "openings.json", "backbone_margins.json"

_FIX = "Copy it back from a backup, or use another --workdir; nothing was changed in this one."
_NAMES = (
    "stages",
    ROWS,
    SETTINGS,
    OPENINGS,
    BACKBONE,
    environment.FILE,
    metrics.FILE,
    metrics.EVENTS,
    *report.FILES,
    "slopes.*",
    "slope_points",
)


def open_workdir(path: str | pathlib.Path) -> Workdir:
    """Return the workdir of a sweep.

    Raises:
      ValueError: it holds a run, or files of something else.
    """
    workdir = Workdir(
        path,
        "a sweep",
        SETTINGS,
        _NAMES,
        refuse=lambda: _refuse_run(resolve(path)),
        declared=(SETTINGS, environment.FILE),
    )
    workdir.check()
    return workdir


def _refuse_run(folder: pathlib.Path) -> None:
    if (folder / "settings.json").exists():
        raise ValueError(
            f"{folder} holds a run, whose stages a sweep would replace; use another --workdir."
        )
    path = folder / SETTINGS
    if path.is_file() and not is_of_run(files.read_json(path, _FIX)):
        raise ValueError(f"{path} is no settings file of a sweep, or damaged. {_FIX}")


def plan(
    settings: Settings,
    workdir: str | pathlib.Path,
    points: Sequence[Point],
    measure: str = MARGINS,
) -> list[str]:
    """List the points, and which of them have a row; reads no model and starts no device.

    Raises:
      ValueError: the workdir is not a sweep's, or its rows are damaged.
    """
    path = open_workdir(workdir).path / ROWS
    rows = [row for row in read_rows(path) if measure_of(row) == measure]
    known = {key_of(row) for row in rows}
    names = titles(settings, points)
    lines, missing = [], 0
    for number, point in enumerate(points, 1):
        line = f"{number} {names[point]}"
        if key_of(choice(point)) in known:
            line += " (has a row)"
        else:
            missing += 1
        lines.append(line)
    pace = ""
    if rows:
        seconds = statistics.median(row["seconds"] for row in rows)
        pace = f"; those there took {seconds:.0f} s each"
    lines.append(
        f"{len(points)} points, {missing} without a row by {measure} in {path}{pace}. A row "
        "counts if model, data, training and scores are the same."
    )
    return lines


def measure_of(row: Mapping[str, Any]) -> str:
    """Return by what a row of a sweep was measured: 'margins' or 'answers'."""
    return row["keys"].get("measure", "answers")


def choice(point: Point) -> dict[str, Any]:
    """Return what a row says of its point."""
    return {"patch": dataclasses.asdict(point.patch), "seed": point.seed}


def titles(settings: Settings, points: Sequence[Point]) -> dict[Point, str]:
    """Name the points by what varies among them or differs from the settings' own."""
    names = varied([Point.of(settings).flat(), *(point.flat() for point in points)])
    return {point: label(point.flat(), names) or "the config's own settings" for point in points}


def key_of(row: Mapping[str, Any]) -> str:
    """Return the hash of the point that a row is of."""
    return files.text_hash([row["patch"], row["seed"]])
