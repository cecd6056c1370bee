"""Which models of a chain stay as folders; the others are kept as patch files alone, and built
again where one is needed. No JAX."""

from __future__ import annotations

import pathlib
from collections.abc import Collection

from safepatch_jax.io.folder import has_weights
from safepatch_jax.patch_file.log import PatchLog, folder_hash
from safepatch_jax.patch_file.log_lines import START
from safepatch_jax.runtime import files, mirror
from safepatch_jax.runtime.console import say

_GOING = ".{}.deleted"  # so is a folder called while it is deleted: it is no model any more


def keep_models(log: PatchLog, last: int, among: Collection[int] | None = None) -> list[int]:
    """Delete the models of links but the last ones that lead to the head; return the numbers of
    those that have none now.

    A model goes only if its folder lies in the chain's own, has the bits that the log says, and the
    patch files from which it can be built again, from the head's model, are whole. The starting
    model always stays.

    Args:
      log: of the chain.
      last: how many links keep theirs; 0: all.
      among: numbers of the links whose models may go; None for all.
    """
    if not last:
        return []
    gone = []
    kept = {START, *log.live[-last:]}
    for number in log.links if among is None else set(among) - {START}:
        folder = log.folder(number)
        if number not in kept and mirror.is_one(folder) and mirror.has_any(folder):
            log.bring(number)
        going = folder.with_name(_GOING.format(folder.name))
        if folder.parent.is_dir():  # what killed commands left half-built or half-deleted
            files.delete_abandoned(folder)
            files.delete(going)
        if number not in kept and has_weights(folder) and _can_go(log, number, folder):
            mirror.delete(folder)
            folder.rename(going)
            files.delete(going)
        if number not in kept and not has_weights(folder):
            gone.append(number)
    return gone


def _can_go(log: PatchLog, number: int, folder: pathlib.Path) -> bool:
    """Return whether a model can be built again as it is; says why one stays."""
    try:
        files.refuse_link(folder, log.workdir)
        log.patch(number)
        for step, _ in log.steps(log.head, number):
            log.patch(step, known=True)
    except ValueError as error:
        say(f"{log.label(number)}: its model is kept: {error}")
        return False
    if folder_hash(folder) != log.hash(number):
        say(f"{log.label(number)}: its model is kept: it was changed since. {folder}")
        return False
    return True
