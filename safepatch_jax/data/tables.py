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
      ValueError: another format, a damaged file, rows that are no objects, or Parquet without
        pyarrow.
    """
    opener = _OPENERS.get(path.suffix, open)
    suffix = pathlib.Path(path.stem).suffix if path.suffix in _OPENERS else path.suffix
    if suffix not in _FORMATS:
        raise ValueError(
            f"{path}: '{suffix}' is not a known format; use {', '.join(_FORMATS[:-1])} or "
            f"{_FORMATS[-1]}."
        )
    if suffix == ".parquet":
        return _read_parquet(path)
    try:
        with opener(
            path, "rt", newline="", encoding="utf-8-sig" if suffix == ".csv" else "utf-8"
        ) as f:
            if suffix == ".csv":
                return list(csv.DictReader(f, strict=True))
            text = f.read()
        # Lines of JSONL end at newlines alone, not at the other breaks that text may hold (U+2028).
        rows = (
            json.loads(text)
            if suffix == ".json"
            else [json.loads(s) for s in text.split("\n") if s.strip()]
        )
    except _DAMAGE as error:
        raise ValueError(f"{path} cannot be read as {suffix[1:].upper()}: {error}.") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a list of objects, one a record.")
    return rows


def text(value: Any) -> str:
    """Return a cell as stripped text; an absent cell is the empty text."""
    return "" if value is None else str(value).strip()


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
