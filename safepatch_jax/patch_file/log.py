"""The patch log of a chain: one line a link, like a commit; no JAX.

A chain is a model that is patched again and again. Each link of it is a model, its patch file (what
turned the parent into it), and a line in log.jsonl that holds the hashes of parent, patch and
result. Nothing is ever removed from the log: a revert is a line of its own. docs/continual.md has
the format.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from safepatch_jax.io.folder import Checkpoint, has_weights, tensor_hashes
from safepatch_jax.patch_file import apply as patch_apply
from safepatch_jax.patch_file.file import PatchFile
from safepatch_jax.patch_file.log_lines import LOG, START, read_entries, write_entry
from safepatch_jax.patch_file.stack import Stack
from safepatch_jax.runtime import addresses, files, mirror, paths, processes, unfinished
from safepatch_jax.runtime.console import say, some
from safepatch_jax.runtime.paths import resolve
from safepatch_jax.runtime.text import printable

LINKS = "links"
# Within a link's folder.
EXPORT, PATCH = "stages/export/model", "stages/patch_file/patch.safetensors"
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

Step = tuple[int, bool]  # a link, and whether its patch is applied; else it is reverted


class PatchLog:
    """The log of a chain, read and checked; `entries` are its lines.

    Raises:
      ValueError: there is no log, it is of another format, a line was changed, removed or inserted,
        or says what cannot be.
    """

    def __init__(self, workdir: str | pathlib.Path):
        self.workdir = resolve(workdir)
        self.entries: list[dict[str, Any]] = processes.on_first(self._read)

    def _read(self) -> list[dict[str, Any]]:
        path = self.workdir / LOG
        mirror.bring_file(path)
        if not path.is_file():
            raise ValueError(
                f"There is no patch log {path}. Give the --workdir of a chain; one is made by "
                "python -m launch.continual run."
            )
        return read_entries(path)

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
        """The first line."""
        return self.entries[0]

    @property
    def links(self) -> dict[int, dict[str, Any]]:
        """The lines of links by number, also of those taken off; of one that a removal has written
        anew the line of the link that it was, with what is new."""
        links: dict[int, dict[str, Any]] = {}
        for entry in self.entries:
            if entry["entry"] == "link":
                links[entry["number"]] = entry
            for moved in _moved(entry):
                links[moved["number"]] = _written_anew(links[moved["of"]], moved)
        return links

    @property
    def rewritten(self) -> dict[int, int]:
        """The numbers of links that removals have written anew, and those that they got."""
        numbers = {}
        for entry in self.entries:
            numbers |= {moved["of"]: moved["number"] for moved in _moved(entry)}
        return numbers

    @property
    def live(self) -> list[int]:
        """The numbers that lead to the head, in order."""
        live: list[int] = []
        for entry in self.entries:
            if entry["entry"] == "link":
                live.append(entry["number"])
            elif entry["entry"] == "revert":
                live = live[: -len(entry["links"])]
            elif entry["entry"] == "remove":
                live[live.index(entry["link"]) :] = [link["number"] for link in entry["links"]]
        return live

    @property
    def decided(self) -> list[dict[str, Any]]:
        """The lines of the links that lead to the head and of those that the gate refused, in the
        order of --links.

        A revert takes off what was decided after the first link that it takes off; a link that is
        tried again after its refusal takes the place of that, and of the refusals after it. A
        removal takes off its link alone.
        """
        decided: list[dict[str, Any]] = []
        for entry in self.entries:
            if entry["entry"] == "remove":
                decided = _without(decided, entry)
            elif entry["entry"] == "revert":
                numbers = [line.get("number") for line in decided]
                del decided[numbers.index(entry["links"][-1]) :]
            elif entry["entry"] != "start":
                for place in range(len(decided) - 1, -1, -1):
                    if decided[place]["entry"] != "refused":
                        break
                    if decided[place]["name"] == entry["name"]:
                        del decided[place:]
                        break
                decided.append(entry)
        return decided

    @property
    def head(self) -> int:
        """The number of the latest model."""
        return self.live[-1] if self.live else START

    def path(self, number: int) -> list[int]:
        """Return the links from the start to a model, in order. Raises ValueError if there is no
        such link."""
        links, numbers = self.links, []
        while number != START:
            if number not in links:
                known = "".join(f", {n} ({link['name']})" for n, link in links.items())
                raise ValueError(
                    f"The log has no link {number}. There are {START} (the starting model){known}."
                )
            numbers.append(number)
            number = links[number]["parent"]["link"]
        return numbers[::-1]

    def steps(self, start: int, to: int) -> list[Step]:
        """Return what leads from one model to another: back to the last link that both come from,
        and on from there. Raises ValueError if there is no such link."""
        path, start_path = self.path(to), self.path(start)
        shared = sum(a == b for a, b in zip(path, start_path))
        steps = [(n, False) for n in reversed(start_path[shared:])]
        return steps + [(n, True) for n in path[shared:]]

    def label(self, number: int) -> str:
        return label(number, self.links[number]["name"]) if number else label(START, "start")

    def hash(self, number: int) -> str:
        """Return the hash of a model, see `model_hash`."""
        return self.links[number]["model"] if number else self.start["model"]

    def folder(self, number: int) -> pathlib.Path:
        """Return where the model of a link lies, or lay; the starting model's may be elsewhere, and
        is never written to."""
        if number:
            return self._link_folder(number) / EXPORT
        folder = self.start["folder"]
        if addresses.is_address(folder):
            return pathlib.Path(paths.local(folder))
        return self.workdir / folder

    def patch_path(self, number: int) -> pathlib.Path:
        return self._link_folder(number) / PATCH

    def _link_folder(self, number: int) -> pathlib.Path:
        return self.workdir / LINKS / self.label(number)

    def patch(self, number: int, known: bool = False) -> PatchFile:
        """Open the patch file of a link and compare it with the log.

        Args:
          known: see `PatchFile`: the content of the logged file was checked when it was made.

        Raises:
          ValueError: it is missing, was changed, or leads from or to another model than the log
            says.
        """
        entry = self.links[number]
        path, link = self.patch_path(number), f"{number} ({entry['name']})"
        mirror.bring_listed(path.parent)
        fix = (
            "Copy it back from a backup: without it no model after this link can be built from the "
            "start."
        )
        if not path.is_file():
            raise ValueError(f"The patch file of link {link} is missing: {path}. {fix}")
        digest = files.file_sha256(path)
        if digest != entry["patch"]["sha256"]:
            raise ValueError(
                f"The patch file of link {link} was changed: {path} has SHA-256 {digest}, the log "
                f"says {entry['patch']['sha256']}. {fix}"
            )
        patch, parent = PatchFile(path, known), self.hash(entry["parent"]["link"])
        for model, value, logged in (
            ("parent", patch_hash(patch, "before"), parent),
            ("recorded parent", entry["parent"]["model"], parent),
            ("model", patch_hash(patch, "after"), entry["model"]),
        ):
            if value != logged:
                raise ValueError(
                    f"Link {link}: its {model} has the hash {value[:16]}..., but the log has "
                    f"{logged[:16]}... for it. Log and patch file are of different chains: copy "
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
        name = processes.on_first(lambda: addresses.name_of(self._model(number)))
        if processes.first() or not addresses.is_address(name):
            return pathlib.Path(paths.local(name))
        return pathlib.Path(paths.readable(name))

    def _model(self, number: int) -> pathlib.Path:
        folder = self.folder(number)
        if number == START:
            self.check_start()
            return folder
        self.bring(number)
        if folder_hash(folder) != self.hash(number):
            say(
                f"{self.label(number)}: its model is missing or was changed; it is built again "
                "from patch files."
            )
            self._refuse_elsewhere(number)
            source = self._nearest(number)
            self.build(self.folder(source), self.steps(source, number), folder, replace=True)
        return folder

    def bring(self, number: int) -> None:
        """Bring the folder of a model here, if it lies in a bucket and is there."""
        folder = self.folder(number)
        if not addresses.address_of(folder):
            return
        if not mirror.has_any(folder):  # what is here is a copy of what was deleted there
            files.delete(folder)
            return
        if number and not mirror.is_published(folder):  # by itself: it was built again
            mirror.bring_listed(folder.parent)
        else:
            mirror.fetch(folder)

    def _nearest(self, number: int) -> int:
        """Return the model from which another is the fewest patches away, of those whose folders
        are as the log says. Raises ValueError as `check_start` where that is none."""
        there = []
        for other in (START, *self.links):
            if other != number and has_weights(self.folder(other)):
                there.append((len(self.steps(other, number)), other))
        for _, other in sorted(there):
            if other == START:
                break
            if folder_hash(self.folder(other)) == self.hash(other):
                return other
        self.check_start()
        return START

    def check_start(self) -> None:
        """Raise ValueError if the starting model, or a file beside its weights, is not as when the
        chain began."""
        folder, start = self.folder(START), self.start
        self.bring(START)
        unfinished.refuse(folder)
        if folder_hash(folder) != start["model"]:
            raise ValueError(
                f"The starting model {folder} is missing or no longer the one with which the "
                f"chain began (hash {start['model'][:16]}...). Put it back; its source was "
                f"{printable(start['source'])}."
            )
        before, after = start["companions"], companion_hashes(folder)
        changes = []
        for name in sorted(before.keys() | after.keys()):
            if name not in before:
                changes.append(f"{printable(name)} is new")
            elif name not in after:
                changes.append(f"{printable(name)} is gone")
            elif before[name] != after[name]:
                changes.append(f"{printable(name)} was changed")
        if changes:
            raise ValueError(
                f"The starting model {folder} is no longer as when the chain began: "
                f"{some(changes)}. Links were made and measured with the files beside the weights "
                "as they were. Put them back, or begin another chain in another --workdir."
            )

    def _refuse_elsewhere(self, number: int) -> None:
        """Raise ValueError unless a link's model folder, which is to be replaced, lies where the
        chain itself has put it."""
        expected = self.workdir.resolve() / LINKS / self.label(number) / EXPORT
        folder, start = self.folder(number).resolve(), self.folder(START).resolve()
        if folder != expected or start.is_relative_to(expected):
            raise ValueError(
                f"{self.folder(number)} is not replaced: it leads out of the chain's folder (to "
                f"{folder}), or is the starting model. Build the model elsewhere: replay."
            )

    def build(
        self,
        model: pathlib.Path,
        steps: Sequence[Step],
        out: pathlib.Path,
        *,
        replace: bool = False,
    ) -> None:
        """Write the model folder to which steps lead from a model, in one pass; it must come out
        with the hash of the log."""
        # All are checked before anything is written.
        stack = Stack([(self.patch(number), applied) for number, applied in steps])
        number, applied = steps[-1]
        digest = self.hash(number if applied else self.links[number]["parent"]["link"])
        with files.new_folder(out, replace=replace) as new:
            patch_apply.apply(stack, model, new)
            if folder_hash(new) != digest:
                raise ValueError(
                    f"{out}: what came out is not the model of the log (hash {digest[:16]}...). "
                    "Nothing was kept. Is the disk sound?"
                )


def _write(workdir: pathlib.Path, *lines: Any) -> dict[str, Any]:
    """Write a log as `write_entry`, in a bucket too."""
    mirror.bring_file(workdir / LOG)
    entry = write_entry(workdir, *lines)
    mirror.written(workdir / LOG)
    return entry


def _moved(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the links that a line writes anew."""
    return entry["links"] if entry["entry"] == "remove" else []


def _written_anew(link: Mapping[str, Any], moved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the line of a link that was written anew; a gate has judged another model."""
    kept = {key: x for key, x in link.items() if key not in ("gate", "id", "previous")}
    return kept | dict(moved)


def _without(decided: Sequence[dict[str, Any]], removal: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what was decided of links after a removal."""
    moved = {link["of"]: link for link in removal["links"]}
    left = []
    for entry in decided:
        number = entry.get("number")
        if number in moved:
            left.append(_written_anew(entry, moved[number]))
        elif number != removal["link"]:
            left.append(entry)
    return left


def label(number: int, name: str) -> str:
    return f"{number:02d}-{name}"


def model_hash(hashes: Mapping[str, str]) -> str:
    """Return the hash of a model: over the SHA-256 of each tensor's bytes, by name."""
    return files.text_hash(dict(hashes))


def patch_hash(patch: PatchFile, when: str) -> str:
    """Return the hash of the model 'before' or 'after' a patch; tensors that an export leaves out
    do not count."""
    hashes = {}
    for name, tensor in patch.tensors.items():
        if not tensor.optional:
            hashes[name] = getattr(tensor, when)
    return model_hash(hashes)


def patch_facts(patch: PatchFile) -> dict[str, Any]:
    """Return what the log has of a patch file."""
    return {
        "sha256": files.file_sha256(patch.path),
        "entries": patch.entries(),
        "bytes": pathlib.Path(patch.path).stat().st_size,
    }


def folder_hash(folder: pathlib.Path) -> str | None:
    """Return the hash of a model folder; None if its weights are missing or cannot be read."""
    if not has_weights(folder):
        return None
    try:
        return model_hash(tensor_hashes(Checkpoint(folder).tensors))
    except (ValueError, OSError):
        return None


def companion_hashes(folder: pathlib.Path) -> dict[str, str]:
    """Return the SHA-256 of each file beside the weights of a model folder: config, tokenizer, chat
    template, and others."""
    hashes = {}
    for path in sorted(folder.iterdir()):
        hidden = path.name.startswith(".")
        if path.is_file() and not hidden and path.name not in _ABOUT:
            if not path.name.endswith(_WEIGHTS):
                hashes[path.name] = files.file_sha256(path)
    return hashes


def data_text(data: Mapping[str, str]) -> str:
    """Describe the harmful records of a link."""
    category = f" [{data['category']}]" if data["category"] else ""
    return printable(data["harmful"] + category)
