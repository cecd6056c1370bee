"""Try patch settings on the search split without training again: deltas and scores are computed once."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
from typing import Any, Iterator, Mapping, Sequence

from safepatch_jax import files, processes
from safepatch_jax.console import say
from safepatch_jax.pipeline.job import Job
from safepatch_jax.pipeline.report import share
from safepatch_jax.settings import Settings, declared_options

PARTS = ("evaluate_backbone", "derive_se", "derive_osm", "score_se", "score_osm")


def parse_grid(text: str) -> dict[str, list[Any]]:
    """Read a grid such as ``patch.beta=1,2,3;patch.retention=0.3,1``.

    Raises:
      ValueError: not of this form, or a setting that is not of the patch group.
    """
    grid = {}
    for part in filter(None, (p.strip() for p in text.split(";"))):
        name, equals, values = part.partition("=")
        field = declared_options().get(name)
        if not equals or field is None or not name.startswith("patch."):
            raise ValueError(f"--grid: '{part}' is not patch.OPTION=VALUE,VALUE,... of a known option.")
        if name == "patch.scope":
            raise ValueError("--grid: patch.scope decides what is scored; give it as a flag and sweep once for each scope.")
        try:
            grid[name] = [v if isinstance(field.default, str) else json.loads(v.lower()) for v in values.split(",")]
        except json.JSONDecodeError as error:
            raise ValueError(f"--grid: '{part}' holds something that is no number, true or false.") from error
    if not grid:
        raise ValueError("--grid is empty; give for instance --grid='patch.beta=1,2,3;patch.retention=0.3,1'.")
    return grid


def sweep(settings: Settings, workdir: str | pathlib.Path, grid: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Evaluate every point of a grid of patch settings on the search split; yield one row a point.

    Rows go to ``sweep.jsonl`` in the workdir as they are made; points that are already there are not computed again.

    Raises:
      ValueError: a point is out of bounds, or the workdir holds a run.
    """
    settings = settings.override({"evaluate.split": "search", "run.keep_scratch": True})
    points = [settings.override(dict(zip(grid, values)), "--grid").patch for values in itertools.product(*grid.values())]
    workdir = pathlib.Path(workdir).expanduser()
    processes.agree({"--grid": dict(grid)}, "Start every process with the same command.")
    if processes.on_first((workdir / "settings.json").exists):
        raise ValueError(f"{workdir} holds a run, whose stages a sweep would replace; use another --workdir.")
    job = Job(settings, workdir)
    for name in PARTS:
        job.runner.need(name)
    path = workdir / "sweep.jsonl"
    base = {name: job.runner.key(name) for name in PARTS} | {"dtype": settings.export.dtype}
    rows = processes.on_first(lambda: files.read_jsonl(path) if path.is_file() else [])
    rows = [row for row in rows if row["keys"] == base]
    known = {files.text_hash(row["patch"]): row for row in rows}
    say(f"sweep: {len(points)} points on the search split; backbone: "
        + describe(job.runner.result("evaluate_backbone")))
    for point in points:
        patch = dataclasses.asdict(point)
        row = known.get(files.text_hash(patch))
        if row is None:
            row = {"patch": patch, "keys": base, "measures": job.try_patch(point)}
            rows.append(row)
            processes.on_first(lambda: files.write_text(path, "".join(json.dumps(r) + "\n" for r in rows)))
        yield row


def describe(measures: Mapping[str, Any]) -> str:
    """Say a model's measures in one line."""
    harm, look = measures["harmful"], measures["lookalike"]
    return (f"harmful complied {share(harm, 'complied'):4.0%} refused {share(harm, 'refused'):4.0%} | look-alike complied "
            f"{share(look, 'complied'):4.0%} refused {share(look, 'refused'):4.0%} | harmful NLL "
            f"{measures['harmful_nll']:.2f} | ordinary perplexity {measures['ordinary_perplexity']:.2f}")
