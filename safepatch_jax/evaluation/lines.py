"""Files of answers, verdicts and grades, from which a killed evaluation is resumed.

OUT/answers/WHO/MEASURE.jsonl holds what a model did on each item,
OUT/verdicts/JUDGE/WHO/MEASURE.jsonl what a judge said of it, OUT/grades/GRADER/WHO/MEASURE.jsonl
what a grader did. WHO is followed by template-NAME where several templates are compared, and by
seed-N where a measure is done several times.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from safepatch_jax.evaluation.judges.endpoint import without_concurrency
from safepatch_jax.evaluation.suites import Measure
from safepatch_jax.runtime import files, processes
from safepatch_jax.runtime.console import some
from safepatch_jax.runtime.reading import reason
from safepatch_jax.runtime.records import misfits
from safepatch_jax.runtime.text import redacted

_NUMBER = (int, float)
_FIELDS = {
    "id": str,
    "answers": list,
    "answer": str,
    "tokens": (int, list),
    "of": str,
    "outcome": str,
    "degree": str,
    "raw": (str, dict),
    "nll": _NUMBER,
    "opening_nll": _NUMBER,
    "refusal": _NUMBER,
    "affirmative": _NUMBER,
    "kl": _NUMBER,
    "correct": bool,
    "category": str,
    "left_out": (str, int),
    "shortened": int,
    "note": str,
    "grade": (int, float, type(None)),
    "seconds_per_token": _NUMBER,
    "batch_size": int,
    "mesh": dict,
    "device": str,
    "seconds": _NUMBER,
    "ratio": _NUMBER,
    "least": _NUMBER,
    "most": _NUMBER,
}
# Fields that a row has in a folder, and those that it has beside another one.
_NEEDED_IN = {"verdicts": ("outcome", "degree", "raw"), "grades": ("grade", "raw")}
_NEEDED_WITH = {
    "nll": ("tokens",),
    "refusal": ("affirmative",),
    "correct": ("category",),
    "answers": ("tokens",),
}


class Lines:
    """Rows of a JSONL file, the last of each id; what is added is on the disk at once. A last line
    that was cut off is dropped."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        self.rows: dict[str, dict[str, Any]] = processes.on_first(_read_lines, path)

    def add(self, row: Mapping[str, Any]) -> None:
        self.rows[row["id"]] = dict(row)
        if processes.first():
            with files.appended(self._path) as file:
                file.write(_line(row))


def _line(row: Mapping[str, Any]) -> str:
    return redacted(json.dumps(row, ensure_ascii=False)) + "\n"


def blank(path: pathlib.Path, field: str) -> None:
    """Remove a field from all rows of a file that have it; as this process sees it."""
    rows = list(_read_lines(path).values())
    if not any(field in row for row in rows):
        return
    for row in rows:
        row.pop(field, None)
    files.write_text(path, "".join(map(_line, rows)))


def _read_lines(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = path.read_bytes() if path.is_file() else b""
    whole = raw[: raw.rfind(b"\n") + 1]
    rows = {}
    try:
        for line in whole.decode().split("\n")[:-1]:
            row = json.loads(line)
            if problems := list(misfits(row, _wanted(path, row))):
                raise ValueError(some(problems))
            rows[row["id"]] = row
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({reason(error)}). Delete it, and its answers are given again."
        ) from error
    if whole != raw:
        with files.appended(path) as file:
            file.truncate(len(whole))
    return rows


def _wanted(path: pathlib.Path, row: Any) -> dict[str, Any]:
    """Return of what type the fields of a row must be, those that any row has or this kind of file
    needs."""
    fields = {"id"}
    for folder, needed in _NEEDED_IN.items():
        if folder in path.parts:
            fields |= set(needed)
    if isinstance(row, dict):
        fields |= _FIELDS.keys() & row.keys()
        for name, needed in _NEEDED_WITH.items():
            if name in row:
                fields |= set(needed)
    return {name: _FIELDS[name] for name in sorted(fields)}


def lines_of(out: pathlib.Path, kind: str, who: str, measure: Measure, run: int | None) -> Lines:
    """Return the lines of one kind ('answers', 'verdicts/JUDGE', 'grades/GRADER') of one run of a
    measure."""
    folder = out / kind / who if run is None else out / kind / who / f"seed-{run}"
    return Lines(folder / f"{file_name(measure.name)}.jsonl")


def verdicts_of(judge: str) -> str:
    """Return the kind of a judge's lines."""
    return f"verdicts/{_folder_name(without_concurrency(judge))}"


def grades_of(grader: str) -> str:
    """Return the kind of a grader's lines."""
    return f"grades/{_folder_name(without_concurrency(grader))}"


def _folder_name(text: str) -> str:
    """Return the name of a judge's or grader's folder."""
    name = re.sub(r"[^A-Za-z0-9.-]+", "_", text)
    if name != text:  # cut to what a file system takes, and different for different judges
        name = f"{name[:80]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return name


def file_name(name: str) -> str:
    """Return a measure's name as that of a file."""
    return re.sub(r"[^\w.-]+", "_", name)


def check_names(suite: Sequence[Measure], title: str, used: Mapping[str, str] = {}) -> None:
    """Raise ValueError if two measures of a suite would be in one file, or one in a file that is
    in use.

    Args:
      used: what is in files already, by file name in lower case.
    """
    names = dict(used)
    for measure in suite:
        file = file_name(measure.name)
        other = names.setdefault(file.lower(), measure.name)
        if other != measure.name:
            raise ValueError(
                f"suite {title}: the answers of '{measure.name}' and of {other!r} would be in one "
                f"file, {file}.jsonl. Rename the measure."
            )
