"""Reading a user's table, whatever its format, as one dictionary a row."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from safepatch_jax.data.cells import twice
from safepatch_jax.data.csv_table import csv_rows
from safepatch_jax.data.json_table import json_rows
from safepatch_jax.data.streams import (
    PACKED,
    counted,
    opened_text,
    refuse_more,
    refuse_other_than_file,
)
from safepatch_jax.runtime.limits import limit, too_much
from safepatch_jax.runtime.reading import Refused, reading

Row = dict[str, Any]
_FORMATS = (".csv", ".json", ".jsonl", ".parquet")
_FIX = "Mend the file, or fetch it again."
_BATCH = 256  # rows of a Parquet file that are unpacked together
_UNPACKED = 1 << 30  # bytes that they may take where each may be as large as all


def read_rows(path: pathlib.Path) -> list[Row]:
    """Read all rows of a table: .csv; .json, a list of objects or one object a line; .jsonl;
    .parquet; .gz and .xz may follow the first three.

    Texts are UTF-8, or UTF-16 with a byte order mark. A CSV file may be separated by semicolons or
    tabs, which is said on the console.

    Raises:
      ValueError: no file, another format, a damaged one, rows that are not objects, more than the
        limits allow (`limits.LIMITS`), or Parquet without pyarrow.
    """
    packed, suffix = "", path.suffix.lower()
    if suffix in PACKED:
        packed, suffix = suffix, pathlib.Path(path.stem).suffix.lower()
    if suffix not in _FORMATS or (packed and suffix == ".parquet"):
        refuse_other_than_file(path)
        raise Refused(
            f"{path}: '{suffix}{packed}' is not a known format; use {', '.join(_FORMATS[:-1])} or "
            f"{_FORMATS[-1]}."
        )
    what = suffix[1:].upper()
    if suffix == ".parquet":
        return _read_parquet(path)
    with reading(path, what, _FIX), opened_text(path, what, packed) as stream:
        if suffix == ".csv":
            return csv_rows(stream, path)
        return json_rows(stream, path, single=suffix == ".jsonl")


def bounded(rows: Iterable[Row], where: Any) -> Iterator[Row]:
    """Yield rows. Raises Refused if there are more than the limit, or at the first whose texts have
    more characters."""
    most = limit("ROW_CHARACTERS")
    for number, row in enumerate(counted(rows, where), 1):
        if _characters(row) > most:
            raise Refused(f"{where}: row {number} has {too_much('ROW_CHARACTERS')}.")
        yield row


def _characters(value: Any) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list | tuple) else 0


def decoded(row: Row) -> Row:
    """Return a row of TensorFlow Datasets with its bytes as text, and arrays as lists."""
    return {name: _plain(value) for name, value in row.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _read_parquet(path: pathlib.Path) -> list[Row]:
    try:
        import pyarrow.parquet  # imported here: only such files need it
    except ImportError as error:
        raise ValueError(
            f"{path}: Parquet needs pyarrow, which is not installed. Run: pip install pyarrow."
        ) from error
    with reading(path, "PARQUET", _FIX):
        refuse_other_than_file(path)
        with pyarrow.parquet.ParquetFile(path) as file:
            if names := twice(file.schema_arrow.names):
                raise Refused(f"{path}: the column {names[0]!r:.60} is there more than once.")
            texts, together, carefully = _plan(file, path)
        try:
            return _rows_of_parquet(path, texts, together)
        except OSError as error:
            if "Not yet implemented" not in str(error):
                raise
            return _rows_of_parquet(path, [], carefully)  # pyarrow has no references in DELTA_*


def _rows_of_parquet(path: pathlib.Path, texts: list[str], together: int) -> list[Row]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, read_dictionary=texts) as file:
        batches = (_unpacked(batch, path) for batch in file.iter_batches(together))
        return list(bounded(itertools.chain.from_iterable(batches), path))


def _unpacked(batch: Any, path: pathlib.Path) -> list[Row]:
    """Return the rows of a batch; a text that the file holds once may stand in all of them, so its
    length is looked at first."""
    import pyarrow
    import pyarrow.compute

    columns = []
    for column in batch.columns:
        if isinstance(column, pyarrow.DictionaryArray):
            longest = pyarrow.compute.max(pyarrow.compute.binary_length(column.dictionary)).as_py()
            if (longest or 0) > 4 * limit("ROW_CHARACTERS"):  # bytes of UTF-8
                raise Refused(f"{path}: a row has {too_much('ROW_CHARACTERS')}.")
            column = column.dictionary_decode()
        columns.append(column)
    return pyarrow.RecordBatch.from_arrays(columns, batch.schema.names).to_pylist()


def _plan(file: Any, path: pathlib.Path) -> tuple[list[str], int, int]:
    """Return the columns of a Parquet file whose texts are left as references to those that the
    file holds once, and how many rows may be unpacked at once: with references, and without."""
    from pyarrow import types

    texts, nested = [], False
    for field in file.schema_arrow:
        if types.is_string(field.type) or types.is_binary(field.type):
            texts.append(field.name)
        nested = nested or types.is_nested(field.type)
    metadata = file.metadata  # not that of columns: pyarrow ends the process if it is damaged
    sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    refuse_more(path, "DATA_BYTES", sum(sizes))
    # A text that is no reference, as all within lists, may be as large as the whole.
    carefully = max(1, min(_BATCH, _UNPACKED // max(*sizes, 1, 1)))
    return texts, carefully if nested else _BATCH, carefully
