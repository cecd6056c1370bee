"""What can be asked of a chain and done with it from its log and patch files alone; no JAX.

To say what is in it and in what two models differ, to build a model again, to take links off, to
verify.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from safepatch_jax.io.folder import Checkpoint, has_weights
from safepatch_jax.patch_file import apply as patch_apply
from safepatch_jax.patch_file.file import BITS, RUN, PatchFile, inspect
from safepatch_jax.patch_file.log import START, PatchLog, data_text, folder_hash, plain
from safepatch_jax.runtime import files
from safepatch_jax.runtime.console import some


def history(log: PatchLog) -> list[str]:
    """Return one line for each line of the log, the latest first."""
    lines, live = [], log.live
    for entry in log.entries:
        date = entry["date"][:16].replace("T", " ")
        if entry["entry"] == "start":
            lines.append(
                f"{START:>3}  {entry['model'][:12]}  {date}  start: {plain(entry['source'])}"
                + (", aligned" if entry["aligned"] else "")
            )
        elif entry["entry"] == "revert":
            taken = ", ".join(map(str, entry["links"]))
            lines.append(
                f"  -  {entry['head']['model'][:12]}  {date}  reverted {taken}; head is "
                f"{entry['head']['link']}"
            )
        else:
            state = "" if entry["number"] in live else "  (reverted)"
            data, entries = entry["data"], entry["patch"]["entries"]
            lines.append(
                f"{entry['number']:>3}  {entry['model'][:12]}  {date}  {entry['name']}: on "
                f"{entry['parent']['link']}, "
                f"{entries:,} entries, {data_text(data)}, {data['records']} records{state}"
            )
    return lines[::-1]


def show(log: PatchLog, number: int) -> list[str]:
    """Return lines that describe a link: what the log says, and what its patch file holds; 0 is the
    starting model."""
    log.path(number)
    entry = log.links[number] if number else log.start
    text = lambda value: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    lines = [plain(f"{key}: {text(value)}") for key, value in entry.items()]
    return lines + (inspect(log.patch(number).path) if number else [])


def compare(log: PatchLog, first: int, second: int) -> dict[str, Any]:
    """Say from the patch files alone in what two models differ; 0 is the starting model.

    Returns:
      tensors: by name, for each in which the two differ or that either changed since the start:
        `differ`, the number of entries in which the two differ; `first` and `second`, in which each
        differs from the start; `both`; `size`.
      total: the sums, and `jaccard`: both / (first or second).
    """
    paths = [log.path(number) for number in (first, second)]
    opened = {number: log.patch(number) for number in {*paths[0], *paths[1]}}
    chains, tensors = [[opened[number] for number in path] for path in paths], {}
    for name in dict.fromkeys(n for chain in chains for patch in chain for n in patch.changed()):
        counts = dict.fromkeys(("differ", "first", "second", "both"), 0)
        for one, other in zip(*(_sums(chain, name) for chain in chains)):
            counts["differ"] += np.count_nonzero(one ^ other)
            counts["first"] += np.count_nonzero(one)
            counts["second"] += np.count_nonzero(other)
            counts["both"] += np.count_nonzero((one != 0) & (other != 0))
        tensors[name] = {k: int(v) for k, v in counts.items()} | {
            "size": (chains[0] or chains[1])[0].tensors[name].size
        }
    total = {
        key: sum(x[key] for x in tensors.values()) for key in ("differ", "first", "second", "both")
    }
    return {
        "tensors": tensors,
        "total": total
        | {"jaccard": total["both"] / max(1, total["first"] + total["second"] - total["both"])},
    }


def differences(log: PatchLog, first: int, second: int) -> list[str]:
    """Return lines that say in what two models differ, see `compare`."""
    found, names = compare(log, first, second), (log.label(first), log.label(second))
    total, tensors = found["total"], found["tensors"]
    changed = sorted(
        (name for name, x in tensors.items() if x["differ"]),
        key=lambda name: -tensors[name]["differ"],
    )
    lines = [
        f"{names[0]} and {names[1]} differ in {total['differ']:,} entries of {len(changed)} "
        "tensors.",
        f"Changed since the start: {total['first']:,} entries in {names[0]}, {total['second']:,} "
        f"in {names[1]}, "
        f"{total['both']:,} in both (Jaccard index {total['jaccard']:.1%}).",
    ]
    width = max(map(len, changed), default=0)
    return lines + [
        f"  {name:{width}}  {tensors[name]['differ']:>12,} of {tensors[name]['size']:,}"
        for name in changed
    ]


def sizes(patches: Sequence[PatchFile]) -> dict[str, Any]:
    """Say how large the patches of a chain are, alone and together, and how far their positions
    overlap.

    Returns:
      weights: entries of the model; entries: of each patch; cumulative: by patch, entries in which
        the model after it differs
      from the start (one that a later patch sets back does not count); overlap: [i][j], Jaccard
      index of the positions of the patches i and j.
    """
    count = len(patches)
    cumulative, shared = np.zeros(count, np.int64), np.zeros((count, count), np.int64)
    for name in dict.fromkeys(n for patch in patches for n in patch.changed()):
        for parts in zip(*(patch.runs(name) for patch in patches)):
            total = np.zeros(RUN, BITS[patches[0].tensors[name].dtype])
            masks = np.zeros((count, RUN), bool)
            for i, (where, what) in enumerate(parts):
                total[where] ^= what
                masks[i, where] = True
                cumulative[i] += np.count_nonzero(total)
                shared[i, : i + 1] += np.count_nonzero(masks[: i + 1] & masks[i], axis=1)
    own = shared.diagonal()
    shared = np.maximum(shared, shared.T)
    either = np.maximum(1, own[:, None] + own[None] - shared)
    return {
        "weights": sum(x.size for x in patches[0].tensors.values()) if patches else 0,
        "entries": own.tolist(),
        "cumulative": cumulative.tolist(),
        "overlap": (shared / either).tolist(),
    }


def _sums(patches: Sequence[PatchFile], name: str) -> Iterator[np.ndarray]:
    """Yield the XOR of all patches of a chain in each RUN elements of a tensor; 0 for ever where
    there is no patch."""
    if not patches:
        while True:
            yield np.zeros(1, np.uint8)
    for parts in zip(*(patch.runs(name) for patch in patches)):
        total = np.zeros(RUN, BITS[patches[0].tensors[name].dtype])
        for where, what in parts:
            total[where] ^= what
        yield total


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
    there, here = log.path(to), log.path(start)
    shared = len([a for a, b in zip(there, here) if a == b])
    steps = [(patch_apply.revert, n) for n in reversed(here[shared:])] + [
        (patch_apply.apply, n) for n in there[shared:]
    ]
    if not steps:
        raise ValueError(f"--to and --from are both {to}: there is nothing to do.")
    model, out = (pathlib.Path(path).expanduser() for path in (model, out))
    files.refuse_full_folder(out)
    Checkpoint(model)  # says what is wrong with the folder, if anything
    if (found := folder_hash(model)) != log.hash(start):
        raise ValueError(
            f"{model} is not the model of {log.label(start)}: its hash is {str(found)[:16]}..., "
            "the log says "
            f"{log.hash(start)[:16]}.... Give the folder of that model, or its number as --from."
        )
    log.build(model, steps, out, log.hash(to))
    return [
        f"{'applied' if move is patch_apply.apply else 'reverted'} {log.label(number)}"
        for move, number in steps
    ]


def revert(log: PatchLog, last: int) -> pathlib.Path:
    """Take the last links off: the head becomes the model before them. The log gets a line, and
    nothing is deleted.

    Returns:
      the folder of the new head, whose bits were compared with the log (and which was built again
      if need be).

    Raises:
      ValueError: fewer links than that, or log, patch files and models do not fit together.
    """
    with files.claimed(log.workdir):
        live = log.live
        if not 1 <= last <= len(live):
            raise ValueError(
                f"--last={last}: the chain has {len(live)} link{'s' * (len(live) != 1)} that can "
                "be taken off" + (f" ({', '.join(map(log.label, live))})." if live else ".")
            )
        taken = live[: -last - 1 : -1]
        for number in taken:
            log.patch(number)
        target = log.links[taken[-1]]["parent"]["link"]
        folder = log.model(target)
        log.append("revert", {"links": taken, "head": {"link": target, "model": log.hash(target)}})
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
        folder, states = log.folder(number), []
        if number:
            try:
                states.append(f"patch of {log.patch(number).entries():,} entries and parent agree")
            except ValueError as error:
                problems.append(str(error))
        if not has_weights(folder):
            states.append(f"no model in {folder}" + (" (replay builds it)" if number else ""))
        elif not number:
            try:
                log.check_start()
                states.append("model agrees")
            except ValueError as error:
                problems.append(str(error))
        elif folder_hash(folder) == log.hash(number):
            states.append("model agrees")
        else:
            problems.append(
                f"{log.label(number)}: the model in {folder} was changed since: its hash is not "
                f"{log.hash(number)[:16]}.... Build it anew with replay"
            )
        lines.append(f"{log.label(number)}: {', '.join(states)}")
    if problems:
        raise ValueError(some(problems, " ", 12))
    return lines
