"""Adding a patch to a registry, and taking one out; no JAX.

What is written beside the index first counts only once the index lists it: a command that was
killed has changed nothing, or all, and the same command again does the rest.
"""

from __future__ import annotations

import dataclasses
import datetime
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from safepatch_jax.patch_file.file import PatchFile
from safepatch_jax.patch_file.log import patch_hash
from safepatch_jax.patch_file.rebase import (
    REFUSE,
    Base,
    rebase,
    refuse_overlap,
    shared_entries,
)
from safepatch_jax.registry import signing
from safepatch_jax.registry.checks import Model, open_patch
from safepatch_jax.registry.index import BESIDE, CARD, EVALUATION, FORMAT, NAME, Entry, Index
from safepatch_jax.registry.store import PATCH, Store
from safepatch_jax.runtime import files
from safepatch_jax.runtime.console import some
from safepatch_jax.runtime.paths import readable
from safepatch_jax.runtime.reading import Refused

_LARGEST = 100_000_000  # bytes of a card or an evaluation
_MOST = 20  # evaluations of a patch


def add(
    store: Store,
    patch: str,
    name: str,
    parent: str = "",
    card: str = "",
    evaluations: Sequence[str] = (),
    key: Any = None,
) -> str:
    """Add a patch file to a registry, which is made if there is none.

    Args:
      patch: the patch file.
      name: of the patch; several versions may have one.
      parent: reference of the patch that it goes onto; by default the one that leaves the model it
        was made for, if there is one.
      card: a file that describes it, Markdown.
      evaluations: files with what it was measured to do: a run's report, a gate's verdict.
      key: a private key, see `signing.private_key`; its signature is stored, also of a patch that
        is there without one.

    Returns:
      its name, NAME@HASH.

    Raises:
      ValueError: a file that cannot be used, a name that cannot be, a parent that leaves another
        model, or the patch is there already with other records, or signed by another key. One
        that is there has its files put back if they are missing or damaged.
    """
    if not NAME.fullmatch(name):
        raise Refused(
            f"{ascii(name)[1:-1]:.120} cannot be the name of a patch: letters, digits, '_', '.' "
            "and '-', the first one a letter or digit, at most 100."
        )
    opened = PatchFile(patch)
    if patch_hash(opened, "before") == patch_hash(opened, "after"):
        raise Refused(
            f"{opened.path} changes only tensors that exports leave out "
            f"({some(opened.changed(), ', ')}): the models before and after it have one hash, by "
            "which a registry tells them apart."
        )
    beside = _beside(card, evaluations)
    digest = files.file_sha256(opened.path)
    label = ""

    def edit(index: Index) -> Index | None:
        nonlocal label
        before = patch_hash(opened, "before")
        onto = _parent(index, before, digest, parent)
        entry = _entry(opened, digest, name, onto, _hashed(beside), key)
        if digest in index.entries:
            _refuse_other_record(index, entry)
            label = index.label(digest)
            signed = _signed(index, entry, opened, key)
            if signed is not None or not store.is_whole(index.entries[digest]):
                _put(store, signed or index.entries[digest], opened.path, beside)
            return signed and Index(index.entries | {digest: signed}, index.removed)
        _put(store, entry, opened.path, beside)
        added = Index(index.entries | {digest: entry}, index.removed)
        label = added.label(digest)
        return added

    store.change(edit)
    return label


def _beside(card: str, evaluations: Sequence[str]) -> dict[str, pathlib.Path]:
    """Return the files that go beside a patch file, by the names that they get."""
    beside = {CARD: pathlib.Path(readable(card))} if card else {}
    if len(evaluations) > _MOST:
        raise Refused(f"{len(evaluations)} evaluations are given; at most {_MOST} are kept.")
    for number, given in enumerate(evaluations, 1):
        path = pathlib.Path(readable(given))
        name = EVALUATION.format(number, path.suffix.removeprefix("."))
        if not BESIDE.fullmatch(name):
            raise Refused(f"{given}: an evaluation is a .json, .md, .xml or .txt file.")
        beside[name] = path
    for path in beside.values():
        if not path.is_file():
            raise Refused(f"There is no file {path}. Give the path of a card or an evaluation.")
        if path.stat().st_size > _LARGEST:
            raise Refused(f"{path} has more than {_LARGEST:,} bytes. Give the report alone.")
    return beside


def _hashed(beside: Mapping[str, pathlib.Path]) -> dict[str, dict[str, Any]]:
    """Return what a manifest says of the files beside a patch file."""
    hashed = {}
    for name, path in beside.items():
        hashed[name] = {"sha256": files.file_sha256(path), "bytes": path.stat().st_size}
    return hashed


def _parent(index: Index, before: str, digest: str, reference: str) -> str:
    """Return the hash of the patch that leaves a model, '' if none does."""
    if reference:
        entry = index.find(reference)
        if entry.hash in index.removed:
            raise Refused(f"{index.label(entry.hash)} was removed, and is no parent of others.")
        if entry.after != before:
            raise Refused(
                f"{index.label(entry.hash)} leaves the model {entry.after[:16]}..., and the patch "
                f"goes onto {before[:16]}.... Give the patch that leaves that one, or leave "
                "--parent out."
            )
        return entry.hash
    if digest in index.entries:
        return index.parents[digest]
    leaving = [x for x, entry in index.live.items() if entry.after == before]
    if len(leaving) > 1:
        raise Refused(
            f"Several patches leave the model {before[:16]}... that this one goes onto: "
            f"{some([index.label(x) for x in leaving], ', ')}. Give one with --parent."
        )
    return leaving[0] if leaving else ""


def _entry(
    patch: PatchFile,
    digest: str,
    name: str,
    parent: str,
    beside: Mapping[str, Any],
    key: Any,
    more: Mapping[str, Any] | None = None,
) -> Entry:
    manifest = {
        "format": FORMAT,
        "name": name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "patch": {
            "sha256": digest,
            "bytes": patch.path.stat().st_size,
            "entries": patch.entries(),
            "tensors": len(patch.changed()),
        },
        "kind": patch.kind,
        "before": patch_hash(patch, "before"),
        "after": patch_hash(patch, "after"),
        "parent": parent,
        "files": dict(beside),
        **(more or {}),
    }
    entry = Entry(digest, manifest)
    if key is None:
        return entry
    return dataclasses.replace(entry, signature=signing.sign(key, entry.content()))


def _refuse_other_record(index: Index, entry: Entry) -> None:
    """Raise ValueError unless a patch is there with the same records, but for date and
    signature."""
    there = index.entries[entry.hash]
    label = index.label(entry.hash)
    if entry.hash in index.removed:
        date = index.removed[entry.hash]["date"][:10]
        raise Refused(f"{label} was removed on {date}, and is not added again.")
    others = []
    if there.name != entry.name:
        others.append("another name")
    if there.files != entry.files:
        of_both = (", ".join(x.files) or "none" for x in (there, entry))
        others.append("files beside it: {}; given now: {}".format(*of_both))
    if entry.parent not in (there.parent, index.parents[there.hash]):
        others.append("another parent")
    if others:
        raise Refused(
            f"This patch file is there already, as {label}, with {' and '.join(others)}. What is "
            "recorded of a patch does not change."
        )


def _signed(index: Index, entry: Entry, patch: PatchFile, key: Any) -> Entry | None:
    """Return a patch that is there with a signature of what is recorded of it, which must be what
    `entry` says, but for the date; None if there is nothing to sign."""
    there = index.entries[entry.hash]
    if key is None or _has_signed(key, there):
        return None
    label = index.label(entry.hash)
    if there.signature:
        raise Refused(
            f"{label} has a signature already that names the key {there.signature['key'][:16]}..., "
            "and is not signed anew."
        )
    wanted = entry.manifest | {x: there.manifest[x] for x in ("date", "parent")}
    if "rebased" in there.manifest:
        wanted["rebased"] = _rebased(patch) | {"entries": there.manifest["rebased"]["entries"]}
    if there.manifest != wanted:
        names = [x for x in there.manifest if there.manifest[x] != wanted.get(x)]
        raise Refused(
            f"{label}: its record has another {ascii(some(names, ', '))[1:-1]} than its patch file "
            "says, and is not signed."
        )
    return dataclasses.replace(there, signature=signing.sign(key, there.content()))


def _rebased(patch: PatchFile) -> dict[str, Any]:
    """Return what a patch file that was written anew says of that; what is missing is None."""
    about, values = patch.about, {"overlap": patch.about.get("overlap")}
    for name in ("of", "without"):
        value = about.get(name)
        values[name] = value.get("sha256") if isinstance(value, dict) else None
    return values


def _put(
    store: Store, entry: Entry, patch: pathlib.Path, beside: Mapping[str, pathlib.Path]
) -> None:
    """Copy the files of a patch to where they belong; what is copied must be what was hashed."""

    def fill(folder: pathlib.Path) -> None:
        wanted = {PATCH: entry.manifest["patch"]["sha256"]}
        wanted |= {name: file["sha256"] for name, file in entry.files.items()}
        for name, path in {PATCH: patch, **beside}.items():
            files.copy(path, folder / name)
            if files.file_sha256(folder / name) != wanted[name]:
                raise Refused(f"{path} was changed meanwhile. Nothing was added; try again.")

    store.fill(entry, fill)


def remove(
    store: Store,
    reference: str,
    model: str | pathlib.Path | None = None,
    overlap: str = REFUSE,
    key: Any = None,
) -> list[str]:
    """Take a patch out of a registry. Patches that were made after it, on it, are written anew for
    the models without it; what they were stays, as removed.

    Args:
      reference: of the patch.
      model: folder of a model on its line, from which the bits before the patch follow; needed
        where others go onto it.
      overlap: one of `rebase.OVERLAPS`.
      key: signs the manifests of what is written anew, see `add`, where it has signed what that is
        made from; the others have no signature then.

    Returns:
      lines that say what was done.

    Raises:
      ValueError: no such patch, later ones change entries of it and `overlap` is 'refuse', or the
        model is missing or another one, or later ones are signed and no key is given; the registry
        was not changed.
    """
    lines: list[str] = []

    def edit(index: Index) -> Index | None:
        lines.clear()
        entry = index.find(reference)
        label = index.label(entry.hash)
        if entry.hash in index.removed:
            lines.append(f"{label} was removed on {index.removed[entry.hash]['date'][:10]}.")
            return None
        later = index.after(entry.hash)
        anew: dict[str, Entry] = {}
        if later:
            anew = _write_anew(store, index, entry, later, model, overlap, key)
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        removed = {entry.hash: {"date": date, "now": "", "without": entry.hash}}
        for old, new in anew.items():
            removed[old] = {"date": date, "now": new.hash, "without": entry.hash}
        entries = index.entries | {new.hash: new for new in anew.values()}
        result = Index(entries, index.removed | removed)
        lines.append(f"{label} is removed; its file stays.")
        for old, new in anew.items():
            lines.append(f"{result.label(old)} is now {result.label(new.hash)}")
            if key is not None and new.signature is None:
                lines.append(
                    f"  {result.label(new.hash)} is not signed: the key of --sign has not signed "
                    "all that it is made from"
                )
        return result

    store.read()  # where there is none, changing makes one
    store.change(edit)
    return lines


def _write_anew(
    store: Store,
    index: Index,
    entry: Entry,
    later: Sequence[Entry],
    model: str | pathlib.Path | None,
    overlap: str,
    key: Any,
) -> dict[str, Entry]:
    """Write later patches for the models without one; return the new entries by the old hashes."""
    label = index.label(entry.hash)
    if key is None:
        _refuse_lost_signatures(index, later)
    opened = {x.hash: open_patch(store, x) for x in (entry, *later)}
    ours = {x.hash for x in (entry, *later) if _has_signed(key, x)}
    shared = {}
    for x in later:
        shared[index.label(x.hash)] = shared_entries(opened[entry.hash], opened[x.hash])
    count = refuse_overlap(label, shared, overlap, "from the model before it, and add these.")
    base = _base(store, index, entry, later, model)
    anew: dict[str, Entry] = {}
    with tempfile.TemporaryDirectory(prefix="safepatch-") as temporary:
        for x in later:
            line = [y.hash for y in index.line(x.hash) if y.hash in opened]
            out = pathlib.Path(temporary, f"{x.hash}.safetensors")
            labels = label, index.label(x.hash)
            patch = rebase(base, [opened[y] for y in line], out, overlap, labels)
            parent, before = index.parents[entry.hash], entry.before
            if onto := anew.get(index.parents[x.hash]):
                parent, before = onto.hash, onto.after
            if patch_hash(patch, "before") != before:
                raise Refused(f"{model} was changed meanwhile. Nothing was removed; try again.")
            rebased = {"of": x.hash, "without": entry.hash, "overlap": overlap, "entries": count}
            kept = {name: file for name, file in x.files.items() if name == CARD}
            digest, more = files.file_sha256(out), {"rebased": rebased}
            # Entries that are shared follow from the other patches too, all others from its own.
            sources = line if count else [x.hash]
            signer = key if ours.issuperset(sources) else None
            anew[x.hash] = _entry(patch, digest, x.name, parent, kept, signer, more)
            card = {name: store.beside(x)[name] for name in kept}
            _put(store, anew[x.hash], out, card)
    return anew


def _refuse_lost_signatures(index: Index, later: Sequence[Entry]) -> None:
    signed = [index.label(x.hash) for x in later if x.signature]
    if signed:
        raise Refused(
            f"{some(signed, ', ')} would be written anew without a signature. Nothing was removed. "
            "Give --sign=KEYFILE: what that key has signed is signed again, and what it has not "
            "has no signature then."
        )


def _has_signed(key: Any, entry: Entry) -> bool:
    """Return whether a private key has made the signature of a manifest."""
    if key is None or entry.signature is None:
        return False
    ours = entry.signature["key"] == signing.public_of(key)
    return ours and signing.is_right(entry.signature, entry.content())


def _base(
    store: Store,
    index: Index,
    entry: Entry,
    later: Sequence[Entry],
    model: str | pathlib.Path | None,
) -> Base:
    """Return the model that a patch goes onto, by way of the patches between it and a model of its
    line."""
    label = index.label(entry.hash)
    if model is None:
        names = some([index.label(x.hash) for x in later], ", ")
        raise Refused(
            f"{names} were made on {label} and are written anew without it: give --model, a model "
            f"of the line, for instance what {label} goes onto."
        )
    line, between = index.line(entry.hash), None
    digests = Model(model).digests(store, [*line, *later])
    for place, x in enumerate(line):
        if x.before == digests[x.hash]:
            between = line[place:-1]
    for x in (entry, *later):
        if between is None and x.after == digests[x.hash]:
            between = index.line(x.hash)[len(line) - 1 :]
    if between is None:
        raise Refused(
            f"{model} is no model of the line of {label}: its hash is "
            f"{digests[entry.hash][:16]}.... Give what {label} goes onto "
            f"({entry.before[:16]}...), or one that a patch of the line goes onto or leaves."
        )
    return Base(model, [open_patch(store, x) for x in between])
