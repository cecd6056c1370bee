"""A link taken out of the middle of a long chain: time, memory, and the bits of what is left.

  python -m benchmarks.removal --folder=DIR --model=DIR2                  # link 7 of 20
  python -m benchmarks.removal --folder=DIR --model=DIR2 --links=6 --link=2

The chain is made by hand, without training: link n flips the lowest bit of every entry of each
matrix whose flat index leaves the remainder n when divided by --every; so no two links meet. Then
`remove` takes out --link, and the head's model must have, bit for bit, the model's bits with the
entries of all other links, as NumPy says. The seconds are of `remove` alone, with the building of
the new head's model. Ends with 1 if a bit differs.
"""

from __future__ import annotations

import math
import pathlib
import resource
import time
from collections.abc import Iterator

import numpy as np
from absl import app, flags

from safepatch_jax.io.folder import Checkpoint
from safepatch_jax.patch_file.create import Change, write_patch
from safepatch_jax.patch_file.file import BITS, RUN, runs_of
from safepatch_jax.patch_file.log import (
    LINKS,
    PATCH,
    PatchLog,
    label,
)
from safepatch_jax.patch_file.removal import remove
from safepatch_jax.runtime.paths import resolve
from tests.patch_file.hand_made import begin, log_link

_FOLDER = flags.DEFINE_string("folder", None, "Where the chain is made; new.", required=True)
_MODEL = flags.DEFINE_string("model", None, "A model folder, which is read only.", required=True)
_COUNT = flags.DEFINE_integer("links", 20, "Links of the chain.", lower_bound=2)
_LINK = flags.DEFINE_integer("link", 7, "The one that is removed.", lower_bound=1)
_EVERY = flags.DEFINE_integer("every", 100, "A link changes one entry in so many.", lower_bound=3)


def flipped(bits: np.ndarray, start: int, links: list[int]) -> np.ndarray:
    """Return bits, of which the first has a flat index, with the entries of some links."""
    new = bits.copy()
    rest = (np.arange(len(bits)) + start) % _EVERY.value
    new[np.isin(rest, links)] ^= 1
    return new


def runs(stored, number: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield a matrix before and after a link."""
    for place, bits in enumerate(runs_of(stored)):
        before = flipped(bits, place * RUN, list(range(1, number)))
        yield before, flipped(before, place * RUN, [number])


def add_link(log: PatchLog, number: int) -> None:
    name = f"link{number}"
    path = log.workdir / LINKS / label(number, name) / PATCH
    path.parent.mkdir(parents=True)
    changes = {}
    for tensor, stored in Checkpoint(log.folder(0)).tensors.items():
        pairs = runs(stored, number)
        if len(stored.shape) < 2:
            pairs = ((bits, bits) for bits in runs_of(stored))
        changes[tensor] = Change(stored.dtype, stored.shape, pairs)
    log_link(log, name, write_patch(path, "difference", {}, changes), seed=number)


def differing(log: PatchLog, folder: pathlib.Path, links: list[int]) -> int:
    """Count entries of a model in which it is not the start with the entries of some links."""
    ours, start, count = Checkpoint(folder).tensors, Checkpoint(log.folder(0)).tensors, 0
    for name, stored in start.items():
        bits = stored.read().reshape(-1).view(BITS[stored.dtype])
        if len(stored.shape) > 1:
            bits = flipped(bits, 0, links)
        theirs = ours[name].read().reshape(-1).view(BITS[stored.dtype])
        count += int(np.count_nonzero(bits != theirs))
    return count


def main(_) -> None:
    start = resolve(_MODEL.value)
    log = begin(resolve(_FOLDER.value), start)
    for number in range(1, _COUNT.value + 1):
        add_link(log, number)
    weights = sum(math.prod(x.shape) for x in Checkpoint(start).tensors.values())
    began, cpu = time.monotonic(), time.process_time()
    head = remove(log, _LINK.value)
    seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    others = [n for n in range(1, _COUNT.value + 1) if n != _LINK.value]
    wrong = differing(log, head, others)
    print(
        f"link {_LINK.value} of {_COUNT.value}, {weights:,} weights, 1 in {_EVERY.value} a link: "
        f"{len(log.entries[-1]['links'])} links written anew in {seconds:.1f} s ({cpu:.1f} s of a "
        f"CPU); peak of memory {memory:.0f} MB; {wrong:,} entries differ"
    )
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    app.run(main)
