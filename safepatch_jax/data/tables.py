"""Reading a user's table, whatever its format, as one dictionary a row."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
import pathlib
import zlib
from typing import Any

_FORMATS = (".csv", ".json", ".jsonl", ".parquet")
_OPENERS = {".gz": gzip.open, ".xz": lzma.open}
_DAMAGE = (
    csv.Error,
    json.JSONDecodeError,
    UnicodeDecodeError,
    EOFError,
    gzip.BadGzipFile,
    lzma.LZMAError,
    zlib.error,
)


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """Read all rows of a .csv, .json (list of objects), .jsonl or .parquet file; .gz and .xz may
    follow the first three.

    Raises:
      ValueError: another format, a damaged file, rows that are not objects, or Parquet
        without pyarrow.
    """
    opener, suffix = open, path.suffix
    if suffix in _OPENERS:
        opener, suffix = _OPENERS[suffix], pathlib.Path(path.stem).suffix
    if suffix not in _FORMATS:
        raise ValueError(
            f"{path}: '{suffix}' is not a known format; use {', '.join(_FORMATS[:-1])} or "
            f"{_FORMATS[-1]}."
        )
    if suffix == ".parquet":
        return _read_parquet(path)
    encoding = "utf-8-sig" if suffix == ".csv" else "utf-8"
    try:
        with opener(path, "rt", newline="", encoding=encoding) as f:
            if suffix == ".csv":
                return list(csv.DictReader(f, strict=True))
            content = f.read()
        if suffix == ".json":
            rows = json.loads(content)
        else:
            # Lines of JSONL end at newlines alone, not at other breaks that text may hold (U+2028).
            rows = [json.loads(line) for line in content.split("\n") if line.strip()]
    except _DAMAGE as error:
        raise ValueError(f"{path} cannot be read as {suffix[1:].upper()}: {error}.") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a list of objects, one a record.")
    return rows


def text(value: Any) -> str:
    """Return a cell as stripped text; an absent cell is the empty text."""
    return "" if value is None else str(value).strip()


def decoded(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of TensorFlow Datasets with its bytes as text."""
    return {
        name: value.decode() if isinstance(value, bytes) else value for name, value in row.items()
    }


def _read_parquet(path: pathlib.Path) -> list[dict[str, Any]]:
    try:
        import pyarrow  # imported here: only such files need it
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            f"{path}: Parquet needs pyarrow, which is not installed. Run: pip install pyarrow."
        ) from error
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as PARQUET: {error}.") from error
