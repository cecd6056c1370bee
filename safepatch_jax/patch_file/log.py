"""The patch log of a chain: one line a link, like a commit; no JAX.

A chain is a model that is patched again and again. Each link of it is a model, its patch file (what
turned the parent into it), and a line in log.jsonl that holds the hashes of parent, patch and
result. Nothing is ever taken out of the log: a revert is a line of its own. docs/continual.md has
the format.
"""

from __future__ import annotations

import datetime
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from safepatch_jax.io.folder import Checkpoint, has_weights, tensor_hashes
from safepatch_jax.patch_file import apply as patch_apply
from safepatch_jax.patch_file.file import PatchFile
from safepatch_jax.runtime import files, processes
from safepatch_jax.runtime.console import say, some

LOG, FORMAT = "log.jsonl", 1
START = 0  # the number of the starting model
LINKS = "links"
EXPORT, PATCH = (
    "stages/export/model",
    "stages/patch_file/patch.safetensors",
)  # within a link's folder
# with a hash of what it was made from, so that one of other settings is not taken for it
START_DIR = "start-{}"
NAME = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9_.-]*"
)  # of a link: it becomes a folder, and stands in tables and pictures
_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".index.json",
)
# Written about a model, read by nothing; "metrics.jsonl" of an alignment holds times.
_ABOUT = (patch_apply.CERTIFICATE, "README.md", "metrics.jsonl")

# What each kind of line holds: types, patterns of texts, and objects with at least these fields.
_HASH, _LINE = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{64}|")
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\+00:00")
_START_FOLDER = re.compile("/.*|" + START_DIR.format("[0-9a-f]+"), re.DOTALL)
_MODEL = {"link": int, "model": _HASH}
_FIELDS: dict[str, dict[str, Any]] = {
    "start": {
        "format": int,
        "source": str,
        "aligned": bool,
        "folder": str,
        "model": _HASH,
        "companions": dict,
        "settings": dict,
        "versions": dict,
    },
    "link": {
        "number": int,
        "name": NAME,
        "parent": _MODEL,
        "model": _HASH,
        "patch": {"sha256": _HASH, "entries": int, "bytes": int},
        "data": {"harmful": str, "category": str, "hash": _HASH, "records": int},
        "seed": int,
        "settings": dict,
        "versions": dict,
    },
    "revert": {"links": list, "head": _MODEL},
}
Step = tuple[
    Callable[..., Any], int
]  # patch_apply.apply or .revert, and the link whose patch it takes


class PatchLog:
    """The log of a chain, read and checked; `entries` are its lines.

    Attributes:
      start: the first line.
      links: the lines of links by number, also of reverted ones.
      live: the numbers that lead to the head, in order.

    Raises:
      ValueError: there is no log, it is of another format, a line was changed, taken out or put in,
        or says what cannot be.
    """

    def __init__(self, workdir: str | pathlib.Path):
        self.workdir = pathlib.Path(workdir).expanduser().absolute()
        self.entries: list[dict[str, Any]] = processes.on_first(self._read)

    def _read(self) -> list[dict[str, Any]]:
        path = self.workdir / LOG
        if not path.is_file():
            raise ValueError(
                f"There is no patch log {path}. Give the --workdir of a chain; one is made by "
                "python -m "
                "launch.continual run."
            )
        return _read_entries(path)

    @classmethod
    def begin(cls, workdir: pathlib.Path, entry: Mapping[str, Any]) -> PatchLog:
        """Write the first line of a new log."""
        processes.on_first(_write, workdir, [], {"entry": "start", **entry})
        return cls(workdir)

    def append(self, kind: str, entry: Mapping[str, Any]) -> None:
        """Add a line; the log on the disk is the old one or the new one at any moment."""
        self.entries.append(
            processes.on_first(_write, self.workdir, self.entries, {"entry": kind, **entry})
        )

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
                live = live[: -len(entry["links"])]
        return live

    @property
    def head(self) -> int:
        return self.live[-1] if self.live else START

    def path(self, number: int) -> list[int]:
        """Return the links from the start to a model, in order. Raises ValueError if there is no
        such link."""
        found: list[int] = []
        while number != START:
            if number not in self.links:
                raise ValueError(
                    f"The log has no link {number}. There are {START} (the starting model)"
                    + "".join(f", {n} ({e['name']})" for n, e in self.links.items())
                    + "."
                )
            found.insert(0, number)
            number = self.links[number]["parent"]["link"]
        return found

    def label(self, number: int) -> str:
        return label(number, self.links[number]["name"]) if number else label(START, "start")

    def hash(self, number: int) -> str:
        """Return the hash of a model, see `model_hash`."""
        return self.links[number]["model"] if number else self.start["model"]

    def folder(self, number: int) -> pathlib.Path:
        """Return where the model of a link lies, or lay; the starting model's may be elsewhere, and
        is never written to."""
        return self._link_folder(number) / EXPORT if number else self.workdir / self.start["folder"]

    def patch_path(self, number: int) -> pathlib.Path:
        return self._link_folder(number) / PATCH

    def _link_folder(self, number: int) -> pathlib.Path:
        return self.workdir / LINKS / self.label(number)

    def patch(self, number: int) -> PatchFile:
        """Open the patch file of a link and compare it with the log.

        Raises:
          ValueError: it is missing, was changed, or leads from or to another model than the log
            says.
        """
        entry = self.links[number]
        path = self.patch_path(number)
        fix = "Copy it back from a backup: without it no model after this link can be built from the start."
        if not path.is_file():
            raise ValueError(
                f"The patch file of link {number} ({entry['name']}) is missing: {path}. {fix}"
            )
        if (digest := files.file_sha256(path)) != entry["patch"]["sha256"]:
            raise ValueError(
                f"The patch file of link {number} ({entry['name']}) was changed: {path} has "
                f"SHA-256 {digest}, the "
                f"log says {entry['patch']['sha256']}. {fix}"
            )
        patch = PatchFile(path)
        for what, found, said in (
            ("parent", patch_hash(patch, "before"), self.hash(entry["parent"]["link"])),
            ("recorded parent", entry["parent"]["model"], self.hash(entry["parent"]["link"])),
            ("model", patch_hash(patch, "after"), entry["model"]),
        ):
            if found != said:
                raise ValueError(
                    f"Link {number} ({entry['name']}): its {what} has the hash {found[:16]}..., "
                    "but the log has "
                    f"{said[:16]}... for it. Log and patch file are of different chains: copy "
                    "both from one backup."
                )
        return patch

    def model(self, number: int) -> pathlib.Path:
        """Return the folder of a model, whose bits are those of the log; one that is missing or was
        changed is built again.

        Raises:
          ValueError: the starting model is missing or was changed (with its config and tokenizer),
            or a patch file that is needed is.
        """
        return pathlib.Path(processes.on_first(lambda: str(self._model(number))))

    def _model(self, number: int) -> pathlib.Path:
        folder = self.folder(number)
        if number == START:
            self.check_start()
        elif folder_hash(folder) != self.hash(number):
            say(
                f"{self.label(number)}: its model is missing or was changed; it is built again "
                "from the patch file."
            )
            self._refuse_elsewhere(number)
            parent = self._model(self.links[number]["parent"]["link"])
            self.build(
                parent, [(patch_apply.apply, number)], folder, self.hash(number), replace=True
            )
        return folder

    def check_start(self) -> None:
        """Raise ValueError if the starting model, or a file beside its weights, is not as when the
        chain began."""
        folder, start = self.folder(START), self.start
        if folder_hash(folder) != start["model"]:
            raise ValueError(
                f"The starting model {folder} is missing or no longer the one with which the "
                "chain began (hash "
                f"{start['model'][:16]}...). Put it back; its source was {plain(start['source'])}."
            )
        then, now = start["companions"], companion_hashes(folder)
        changed = [
            plain(name)
            + (" is new" if name not in then else " is gone" if name not in now else " was changed")
            for name in sorted(then.keys() | now.keys())
            if then.get(name) != now.get(name)
        ]
        if changed:
            raise ValueError(
                f"The starting model {folder} is no longer as when the chain began: "
                f"{some(changed)}. Links were "
                "made and measured with the files beside the weights as they were. Put them back, "
                "or begin another "
                "chain in another --workdir."
            )

    def _refuse_elsewhere(self, number: int) -> None:
        """Raise ValueError unless a link's model folder, which is to be replaced, lies where the
        chain itself has put it."""
        own = self.workdir.resolve() / LINKS / self.label(number) / EXPORT
        if self.folder(number).resolve() != own or self.folder(START).resolve().is_relative_to(own):
            raise ValueError(
                f"{self.folder(number)} is not replaced: it leads out of the chain's folder (to "
                f"{self.folder(number).resolve()}), or is the starting model. Build the model "
                "elsewhere: replay."
            )

    def build(
        self,
        model: pathlib.Path,
        steps: Sequence[Step],
        out: pathlib.Path,
        digest: str,
        *,
        replace: bool = False,
    ) -> None:
        """Write a model folder by applying or reverting patches one after the other; it must come
        out with this hash."""
        for _, number in steps:
            self.patch(number)  # all are checked before anything is written
        with files.new_folder(out, replace=replace) as new:
            source = [model, new]  # after the first patch the others go onto what it left
            for move, number in steps:
                move(self.patch_path(number), *source)
                source = [new]
            if folder_hash(new) != digest:
                raise ValueError(
                    f"{out}: what came out is not the model of the log (hash {digest[:16]}...). "
                    "Nothing was kept. "
                    "Is the disk sound?"
                )


def label(number: int, name: str) -> str:
    return f"{number:02d}-{name}"


def model_hash(hashes: Mapping[str, str]) -> str:
    """Return the hash of a model: over the SHA-256 of each tensor's bytes, by name."""
    return files.text_hash(dict(hashes))


def patch_hash(patch: PatchFile, when: str) -> str:
    """Return the hash of the model 'before' or 'after' a patch; tensors that an export leaves out
    do not count."""
    return model_hash(
        {name: getattr(x, when) for name, x in patch.tensors.items() if not x.optional}
    )


def folder_hash(folder: pathlib.Path) -> str | None:
    """Return the hash of a model folder; None if its weights are missing or cannot be read."""
    try:
        return (
            model_hash(tensor_hashes(Checkpoint(folder).tensors)) if has_weights(folder) else None
        )
    except (ValueError, OSError):
        return None


def companion_hashes(folder: pathlib.Path) -> dict[str, str]:
    """Return the SHA-256 of each file beside the weights of a model folder: config, tokenizer, chat
    template, and others."""
    return {
        p.name: files.file_sha256(p)
        for p in sorted(folder.iterdir())
        if p.is_file()
        and not p.name.startswith(".")
        and not p.name.endswith(_WEIGHTS)
        and p.name not in _ABOUT
    }


def data_text(data: Mapping[str, str]) -> str:
    """Say which harmful records a link has."""
    return plain(data["harmful"] + (f" [{data['category']}]" if data["category"] else ""))


def plain(text: str) -> str:
    """Return a text of which a terminal shows every sign and obeys none."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def entry_id(entry: Mapping[str, Any]) -> str:
    """Return the hash of a line; the line before is part of it."""
    return files.text_hash({key: value for key, value in entry.items() if key != "id"})


def _read_entries(path: pathlib.Path) -> list[dict[str, Any]]:
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
            "is known here: "
            "another version of safepatch_jax made it. Use that version, or begin another chain "
            "in another "
            "--workdir."
        )
    return entries


def _check_ids(entries: Sequence[Any]) -> None:
    """Raise ValueError if a line was changed, taken out or put in, or the first one is no start."""
    last = ""
    for number, entry in enumerate(entries, 1):
        if (
            not isinstance(entry, dict)
            or entry.get("previous") != last
            or entry.get("id") != entry_id(entry)
        ):
            raise ValueError(f"line {number} was changed, or one before it was taken out")
        last = entry["id"]
    if not entries or entries[0].get("entry") != "start":
        raise ValueError("it does not begin with a start")


def _check(entries: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError for a line that no chain has: the hashes do not tell who wrote it."""
    models, parents, live = {START: entries[0].get("model")}, {}, []
    for line, entry in enumerate(entries, 1):
        kind, head = entry.get("entry"), live[-1] if live else START
        problems = (
            ["it is no start, link or revert"]
            if kind not in tuple(_FIELDS) or (kind == "start") != (line == 1)
            else [*_misfits(entry, {"date": _DATE, "previous": _LINE, "id": _HASH} | _FIELDS[kind])]
        )
        if not problems and kind == "start":
            if not _START_FOLDER.fullmatch(entry["folder"]) or not entry["folder"].isprintable():
                problems = [
                    f"folder is {ascii(entry['folder'])}, neither absolute nor "
                    f"{START_DIR.format('HASH')}"
                ]
        elif not problems and kind == "link":
            number, parent = entry["number"], entry["parent"]["link"]
            if (number, parent) != (len(models), head):
                problems = [
                    f"it is link {number} on {parent}, and {len(models)} on {head} comes next"
                ]
            models[number], parents[number] = entry["model"], parent
            live.append(number)
        elif not problems:
            taken = entry["links"]
            if not taken or taken != live[: -len(taken) - 1 : -1]:
                problems = [f"it takes off {ascii(taken)}, and the links are {live}"]
            elif entry["head"] != {"link": (head := parents[taken[-1]]), "model": models[head]}:
                problems = [f"its head is not the model of {head}, which is left"]
            del live[-len(taken) :]
        if problems:
            raise ValueError(f"line {line}: {some(problems)}")


def _misfits(value: Any, wanted: Any, name: str = "") -> Iterator[str]:
    """Yield what in a value is not as in a description of `_FIELDS`."""
    if isinstance(wanted, dict):
        if not isinstance(value, dict):
            yield f"{name} is no object"
            return
        for key, inner in wanted.items():
            where = f"{name}.{key}".lstrip(".")
            if key in value:
                yield from _misfits(value[key], inner, where)
            else:
                yield f"{where} is missing"
    elif isinstance(wanted, re.Pattern):
        if not isinstance(value, str) or not wanted.fullmatch(value):
            yield f"{name} is {ascii(value):.80}"
    elif type(value) is not wanted:
        yield f"{name} is {ascii(value):.80}, not {wanted.__name__}"


def _write(
    workdir: pathlib.Path, entries: Sequence[Mapping[str, Any]], entry: Mapping[str, Any]
) -> dict[str, Any]:
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    entry = {**entry, "date": date, "previous": entries[-1]["id"] if entries else ""}
    entry["id"] = entry_id(entry)
    path, ids = workdir / LOG, [e["id"] for e in entries]
    if ([e["id"] for e in _read_entries(path)] if path.is_file() else []) != ids:
        raise ValueError(
            f"{path} was changed by another process meanwhile. Nothing was logged; give the "
            "command again."
        )
    _check([*entries, entry])
    files.write_text(
        path, "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in (*entries, entry))
    )
    return entry
