"""Checks of a patch before it is used: who signed it, and that its file does what is recorded."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Sequence

from safepatch_jax.io.folder import Checkpoint, has_weights, tensor_hashes
from safepatch_jax.patch_file.file import PatchFile
from safepatch_jax.patch_file.log import model_hash, patch_hash
from safepatch_jax.registry import signing
from safepatch_jax.registry.index import Entry
from safepatch_jax.registry.store import Store
from safepatch_jax.runtime.reading import Refused


def check_signature(entry: Entry, trust: str) -> str:
    """Say who has signed a manifest. Raises ValueError if the signature is wrong, or `trust` is
    given and it is not of that key."""
    if entry.signature is None:
        if trust:
            raise Refused(
                f"{entry.name}@{entry.hash[:12]} is not signed, and --trust asks for the signature "
                f"of {trust[:16]}.... Ask its maker for a signed one (add --sign=KEYFILE)."
            )
        return "not signed"
    if trust and entry.signature["key"] != trust:
        raise Refused(
            f"{entry.name}@{entry.hash[:12]} is signed in the name of the key "
            f"{entry.signature['key'][:16]}..., not of {trust[:16]}..., which --trust asks for."
        )
    if not signing.is_right(entry.signature, entry.content()):
        raise Refused(
            f"{entry.name}@{entry.hash[:12]}: its signature is not that of its manifest: one of "
            "them was changed. Do not use it."
        )
    return f"signed by {entry.signature['key'][:16]}..."


def open_patch(store: Store, entry: Entry) -> PatchFile:
    """Open a patch file. Raises ValueError if it does something else than its manifest says."""
    patch = PatchFile(store.patch(entry))
    does = patch_hash(patch, "before"), patch_hash(patch, "after"), patch.entries()
    if does != (entry.before, entry.after, entry.manifest["patch"]["entries"]):
        raise Refused(
            f"{entry.name}@{entry.hash[:12]}: the patch file goes from and to other models than "
            "its manifest says. Do not use it."
        )
    return patch


class Model:
    """A model folder, read once.

    Attributes:
      hashes: SHA-256 of the bytes of each tensor, by name; none if its weights are missing or
        cannot be read.
    """

    def __init__(self, folder: str | pathlib.Path):
        self.hashes: dict[str, str] = {}
        if has_weights(pathlib.Path(folder)):
            with contextlib.suppress(ValueError, OSError):  # what is done with it next says so
                self.hashes = dict(tensor_hashes(Checkpoint(folder).tensors))

    def strangers(self, patch: PatchFile) -> list[str]:
        """Return the tensors that a patch does not list."""
        return [name for name in self.hashes if name not in patch.tensors]

    def digests(self, store: Store, entries: Sequence[Entry]) -> dict[str, str]:
        """Return what the hash of the model is to be compared with each patch by, by the patch's
        hash: that of all its tensors, or where it has more than a patch must list (an export may
        leave out copies and buffers) that of those which this patch must list."""
        whole = model_hash(self.hashes)
        if not any(whole in (x.before, x.after) for x in entries):
            if self.hashes.keys() - _required(open_patch(store, entries[-1])):
                return {x.hash: self._restricted(open_patch(store, x)) for x in entries}
        return {x.hash: whole for x in entries}

    def _restricted(self, patch: PatchFile) -> str:
        names = _required(patch)
        return model_hash({name: x for name, x in self.hashes.items() if name in names})


def _required(patch: PatchFile) -> set[str]:
    return {name for name, tensor in patch.tensors.items() if not tensor.optional}
