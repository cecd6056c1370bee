"""A sweep by margins: what measures its points, the backbone's measures, and the answers of the
models on the front."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from safepatch_jax.evaluation.openings import Openings
from safepatch_jax.run.margins import MarginMeter
from safepatch_jax.run.state import Run
from safepatch_jax.runtime import files, processes
from safepatch_jax.studies.sweep import analysis
from safepatch_jax.studies.sweep.plan import BACKBONE, OPENINGS

MOST_ANSWERS = 12
_FIX = "Delete it, and it is made again."


def margin_meter(run: Run) -> MarginMeter:
    """Return what measures by margins, with the openings in the workdir if they are this
    backbone's, else with those that are found now."""
    path, key = run.workdir / OPENINGS, run.runner.key("evaluate_backbone")
    noted = noted_with(path, key)
    if noted is not None:
        return MarginMeter(run, Openings.from_dict(noted))
    for name in ("align" if run.settings.align.enabled else "import", "evaluate_backbone"):
        run.runner.need(name)
    meter = MarginMeter(run)
    content = meter.openings.to_dict(meter.backbone().decode) | {"key": key}
    processes.on_first(files.write_json, path, content)
    return meter


def measure_keys(run: Run, meter: MarginMeter) -> dict[str, Any]:
    """Return what a row that is measured by margins depends on, beside stages."""
    openings = files.text_hash(dataclasses.asdict(meter.openings))[:16]
    limit = run.settings.evaluate.margin_limit
    return {"measure": "margins", "margin_limit": limit, "openings": openings}


def backbone_measures(run: Run, meter: MarginMeter) -> dict[str, Any]:
    """Return the backbone's measures, which are kept in the workdir."""
    path = run.workdir / BACKBONE
    key = files.text_hash([run.runner.key("evaluate_backbone"), measure_keys(run, meter)])
    noted = noted_with(path, key)
    if noted is None:
        noted = {"key": key, "measures": meter.measures(meter.backbone(), "backbone")}
        processes.on_first(files.write_json, path, noted)
    return noted["measures"]


def noted_with(path: pathlib.Path, key: str) -> dict[str, Any] | None:
    """Return what a JSON file of the workdir holds if it was made with this 'key', the same in all
    processes."""
    noted = processes.on_first(_read, path)
    return noted if noted.get("key") == key else None


def _read(path: pathlib.Path) -> dict[str, Any]:
    return files.read_json(path, _FIX) if path.is_file() else {}


def unanswered(
    rows: Iterable[Mapping[str, Any]], content: Mapping[str, Any]
) -> list[Mapping[str, Any]]:
    """Return the rows of the models that should write answers and have not: those on the front
    (MOST_ANSWERS at most, evenly over it), and the recommended one, each with the first seed over
    which choices are compared.

    Args:
      rows: of the sweep.
      content: see `analysis.gather`, of these rows.
    """
    trials = content["trials"]
    wanted = sorted((trial for trial in trials if trial["front"]), key=analysis.place)
    wanted = wanted[:: -(-len(wanted) // MOST_ANSWERS) or 1]
    wanted.append(trials[content["recommended"]["trial"]])
    chosen = set()
    for trial in wanted:
        seeds = content["compared_on"] if trial["compared"] else trial["seeds"]
        chosen.add(_key(trial["patch"], seeds[0]))
    return [
        row for row in rows if "answers" not in row and _key(row["patch"], row["seed"]) in chosen
    ]


def _key(patch: Mapping[str, Any], seed: int) -> str:
    return files.text_hash([patch, seed])
