"""Try patch settings on the search split without training again: deltas and scores are computed once."""

from __future__ import annotations

import itertools
import json
import pathlib
from typing import Any, Iterator, Mapping, Sequence

from safepatch_jax import files
from safepatch_jax.console import say
from safepatch_jax.pipeline.job import Job
from safepatch_jax.pipeline.report import share
from safepatch_jax.settings import Settings, declared_options

PARTS = ("score_se", "score_osm")


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
        grid[name] = [v if isinstance(field.default, str) else json.loads(v) for v in values.split(",")]
    if not grid:
        raise ValueError("--grid is empty; give for instance --grid='patch.beta=1,2,3;patch.retention=0.3,1'.")
    return grid


def sweep(settings: Settings, workdir: str | pathlib.Path, grid: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Evaluate every point of a grid of patch settings on the search split; yield one row a point.

    Rows go to ``sweep.jsonl`` in the workdir as they are made; points that are already there are not computed again.
    """
    settings = settings.override({"evaluate.split": "search", "run.keep_scratch": True})
    job = Job(settings, workdir, update=True)
    job.runner.finish(["evaluate_backbone", *PARTS])
    path = pathlib.Path(workdir) / "sweep.jsonl"
    base = {name: job.runner.key(name) for name in PARTS}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    rows = [row for row in rows if row["keys"] == base]
    known = {files.text_hash(row["patch"]): row for row in rows}
    points = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    say(f"sweep: {len(points)} points on the search split")
    for point in points:
        here = Job(settings.override(point), workdir, update=True)
        here.context = job.context  # keep what is compiled and tokenised
        patch = here.settings.to_dict()["patch"]
        row = known.get(files.text_hash(patch))
        if row is None:
            row = {"patch": patch, "keys": base, "measures": here.try_patch()}
            rows.append(row)
            files.write_text(path, "".join(json.dumps(r) + "\n" for r in rows))
        yield row


def describe(measures: Mapping[str, Any]) -> str:
    """Say a model's measures in one line."""
    harm, look = measures["harmful"], measures["lookalike"]
    return (f"harmful complied {share(harm, 'complied'):4.0%} refused {share(harm, 'refused'):4.0%} | look-alike complied "
            f"{share(look, 'complied'):4.0%} refused {share(look, 'refused'):4.0%} | harmful NLL "
            f"{measures['harmful_nll']:.2f} | ordinary perplexity {measures['ordinary_perplexity']:.2f}")
