"""What can be done with the patches of a registry: list, show, verify, pull, apply, compare; no
JAX."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from safepatch_jax.patch_file import apply as patch_apply
from safepatch_jax.patch_file.conflicts import conflicts, lines
from safepatch_jax.patch_file.file import PatchFile, inspect
from safepatch_jax.registry.checks import Model, check_signature, open_patch
from safepatch_jax.registry.index import CARD, Entry, Index
from safepatch_jax.registry.store import PATCH, Store
from safepatch_jax.runtime import files
from safepatch_jax.runtime.console import some
from safepatch_jax.runtime.reading import Refused

_CARD_LINES = 200


def listed(store: Store) -> list[str]:
    """Return a line for each patch of a registry, those that were removed last."""
    index = store.read()
    live = index.live
    text = []
    for x, entry in live.items():
        text.append(f"{index.label(x)}  {_summary(index, entry)}")
    for x, removal in index.removed.items():
        text.append(f"{index.label(x)}  {_fate(index, removal)}")
    return text or ["The registry has no patches."]


def _summary(index: Index, entry: Entry) -> str:
    patch, onto = entry.manifest["patch"], f"model {entry.before[:12]}"
    if parent := index.parents[entry.hash]:
        onto = index.label(parent)
    parts = [
        entry.manifest["date"][:10],
        f"{patch['entries']:,} entries",
        f"{patch['bytes']:,} bytes",
        f"on {onto}",
    ]
    if entry.signature:
        parts.append(f"names the key {entry.signature['key'][:12]}, not checked")
    if evaluations := len(entry.files.keys() - {CARD}):
        parts.append(f"{evaluations} evaluation{'s' * (evaluations > 1)}")
    return ", ".join(parts)


def _fate(index: Index, removal: dict[str, str]) -> str:
    text = f"removed on {removal['date'][:10]}"
    if removal["now"]:
        text += f": now {index.label(removal['now'])}, without {index.label(removal['without'])}"
    return text


def show(store: Store, reference: str) -> list[str]:
    """Return lines that describe a patch: what is recorded of it, its card, what its file holds. Of
    a name with several patches a line each. Raises ValueError if there is none, or its files are
    not those that were added."""
    index = store.read()
    same = [x for x in index.live.values() if x.name == reference]
    if len(same) > 1:
        return [f"{index.label(x.hash)}  {_summary(index, x)}" for x in same]
    entry = index.find(reference)
    text = [f"{index.label(entry.hash)}: {entry.hash}"]
    if entry.hash in index.removed:
        text.append(_fate(index, index.removed[entry.hash]))
    for name, value in entry.known.items():
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        text.append(f"{name}: {shown}")
    text.append(f"signature: {_signed(entry)}")
    beside = store.beside(entry)
    for name in entry.files:
        text.append(f"{name}:")
        text += _beginning(beside[name])
    return [*text, *inspect(store.patch(entry))]


def _signed(entry: Entry) -> str:
    if entry.signature is None:
        return "none"
    return f"names the key {entry.signature['key']}, not checked: safepatch registry verify does"


def _beginning(path: pathlib.Path) -> list[str]:
    """Return the lines of a card or an evaluation, of a long one the first ones."""
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read(1 << 16).splitlines()
    if len(text) > _CARD_LINES:
        text = [*text[:_CARD_LINES], "..."]
    return [f"  {line}" for line in text]


def verify(store: Store, reference: str = "", trust: str = "") -> list[str]:
    """Compare patch files, manifests and signatures with the index; return a line for each patch.

    Args:
      reference: of one patch; '' for all. Of those that were removed the files may be missing.
      trust: a public key in hex; patches without its signature are mistakes.

    Raises:
      ValueError: something does not fit; all of it is collected.
    """
    index = store.read()
    chosen = [index.find(reference)] if reference else list(index.entries.values())
    text, problems = [], []
    for entry in chosen:
        removed = entry.hash in index.removed
        if removed and not store.has(entry):
            continue
        try:
            states = _verified(store, entry, "" if removed else trust)
        except (ValueError, OSError) as error:
            problems.append(f"{index.label(entry.hash)}: {error}")
            continue
        text.append(f"{index.label(entry.hash)}: {', '.join(states)}")
    if problems:
        raise ValueError(some(problems, " ", 12))
    return text


def _verified(store: Store, entry: Entry, trust: str) -> list[str]:
    signed = check_signature(entry, trust)
    beside = store.beside(entry)
    open_patch(store, entry)
    states = [f"patch of {entry.manifest['patch']['entries']:,} entries agrees"]
    if entry.files:
        states.append(f"{', '.join(sorted(beside.keys() & entry.files.keys()))} agree")
    return [*states, signed]


def pull(store: Store, reference: str, out: str | pathlib.Path, trust: str = "") -> list[str]:
    """Copy a patch file, its manifest, card and evaluations into a new folder; return lines that
    say so. Raises ValueError as `verify`, or if `out` is not empty."""
    index = store.read()
    entry = index.find(reference)
    files.refuse_full_folder(out)
    if trust:
        check_signature(entry, trust)
    patch, beside = open_patch(store, entry).path, store.beside(entry)
    with files.new_folder(out) as new:
        for name, path in {PATCH: patch, **beside}.items():
            files.copy(path, new / name)
    text = [f"{out}: {index.label(entry.hash)}, {', '.join(sorted([PATCH, *beside]))}"]
    if entry.hash in index.removed:
        text.append(f"{index.label(entry.hash)} was {_fate(index, index.removed[entry.hash])}.")
    return text


def apply(
    store: Store,
    reference: str,
    folder: str | pathlib.Path,
    out: str | pathlib.Path | None = None,
    trust: str = "",
) -> list[str]:
    """Bring a model folder to what a patch leaves, by the patches of its line that it lacks.

    Args:
      reference: of the patch.
      folder: a model that the patch, or one before it on its line, goes onto; or where applying
        this patch in place was interrupted.
      out: a new folder, which appears whole or not at all; None changes `folder` in place, by one
        patch.
      trust: a public key in hex, by which all of these patches must be signed.

    Returns:
      lines that say what was done.

    Raises:
      ValueError: a patch that was removed, another model, a patch that is not signed so, or one
        that cannot be read; nothing was written.
    """
    index = store.read()
    entry = index.find(reference)
    if entry.hash in index.removed:
        removal = index.removed[entry.hash]
        raise Refused(
            f"{index.label(entry.hash)} was {_fate(index, removal)}. It is not applied; pull still "
            "gives its file, which patch revert needs."
        )
    model = Model(folder)
    steps = _missing(store, index, entry, model, folder)
    if len(steps) > 1 and out is None:
        raise Refused(
            f"{folder} lacks {len(steps)} patches of the line: "
            f"{some([index.label(x.hash) for x in steps], ', ')}. Give a new folder with --out; in "
            "place one is applied at a time."
        )
    for x in steps if trust else ():
        check_signature(x, trust)
    opened = [open_patch(store, x) for x in steps]
    _refuse_strangers(model, opened, [index.label(x.hash) for x in steps], folder)
    verb = "applied" if _run(opened, folder, out) else "was applied already:"
    return [f"{verb} {index.label(x.hash)}" for x in steps]


def _missing(
    store: Store, index: Index, entry: Entry, model: Model, folder: str | pathlib.Path
) -> list[Entry]:
    """Return the patches of a line from what a model is on; the last one alone where it is no model
    of the line, and applying it says why, or has it. Raises ValueError where removed patches are
    in the way."""
    line = index.line(entry.hash)
    digests = model.digests(store, line)
    if entry.after == digests[entry.hash]:
        return [entry]
    for place in range(len(line) - 1, -1, -1):
        if line[place].before == digests[line[place].hash]:
            return line[place:]
    _refuse_removed(index, line, digests[entry.hash], folder)
    return [entry]


def _refuse_removed(
    index: Index, line: Sequence[Entry], digest: str, folder: str | pathlib.Path
) -> None:
    """Raise ValueError if a model is what a removed patch leaves and the line is reached from there
    by taking patches off: says which."""
    models = {x.before for x in line} | {line[-1].after}
    for removed in index.removed:
        back: list[str] = []
        for x in index.line(removed)[::-1] if index.entries[removed].after == digest else ():
            back.append(index.label(x.hash))
            if x.before in models:
                raise Refused(
                    f"{folder} is what {back[0]} leaves, which was removed. Nothing was written. "
                    f"Take off, in this order, {', '.join(back)} (safepatch registry pull gives "
                    "their files, safepatch patch revert takes them off), then give this command "
                    "again."
                )


def _refuse_strangers(
    model: Model, steps: Sequence[PatchFile], labels: Sequence[str], folder: str | pathlib.Path
) -> None:
    """Raise ValueError if a model has tensors that a patch after the first one does not list."""
    for patch, label in zip(steps[1:], labels[1:]):
        if names := model.strangers(patch):
            raise Refused(
                f"{folder} has tensors that {label} does not list, as the model that it was made "
                f"for was exported without them: {some(names, ', ')}. Nothing was written. Apply "
                f"the patches up to it, and give the model without these tensors."
            )


def _run(
    patches: Sequence[PatchFile], folder: str | pathlib.Path, out: str | pathlib.Path | None
) -> bool:
    """Apply patches one after the other; return whether anything changed."""
    if len(patches) == 1:
        return bool(patch_apply.apply(patches[0].path, folder, out).moved)
    with files.new_folder(out) as new:
        source: list[Any] = [folder, new]  # after the first patch the others go onto what it left
        for patch in patches:
            patch_apply.apply(patch.path, *source)
            source = [new]
    return True


def compare(
    store: Store | None, first: str, second: str, folder: str | pathlib.Path | None = None
) -> list[str]:
    """Return lines that say how two patches meet, see `conflicts`.

    Args:
      store: of the registry that has them; None where they are paths of patch files.
      first, second: references, or paths.
      folder: a model from which the values before them follow; None for counts alone.
    """
    if store is None:
        return lines(conflicts(PatchFile(first), PatchFile(second), folder), first, second)
    index = store.read()
    entries = [index.find(reference) for reference in (first, second)]
    between = {}
    for entry in entries:
        between |= {x.hash: x for x in index.line(entry.hash)}
    one, other = (open_patch(store, entry) for entry in entries)
    others = [open_patch(store, x) for x in between.values() if x not in entries]
    names = [index.label(entry.hash) for entry in entries]
    return lines(conflicts(one, other, folder, others), *names)
