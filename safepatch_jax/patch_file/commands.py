"""What can be done with a chain from its log and patch files alone; no JAX.

Show what is in it and in what two models differ, build a model again, take links off, verify.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from safepatch_jax.io.folder import Checkpoint, has_weights
from safepatch_jax.patch_file.file import RUN, inspect
from safepatch_jax.patch_file.growth import changed_by
from safepatch_jax.patch_file.log import PatchLog, data_text, folder_hash
from safepatch_jax.patch_file.log_lines import START
from safepatch_jax.patch_file.stack import flips_of
from safepatch_jax.runtime import files, mirror, paths
from safepatch_jax.runtime.console import some
from safepatch_jax.runtime.text import printable


def history(log: PatchLog) -> list[str]:
    """Return one line for each line of the log, the latest first."""
    live, fates = log.live, _fates(log)
    return [_history_line(entry, live, fates) for entry in reversed(log.entries)]


def _history_line(entry: Mapping[str, Any], live: Sequence[int], fates: Mapping[int, str]) -> str:
    date = entry["date"][:16].replace("T", " ")
    if entry["entry"] == "start":
        aligned = ", aligned" if entry["aligned"] else ""
        source = printable(entry["source"])
        return f"{START:>3}  {entry['model'][:12]}  {date}  start: {source}{aligned}"
    if entry["entry"] == "revert":
        links, head = ", ".join(map(str, entry["links"])), entry["head"]
        return f"  -  {head['model'][:12]}  {date}  reverted {links}; head is {head['link']}"
    if entry["entry"] == "remove":
        return f"  -  {entry['head']['model'][:12]}  {date}  {_removal(entry)}"
    data = entry["data"]
    if entry["entry"] == "refused":
        return (
            f"  -  {entry['model'][:12]}  {date}  {entry['name']}: on {entry['parent']['link']}, "
            f"refused by the gate ({printable(entry['gate']['verdict'])}), {data_text(data)}"
        )
    state = "" if entry["number"] in live else f"  ({fates.get(entry['number'], 'reverted')})"
    return (
        f"{entry['number']:>3}  {entry['model'][:12]}  {date}  {entry['name']}: on "
        f"{entry['parent']['link']}, {entry['patch']['entries']:,} entries, {data_text(data)}, "
        f"{data['records']} records{state}"
    )


def _removal(entry: Mapping[str, Any]) -> str:
    text = f"removed {entry['link']}"
    if moved := [f"{link['of']} is {link['number']}" for link in entry["links"]]:
        text += f"; {', '.join(moved)}"
    if entry["entries"]:
        text += f"; {entry['entries']:,} overlapping entries by --overlap={entry['overlap']}"
    return f"{text}; head is {entry['head']['link']}"


def _fates(log: PatchLog) -> dict[int, str]:
    """Return what has become of links that removals have taken off or written anew."""
    fates = {number: f"now {new}" for number, new in log.rewritten.items()}
    for entry in log.entries:
        if entry["entry"] == "remove":
            fates[entry["link"]] = "removed"
    return fates


def show(log: PatchLog, number: int) -> list[str]:
    """Return lines that describe a link: what the log says, and what its patch file holds; 0 is the
    starting model."""
    log.path(number)  # refuses a number that is not there
    entry = log.links[number] if number else log.start
    lines = []
    for key, value in entry.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        lines.append(printable(f"{key}: {text}"))
    return lines + (inspect(log.patch(number).path) if number else [])


def compare(log: PatchLog, first: int, second: int) -> dict[str, Any]:
    """Compare two models from the patch files alone; 0 is the starting model.

    Returns:
      tensors: by name, for each in which the two differ or that either changed since the start:
        `differ`, the number of entries in which the two differ; `first` and `second`, in which each
        differs from the start; `both`; `size`.
      total: the sums, and `jaccard`: both / (first or second).
    """
    paths = log.path(first), log.path(second)
    opened = {number: log.patch(number) for number in {*paths[0], *paths[1]}}
    one = [opened[number] for number in paths[0]]
    other = [opened[number] for number in paths[1]]
    total = dict.fromkeys(("differ", "first", "second", "both"), 0)
    tensors = {}
    for name in changed_by([*one, *other]):
        tensor = (one or other)[0].tensors[name]
        flips = [flips_of(patches, name, tensor) for patches in (one, other)]
        counts = dict.fromkeys(total, 0)
        for start in range(0, tensor.size, RUN):  # so that no other array has a tensor's size
            a, b = (x[start : start + RUN] for x in flips)
            counts["differ"] += int(np.count_nonzero(a ^ b))
            counts["first"] += int(np.count_nonzero(a))
            counts["second"] += int(np.count_nonzero(b))
            counts["both"] += int(np.count_nonzero((a != 0) & (b != 0)))
        for key, count in counts.items():
            total[key] += count
        tensors[name] = counts | {"size": tensor.size}
    either = total["first"] + total["second"] - total["both"]
    return {"tensors": tensors, "total": total | {"jaccard": total["both"] / max(1, either)}}


def differences(log: PatchLog, first: int, second: int) -> list[str]:
    """Return lines that say in what two models differ, see `compare`."""
    comparison = compare(log, first, second)
    total, tensors = comparison["total"], comparison["tensors"]
    one, other = log.label(first), log.label(second)
    changed = [name for name, counts in tensors.items() if counts["differ"]]
    changed.sort(key=lambda name: -tensors[name]["differ"])
    lines = [
        f"{one} and {other} differ in {total['differ']:,} entries of {len(changed)} tensors.",
        f"Changed since the start: {total['first']:,} entries in {one}, {total['second']:,} in "
        f"{other}, {total['both']:,} in both (Jaccard index {total['jaccard']:.1%}).",
    ]
    width = max(map(len, changed), default=0)
    for name in changed:
        counts = tensors[name]
        lines.append(f"  {name:{width}}  {counts['differ']:>12,} of {counts['size']:,}")
    return lines


def replay(
    log: PatchLog, to: int, start: int, model: str | pathlib.Path, out: str | pathlib.Path
) -> list[str]:
    """Build the model of one link from that of another, by the patch files between them.

    Args:
      to: the number of the link to be built; 0 is the starting model.
      start: the number of the link whose model is given.
      model: its folder.
      out: a new folder, which appears whole or not at all.

    Returns:
      what was done: one line a patch.

    Raises:
      ValueError: no such link, `model` is another one, a patch file is missing or was changed, or
        `out` is not empty.
    """
    steps = log.steps(start, to)
    if not steps:
        raise ValueError(f"--to and --from are both {to}: there is nothing to do.")
    model, out = (pathlib.Path(paths.plain(path)) for path in (model, out))
    files.refuse_full_folder(out)
    Checkpoint(model)  # says what is wrong with the folder, if anything
    digest = folder_hash(model)
    if digest != log.hash(start):
        raise ValueError(
            f"{model} is not the model of {log.label(start)}: its hash is {str(digest)[:16]}..., "
            f"the log says {log.hash(start)[:16]}.... Give the folder of that model, or its number "
            "as --from."
        )
    log.build(model, steps, out)
    lines = []
    for number, applied in steps:
        verb = "applied" if applied else "reverted"
        lines.append(f"{verb} {log.label(number)}")
    return lines


def revert(log: PatchLog, last: int) -> pathlib.Path:
    """Take the last links off: the head becomes the model before them. The log gets a line, and
    nothing is deleted.

    Returns:
      the folder of the new head, whose bits were compared with the log (and which was built again
      if need be).

    Raises:
      ValueError: fewer links than that, or log, patch files and models do not fit together.
    """
    with files.claimed(log.workdir), mirror.alone(log.workdir):
        live = log.live
        if not 1 <= last <= len(live):
            links = f" ({', '.join(map(log.label, live))})" if live else ""
            raise ValueError(
                f"--last={last}: the chain has {len(live)} link{'s' * (len(live) != 1)} that can "
                f"be taken off{links}."
            )
        reverted = live[: -last - 1 : -1]
        for number in reverted:
            log.patch(number)
        target = log.links[reverted[-1]]["parent"]["link"]
        folder = log.model(target)
        head = {"link": target, "model": log.hash(target)}
        log.append("revert", {"links": reverted, "head": head})
        return folder


def verify(log: PatchLog) -> list[str]:
    """Compare every patch file, parent hash and model folder with the log; return one line for each
    model.

    A model that is not there is no mistake. Of the starting model the files beside the weights
    count too.

    Raises:
      ValueError: something does not fit; all of it is collected.
    """
    lines, problems = [], []
    for number in (START, *log.links):
        states = []
        for check in (_patch_state, _model_state):
            try:
                states += check(log, number)
            except ValueError as error:
                problems.append(str(error))
        lines.append(f"{log.label(number)}: {', '.join(states)}")
    if problems:
        raise ValueError(some(problems, " ", 12))
    return lines


def _patch_state(log: PatchLog, number: int) -> list[str]:
    """Check the patch file of a link. Raises ValueError as `PatchLog.patch` does."""
    if number == START:
        return []
    return [f"patch of {log.patch(number).entries():,} entries and parent agree"]


def _model_state(log: PatchLog, number: int) -> list[str]:
    """Check the folder of a model. Raises ValueError if it is there and was changed."""
    folder = log.folder(number)
    log.bring(number)
    if not has_weights(folder):
        return [f"no model in {folder}" + (" (replay builds it)" if number else "")]
    if number == START:
        log.check_start()
    elif folder_hash(folder) != log.hash(number):
        raise ValueError(
            f"{log.label(number)}: the model in {folder} was changed since: its hash is not "
            f"{log.hash(number)[:16]}.... Build it anew with replay"
        )
    return ["model agrees"]
