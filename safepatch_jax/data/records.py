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
import os
import pathlib
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

from safepatch_jax.data import builders, cells, hub_sets
from safepatch_jax.data.cells import CONVERSATIONS, Turns, placed
from safepatch_jax.data.duplicates import first_of_each
from safepatch_jax.data.sets import DATA_DIR, SETS, Row
from safepatch_jax.data.streams import refuse_other_than_file
from safepatch_jax.data.tables import bounded, decoded, read_rows
from safepatch_jax.runtime import libraries
from safepatch_jax.runtime.addresses import is_address
from safepatch_jax.runtime.console import say, some
from safepatch_jax.runtime.paths import readable
from safepatch_jax.runtime.reading import Refused, reading

DATA_ROLES = ("harmful", "lookalike", "ordinary")
SPLITS = ("train", "search", "report")
# Column names we recognise, first match wins: ours, then those of AdvBench, HarmBench, Alpaca,
# BeaverTails, and of conversations.
_ALIASES = {
    "prompt": ("prompt", "goal", "instruction", "question", "Behavior", *CONVERSATIONS),
    "answer": ("answer", "target", "output", "response"),
    "refusal": ("refusal",),
    "category": ("category", "type", "topic", "SemanticCategory"),
    "context": ("context", "input"),
    "label": ("label",),
    "split": ("split",),
}
_REVISION = "revision"  # after the name of a data set of the Hub, beside the fields
_SAFE = "is_safe"  # BeaverTails' column
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
    """One prompt with what is known of it; fields that a source lacks are empty.

    Attributes:
      turns: (role, text) of what stands before the prompt: a system message or none, then the
        user's and the assistant's messages in turn.
    """

    prompt: str
    answer: str
    refusal: str
    category: str
    split: str
    turns: Turns = ()

    @property
    def key(self) -> str:
        """What tells examples apart: the prompt, and what stands before it."""
        return cells.key(self.prompt, self.turns)

    def fields(self) -> dict[str, Any]:
        """Return what is hashed; of a record without turns the five texts alone."""
        fields = dict(self.__dict__)
        if not self.turns:
            del fields["turns"]
        return fields


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
        - 'hf:ORG/NAME:CONFIG@SPLIT', a data set of the Hugging Face Hub (`hub_sets`), where
          CONFIG and SPLIT may be left out, and '?revision=COMMIT' may follow;
        - the path of a .csv, .json (list of objects), .jsonl or .parquet file.
        After the last three '?prompt=COLUMN&answer=COLUMN' may name columns; else those in
        `_ALIASES` are recognised. A cell of the prompt may be a conversation
        (`cells.conversation`): its last message of the user is the prompt, and the assistant's
        after that the answer, where the file has no other.
      manual_dir: where files of public data sets that were fetched by hand lie, see
        `builders.load_set`.
      data_dir: where public data sets are prepared.
      answers: whether a row needs one; by default harmful and ordinary ones do.

    Rows that a data set labels as the opposite of the role are left out, and so are near-duplicates
    of an earlier row (`duplicates.first_of_each`; not in the built-in set; after other turns a
    prompt is another one). Without a 'split' column a row's split follows from the
    hash of its prompt: about 60 % train, 20 % search, 20 % report.

    Raises:
      ValueError: no such file or set, unreadable, a needed column is missing, a cell that is no
        text or conversation, no usable row, or a prompt in two splits.
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
        unique = _unique(records)
    omitted["near-duplicates"] = len(records) - len(unique)
    notes = []
    if reasons := [f"{count:,} {reason}" for reason, count in omitted.items() if count]:
        notes.append(f"left out: {', '.join(reasons)}")
    if unread := _unread(source, rows, columns):
        notes.append(f"columns not read: {some(unread, ', ', 8)}")
    if notes:
        say(f"  {role} ({source}): {len(unique):,} of {len(rows):,} rows; {'; '.join(notes)}")
    return unique


def _unread(source: str, rows: Sequence[Row], columns: Mapping[str, str]) -> list[str]:
    """Return the columns of somebody's table that are no field's."""
    if source == "builtin" or source.startswith("set:"):
        return []
    present = dict.fromkeys(itertools.chain.from_iterable(rows))
    return [f"{name:.60}" for name in present if name not in (*columns.values(), _SAFE)]


def _usable(
    role: str, source: str, rows: Sequence[Row], columns: Mapping[str, str], answers: bool
) -> tuple[list[Record], dict[str, int]]:
    """Return the records of rows, and how many rows were left out, by reason."""
    lacking = "without prompt or answer" if answers else "without prompt"
    records, omitted = [], {lacking: 0, _OPPOSITE: 0}
    for number, row in enumerate(rows, 1):
        fields, turns = _read_cells(source, number, row, columns)
        prompt = "\n\n".join(filter(None, (fields["prompt"], fields["context"])))
        if not prompt or (answers and not fields["answer"]):
            omitted[lacking] += 1
        elif _is_opposite(role, row, fields):
            omitted[_OPPOSITE] += 1
        else:
            key = cells.key(prompt, turns)
            split = fields["split"] or _hashed_split(key)
            if split not in SPLITS:
                raise ValueError(
                    f"{source}: row {number}: split '{split:.60}' is not one of "
                    f"{', '.join(SPLITS)}."
                )
            refusal = fields["refusal"] or _pick(_REFUSALS, key)
            records.append(
                Record(prompt, fields["answer"], refusal, fields["category"], split, turns)
            )
    return records, omitted


def _read_cells(
    source: str, number: int, row: Row, columns: Mapping[str, str]
) -> tuple[dict[str, str], Turns]:
    """Return the texts of a row by field, '' where there is none, and what stands before its
    prompt."""
    fields, turns, answer = dict.fromkeys(_ALIASES, ""), (), ""
    for field, column in columns.items():
        value = row.get(column)
        with placed(source, number, column):
            talk = cells.conversation(value) if field == "prompt" else None
            if talk is None:
                fields[field] = _READERS.get(field, cells.text)(value)
            else:
                fields[field], turns, answer = talk.prompt, talk.turns, talk.answer
    if answer and answer != (fields["answer"] or answer):
        raise Refused(
            f"{source}: row {number}: the conversation in column {columns['prompt']!r:.100} ends "
            f"with another answer than column {columns['answer']!r:.100} holds. Remove one of them."
        )
    fields["answer"] = fields["answer"] or answer
    return fields, turns


def _label(value: Any) -> str:
    return value.strip() if isinstance(value, str) else ""  # only words are looked for


_READERS = {
    "answer": cells.answer,
    "refusal": cells.answer,
    "category": cells.category,
    "label": _label,
}


def _unique(records: Sequence[Record]) -> list[Record]:
    """Return the records that are no near-duplicate of one before them with the same turns."""
    places: dict[Turns, list[int]] = {}
    for place, record in enumerate(records):
        places.setdefault(record.turns, []).append(place)
    kept = []
    for alike in places.values():
        prompts = [records[place].prompt for place in alike]
        kept += [alike[i] for i in first_of_each(prompts)]
    return [records[place] for place in sorted(kept)]


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
    place, mapping = (source, {}) if os.path.isfile(source) else _parse_mapping(source)
    if place.startswith("tfds:"):
        return _read_tfds(place), mapping
    if place.startswith(hub_sets.SCHEME) and not os.path.exists(place):
        revision = mapping.pop(_REVISION, "")
        return hub_sets.read(place, revision), mapping
    place = readable(place) if is_address(place) else place
    if os.path.exists(place):
        refuse_other_than_file(pathlib.Path(place))
    else:
        hint = f" Did you mean 'set:{place}'?" if place in SETS else ""
        raise ValueError(
            f"No {role} data file '{place}'.{hint} Give 'builtin' or the path of a .csv, .json, "
            ".jsonl or .parquet file, 'set:NAME', or 'hf:org/name' (docs/data.md)."
        )
    return read_rows(pathlib.Path(place)), mapping


def _parse_mapping(source: str) -> tuple[str, dict[str, str]]:
    """Split 'PLACE?field=column&...' (percent signs escape & and = in a column's name)."""
    place, _, query = source.partition("?")
    fields = [*_ALIASES, _REVISION] if place.startswith(hub_sets.SCHEME) else list(_ALIASES)
    mapping = {}
    for part in filter(None, query.split("&")):
        field, _, column = map(urllib.parse.unquote, part.partition("="))
        if field not in fields or not column or field in mapping:
            close = difflib.get_close_matches(field, fields, n=1)
            hint = f" (did you mean '{close[0]}'?)" if close and close[0] != field else ""
            raise ValueError(
                f"{source}: '{part}' is not FIELD=COLUMN, each field once, with a field of "
                f"{', '.join(fields)}{hint}."
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
    header = some([f"{name:.60}" for name in present], ", ", 20) or "none"
    if absent := [column for column in mapping.values() if column not in present]:
        raise ValueError(f"{source}: no column {', '.join(map(repr, absent))}; found {header}.")
    # A column that the source names is the field's that it is named for, and no other's.
    free = present.keys() - mapping.values()
    columns = {}
    for field, aliases in _ALIASES.items():
        if names := [alias for alias in aliases if alias in free]:
            columns[field] = names[0]
    talks = [name for name in CONVERSATIONS if name in free]
    if answers and talks and "answer" not in columns:
        columns["prompt"] = talks[0]  # it holds the answers too
    columns |= mapping
    needed = ["prompt"]
    if (
        answers
        and "answer" not in columns
        and not _hold_answers(source, rows, columns.get("prompt"))
    ):
        needed.append("answer")
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


def _hold_answers(source: str, rows: Sequence[Row], column: str | None) -> bool:
    """Tell whether cells of a column are conversations, which may end with an answer."""
    for number, row in enumerate(rows, 1):
        with placed(source, number, str(column)):
            if cells.conversation(row.get(column)) is not None:
                return True
    return False


def _check_splits(source: str, records: Sequence[Record]) -> None:
    """Raise ValueError if a prompt is in more than one split."""
    splits: dict[str, set[str]] = {}
    for record in records:
        splits.setdefault(record.key, set()).add(record.split)
    if leaks := [prompt for prompt, names in splits.items() if len(names) > 1]:
        raise ValueError(
            f"{source}: {len(leaks)} prompts stand in more than one split, so a report would "
            f"measure what was trained on; the first: {leaks[0][:60]!r}. Remove the copies."
        )


def _is_opposite(role: str, row: Row, fields: Mapping[str, str]) -> bool:
    """Return whether the data set labels a row as the opposite of the role: safe prompts (XSTest)
    or answers (BeaverTails) for harmful, unsafe ones for the other two."""
    label = fields["label"].lower()
    if role == "harmful":
        return label == "safe" or str(row.get(_SAFE, "")).lower() == "true"
    contrast = role == "lookalike" and fields["category"].startswith("contrast_")
    return label == "unsafe" or contrast


def take(records: Sequence[Record], split: str, limit: int | None = None) -> list[Record]:
    """Return the records of a split in file order; of more than `limit`, those with the lowest hash
    of their prompt.

    So a limit draws from the whole file, which may be sorted by type, and always draws the same.

    Raises:
      ValueError: the split is empty.
    """
    rows = [record for record in records if record.split == split]
    if limit is not None and len(rows) > limit:
        last = sorted(_hash(record.key) for record in rows)[limit - 1]
        rows = [record for record in rows if _hash(record.key) <= last][:limit]
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
        rows.append(row | {_SAFE: record["label"] == "safe"})
    return rows


def _read_tfds(source: str) -> list[Row]:
    """Read a prepared TFDS set through its random-access files; TensorFlow is not needed."""
    tfds = libraries.needed(source, *libraries.TFDS)  # here: only such sources need it
    name, _, split = source.removeprefix("tfds:").partition("@")
    fix = (
        "Prepare it with file_format='array_record', for instance tfds.builder(NAME, "
        "file_format='array_record').download_and_prepare(), and set TFDS_DATA_DIR if it is not in "
        "the default folder."
    )
    with reading(source, "a data set prepared here", fix):
        rows = tfds.data_source(name, split=split or "train", download=False)
        return list(bounded(map(decoded, rows), source))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _hashed_split(prompt: str) -> str:
    return ("train", "train", "train", "search", "report")[_hash(prompt) % 5]


def _pick(options: Sequence[str], key: str) -> str:
    return options[_hash(key) % len(options)]
