"""How the patches of a chain add up: how large they are alone and together, and how far their
positions overlap; no JAX.

Each link is compared with those before it once, in one pass over their patch files; what came out
is noted, so that a chain of many links does not compare every two patches again.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from safepatch_jax.patch_file.file import BITS, PatchFile
from safepatch_jax.patch_file.log import PatchLog
from safepatch_jax.runtime import files
from safepatch_jax.runtime.records import HASH, misfits
from safepatch_jax.runtime.workers import Workers

_TENSORS = 4  # that are counted at a time: each is held, with a mark for each of its entries
_FIELDS = {"key": HASH, "weights": int, "differ": int, "shared": list}


def sizes(log: PatchLog, notes: pathlib.Path) -> dict[str, Any]:
    """Measure how large the patches that lead to the head are, alone and together, and how far
    their positions overlap.

    Args:
      log: of the chain.
      notes: a folder for what was counted, a file a link.

    Returns:
      weights: entries of the model; entries: of each patch; cumulative: by patch, entries in which
        the model after it differs from the start (one that a later patch sets back does not count);
        overlap: [i][j], Jaccard index of the positions of the patches i and j.

    Raises:
      ValueError: as `PatchLog.patch`, of the files that have to be read.
    """
    counts = [_counted(log, number, notes) for number in log.live]
    entries = [log.links[number]["patch"]["entries"] for number in log.live]
    overlap = np.eye(len(counts))
    for i, count in enumerate(counts):
        for j, shared in enumerate(count["shared"]):
            either = max(1, entries[i] + entries[j] - shared)
            overlap[i, j] = overlap[j, i] = shared / either
    return {
        "weights": counts[0]["weights"] if counts else 0,
        "entries": entries,
        "cumulative": [count["differ"] for count in counts],
        "overlap": overlap.tolist(),
    }


def _counted(log: PatchLog, number: int, notes: pathlib.Path) -> dict[str, Any]:
    """Return what was noted of a link, or count it and note that."""
    path = log.path(number)
    key = files.text_hash([log.links[n]["patch"]["sha256"] for n in path])
    note = notes / f"{log.label(number)}.json"
    count = _noted(note)
    if count.get("key") != key or len(count["shared"]) != len(path) - 1:
        count = {"key": key, **_count([log.patch(n, known=True) for n in path])}
        files.write_json(note, count)
    return count


def _noted(note: pathlib.Path) -> dict[str, Any]:
    """Return a note; {} if there is none that can be read."""
    try:
        count = files.read_json(note)
    except ValueError:
        return {}
    sound = not list(misfits(count, _FIELDS)) and all(type(x) is int for x in count["shared"])
    return count if sound else {}


def _count(patches: Sequence[PatchFile]) -> dict[str, Any]:
    """Compare the last of some patches with each of those before it.

    Returns:
      weights; differ: entries in which the model after all of them differs from that before;
        shared: positions that the last one has in common with each of the others.
    """
    with Workers(_TENSORS) as pool:
        names = changed_by(patches)
        counts = list(pool.map(lambda name: _count_tensor(patches, name), names))
    # There may be no tensor, of patches that change nothing.
    differ, *shared = np.reshape(np.array(counts, np.int64), (-1, len(patches))).sum(axis=0)
    return {
        "weights": sum(tensor.size for tensor in patches[-1].tensors.values()),
        "differ": int(differ),
        "shared": list(map(int, shared)),
    }


def _count_tensor(patches: Sequence[PatchFile], name: str) -> list[int]:
    """Return `differ` and all of `shared` of one tensor, see `_count`."""
    *earlier, last = patches
    tensor = last.tensors[name]
    total, mask = np.zeros(tensor.size, BITS[tensor.dtype]), np.zeros(tensor.size, bool)
    for positions, flips in last.chunks(name):
        total[positions], mask[positions] = flips, True
    shared = []
    for patch in earlier:
        count = 0
        for positions, flips in patch.chunks(name):
            total[positions] ^= flips
            count += int(np.count_nonzero(mask[positions]))
        shared.append(count)
    return [int(np.count_nonzero(total)), *shared]


def changed_by(patches: Sequence[PatchFile]) -> list[str]:
    """Return the names of the tensors that any of the patches changes, each once."""
    names: dict[str, None] = {}
    for patch in patches:
        names |= dict.fromkeys(patch.changed())
    return list(names)
