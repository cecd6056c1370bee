"""Whether settings and --links continue the chain that a log has."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from safepatch_jax.outcome import NEUTRAL
from safepatch_jax.patch_file.log import PatchLog
from safepatch_jax.settings import Settings
from safepatch_jax.studies.continual.links import Link

# What may differ between two runs of a chain: where and how it is made, how models are measured.
_FREE = (*NEUTRAL, "evaluate.", "data.eval_limit")


def check_resumable(
    log: PatchLog, settings: Settings, links: Sequence[Link], hashes: Mapping[str, str]
) -> None:
    """Compare settings and links with a chain's log.

    Args:
      log: of the chain.
      settings, links: with which it is to be continued.
      hashes: of the harmful records of each link, by its name.

    Raises:
      ValueError: other settings, other links than those that were made, or fewer.
    """
    _check_settings(log, settings)
    decided = log.decided
    for i, entry in enumerate(decided):
        fix = _fix(log, decided[i:])
        if i >= len(links):
            names = ", ".join(map(_name, decided))
            raise ValueError(
                f"--links has {len(links)} entries, and the chain in {log.workdir} has "
                f"{len(decided)} links: {names}. Give all of them, new ones at the end. {fix}"
            )
        link = links[i]
        wanted = {"name": link.name, **link.data(settings), "hash": hashes[link.name]}
        changes = _changes({"name": entry["name"], **entry["data"]}, wanted)
        if changes:
            raise ValueError(
                f"--links: entry {i + 1} is not that of link {_label(log, entry)} of this "
                f"chain: {', '.join(changes)}. {fix}"
            )


def _name(entry: Mapping[str, Any]) -> str:
    return entry["name"] if entry["entry"] == "link" else f"{entry['name']} (refused)"


def _label(log: PatchLog, entry: Mapping[str, Any]) -> str:
    return log.label(entry["number"]) if entry["entry"] == "link" else _name(entry)


def _fix(log: PatchLog, after: Sequence[Mapping[str, Any]]) -> str:
    """Say how what was decided is undone; `after` are the lines from the first of it on."""
    made = sum(entry["entry"] == "link" for entry in after)
    if after[0]["entry"] == "refused":
        return (
            "A link that the gate refused keeps its place in --links, and is not made again; to "
            "try it once more give --gate other rules, or it another name at the end."
        )
    fix = (
        "A link that was made stays; take it off first: python -m launch.continual revert "
        f"--workdir={shlex.quote(str(log.workdir))} --last={made}."
    )
    removals = [entry["link"] for entry in log.entries if entry["entry"] == "remove"]
    if removed := [log.links[number]["name"] for number in removals]:
        fix += f" Removed were {', '.join(removed)}: --links is given without them."
    return fix


def _check_settings(log: PatchLog, settings: Settings) -> None:
    logged = Settings().flat() | log.start["settings"]  # settings that are newer than the chain
    wanted = {}
    for name, value in settings.flat().items():
        if not name.startswith(_FREE):
            wanted[name] = value
    changes = _changes(logged, wanted, ": ")
    if changes:
        raise ValueError(
            f"The chain in {log.workdir} was made with other settings: {'; '.join(changes)}. Give "
            "the same ones, or begin another chain in another --workdir."
        )


def _changes(logged: Mapping[str, Any], wanted: Mapping[str, Any], between: str = " ") -> list[str]:
    lines = []
    for name, value in wanted.items():
        if logged[name] != value:
            lines.append(f"{name}{between}{logged[name]!r} -> {value!r}")
    return lines
