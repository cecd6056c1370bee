"""The lines of a patch log: how they are written, and what in a file is refused; no JAX.

Each line holds the hash of the one before, so a line that was changed, removed or inserted shows.
The hashes do not tell who wrote a line, so its contents are checked too.
"""

from __future__ import annotations

import datetime
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from safepatch_jax.runtime import files
from safepatch_jax.runtime.console import some
from safepatch_jax.runtime.records import HASH, misfits

LOG, FORMAT = "log.jsonl", 1
START = 0  # the number of the starting model
# With a hash of what it was made from, so that one of other settings is not mistaken for it.
START_DIR = "start-{}"
# Of a link: it becomes a folder, and stands in tables and pictures.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

# What each kind of line holds: types, patterns of texts, and objects with at least these fields.
_LINE = re.compile("[0-9a-f]{64}|")
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\+00:00")
_START_FOLDER = re.compile("(?:gs:/|s3:/)?/.*|" + START_DIR.format("[0-9a-f]+"), re.DOTALL)
_MODEL = {"link": int, "model": HASH}
_PATCH = {"sha256": HASH, "entries": int, "bytes": int}
_COMMON = {"date": _DATE, "previous": _LINE, "id": HASH}
_FIELDS: dict[str, dict[str, Any]] = {
    "start": {
        "format": int,
        "source": str,
        "aligned": bool,
        "folder": str,
        "model": HASH,
        "companions": dict,
        "settings": dict,
        "versions": dict,
    },
    "link": {
        "number": int,
        "name": NAME,
        "parent": _MODEL,
        "model": HASH,
        "patch": _PATCH,
        "data": {"harmful": str, "category": str, "hash": HASH, "records": int},
        "seed": int,
        "settings": dict,
        "versions": dict,
    },
    "refused": {
        "name": NAME,
        "parent": _MODEL,
        "model": HASH,
        "data": {"harmful": str, "category": str, "hash": HASH, "records": int},
        "gate": {"rules": HASH, "against": str, "verdict": str, "checks": list},
    },
    "revert": {"links": list, "head": _MODEL},
    "remove": {"link": int, "overlap": str, "entries": int, "links": list, "head": _MODEL},
}
# A link that was written anew, as a removal lists it.
_MOVED = {"number": int, "of": int, "parent": _MODEL, "model": HASH, "patch": _PATCH}


def entry_id(entry: Mapping[str, Any]) -> str:
    """Return the hash of a line; the line before is part of it."""
    return files.text_hash({key: value for key, value in entry.items() if key != "id"})


def read_entries(path: pathlib.Path) -> list[dict[str, Any]]:
    """Read and check the lines of a log."""
    try:
        entries = files.read_jsonl(path)
        _check_ids(entries)
        known = entries[0].get("format") == FORMAT
        if known:
            _check(entries)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"The patch log {path} is damaged: {error}. Copy it back from a backup."
        ) from error
    if not known:
        raise ValueError(
            f"The patch log {path} is of format {ascii(entries[0].get('format'))}, and {FORMAT} "
            "is known here: another version of safepatch_jax made it. Use that version, or begin "
            "another chain in another --workdir."
        )
    return entries


def _check_ids(entries: Sequence[Any]) -> None:
    """Raise ValueError if a line was changed, removed or inserted, or the first one is no start."""
    last = ""
    for number, entry in enumerate(entries, 1):
        follows = isinstance(entry, dict) and entry.get("previous") == last
        if not follows or entry.get("id") != entry_id(entry):
            raise ValueError(f"line {number} was changed, or one before it was taken out")
        last = entry["id"]
    if not entries or entries[0].get("entry") != "start":
        raise ValueError("it does not begin with a start")


def _check(entries: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError for a line that no chain has: the hashes do not tell who wrote it."""
    chain = _Chain(entries[0].get("model"))
    for line, entry in enumerate(entries, 1):
        kind = entry.get("entry")
        # A tuple, as what JSON gives may have no hash.
        if kind not in tuple(_FIELDS) or (kind == "start") != (line == 1):
            problems = ["it is no start, link, refused, revert or remove"]
        else:
            problems = [*misfits(entry, _COMMON | _FIELDS[kind])] or chain.add(entry)
        if problems:
            raise ValueError(f"line {line}: {some(problems)}")


class _Chain:
    """What the lines of a log add up to, line by line; `model` is the starting model's hash."""

    def __init__(self, model: Any):
        self._models, self._parents = {START: model}, {}
        self._live: list[int] = []

    def add(self, entry: Mapping[str, Any]) -> list[str]:
        """Add a line whose fields are right; return what of it does not follow from the lines
        before."""
        rules = {
            "start": self._start,
            "link": self._link,
            "refused": self._refused,
            "revert": self._revert,
            "remove": self._remove,
        }
        return rules[entry["entry"]](entry)

    def _start(self, entry: Mapping[str, Any]) -> list[str]:
        folder = entry["folder"]
        if _START_FOLDER.fullmatch(folder) and folder.isprintable():
            return []
        expected = f"neither absolute nor an address nor {START_DIR.format('HASH')}"
        return [f"folder is {ascii(folder)}, {expected}"]

    def _link(self, entry: Mapping[str, Any]) -> list[str]:
        number, parent = entry["number"], entry["parent"]["link"]
        following, head = len(self._models), self._live[-1] if self._live else START
        if (number, parent) != (following, head):
            return [f"it is link {number} on {parent}, and {following} on {head} comes next"]
        self._models[number], self._parents[number] = entry["model"], parent
        self._live.append(number)
        return []

    def _refused(self, entry: Mapping[str, Any]) -> list[str]:
        head = self._live[-1] if self._live else START
        if entry["parent"] != {"link": head, "model": self._models[head]}:
            return [f"a link on another model than {head}, the head, was refused"]
        if not all(isinstance(line, str) for line in entry["gate"]["checks"]):
            return ["gate.checks are no lines"]
        return []

    def _revert(self, entry: Mapping[str, Any]) -> list[str]:
        links = entry["links"]
        if not links or links != self._live[: -len(links) - 1 : -1]:
            return [f"it takes off {ascii(links)}, and the links are {self._live}"]
        head = self._parents[links[-1]]
        if entry["head"] != {"link": head, "model": self._models[head]}:
            return [f"its head is not the model of {head}, which is left"]
        del self._live[-len(links) :]
        return []

    def _remove(self, entry: Mapping[str, Any]) -> list[str]:
        number, moved = entry["link"], entry["links"]
        if number not in self._live:
            return [f"it removes {number}, and the links are {self._live}"]
        for link in moved:
            if problems := list(misfits(link, _MOVED)):
                return problems
        place = self._live.index(number)
        later = self._live[place + 1 :]
        if [link["of"] for link in moved] != later:
            return [f"it does not write the links {later}, which come after {number}, anew"]
        head = self._parents[number]
        for link in moved:
            following = len(self._models)
            parent = {"link": head, "model": self._models[head]}
            if link["number"] != following or link["parent"] != parent:
                return [f"link {link['of']} does not go on as {following} on {head}"]
            self._models[following], self._parents[following] = link["model"], head
            head = following
        if entry["head"] != {"link": head, "model": self._models[head]}:
            return [f"its head is not the model of {head}, which is left"]
        self._live[place:] = [link["number"] for link in moved]
        return []


def write_entry(
    workdir: pathlib.Path, entries: Sequence[Mapping[str, Any]], entry: Mapping[str, Any]
) -> dict[str, Any]:
    """Write a log with one more line, and return that line."""
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    entry = {**entry, "date": date, "previous": entries[-1]["id"] if entries else ""}
    entry["id"] = entry_id(entry)
    path = workdir / LOG
    stored = read_entries(path) if path.is_file() else []
    if [x["id"] for x in stored] != [x["id"] for x in entries]:
        raise ValueError(
            f"{path} was changed by another process meanwhile. Nothing was logged; give the "
            "command again."
        )
    _check([*entries, entry])
    lines = [json.dumps(x, ensure_ascii=False) + "\n" for x in (*entries, entry)]
    files.write_text(path, "".join(lines))
    return entry
