"""The rows of a sweep, read back: one JSON object a line, of which every setting, count and number
is checked."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from safepatch_jax.evaluation.judges.base import OUTCOMES
from safepatch_jax.runtime.console import say
from safepatch_jax.settings import PatchSettings, Settings

OPTIONS = tuple(field.name for field in dataclasses.fields(PatchSettings))
_ROW = {"patch": dict, "seed": int, "keys": dict, "measures": dict, "seconds": (int, float)}
_COUNTS, _NUMBERS = ("harmful", "lookalike"), ("harmful_nll", "ordinary_perplexity")
_LARGEST = 1e36  # no measure comes near (perplexity ends at e^80), and sums stay finite


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """Read the rows of all sweeps in a workdir; a last line that breaks off is left out, with a
    word.

    Raises:
      ValueError: a line is damaged; says which, and what to do.
    """
    rows = []
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(_checked(json.loads(line, parse_constant=_refuse)))
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                say(
                    f"{path}: line {number}, the last one, breaks off and is left out; its point "
                    "is tried again."
                )
                break
            raise ValueError(
                f"{path}: line {number} is damaged ({error}). Delete that line, and its point "
                "alone is tried "
                "again; or delete the file, and all are."
            ) from error
    return rows


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _checked(row: Any) -> dict[str, Any]:
    """Return a row whose settings have the types of the declared ones.

    Options that are not declared are of another version, whose rows are kept and not used.
    """
    if not isinstance(row, dict):
        raise ValueError("it holds no row of a sweep")
    wrong = [name for name, kind in _ROW.items() if not isinstance(row.get(name), kind)]
    wrong += [
        name
        for name in (*_COUNTS, *_NUMBERS)
        if "measures" not in wrong and name not in row["measures"]
    ]
    if wrong:
        raise ValueError(
            f"a row has {', '.join([*_ROW, *_COUNTS, *_NUMBERS])}; here lacks or is of another "
            "kind: " + ", ".join(wrong)
        )
    measures = row["measures"]
    wrong = [
        f"{name} should hold numbers of answers ({', '.join(OUTCOMES)}), and their sum n above 0"
        for name in _COUNTS
        if not _counted(measures[name])
    ]
    wrong += [
        f"{name} should be a finite number"
        for name in ("seconds", *_NUMBERS)
        if not _finite((row | measures)[name])
    ]
    if not wrong and not measures["ordinary_perplexity"] > 0:
        wrong.append("ordinary_perplexity should be above 0")
    if wrong:
        raise ValueError("; ".join(wrong))
    known = {f"patch.{name}": row["patch"][name] for name in OPTIONS if name in row["patch"]}
    settings = Settings().override(known | {"run.seed": row["seed"]}, "its settings")
    return row | {
        "patch": row["patch"]
        | {name: getattr(settings.patch, name) for name in OPTIONS if name in row["patch"]}
    }


def _counted(counts: Any) -> bool:
    names = (*OUTCOMES, "n")
    whole = isinstance(counts, Mapping) and all(
        type(counts.get(name)) is int and counts[name] >= 0 for name in names
    )
    return whole and sum(counts[name] for name in OUTCOMES) == counts["n"] > 0


def _finite(number: Any) -> bool:
    return type(number) in (int, float) and abs(number) < _LARGEST
