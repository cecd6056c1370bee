"""Prepares the public data sets as TensorFlow Datasets in array_record format, without TensorFlow.

A set's file is found in manual_dir, or downloaded and its checksum verified; TFDS then writes its
rows under data_dir, whole or not at all. A prepared folder belongs to the bytes of its file, so
another file is prepared anew. Where TFDS is not installed, the same records come from the file at
each start.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import http.client
import itertools
import json
import pathlib
import shutil
import urllib.request
from collections.abc import Sequence
from typing import TYPE_CHECKING

from safepatch_jax.data.cells import check_unicode, placed, text
from safepatch_jax.data.sets import DATA_DIR, FIELDS, SETS, DataSet, File, Row, Split
from safepatch_jax.data.streams import refuse_other_than_file
from safepatch_jax.data.tables import decoded
from safepatch_jax.io import checksums
from safepatch_jax.runtime import files, libraries
from safepatch_jax.runtime.console import say, some
from safepatch_jax.runtime.limits import limit, too_much
from safepatch_jax.runtime.paths import plain, resolve
from safepatch_jax.runtime.reading import Refused, reading, reason

if TYPE_CHECKING:
    from safepatch_jax.data.tfds_sets import SafetySets

_LABELS = {"harmful": "unsafe", "lookalike": "safe", "ordinary": "safe"}  # of a role's rows
_AGAIN = "Delete the folder; it is made again."
_TIMEOUT = 60.0  # seconds without a byte after which a download is given up


def load_set(
    name: str, splits: str, manual_dir: str = "", data_dir: str | pathlib.Path = DATA_DIR
) -> list[Row]:
    """Return the records of a public set, in file order; prepare it first if needed.

    Args:
      name: a key of `SETS`.
      splits: a split of it, or several as 'A+B'.
      manual_dir: where files that were fetched by hand lie; '' is the folder 'manual' of data_dir.
      data_dir: holds prepared sets and downloads.

    Returns:
      A dictionary a record with the FIELDS; `extra` is a dictionary.

    Raises:
      ValueError: unknown set or split, a missing file, a wrong checksum, a file that is not the
        set's, no answers where the set has answers.
    """
    entry, folder = find_set(name), resolve(data_dir)
    rows = []
    for split in splits.split("+"):
        rows += _load_split(entry, split, manual_dir, folder)
    return rows


def find_set(name: str) -> DataSet:
    """Return the entry of a set. Raises ValueError if there is none, with the nearest name."""
    if name not in SETS:
        close = difflib.get_close_matches(name, SETS, n=1)
        hint = f" (did you mean 'set:{close[0]}'?)" if close else ""
        raise ValueError(f"No data set 'set:{name}'{hint}; there are {', '.join(SETS)}.")
    return SETS[name]


def find_split(entry: DataSet, split: str) -> Split:
    """Return a split's declaration. Raises ValueError if the set has no such split."""
    if split not in entry.splits:
        raise ValueError(
            f"set:{entry.name} has no split '{split}'; its splits are {', '.join(entry.splits)}."
        )
    return entry.splits[split]


def _load_split(entry: DataSet, split: str, manual_dir: str, data_dir: pathlib.Path) -> list[Row]:
    file = find_split(entry, split).file
    if missing := libraries.missing(*libraries.TFDS):
        return _load_unprepared(entry, split, manual_dir, data_dir, missing)
    builder, path = _prepared(entry, file, manual_dir, data_dir)
    if split not in builder.info.splits:
        raise _no_rows(entry, split, path)
    with reading(builder.data_path, "a prepared data set", _AGAIN):
        return [_unpacked(decoded(stored)) for stored in builder.as_data_source(split)]


def _load_unprepared(
    entry: DataSet, split: str, manual_dir: str, data_dir: pathlib.Path, missing: Sequence[str]
) -> list[Row]:
    """Return the records of a split, read from the set's own file."""
    files.make_usable(data_dir, "--run.cache_dir or, in an evaluation, --data_dir")
    file = find_split(entry, split).file
    with files.locked(data_dir / f".{entry.name}.lock"):
        path, sha256 = _find_file(entry, file, manual_dir, data_dir)
        if sha256 == file.sha256:
            _check_sha256(path, sha256)
        records = read_records(entry, file, path)
    if split not in records:
        raise _no_rows(entry, split, path)
    say(
        f"Read set:{entry.name}@{split} from {path}: {len(records[split]):,} records, not "
        f"prepared, as {some(missing, ', ')} is not installed. Licence: {entry.licence}."
    )
    return [_unpacked(record) for record in records[split]]


def _unpacked(record: Row) -> Row:
    return record | {"extra": json.loads(record["extra"] or "{}")}


def _no_rows(entry: DataSet, split: str, path: pathlib.Path) -> ValueError:
    file = find_split(entry, split).file
    return ValueError(
        f"{path} has no rows of set:{entry.name}@{split}. Fetch the whole file: {file.url}"
    )


def _prepared(
    entry: DataSet, file: File, manual_dir: str, data_dir: pathlib.Path
) -> tuple[SafetySets, pathlib.Path]:
    """Return the builder of a file's prepared records, and where the file lies."""
    from safepatch_jax.data import tfds_sets  # here: TFDS takes a second, and may be missing

    files.make_usable(data_dir, "--run.cache_dir or, in an evaluation, --data_dir")
    with files.locked(data_dir / f".{entry.name}.lock"):
        path, sha256 = _find_file(entry, file, manual_dir, data_dir)
        folder = data_dir / f"{entry.name}-{_splits_of(entry, file)[0]}-{sha256[:12]}"
        if (folder / checksums.NAME).is_file():
            # A damaged file may still be read, as other records.
            checksums.check(folder, f"Delete {folder}; it is made again.")
        else:
            # What a killed run left there.
            shutil.rmtree(folder, ignore_errors=True)
        records = functools.partial(read_records, entry, file, path)
        with reading(folder, "a prepared data set", _AGAIN):
            builder = tfds_sets.SafetySets(entry, records, folder)
        if not pathlib.Path(builder.data_path).is_dir():
            if sha256 == file.sha256:
                _check_sha256(path, sha256)
            tfds_sets.prepare(builder)
            checksums.write(folder)
            splits = builder.info.splits
            counts = ", ".join(f"{name} {info.num_examples:,}" for name, info in splits.items())
            differs = file.sha256 not in ("", sha256)
            remark = "; not byte for byte the published file" if differs else ""
            say(
                f"Prepared set:{entry.name} from {path}: {counts} records{remark}. Licence: "
                f"{entry.licence}."
            )
    return builder, path


def _splits_of(entry: DataSet, file: File) -> list[str]:
    """Return the names of the splits that are in a file."""
    return [name for name, split in entry.splits.items() if split.file == file]


def read_records(entry: DataSet, file: File, path: pathlib.Path) -> dict[str, list[dict[str, str]]]:
    """Read a file of a set as flat records by split, in file order; skip rows without a prompt.

    Raises:
      ValueError: columns are missing, rows of an unknown split, no rows, or no answers where the
        set has answers.
    """
    rows, splits, records = entry.read(path), _splits_of(entry, file), {}
    if missing := _adapt(entry, rows, path):
        raise ValueError(
            f"{path} is not the file of set:{entry.name}: no column "
            f"{', '.join(map(repr, missing))}; found "
            f"{some([f'{name:.60}' for name in rows[0]], ', ', 20)}. A table of "
            "your own is given by its path, with '?prompt=COLUMN&answer=COLUMN' where its columns "
            "have other names."
        )
    for position, row in enumerate(rows):
        split = splits[0]
        if entry.split_by:
            with placed(path, position + 1, entry.split_by):
                split = text(row.get(entry.split_by))
        if split not in splits:
            raise ValueError(
                f"{path}: row {position + 1} has '{split:.60}' as {entry.split_by}; expected "
                f"{' or '.join(splits)}."
            )
        record = _fields(entry, split, row, position, path)
        if record["prompt"]:
            records.setdefault(split, []).append(record)
    if not records:
        raise ValueError(
            f"{path}: no row with a prompt; set:{entry.name} was not prepared. Fetch the file "
            f"again: {file.url}"
        )
    every = itertools.chain.from_iterable(records.values())
    if entry.has_answers and not any(record["answer"] for record in every):
        raise ValueError(
            f"{path}: every answer (column '{entry.columns['answer']}') is empty. Fetch the file "
            f"again: {file.url}"
        )
    return records


def _adapt(entry: DataSet, rows: Sequence[Row], path: pathlib.Path) -> list[str]:
    """Adapt rows to the columns that the set names; return the names of those that are missing."""
    for number, row in enumerate(rows, 1):
        try:
            if entry.adapt is not None:
                entry.adapt(row)
        except KeyError as error:
            return [error.args[0]]
        except ValueError as error:
            raise Refused(
                f"{path}: row {number} is not one of set:{entry.name}: {error}"
            ) from error
    if not rows:
        return []
    columns = filter(None, (*entry.columns.values(), entry.split_by))
    return [column for column in columns if column not in rows[0]]


def _fields(
    entry: DataSet, split: str, row: Row, position: int, path: pathlib.Path
) -> dict[str, str]:
    """Return a flat record; columns that are no field are kept in `extra`, as JSON.

    A row without an id gets its position in the file; one without a label the label that its
    split's role implies.
    """
    record = dict.fromkeys(FIELDS, "")
    for field, column in entry.columns.items():
        with placed(path, position + 1, column):
            record[field] = text(row.get(column))
    record["id"] = record["id"] or str(position)
    record["label"] = record["label"] or _LABELS.get(entry.splits[split].role, "")
    used = {*entry.columns.values(), entry.split_by}
    extra = {}
    for name, value in row.items():
        if name not in used and value not in (None, "", []):
            extra[name] = value
    if extra:
        with reading(f"{path}: row {position + 1}", "a record", "Mend the row."):
            record["extra"] = json.dumps(extra, ensure_ascii=False)
            check_unicode(record["extra"])
    return record


def _names(entry: DataSet, file: File) -> Sequence[str]:
    """Return the names that a file may have; the published one ('test.jsonl') only in a folder
    that is named after the set, since other sets may use it too."""
    published = file.url.rpartition("/")[2]
    return (*file.names, *(f"{entry.name}/{name}" for name in (published, *file.names)))


def _find_file(
    entry: DataSet, file: File, manual_dir: str, data_dir: pathlib.Path
) -> tuple[pathlib.Path, str]:
    """Return a file of the user's, or a downloaded one, and the SHA-256 of its bytes."""
    manual = pathlib.Path(plain(manual_dir)) if manual_dir else data_dir / "manual"
    if manual_dir and not manual.is_dir():
        raise ValueError(
            f"data.manual_dir '{manual}' is not a folder. Give the folder in which files fetched "
            "by hand lie."
        )
    for name in _names(entry, file):
        if (manual / name).exists():
            refuse_other_than_file(manual / name)
            with reading(manual / name, "a data file", "May you read it?"):
                return manual / name, files.file_sha256(manual / name)
    by_hand = (
        f"Fetch {file.url} by hand and put it into {manual} as {file.names[0]} (data.manual_dir "
        "names another folder)."
    )
    if not file.sha256:
        raise ValueError(
            f"set:{entry.name} needs a file that is not fetched automatically. {by_hand}"
        )
    target = data_dir / "downloads" / f"{file.sha256[:12]}-{file.names[0]}"
    if not target.is_file():
        try:
            fetch(file.url, file.sha256, target)
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(
                f"set:{entry.name}: {file.url} cannot be downloaded ({reason(error)}). {by_hand}"
            ) from error
    return target, file.sha256


def _check_sha256(path: pathlib.Path, sha256: str) -> None:
    """Raise ValueError if a file is not what it was when it was downloaded."""
    if files.file_sha256(path) != sha256:
        raise ValueError(f"{path} was damaged since it was downloaded. Delete it, and try again.")


def fetch(url: str, sha256: str, target: pathlib.Path) -> None:
    """Download a file, which appears under its name only if its SHA-256 is as expected.

    Raises:
      ValueError: another checksum, or more bytes than the limit.
      OSError, HTTPException: no such file, or no network.
    """
    with urllib.request.urlopen(url, timeout=_TIMEOUT) as response, files.new_file(target) as f:
        say(f"Downloading {url}")
        digest = hashlib.sha256()
        while block := response.read(1 << 20):
            if f.tell() + len(block) > limit("DATA_BYTES"):
                raise Refused(f"{url} has {too_much('DATA_BYTES')}. Nothing was kept.")
            f.write(block)
            digest.update(block)
        if digest.hexdigest() != sha256:
            raise ValueError(
                f"{url} has SHA-256 {digest.hexdigest()}, expected {sha256}: the file was changed "
                "or damaged. Nothing was kept. Try again, or put the file that you trust into "
                "data.manual_dir."
            )
