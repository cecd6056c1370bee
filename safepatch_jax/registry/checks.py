"""Checks of a patch before it is used: who signed it, and that its file does what is recorded."""

from __future__ import annotations

from safepatch_jax.patch_file.file import PatchFile
from safepatch_jax.patch_file.log import patch_hash
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
            f"{entry.name}@{entry.hash[:12]} is signed by {entry.signature['key'][:16]}..., not by "
            f"{trust[:16]}..., which --trust asks for."
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
