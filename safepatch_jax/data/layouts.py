"""How the files of some public data sets are laid out, where a column is not simply a field.

Functions of a row change it in place; a column that it lacks is a KeyError.
"""

from __future__ import annotations

import csv
import io
import pathlib
import re
import tarfile
import zipfile
from collections.abc import Iterator
from typing import Any

from safepatch_jax.data.tables import text

Row = dict[str, Any]


def beavertails(row: Row) -> None:
    """Name the categories that hold, and the label."""
    row["category"] = "; ".join(name for name, holds in (row["category"] or {}).items() if holds)
    row["label"] = "safe" if row.pop("is_safe") else "unsafe"


def harmbench(row: Row) -> None:
    """Put the context before the behaviour, as HarmBench itself does."""
    if context := text(row.pop("ContextString")):
        row["Behavior"] = f"{context}\n\n---\n\n{row['Behavior']}"


def alpaca(row: Row) -> None:
    """Put the input after the instruction."""
    parts = text(row["instruction"]), text(row.pop("input", ""))
    row["instruction"] = "\n\n".join(filter(None, parts))


def gsm8k(row: Row) -> None:
    """Add the number after ####."""
    row["final"] = text(row["answer"]).rpartition("####")[2].strip()


def mt_bench(row: Row) -> None:
    """Add the first turn as prompt."""
    row["prompt"] = (row["turns"] or [""])[0]


def mmlu_rows(path: pathlib.Path) -> list[Row]:
    """Read the dev, val and test questions of an archive (ZIP or TAR) without unpacking it.

    Raises:
      ValueError: no such archive, or a row that is not a question, choices and an answer.
    """
    rows = []
    for name, content in _members(path):
        split, file = pathlib.PurePosixPath(name).parts[-2:]
        for row in csv.reader(io.StringIO(content.decode("utf-8"), newline="")):
            if len(row) < 4:
                raise ValueError(
                    f"{path}: a row of {name} has {len(row)} cells; expected question, choices, "
                    "answer."
                )
            rows.append(
                {
                    "question": row[0],
                    "choices": row[1:-1],
                    "answer": row[-1],
                    "split": split,
                    "subject": file.removesuffix(f"_{split}.csv"),
                }
            )
    return rows


def _members(path: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents of the question files, sorted by name."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for name in _question_files(archive.namelist()):
                    yield name, archive.read(name)
        else:
            with tarfile.open(path) as archive:
                for name in _question_files(archive.getnames()):
                    yield name, archive.extractfile(name).read()
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as ZIP or TAR. Fetch it again.") from error


def _question_files(names: list[str]) -> list[str]:
    pattern = re.compile(r".*/(dev|val|test)/[^/]*\.csv")
    return sorted(filter(pattern.fullmatch, names))
