"""What a chain does beside making its links, by the number of links: parts from which the cost of a
long one is computed (docs/chains.md).

  python -m benchmarks.chain_parts --model=DIR --folder=DIR2 --links=20 --share=0.05

The links are made up: each changes so large a share of each weight matrix, at random. For each
number of links, in seconds: its patch file compared with those before it (the overlaps of the
report), its parent's model deleted (the patch file read, the model hashed), and so many models
built again from patch files. Also bytes of a patch file an entry, seconds to hash a model and to
copy one to the disk.
"""

from __future__ import annotations

import math
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from absl import app, flags

from benchmarks.common import machine
from safepatch_jax.io.companions import copy_companions
from safepatch_jax.io.folder import Checkpoint
from safepatch_jax.io.stored import Stored
from safepatch_jax.patch_file import apply as patch_apply
from safepatch_jax.patch_file.create import Change, write_patch
from safepatch_jax.patch_file.file import PatchFile, runs_of
from safepatch_jax.patch_file.growth import sizes
from safepatch_jax.patch_file.log import (
    EXPORT,
    LINKS,
    PATCH,
    PatchLog,
    folder_hash,
    label,
)
from safepatch_jax.patch_file.pruning import keep_models
from safepatch_jax.reporting.tables import table
from safepatch_jax.runtime import files
from tests.patch_file.hand_made import begin, log_link

_MODEL = flags.DEFINE_string("model", None, "A model folder.", required=True)
_FOLDER = flags.DEFINE_string("folder", None, "Where the chain is made; new.", required=True)
_LINKS = flags.DEFINE_integer("links", 20, "Links of the chain.", lower_bound=1)
_SHARE = flags.DEFINE_float("share", 0.05, "Entries of a matrix that a link changes.")


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    begun = time.process_time(), time.perf_counter()
    result = call()
    return time.process_time() - begun[0], result


def flipped(tensor: Stored, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the bits of a tensor before and after a made-up change."""
    for before in runs_of(tensor):
        after = before.copy()
        after[rng.random(len(before)) < _SHARE.value] ^= 1
        yield before, after


def add_link(log: PatchLog, rng: np.random.Generator) -> PatchFile:
    """Log a made-up link on the head, with its patch file and its model."""
    number, parent = log.head + 1, log.head
    folder, changes = log.workdir / LINKS / label(number, f"c{number}"), {}
    for name, tensor in Checkpoint(log.folder(parent)).tensors.items():
        matrix = len(tensor.shape) == 2 and "embed" not in name
        runs = flipped(tensor, rng) if matrix else ((x, x) for x in runs_of(tensor))
        changes[name] = Change(tensor.dtype, tensor.shape, runs)
    (folder / PATCH).parent.mkdir(parents=True)
    patch = write_patch(folder / PATCH, "difference", {}, changes)
    patch_apply.apply(patch.path, log.folder(parent), folder / EXPORT)
    log_link(log, f"c{number}", patch)
    return patch


def copied(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copy a model to the disk."""
    with files.new_folder(target) as new:
        copy_companions(source, new)
        for path in {tensor.path for tensor in Checkpoint(source).tensors.values()}:
            files.copy(path, new / path.name)
            with open(new / path.name, "rb") as file:
                os.fsync(file.fileno())


def main(argv: list[str]) -> None:
    folder, model = (pathlib.Path(x.value).expanduser().absolute() for x in (_FOLDER, _MODEL))
    if folder.exists() and any(folder.iterdir()):
        sys.exit(f"{folder} is not empty.")
    folder.mkdir(parents=True, exist_ok=True)
    log, rng, rows = begin(folder / "chain", model), np.random.default_rng(0), []
    weights = sum(math.prod(x.shape) for x in Checkpoint(model).tensors.values())
    print(f"{machine()}; {weights:,} weights, CPU seconds", flush=True)
    for _ in range(_LINKS.value):
        patch = add_link(log, rng)
        compare, _ = timed(lambda: sizes(log, folder / "notes"))
        delete, _ = timed(lambda: keep_models(log, 1))
        rows.append([log.head, f"{patch.entries():,}", f"{compare:.2f}", f"{delete:.2f}"])
        print(rows[-1], flush=True)
    print(table(("link", "entries", "compared with those before", "parent deleted"), rows))
    entries, size = patch.entries(), patch.path.stat().st_size
    print(f"A patch file: {size / entries:.2f} bytes an entry; hashed", end=" ")
    print(f"{timed(lambda: files.file_sha256(patch.path))[0]:.2f} s, opened and checked", end=" ")
    print(f"{timed(lambda: PatchFile(patch.path))[0]:.2f} s.")
    print(f"A model: hashed {timed(lambda: folder_hash(log.folder(log.head)))[0]:.2f} s", end=", ")
    print(f"copied {timed(lambda: copied(model, folder / 'copy'))[0]:.2f} s.")
    for patches in sorted({1, log.head // 2} - {0, log.head}):
        number = log.head - patches
        seconds, _ = timed(lambda number=number: log.model(number))
        print(f"A model {patches} patches away built again: {seconds:.2f} s", flush=True)
        shutil.rmtree(log.folder(number))


if __name__ == "__main__":
    app.run(main)
