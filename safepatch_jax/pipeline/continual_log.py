"""The patch log of a chain: one line a link, like a commit; no JAX.

A chain is a model that is patched again and again. Each link of it is a model, its patch file (what turned the parent into
it), and a line in log.jsonl that holds the hashes of parent, patch and result. Nothing is ever taken out of the log: a revert is
a line of its own. docs/continual.md has the format.
"""

from __future__ import annotations

import datetime
import json
import pathlib
from typing import Any, Callable, Mapping, Sequence

from safepatch_jax import files, processes
from safepatch_jax.console import say
from safepatch_jax.io.folder import Checkpoint, has_weights, tensor_hashes
from safepatch_jax.patching import patch_apply
from safepatch_jax.patching.patch_file import PatchFile

LOG = "log.jsonl"
START = 0  # the number of the starting model
Step = tuple[Callable[..., Any], int]  # patch_apply.apply or .revert, and the link whose patch it takes


class PatchLog:
    """The log of a chain, read and checked; `entries` are its lines.

    Attributes:
      start: the first line.
      links: the lines of links by number, also of reverted ones.
      live: the numbers that lead to the head, in order.

    Raises:
      ValueError: there is no log, or a line was changed, taken out or put in.
    """

    def __init__(self, workdir: str | pathlib.Path):
        self.workdir = pathlib.Path(workdir).expanduser().absolute()
        self.entries: list[dict[str, Any]] = processes.on_first(self._read)

    def _read(self) -> list[dict[str, Any]]:
        path = self.workdir / LOG
        if not path.is_file():
            raise ValueError(f"There is no patch log {path}. Give the --workdir of a chain; one is made by python -m "
                             "launch.continual run.")
        last = ""
        try:
            entries = files.read_jsonl(path)
            for number, entry in enumerate(entries, 1):
                if entry["previous"] != last or entry["id"] != entry_id(entry):
                    raise ValueError(f"line {number} was changed, or one before it was taken out")
                last = entry["id"]
            if not entries or entries[0]["entry"] != "start":
                raise ValueError("it does not begin with a start")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"The patch log {path} is damaged: {error}. Copy it back from a backup.") from error
        return entries

    @classmethod
    def begin(cls, workdir: pathlib.Path, entry: Mapping[str, Any]) -> PatchLog:
        """Write the first line of a new log."""
        processes.on_first(lambda: _write(workdir, [], {"entry": "start", **entry}))
        return cls(workdir)

    def append(self, kind: str, entry: Mapping[str, Any]) -> None:
        """Add a line; the log on the disk is the old one or the new one at any moment."""
        self.entries.append(processes.on_first(lambda: _write(self.workdir, self.entries, {"entry": kind, **entry})))

    @property
    def start(self) -> dict[str, Any]:
        return self.entries[0]

    @property
    def links(self) -> dict[int, dict[str, Any]]:
        return {e["number"]: e for e in self.entries if e["entry"] == "link"}

    @property
    def live(self) -> list[int]:
        live: list[int] = []
        for entry in self.entries:
            if entry["entry"] == "link":
                live.append(entry["number"])
            elif entry["entry"] == "revert":
                live = live[:-len(entry["links"])]
        return live

    @property
    def head(self) -> int:
        return self.live[-1] if self.live else START

    def path(self, number: int) -> list[int]:
        """Return the links from the start to a model, in order. Raises ValueError if there is no such link."""
        found: list[int] = []
        while number != START:
            if number not in self.links:
                raise ValueError(f"The log has no link {number}. There are {START} (the starting model)"
                                 + "".join(f", {n} ({e['name']})" for n, e in self.links.items()) + ".")
            found.insert(0, number)
            number = self.links[number]["parent"]["link"]
        return found

    def label(self, number: int) -> str:
        return label(number, self.links[number]["name"]) if number else label(START, "start")

    def hash(self, number: int) -> str:
        """Return the hash of a model, see `model_hash`."""
        return self.links[number]["model"] if number else self.start["model"]

    def folder(self, number: int) -> pathlib.Path:
        """Return where the model of a link lies, or lay."""
        return self.workdir / (self.links[number]["folder"] if number else self.start["folder"])

    def patch(self, number: int) -> PatchFile:
        """Open the patch file of a link and compare it with the log.

        Raises:
          ValueError: it is missing, was changed, or leads from or to another model than the log says.
        """
        entry = self.links[number]
        path = self.workdir / entry["patch"]["file"]
        fix = "Copy it back from a backup: without it no model after this link can be built from the start."
        if not path.is_file():
            raise ValueError(f"The patch file of link {number} ({entry['name']}) is missing: {path}. {fix}")
        if (digest := files.file_sha256(path)) != entry["patch"]["sha256"]:
            raise ValueError(f"The patch file of link {number} ({entry['name']}) was changed: {path} has SHA-256 {digest}, the "
                             f"log says {entry['patch']['sha256']}. {fix}")
        patch = PatchFile(path)
        for what, found, said in (("parent", patch_hash(patch, "before"), self.hash(entry["parent"]["link"])),
                                  ("recorded parent", entry["parent"]["model"], self.hash(entry["parent"]["link"])),
                                  ("model", patch_hash(patch, "after"), entry["model"])):
            if found != said:
                raise ValueError(f"Link {number} ({entry['name']}): its {what} has the hash {found[:16]}..., but the log has "
                                 f"{said[:16]}... for it. Log and patch file are of different chains: copy both from one backup.")
        return patch

    def model(self, number: int) -> pathlib.Path:
        """Return the folder of a model, whose bits are those of the log; one that is missing or was changed is built again.

        Raises:
          ValueError: the starting model is missing or was changed, or a patch file that is needed is.
        """
        return pathlib.Path(processes.on_first(lambda: str(self._model(number))))

    def _model(self, number: int) -> pathlib.Path:
        folder = self.folder(number)
        if folder_hash(folder) == self.hash(number):
            return folder
        if number == START:
            raise ValueError(f"The starting model {folder} is missing or no longer the one with which the chain began (hash "
                             f"{self.start['model'][:16]}...). Put it back; its source was {self.start['source']}.")
        say(f"{self.label(number)}: its model is missing or was changed; it is built again from the patch file.")
        parent = self._model(self.links[number]["parent"]["link"])
        self.build(parent, [(patch_apply.apply, number)], folder, self.hash(number), replace=True)
        return folder

    def build(self, model: pathlib.Path, steps: Sequence[Step], out: pathlib.Path, digest: str, *, replace: bool = False) -> None:
        """Write a model folder by applying or reverting patches one after the other; it must come out with this hash."""
        paths = [(move, self.patch(number).path) for move, number in steps]  # all are checked before anything is written
        with files.new_folder(out, replace=replace) as new:
            (move, path), *rest = paths
            move(path, model, new)
            for move, path in rest:
                move(path, new)
            if folder_hash(new) != digest:
                raise ValueError(f"{out}: what came out is not the model of the log (hash {digest[:16]}...). Nothing was kept. "
                                 "Is the disk sound?")


def label(number: int, name: str) -> str:
    return f"{number:02d}-{name}"


def model_hash(hashes: Mapping[str, str]) -> str:
    """Return the hash of a model: over the SHA-256 of each tensor's bytes, by name."""
    return files.text_hash(dict(hashes))


def patch_hash(patch: PatchFile, when: str) -> str:
    """Return the hash of the model 'before' or 'after' a patch; tensors that an export leaves out do not count."""
    return model_hash({name: getattr(x, when) for name, x in patch.tensors.items() if not x.optional})


def folder_hash(folder: pathlib.Path) -> str | None:
    """Return the hash of a model folder; None if its weights are missing or cannot be read."""
    try:
        return model_hash(tensor_hashes(Checkpoint(folder).tensors)) if has_weights(folder) else None
    except (ValueError, OSError):
        return None


def data_text(data: Mapping[str, str]) -> str:
    """Say which harmful records a link has."""
    return data["harmful"] + (f" [{data['category']}]" if data["category"] else "")


def entry_id(entry: Mapping[str, Any]) -> str:
    """Return the hash of a line; the line before is part of it."""
    return files.text_hash({key: value for key, value in entry.items() if key != "id"})


def _write(workdir: pathlib.Path, entries: Sequence[Mapping[str, Any]], entry: Mapping[str, Any]) -> dict[str, Any]:
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    entry = {**entry, "date": date, "previous": entries[-1]["id"] if entries else ""}
    entry["id"] = entry_id(entry)
    path, before = workdir / LOG, _text(entries)
    if (path.read_text(encoding="utf-8") if path.is_file() else "") != before:
        raise ValueError(f"{path} was changed by another process meanwhile. Nothing was logged; give the command again.")
    files.write_text(path, before + _text([entry]))
    return entry


def _text(entries: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
