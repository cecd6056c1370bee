"""The end of a run on the console, from its report.json: neither JAX nor pictures are imported."""

from __future__ import annotations

import pathlib

from safepatch_jax.evaluation.judges.base import COMPLIED, REFUSED
from safepatch_jax.reporting import ending
from safepatch_jax.runtime import files, processes

# The prompts of which an outcome is counted.
COUNTED = {"harm": ("harmful", COMPLIED), "over-refusal": ("lookalike", REFUSED)}
_UTILITY = "perplexity, ordinary"


def result(workdir: pathlib.Path) -> list[str]:
    """Return a finished run's table: harm, over-refusal and utility of the backbone ('before') and
    of the patched model ('after'); process 0 reads it."""
    return processes.on_first(_result, workdir)


def _result(workdir: pathlib.Path) -> list[str]:
    content = files.read_json(workdir / "report.json")
    before, after = (content["measures"][variant] for variant in ("backbone", "safepatching"))
    rows = []
    for kind, (role, outcome) in COUNTED.items():
        counts = []
        for of_model in (before[role], after[role]):
            counts.append({"count": of_model[outcome], "n": of_model["n"]})
        test = content.get("paired", {}).get(kind)  # reports of earlier versions have none
        rows.append(ending.share_row(kind, *counts, test))
    values = [of_model["ordinary_perplexity"] for of_model in (before, after)]
    return ending.lines([*rows, ending.perplexity_row(_UTILITY, *values)])
