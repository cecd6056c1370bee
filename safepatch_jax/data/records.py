"""Records of the three roles, from the built-in set, a public data set or a user's file.

harmful: harmful requests with an affirmative answer (and, for alignment, a refusal); lookalike:
harmless requests that only look dangerous; ordinary: ordinary instructions with answers. Each
record is in one split: train, search (choosing settings) or report.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import pathlib
import urllib.parse
from collections.abc import Mapping, Sequence

from safepatch_jax.data.duplicates import first_of_each
from safepatch_jax.data.sets import DATA_DIR, SETS, Row
from safepatch_jax.data.tables import read_rows, text
from safepatch_jax.runtime.console import say

ROLES = ("harmful", "lookalike", "ordinary")
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
    """Read all records of a role; says what was left out on the way.

    Args:
      role: one of ROLES.
      source: one of
        'builtin';
        'set:NAME' or 'set:NAME@SPLIT', a public data set of `sets.SETS` (several splits: '@A+B');
        'tfds:NAME@SPLIT', a TensorFlow Datasets set prepared in array_record format;
        the path of a .csv, .json (list of objects), .jsonl or .parquet file.
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
    if role not in ROLES:
        raise ValueError(f"unknown role '{role}'; roles are {', '.join(ROLES)}.")
    answers = _NEEDS_ANSWER[role] if answers is None else answers
    rows, mapping = _rows_of(role, source, manual_dir, data_dir, answers)
    if not rows:
        raise ValueError(f"{source}: no rows. A {role} file needs at least one row with a prompt.")
    columns = _find_columns(role, source, rows, mapping, answers)
    records, empty, opposite = [], 0, 0
    lacking = "without prompt or answer" if answers else "without prompt"
    for row in rows:
        get = lambda name: text(row.get(columns[name])) if columns[name] else ""
        prompt = "\n\n".join(filter(None, (get("prompt"), get("context"))))
        if not prompt or (answers and not get("answer")):
            empty += 1
        elif _of_the_other_kind(role, row, get):
            opposite += 1
        else:
            split = get("split") or _hashed_split(prompt)
            if split not in SPLITS:
                raise ValueError(f"{source}: split '{split}' is not one of {', '.join(SPLITS)}.")
            refusal = get("refusal") or _pick(_REFUSALS, prompt)
            records.append(Record(prompt, get("answer"), refusal, get("category"), split))
    if not records:
        raise ValueError(
            f"{source}: none of the {len(rows)} rows can be used as {role} ({empty} {lacking}, "
            f"{opposite} "
            "labelled as the opposite)."
        )
    _refuse_leaks(source, records)
    kept = (
        records
        if source == "builtin"
        else [records[i] for i in first_of_each([r.prompt for r in records])]
    )
    left_out = {
        lacking: empty,
        "labelled as the opposite": opposite,
        "near-duplicates": len(records) - len(kept),
    }
    if any(left_out.values()):
        say(
            f"  {role} ({source}): {len(kept):,} of {len(rows):,} rows; left out: "
            + ", ".join(f"{count:,} {why}" for why, count in left_out.items() if count)
        )
    return kept


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
            ".jsonl or .parquet "
            "file, or 'set:NAME' (docs/data.md)."
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
            raise ValueError(
                f"{source}: '{part}' is not FIELD=COLUMN, each field once, with a field of "
                f"{', '.join(_ALIASES)}"
                + (f" (did you mean '{close[0]}'?)." if close and close[0] != field else ".")
            )
        mapping[field] = column
    return place, mapping


def _find_columns(
    role: str,
    source: str,
    rows: Sequence[Row],
    mapping: Mapping[str, str],
    answers: bool,
) -> dict[str, str | None]:
    """Return the column of each field: as the source names it, else the first known alias. Raises
    ValueError if one lacks."""
    present = dict.fromkeys(
        key for row in rows for key in row
    )  # JSON rows need not all hold the same keys
    found = ", ".join(map(str, present)) or "none"
    if wrong := [column for column in mapping.values() if column not in present]:
        raise ValueError(f"{source}: no column {', '.join(map(repr, wrong))}; found {found}.")
    columns = {
        name: next((alias for alias in aliases if alias in present), None)
        for name, aliases in _ALIASES.items()
    }
    columns |= mapping
    needed = ["prompt"] + (["answer"] if answers else [])
    if lacking := [name for name in needed if columns[name] is None]:
        raise ValueError(
            f"{source}: a {role} file needs the column{'s' if len(lacking) > 1 else ''} "
            + " and ".join(f"'{n}' (or {', '.join(_ALIASES[n][1:])})" for n in lacking)
            + f"; found {found}. Rename the columns, or name them: "
            f"FILE?{'&'.join(f'{n}=COLUMN' for n in lacking)}"
        )
    return columns


def _refuse_leaks(source: str, records: Sequence[Record]) -> None:
    """Raise ValueError if a prompt stands in more than one split."""
    splits: dict[str, set[str]] = {}
    for record in records:
        splits.setdefault(record.prompt, set()).add(record.split)
    if leaks := [prompt for prompt, found in splits.items() if len(found) > 1]:
        raise ValueError(
            f"{source}: {len(leaks)} prompts stand in more than one split, so a report would "
            "measure what was "
            f"trained on; the first: {leaks[0][:60]!r}. Remove the copies."
        )


def _of_the_other_kind(role: str, row: Row, get) -> bool:
    """Tell rows that a data set labels as the opposite: unsafe contrasts in XSTest, safe answers in
    BeaverTails."""
    if role == "lookalike":
        return get("label").lower() == "unsafe" or get("category").startswith("contrast_")
    return role == "harmful" and str(row.get("is_safe", "")).lower() == "true"


def take(records: Sequence[Record], split: str, limit: int | None = None) -> list[Record]:
    """Return the records of a split in file order; of more than `limit`, those with the lowest hash
    of their prompt.

    So a limit draws from the whole file, which may be sorted by type, and always the same records.

    Raises:
      ValueError: the split is empty.
    """
    chosen = [r for r in records if r.split == split]
    if limit is not None and len(chosen) > limit:
        last = sorted(_hash(r.prompt) for r in chosen)[limit - 1]
        chosen = [r for r in chosen if _hash(r.prompt) <= last][:limit]
    if not chosen:
        raise ValueError(
            f"No record is in the split '{split}' ({len(records)} in all). Give more rows, or a "
            "'split' column."
        )
    return chosen


def _read_set(
    role: str, source: str, manual_dir: str, data_dir: str | pathlib.Path, answers: bool
) -> list[Row]:
    """Read the splits of a public data set that serve the role."""
    from safepatch_jax.data import (
        builders,  # imported here: TFDS takes a second, and only such sources need it
    )

    name, _, splits = source.removeprefix("set:").partition("@")
    entry = builders.find_set(name)
    splits = splits or entry.first_split(role) or next(iter(entry.splits))
    if wrong := [s for s in splits.split("+") if builders.find_split(entry, s).role != role]:
        fitting = [n for n, other in SETS.items() if other.first_split(role)]
        raise ValueError(
            f"{source}: '{wrong[0]}' of this set is {entry.splits[wrong[0]].role} data, not "
            f"{role}. Sets with "
            f"{role} data: {', '.join(fitting)}."
        )
    if answers and not entry.has_answers:
        fitting = [n for n, other in SETS.items() if other.first_split(role) and other.has_answers]
        raise ValueError(
            f"{source}: this set has no answers, which {role} data need. Sets with answers: "
            f"{', '.join(fitting)}."
        )
    rows = builders.load_set(name, splits, manual_dir, data_dir)
    return [
        {
            "prompt": r["prompt"],
            "answer": r["answer"],
            "category": r["category"],
            "label": r["label"],
            "is_safe": r["label"] == "safe",
        }
        for r in rows
    ]


def _read_tfds(source: str) -> list[Row]:
    """Read a prepared TFDS set through its random-access files; TensorFlow is not needed."""
    import tensorflow_datasets as tfds  # imported here: only such sources need it

    name, _, split = source.removeprefix("tfds:").partition("@")
    try:  # a set that is not prepared is reported as any of these, by version and format
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
            "file_format='array_record', "
            "for instance tfds.builder(NAME, file_format='array_record').download_and_prepare(), "
            "and set "
            "TFDS_DATA_DIR if it is not in the default folder."
        ) from error
    return [{k: v.decode() if isinstance(v, bytes) else v for k, v in row.items()} for row in rows]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _hashed_split(prompt: str) -> str:
    fifth = _hash(prompt) % 5
    return "search" if fifth == 3 else "report" if fifth == 4 else "train"


def _pick(options: Sequence[str], key: str) -> str:
    return options[_hash(key) % len(options)]
