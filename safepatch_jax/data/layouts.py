"""How the files of some public data sets are laid out, where a column is not simply a field.

Functions of a row change it in place; a column that it lacks is a KeyError, a cell of another kind
a ValueError.
"""

from __future__ import annotations

import operator
import pathlib
import re
import tarfile
import zipfile
from typing import IO

from safepatch_jax.data.cells import category, text
from safepatch_jax.data.csv_table import csv_records
from safepatch_jax.data.streams import (
    decoded_text,
    opened_archive,
    refuse_more,
    refuse_other_than_file,
)
from safepatch_jax.data.tables import Row
from safepatch_jax.runtime.reading import Refused, reading

_QUESTIONS = re.compile(r".*/(dev|val|test)/[^/]*\.csv")


def beavertails(row: Row) -> None:
    """Name the categories that hold, and the label."""
    row["category"] = category(row["category"] or {})
    safe = row.pop("is_safe")
    if not isinstance(safe, bool):
        raise ValueError(f"'is_safe' is {safe!r:.60}, where true or false is needed")
    row["label"] = "safe" if safe else "unsafe"


def harmbench(row: Row) -> None:
    """Put the context before the behaviour, as HarmBench itself does."""
    if context := text(row.pop("ContextString")):
        row["Behavior"] = f"{context}\n\n---\n\n{text(row['Behavior'])}"


def alpaca(row: Row) -> None:
    """Put the input after the instruction."""
    parts = text(row["instruction"]), text(row.pop("input", ""))
    row["instruction"] = "\n\n".join(filter(None, parts))


def gsm8k(row: Row) -> None:
    """Add the number after ####."""
    row["final"] = text(row["answer"]).rpartition("####")[2].strip()


def mt_bench(row: Row) -> None:
    """Add the first turn as prompt."""
    turns = row["turns"] or [""]
    if not isinstance(turns, list):
        raise ValueError(f"'turns' is {turns!r:.60}, where a list of texts is needed")
    row["prompt"] = turns[0]


def mmlu_rows(path: pathlib.Path) -> list[Row]:
    """Read the dev, val and test questions of an archive (ZIP or TAR) without unpacking it.

    Raises:
      ValueError: no such archive, a member with a password, more than the limits allow, or a row
        that is not a question, choices and an answer.
    """
    rows: list[tuple[str, Row]] = []
    with reading(path, "ZIP or TAR", "Fetch it again."):
        refuse_other_than_file(path)
        if zipfile.is_zipfile(path):
            _read_zip(path, rows)
        else:
            _read_tar(path, rows)
    # An archive may hold its members in any order.
    return [row for _, row in sorted(rows, key=operator.itemgetter(0))]


def _read_zip(path: pathlib.Path, rows: list[tuple[str, Row]]) -> None:
    with zipfile.ZipFile(path) as archive:
        refuse_more(path, "ARCHIVE_MEMBERS", len(archive.filelist))
        refuse_more(path, "DATA_BYTES", sum(info.file_size for info in archive.filelist))
        for info in archive.filelist:
            if _QUESTIONS.fullmatch(info.filename):
                with archive.open(info) as member:
                    _read_member(path, info.filename, member, rows)


def _read_tar(path: pathlib.Path, rows: list[tuple[str, Row]]) -> None:
    with opened_archive(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
        for number, info in enumerate(archive, 1):
            refuse_more(path, "ARCHIVE_MEMBERS", number)
            refuse_more(path, "DATA_BYTES", info.offset_data + info.size)
            if info.isfile() and _QUESTIONS.fullmatch(info.name):
                with archive.extractfile(info) as member:
                    _read_member(path, info.name, member, rows)


def _read_member(
    path: pathlib.Path, name: str, member: IO[bytes], rows: list[tuple[str, Row]]
) -> None:
    split, file = pathlib.PurePosixPath(name).parts[-2:]
    where = f"{path}: {name:.200}"
    with decoded_text(member, where, "CSV") as text_of:
        for line, cells in csv_records(text_of, where):
            letters = "ABCD"[: len(cells) - 2]
            if len(cells) < 4 or len(cells) > 6 or cells[-1].strip() not in tuple(letters):
                raise Refused(
                    f"{where}: the row at line {line} has {len(cells)} cells and ends with "
                    f"{cells[-1]!r:.60}; expected question, choices, answer (a letter)."
                )
            row = {
                "question": cells[0],
                "choices": cells[1:-1],
                "answer": cells[-1],
                "split": split,
                "subject": file.removesuffix(f"_{split}.csv"),
            }
            rows.append((name, row))
            refuse_more(path, "DATA_ROWS", len(rows))
