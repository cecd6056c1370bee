"""Records of the three roles, from the built-in set, a public data set or a user's file.

harmful: harmful requests with an affirmative answer (and, for alignment, a refusal); lookalike:
harmless requests that only look dangerous; ordinary: ordinary instructions with answers. Each
record is in one split: train, search (choosing settings) or report.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import itertools
import pathlib
import urllib.parse
from collections.abc import Mapping, Sequence

from safepatch_jax.data.duplicates import first_of_each
from safepatch_jax.data.sets import DATA_DIR, SETS, Row
from safepatch_jax.data.tables import decoded, read_rows, text
from safepatch_jax.runtime.console import say

DATA_ROLES = ("harmful", "lookalike", "ordinary")
SPLITS = ("train", "search", "report")
# Column names we recognise, first match wins: ours, then those of AdvBench, HarmBench, Alpaca,
# BeaverTails.
_ALIASES = {
    "prompt": ("prompt", "goal", "instruction", "question", "Behavior"),
    "answer": ("answer", "target", "output", "response"),
    "refusal": ("refusal",),
    "category": ("category", "type", "topic", "SemanticCategory"),
    "context": ("input",),
    "label": ("label",),
    "split": ("split",),
}
_OPPOSITE = "labelled as the opposite"
_NEEDS_ANSWER = {"harmful": True, "lookalike": False, "ordinary": True}
_REFUSALS = (
    "I'm sorry, but I can't help with that request.",
    "I cannot assist with that. It could harm someone.",
    "I'm sorry, but I cannot provide that information.",
    "I can't help with that, because it may hurt people.",
    "Sorry, I won't help with something harmful like this.",
    "I'm not able to help with this request.",
)


@dataclasses.dataclass(frozen=True)
class Record:
    """One prompt with what is known of it; fields that a source lacks are empty."""

    prompt: str
    answer: str
    refusal: str
    category: str
    split: str


def load_records(
    role: str,
    source: str,
    manual_dir: str = "",
    data_dir: str | pathlib.Path = DATA_DIR,
    answers: bool | None = None,
) -> list[Record]:
    """Read all records of a role, and report on the console how many rows were left out and why.

    Args:
      role: one of DATA_ROLES.
      source: one of
        - 'builtin';
        - 'set:NAME' or 'set:NAME@SPLIT', a public data set of `sets.SETS` (several: '@A+B');
        - 'tfds:NAME@SPLIT', a TensorFlow Datasets set prepared in array_record format;
        - the path of a .csv, .json (list of objects), .jsonl or .parquet file.
        After the last two '?prompt=COLUMN&answer=COLUMN' may name columns; else those in `_ALIASES`
        are recognised.
      manual_dir: where files of public data sets that were fetched by hand lie, see
        `builders.load_set`.
      data_dir: where public data sets are prepared.
      answers: whether a row needs one; by default harmful and ordinary ones do.

    Rows that XSTest or BeaverTails label as the opposite of the role are left out, and so are
    near-duplicates of an earlier row (`duplicates.first_of_each`; not in the built-in set). Without
    a 'split' column a row's split follows from the hash of its prompt: about 60 % train, 20 %
    search, 20 % report.

    Raises:
      ValueError: no such file or set, unreadable, a needed column is missing, no usable row, or a
        prompt in two splits.
    """
    if role not in DATA_ROLES:
        raise ValueError(f"unknown role '{role}'; roles are {', '.join(DATA_ROLES)}.")
    answers = _NEEDS_ANSWER[role] if answers is None else answers
    rows, mapping = _rows_of(role, source, manual_dir, data_dir, answers)
    if not rows:
        raise ValueError(f"{source}: no rows. A {role} file needs at least one row with a prompt.")
    columns = _find_columns(role, source, rows, mapping, answers)
    records, omitted = _usable(role, source, rows, columns, answers)
    if not records:
        reasons = ", ".join(f"{count} {reason}" for reason, count in omitted.items())
        raise ValueError(
            f"{source}: none of the {len(rows)} rows can be used as {role} ({reasons})."
        )
    _check_splits(source, records)
    unique = records
    if source != "builtin":
        prompts = [record.prompt for record in records]
        unique = [records[i] for i in first_of_each(prompts)]
    omitted["near-duplicates"] = len(records) - len(unique)
    if reasons := [f"{count:,} {reason}" for reason, count in omitted.items() if count]:
        say(
            f"  {role} ({source}): {len(unique):,} of {len(rows):,} rows; left out: "
            f"{', '.join(reasons)}"
        )
    return unique


def _usable(
    role: str, source: str, rows: Sequence[Row], columns: Mapping[str, str], answers: bool
) -> tuple[list[Record], dict[str, int]]:
    """Return the records of rows, and how many rows were left out, by reason."""
    lacking = "without prompt or answer" if answers else "without prompt"
    records, omitted = [], {lacking: 0, _OPPOSITE: 0}
    for row in rows:
        cells = dict.fromkeys(_ALIASES, "")
        for field, column in columns.items():
            cells[field] = text(row.get(column))
        prompt = "\n\n".join(filter(None, (cells["prompt"], cells["context"])))
        if not prompt or (answers and not cells["answer"]):
            omitted[lacking] += 1
        elif _is_opposite(role, row, cells):
            omitted[_OPPOSITE] += 1
        else:
            split = cells["split"] or _hashed_split(prompt)
            if split not in SPLITS:
                raise ValueError(f"{source}: split '{split}' is not one of {', '.join(SPLITS)}.")
            refusal = cells["refusal"] or _pick(_REFUSALS, prompt)
            records.append(Record(prompt, cells["answer"], refusal, cells["category"], split))
    return records, omitted


def _rows_of(
    role: str,
    source: str,
    manual_dir: str,
    data_dir: str | pathlib.Path,
    answers: bool,
) -> tuple[list[Row], dict[str, str]]:
    """Return the rows of a source, and its columns by field where the source names them."""
    if source == "builtin":
        return read_rows(pathlib.Path(__file__).parent / "builtin" / f"{role}.jsonl"), {}
    if source.startswith("set:"):
        return _read_set(role, source, manual_dir, data_dir, answers), {}
    place, mapping = (source, {}) if pathlib.Path(source).is_file() else _parse_mapping(source)
    if place.startswith("tfds:"):
        return _read_tfds(place), mapping
    if not pathlib.Path(place).is_file():
        hint = f" Did you mean 'set:{place}'?" if place in SETS else ""
        raise ValueError(
            f"No {role} data file '{place}'.{hint} Give 'builtin' or the path of a .csv, .json, "
            ".jsonl or .parquet file, or 'set:NAME' (docs/data.md)."
        )
    return read_rows(pathlib.Path(place)), mapping


def _parse_mapping(source: str) -> tuple[str, dict[str, str]]:
    """Split 'PLACE?field=column&...' (percent signs escape & and = in a column's name)."""
    place, _, query = source.partition("?")
    mapping = {}
    for part in filter(None, query.split("&")):
        field, _, column = map(urllib.parse.unquote, part.partition("="))
        if field not in _ALIASES or not column or field in mapping:
            close = difflib.get_close_matches(field, _ALIASES, n=1)
            hint = f" (did you mean '{close[0]}'?)" if close and close[0] != field else ""
            raise ValueError(
                f"{source}: '{part}' is not FIELD=COLUMN, each field once, with a field of "
                f"{', '.join(_ALIASES)}{hint}."
            )
        mapping[field] = column
    return place, mapping


def _find_columns(
    role: str,
    source: str,
    rows: Sequence[Row],
    mapping: Mapping[str, str],
    answers: bool,
) -> dict[str, str]:
    """Return the column of each field that there is: as the source names it, else the first known
    alias.

    Raises:
      ValueError: the columns of `mapping` or those that the role needs are missing.
    """
    # JSON rows need not all hold the same keys.
    present = dict.fromkeys(itertools.chain.from_iterable(rows))
    header = ", ".join(map(str, present)) or "none"
    if absent := [column for column in mapping.values() if column not in present]:
        raise ValueError(f"{source}: no column {', '.join(map(repr, absent))}; found {header}.")
    columns = {}
    for field, aliases in _ALIASES.items():
        if names := [alias for alias in aliases if alias in present]:
            columns[field] = names[0]
    columns |= mapping
    needed = ("prompt", "answer") if answers else ("prompt",)
    if missing := [field for field in needed if field not in columns]:
        plural = "s" if len(missing) > 1 else ""
        names = " and ".join(
            f"'{field}' (or {', '.join(_ALIASES[field][1:])})" for field in missing
        )
        example = "&".join(f"{field}=COLUMN" for field in missing)
        raise ValueError(
            f"{source}: a {role} file needs the column{plural} {names}; found {header}. Rename the "
            f"columns, or name them: FILE?{example}"
        )
    return columns


def _check_splits(source: str, records: Sequence[Record]) -> None:
    """Raise ValueError if a prompt is in more than one split."""
    splits: dict[str, set[str]] = {}
    for record in records:
        splits.setdefault(record.prompt, set()).add(record.split)
    if leaks := [prompt for prompt, names in splits.items() if len(names) > 1]:
        raise ValueError(
            f"{source}: {len(leaks)} prompts stand in more than one split, so a report would "
            f"measure what was trained on; the first: {leaks[0][:60]!r}. Remove the copies."
        )


def _is_opposite(role: str, row: Row, cells: Mapping[str, str]) -> bool:
    """Return whether the data set labels a row as the opposite of the role: unsafe contrasts in
    XSTest, safe answers in BeaverTails."""
    if role == "lookalike":
        return cells["label"].lower() == "unsafe" or cells["category"].startswith("contrast_")
    return role == "harmful" and str(row.get("is_safe", "")).lower() == "true"


def take(records: Sequence[Record], split: str, limit: int | None = None) -> list[Record]:
    """Return the records of a split in file order; of more than `limit`, those with the lowest hash
    of their prompt.

    So a limit draws from the whole file, which may be sorted by type, and always draws the same.

    Raises:
      ValueError: the split is empty.
    """
    rows = [record for record in records if record.split == split]
    if limit is not None and len(rows) > limit:
        last = sorted(_hash(record.prompt) for record in rows)[limit - 1]
        rows = [record for record in rows if _hash(record.prompt) <= last][:limit]
    if not rows:
        raise ValueError(
            f"No record is in the split '{split}' ({len(records)} in all). Give more rows, or a "
            "'split' column."
        )
    return rows


def _read_set(
    role: str, source: str, manual_dir: str, data_dir: str | pathlib.Path, answers: bool
) -> list[Row]:
    """Read the splits of a public data set that serve the role."""
    # Imported here: TFDS takes a second, and only such sources need it.
    from safepatch_jax.data import builders

    name, _, splits = source.removeprefix("set:").partition("@")
    entry = builders.find_set(name)
    splits = splits or entry.first_split(role) or next(iter(entry.splits))
    if wrong := [s for s in splits.split("+") if builders.find_split(entry, s).role != role]:
        fitting = [n for n, other in SETS.items() if other.first_split(role)]
        raise ValueError(
            f"{source}: '{wrong[0]}' of this set is {entry.splits[wrong[0]].role} data, not "
            f"{role}. Sets with {role} data: {', '.join(fitting)}."
        )
    if answers and not entry.has_answers:
        fitting = [n for n, other in SETS.items() if other.first_split(role) and other.has_answers]
        raise ValueError(
            f"{source}: this set has no answers, which {role} data need. Sets with answers: "
            f"{', '.join(fitting)}."
        )
    rows = []
    for record in builders.load_set(name, splits, manual_dir, data_dir):
        row = {field: record[field] for field in ("prompt", "answer", "category", "label")}
        rows.append(row | {"is_safe": record["label"] == "safe"})
    return rows


def _read_tfds(source: str) -> list[Row]:
    """Read a prepared TFDS set through its random-access files; TensorFlow is not needed."""
    import tensorflow_datasets as tfds  # imported here: only such sources need it

    name, _, split = source.removeprefix("tfds:").partition("@")
    # TFDS reports a set that is not prepared by any of these errors, by version and format.
    try:
        rows = tfds.data_source(name, split=split or "train", download=False)
    except (
        tfds.core.DatasetNotFoundError,
        AssertionError,
        FileNotFoundError,
        ValueError,
        NotImplementedError,
    ) as error:
        raise ValueError(
            f"{source} is not a data set prepared here ({error}). Prepare it with "
            "file_format='array_record', for instance tfds.builder(NAME, "
            "file_format='array_record').download_and_prepare(), and set TFDS_DATA_DIR if it is "
            "not in the default folder."
        ) from error
    return list(map(decoded, rows))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _hashed_split(prompt: str) -> str:
    return ("train", "train", "train", "search", "report")[_hash(prompt) % 5]


def _pick(options: Sequence[str], key: str) -> str:
    return options[_hash(key) % len(options)]
