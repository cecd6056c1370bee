"""Records of the three roles, from the built-in set or from a user's file.

harmful: harmful requests with an affirmative answer (and, for alignment, a refusal); lookalike: harmless requests that
only look dangerous; ordinary: ordinary instructions with answers. Each record is in one split: train, search (choosing
settings) or report.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import pathlib
from typing import Any, Sequence

from safepatch_jax import files

ROLES = ("harmful", "lookalike", "ordinary")
SPLITS = ("train", "search", "report")
# Column names we recognise, first match wins: ours, then those of AdvBench, HarmBench, Alpaca, BeaverTails.
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


def load_records(role: str, source: str) -> list[Record]:
    """Read all records of a role.

    Args:
      role: one of ROLES.
      source: 'builtin'; the path of a .csv, .json (list of objects) or .jsonl file; or 'tfds:NAME@SPLIT', a prepared
        TensorFlow Datasets set in array_record format. Recognised columns are listed in `_ALIASES`. Rows that XSTest or
        BeaverTails label as the opposite of the role are left out. Without a 'split' column a row's split follows from
        the hash of its prompt: about 60 % train, 20 % search, 20 % report.

    Raises:
      ValueError: no such file, unreadable, a needed column is missing, no usable row, or a prompt in two splits.
    """
    if role not in ROLES:
        raise ValueError(f"unknown role '{role}'; roles are {', '.join(ROLES)}.")
    if source.startswith("tfds:"):
        path, rows = source, _read_tfds(source)
    else:
        builtin = pathlib.Path(__file__).parent / "builtin" / f"{role}.jsonl"
        path = builtin if source == "builtin" else pathlib.Path(source)
        rows = _read_rows(path, role)
    if not rows:
        raise ValueError(f"{path}: no rows. A {role} file needs at least one row with a prompt.")
    present = dict.fromkeys(key for row in rows for key in row)  # JSON rows need not all hold the same keys
    columns = {name: next((alias for alias in aliases if alias in present), None) for name, aliases in _ALIASES.items()}
    needed = ["prompt"] + (["answer"] if _NEEDS_ANSWER[role] else [])
    lacking = [name for name in needed if columns[name] is None]
    if lacking:
        raise ValueError(
            f"{path}: a {role} file needs the column{'s' if len(lacking) > 1 else ''} "
            + " and ".join(f"'{n}' (or {', '.join(_ALIASES[n][1:])})" for n in lacking)
            + f"; found {', '.join(map(str, present)) or 'none'}. Rename the columns.")
    records = []
    for row in rows:
        get = lambda name: _text(row.get(columns[name])) if columns[name] else ""
        prompt = "\n\n".join(filter(None, (get("prompt"), get("context"))))
        if not prompt or (_NEEDS_ANSWER[role] and not get("answer")) or _of_the_other_kind(role, row, get):
            continue
        split = get("split") or _hashed_split(prompt)
        if split not in SPLITS:
            raise ValueError(f"{path}: split '{split}' is not one of {', '.join(SPLITS)}.")
        records.append(Record(prompt, get("answer"), get("refusal") or _pick(_REFUSALS, prompt), get("category"), split))
    splits: dict[str, set[str]] = {}
    for record in records:
        splits.setdefault(record.prompt, set()).add(record.split)
    if leaks := [prompt for prompt, found in splits.items() if len(found) > 1]:
        raise ValueError(f"{path}: {len(leaks)} prompts stand in more than one split, so a report would measure what was "
                         f"trained on; the first: {leaks[0][:60]!r}. Remove the copies.")
    if not records:
        raise ValueError(f"{path}: none of the {len(rows)} rows can be used as {role} (empty cells, or all 'unsafe').")
    return records


def _of_the_other_kind(role: str, row: dict[str, Any], get) -> bool:
    """Tell rows that a data set labels as the opposite: unsafe contrasts in XSTest, safe answers in BeaverTails."""
    if role == "lookalike":
        return get("label").lower() == "unsafe" or get("category").startswith("contrast_")
    return role == "harmful" and str(row.get("is_safe", "")).lower() == "true"


def take(records: Sequence[Record], split: str, limit: int | None = None) -> list[Record]:
    """Return the records of a split in file order; of more than `limit`, those with the lowest hash of their prompt.

    So a limit draws from the whole file, which may be sorted by type, and always the same records.

    Raises:
      ValueError: the split is empty.
    """
    chosen = [r for r in records if r.split == split]
    if limit is not None and len(chosen) > limit:
        last = sorted(_hash(r.prompt) for r in chosen)[limit - 1]
        chosen = [r for r in chosen if _hash(r.prompt) <= last][:limit]
    if not chosen:
        raise ValueError(f"No record is in the split '{split}' ({len(records)} in all). Give more rows, or a 'split' column.")
    return chosen


def _read_rows(path: pathlib.Path, role: str) -> list[dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"No {role} data file '{path}'. Give 'builtin' or the path of a .csv, .json or .jsonl file.")
    try:
        if path.suffix == ".csv":
            with open(path, newline="", encoding="utf-8-sig") as f:
                return list(csv.DictReader(f, strict=True))
        if path.suffix == ".jsonl":
            rows = files.read_jsonl(path)
        elif path.suffix == ".json":
            rows = json.loads(path.read_text(encoding="utf-8"))
        else:
            raise ValueError(f"{path}: '{path.suffix}' is not a known format; use .csv, .json or .jsonl.")
    except (csv.Error, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as {path.suffix[1:].upper()}: {error}.") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a list of objects, one a record.")
    return rows


def _read_tfds(source: str) -> list[dict[str, Any]]:
    """Read a prepared TFDS set through its random-access files; TensorFlow is not needed."""
    import tensorflow_datasets as tfds  # imported here: only such sources need it

    name, _, split = source.removeprefix("tfds:").partition("@")
    try:  # a set that is not prepared is reported as any of these, by version and format
        rows = tfds.data_source(name, split=split or "train", download=False)
    except (tfds.core.DatasetNotFoundError, AssertionError, FileNotFoundError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{source} is not a data set prepared here ({error}). Prepare it with file_format='array_record', "
                         "for instance tfds.builder(NAME, file_format='array_record').download_and_prepare(), and set "
                         "TFDS_DATA_DIR if it is not in the default folder.") from error
    return [{k: v.decode() if isinstance(v, bytes) else v for k, v in row.items()} for row in rows]


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _hashed_split(prompt: str) -> str:
    fifth = _hash(prompt) % 5
    return "search" if fifth == 3 else "report" if fifth == 4 else "train"


def _pick(options: Sequence[str], key: str) -> str:
    return options[_hash(key) % len(options)]
