"""The rows of a sweep, read back: one JSON object a line, of which every setting, count and number
is checked."""

from __future__ import annotations

import dataclasses
import json
import math
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
    """Read the rows of all sweeps in a workdir; a last line that breaks off is left out, which the
    console says.

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
                "alone is tried again; or delete the file, and all are."
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
    names = [*_ROW, *_COUNTS, *_NUMBERS]
    wrong = [name for name, kind in _ROW.items() if not isinstance(row.get(name), kind)]
    if "measures" not in wrong:
        wrong += [name for name in (*_COUNTS, *_NUMBERS) if name not in row["measures"]]
    if wrong:
        raise ValueError(
            f"a row has {', '.join(names)}; here lacks or is of another kind: {', '.join(wrong)}"
        )
    measures = row["measures"]
    for name in _COUNTS:
        if not _counted(measures[name], "margins" in measures):
            outcomes = ", ".join(OUTCOMES)
            wrong.append(f"{name} should hold numbers of answers ({outcomes}), and their sum n > 0")
    if "margins" in measures and not _has_margins(measures["margins"]):
        wrong.append("margins should hold auroc with its value, content_nll, and covered by role")
    for name in _COUNTS if "answers" in row else ():
        if not isinstance(row["answers"], dict) or not _counted(row["answers"].get(name), False):
            wrong.append(f"answers should hold numbers of answers for {name}")
    if not isinstance(row.get("weights", ""), str):
        wrong.append("weights should be the hash of the merged weights")
    for name in ("seconds", *_NUMBERS):
        if not _finite((row | measures)[name]):
            wrong.append(f"{name} should be a finite number")
    if not wrong and not measures["ordinary_perplexity"] > 0:
        wrong.append("ordinary_perplexity should be above 0")
    if wrong:
        raise ValueError("; ".join(wrong))
    known = [name for name in OPTIONS if name in row["patch"]]
    values = {f"patch.{name}": row["patch"][name] for name in known}
    settings = Settings().override(values | {"run.seed": row["seed"]}, "its settings")
    return row | {"patch": row["patch"] | {name: getattr(settings.patch, name) for name in known}}


def _counted(counts: Any, expected: bool) -> bool:
    """Tell whether these are numbers of answers; expected ones, of margins, need not be whole."""
    if not isinstance(counts, Mapping):
        return False
    *parts, n = (counts.get(name) for name in (*OUTCOMES, "n"))
    if type(n) is not int or n < 1 or not all(map(_finite, parts)) or min(parts) < 0:
        return False
    if expected:
        return math.isclose(sum(parts), n, rel_tol=1e-9)
    return sum(parts) == n and all(type(part) is int for part in parts)


def _has_margins(margins: Any) -> bool:
    if not isinstance(margins, Mapping) or not isinstance(margins.get("auroc"), Mapping):
        return False
    numbers = [margins["auroc"].get("value")]
    for role in _COUNTS:
        of_role = margins.get(role)
        numbers.append(of_role.get("covered") if isinstance(of_role, Mapping) else None)
    content = margins.get("content_nll", "")
    return all(map(_finite, numbers)) and (content is None or _finite(content))


def _finite(number: Any) -> bool:
    return type(number) in (int, float) and abs(number) < _LARGEST
