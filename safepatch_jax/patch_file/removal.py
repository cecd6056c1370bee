"""Taking a link out of the middle of a chain, from its log and patch files alone; no JAX.

The links after it are written anew for the models without it, under new numbers, and one line of
the log says so: until that is written nothing has changed, and what was begun is no part of the
chain. docs/continual.md has what is promised.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from safepatch_jax.patch_file.file import PatchFile
from safepatch_jax.patch_file.log import LINKS, PATCH, PatchLog, label, patch_facts, patch_hash
from safepatch_jax.patch_file.log_lines import START
from safepatch_jax.patch_file.rebase import (
    REFUSE,
    Base,
    rebase,
    refuse_overlap,
    shared_entries,
)
from safepatch_jax.runtime import files, mirror
from safepatch_jax.runtime.console import say
from safepatch_jax.runtime.reading import Refused

_REMOVAL = "removal.json"  # beside the patch file of a link that a removal has written anew


def remove(log: PatchLog, number: int, overlap: str = REFUSE) -> pathlib.Path:
    """Take a link out of a chain: the head becomes the model of the other links. Nothing is
    deleted.

    Args:
      number: of a link that leads to the head. Where its removal is the log's last line, that is
        finished.
      overlap: one of `rebase.OVERLAPS`.

    Returns:
      the folder of the new head's model, which is built if need be.

    Raises:
      ValueError: no such link, later links change entries of it and `overlap` is 'refuse', or log,
        patch files and starting model do not fit together; the log was not changed.
    """
    with files.claimed(log.workdir), mirror.alone(log.workdir):
        last = log.entries[-1]
        if (last["entry"], last.get("link")) != ("remove", number):
            _remove(log, number, overlap)
        return log.model(log.head)


def is_begun(folder: pathlib.Path) -> bool:
    """Return whether the folder of a link is one that a removal has written."""
    return (folder / PATCH).with_name(_REMOVAL).is_file()


def _remove(log: PatchLog, number: int, overlap: str) -> None:
    live = log.live
    if number not in live:
        links = ", ".join(map(log.label, live)) or "none"
        raise Refused(
            f"Link {number} cannot be removed: it does not lead to the head. The links that do: "
            f"{links}."
        )
    place = live.index(number)
    later = live[place + 1 :]
    line = [log.patch(x) for x in live[place:]]
    shared = {log.label(x): shared_entries(line[0], patch) for x, patch in zip(later, line[1:])}
    anew = f"revert --last={len(later) + 1}, then run with the remaining --links."
    count = refuse_overlap(f"Link {log.label(number)}", shared, overlap, anew)
    log.check_start()
    base = Base(log.folder(START), [log.patch(x) for x in live[:place]])
    try:
        moved = _write_anew(log, base, [number, *later], line, overlap)
    except BaseException:
        for stage in _places(log, later):
            mirror.delete(stage)
            files.delete(stage)
        raise
    head = log.links[number]["parent"]
    if moved:
        head = {"link": moved[-1]["number"], "model": moved[-1]["model"]}
    removal = {"link": number, "overlap": overlap, "entries": count, "links": moved, "head": head}
    log.append("remove", removal)


def _places(log: PatchLog, later: Sequence[int]) -> list[pathlib.Path]:
    """Return where the stages of links that are written anew go, none of which is in the log."""
    links = log.links
    folders = []
    for number, link in enumerate(later, max(links) + 1):
        folders.append((log.workdir / LINKS / label(number, links[link]["name"]) / PATCH).parent)
    return folders


def _write_anew(
    log: PatchLog, base: Base, numbers: Sequence[int], line: Sequence[PatchFile], overlap: str
) -> list[dict[str, Any]]:
    """Write the patch files of links for the models without the first of them; return what the log
    has of them.

    Args:
      base: the model that the first link goes onto.
      numbers, line: of the first link and all after it.
      overlap: one of `rebase.OVERLAPS`.
    """
    links, removed = log.links, numbers[0]
    parent, moved = links[removed]["parent"], []
    for place, (number, stage) in enumerate(zip(numbers[1:], _places(log, numbers[1:])), 1):
        new, folder = max(links) + place, stage.parents[1]
        say(f"{log.label(number)} is written anew as {folder.name}, without {log.label(removed)}")
        files.refuse_link(folder, log.workdir)
        with files.new_folder(stage, replace=True) as filled:
            part, labels = line[: place + 1], (log.label(removed), log.label(number))
            patch = rebase(base, part, filled / pathlib.Path(PATCH).name, overlap, labels)
            if patch_hash(patch, "before") != parent["model"]:
                raise Refused(
                    f"The model on which {folder.name} goes is not what the log says: the starting "
                    "model or a patch file was changed meanwhile. Nothing was logged; give the "
                    "command again."
                )
            files.write_json(filled / _REMOVAL, {"of": number, "without": removed})
            listed = {"format": 1, "outputs": files.folder_hashes(filled)}
            files.write_json(filled / mirror.STAGE_LIST, listed)  # by which a bucket is read
            moved.append(
                {
                    "number": new,
                    "of": number,
                    "parent": parent,
                    "model": patch_hash(patch, "after"),
                    "patch": patch_facts(patch),
                }
            )
        parent = {"link": new, "model": moved[-1]["model"]}
    return moved
