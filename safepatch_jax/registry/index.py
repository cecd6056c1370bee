"""The index of a registry: which patches there are, checked as what others may have written.

Nothing in it names a path: where a patch lies follows from its hash.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from safepatch_jax.option import nearest
from safepatch_jax.registry.signing import KEY, VALUE
from safepatch_jax.runtime.console import some
from safepatch_jax.runtime.reading import Refused, reading
from safepatch_jax.runtime.records import HASH, Each, misfits

FORMAT = 1
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
# What lies beside a patch file, by name.
CARD, EVALUATION = "card.md", "evaluation-{}.{}"
BESIDE = re.compile(r"card\.md|evaluation-[1-9][0-9]?\.(json|md|xml|txt)")
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\+00:00")
_WORD = re.compile("[a-z_-]{1,40}")
_MAYBE = re.compile("[0-9a-f]{64}|")
_REFERENCE = re.compile(rf"({NAME.pattern})?(?:@([0-9a-f]{{4,64}}))?")
_SHORTEST = 8  # digits of a hash that are shown
_LARGEST = 1 << 50  # bytes of a file, or entries of a patch
_FILE = {"sha256": HASH, "bytes": int}
_MANIFEST = {
    "format": int,
    "name": NAME,
    "date": _DATE,
    "patch": {**_FILE, "entries": int, "tensors": int},
    "kind": _WORD,
    "before": HASH,
    "after": HASH,
    "parent": _MAYBE,
    "files": Each(_FILE),
}
_REBASED = {"of": HASH, "without": HASH, "overlap": _WORD, "entries": int}
_INDEX = {
    "format": int,
    "patches": Each({"manifest": _MANIFEST}),
    "removed": Each({"date": _DATE, "now": _MAYBE, "without": HASH}),
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A patch in a registry.

    Attributes:
      hash: the SHA-256 of its file.
      manifest: what is recorded of it; it does not change.
      signature: key and value, in hex; None if it has none.
    """

    hash: str
    manifest: dict[str, Any]
    signature: dict[str, str] | None = None

    @property
    def name(self) -> str:
        return self.manifest["name"]

    @property
    def before(self) -> str:
        """The hash of the model that the patch goes onto."""
        return self.manifest["before"]

    @property
    def after(self) -> str:
        """The hash of the model that it leaves."""
        return self.manifest["after"]

    @property
    def parent(self) -> str:
        """The hash of the patch before it, as recorded; '' if no patch that was there left the
        model that it goes onto, see `Index.parents`."""
        return self.manifest["parent"]

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """SHA-256 and bytes of what lies beside the patch file, by name."""
        return self.manifest["files"]

    @property
    def known(self) -> dict[str, Any]:
        """The manifest without fields that are not known here, which may say anything."""
        return _known(self.manifest, _MANIFEST | {"rebased": _REBASED})

    def content(self) -> bytes:
        """Return what is signed."""
        return json.dumps(self.manifest, sort_keys=True, separators=(",", ":")).encode()

    def to_json(self) -> dict[str, Any]:
        return {"manifest": self.manifest, "signature": self.signature}


def _known(value: Any, wanted: Any) -> Any:
    """Return what of a JSON value, which is as wanted, is wanted."""
    if isinstance(wanted, Each):
        return {key: _known(inner, wanted.value) for key, inner in value.items()}
    if not isinstance(wanted, dict):
        return value
    return {key: _known(value[key], inner) for key, inner in wanted.items() if key in value}


class Index:
    """The patches of a registry by hash, in the order in which they were added.

    Attributes:
      entries: all, also removed ones.
      removed: of those that were taken out, by hash: `date`; `now`, the hash of what took its place
        or ''; `without`, the hash of the patch whose removal it was.
    """

    def __init__(
        self,
        entries: Mapping[str, Entry] | None = None,
        removed: Mapping[str, dict[str, str]] | None = None,
    ):
        self.entries, self.removed = dict(entries or {}), dict(removed or {})

    @property
    def live(self) -> dict[str, Entry]:
        """Those that were not taken out."""
        return {x: entry for x, entry in self.entries.items() if x not in self.removed}

    def dump(self) -> bytes:
        patches = {x: entry.to_json() for x, entry in self.entries.items()}
        content = {"format": FORMAT, "patches": patches, "removed": self.removed}
        return (json.dumps(content, indent=1) + "\n").encode()

    @functools.cached_property
    def parents(self) -> dict[str, str]:
        """The hash of the patch before each one: the one that is recorded; where none is, as when
        the later one was added first, the one that leaves the model that it goes onto, if one
        alone does and does not come after it; else ''."""
        parents = {x: entry.parent for x, entry in self.entries.items()}
        leaving: dict[str, list[str]] = {}
        for x, entry in self.live.items():
            leaving.setdefault(entry.after, []).append(x)
        firsts = {x: parent or x for x, parent in parents.items()}
        for x, entry in self.live.items():
            candidates = leaving.get(entry.before, [])
            if not entry.parent and len(candidates) == 1 and _first(firsts, candidates[0]) != x:
                parents[x] = firsts[x] = candidates[0]
        return parents

    def line(self, digest: str) -> list[Entry]:
        """Return the patches that lead to one, the first one first, itself last."""
        line = []
        while digest:
            line.append(self.entries[digest])
            digest = self.parents[digest]
        return line[::-1]

    def after(self, digest: str) -> list[Entry]:
        """Return the patches that were made after one, on it or on one of these, each after its
        parent."""
        children: dict[str, list[Entry]] = {}
        for x, entry in self.live.items():
            children.setdefault(self.parents[x], []).append(entry)
        found = list(children.get(digest, []))
        for entry in found:  # which grows meanwhile
            found += children.get(entry.hash, [])
        return found

    def short(self, digest: str) -> str:
        """Return the beginning of a hash that no other one has."""
        length = _SHORTEST
        while length < len(digest):
            if sum(x.startswith(digest[:length]) for x in self.entries) < 2:
                break
            length += 1
        return digest[:length]

    def label(self, digest: str) -> str:
        """Return how a patch is named: NAME@HASH, as short as it is unique."""
        return f"{self.entries[digest].name}@{self.short(digest)}"

    def find(self, reference: str) -> Entry:
        """Return the patch of a reference: NAME, NAME@HASH or @HASH, the hash shortened to 4 digits
        or more. One that was removed is found by its hash.

        Raises:
          ValueError: not of this form, none, or more than one; lists these.
        """
        match = _REFERENCE.fullmatch(reference)
        if not match or not reference:
            raise Refused(
                f"{ascii(reference)[1:-1]:.120} is no patch of a registry: give NAME, NAME@HASH or "
                "@HASH, of the hash 4 digits or more (0-9, a-f)."
            )
        name, prefix = match.groups()
        found = []
        for entry in (self.entries if prefix else self.live).values():
            if (not name or entry.name == name) and entry.hash.startswith(prefix or ""):
                found.append(entry)
        if not found:
            names = sorted({entry.name for entry in self.live.values()})
            hint = nearest(name, names) if name and name not in names else ""
            raise Refused(
                f"There is no patch {reference} in the registry{hint}. safepatch registry list "
                "shows all."
            )
        if len(found) > 1:
            labels = [f"{self.label(x.hash)} of {x.manifest['date'][:10]}" for x in found]
            raise Refused(
                f"{reference} is ambiguous: {some(labels, ', ', 10)}. Give more digits of the hash."
            )
        return found[0]


def _first(firsts: dict[str, str], digest: str) -> str:
    """Return the first patch of a line, by the one before each patch or the first itself; the way
    there is shortened, so that many patches cost no more than a few steps each."""
    while firsts[digest] != digest:
        firsts[digest] = firsts[firsts[digest]]
        digest = firsts[digest]
    return digest


def load(content: bytes, where: str) -> Index:
    """Read an index. Raises ValueError if it is damaged, or says what cannot be."""
    fix = "Copy it back from a backup."
    with reading(where, "the index of a registry", fix):
        value = json.loads(content)
    if isinstance(value, dict) and value.get("format") not in (None, FORMAT):
        raise Refused(
            f"{where} is of format {ascii(value['format']):.40}, and {FORMAT} is known here. Use "
            "the version of safepatch_jax that made it."
        )
    problems = list(misfits(value, _INDEX))
    if not problems:
        entries, problems = _entries(value["patches"])
        problems = problems or _contradictions(entries, value["removed"])
    if problems:
        raise Refused(f"{where} is damaged: {some(problems, most=3)}. {fix}")
    return Index(entries, value["removed"])


def read_manifest(content: bytes, where: str) -> tuple[dict[str, Any], dict[str, str] | None]:
    """Read what lies beside a patch file: manifest and signature. Raises ValueError if it is
    damaged."""
    with reading(where, "a manifest", "Add the patch again."):
        value = json.loads(content)
    if problems := list(misfits(value, {"manifest": dict})):
        raise Refused(f"{where} is damaged: {some(problems)}. Add the patch again.")
    return value["manifest"], value.get("signature")


def _entries(patches: Mapping[str, Any]) -> tuple[dict[str, Entry], list[str]]:
    entries, problems = {}, []
    for digest, value in patches.items():
        manifest, signature = value["manifest"], value.get("signature")
        where = ascii(digest)[1:17]
        if manifest["patch"]["sha256"] != digest:
            problems.append(f"{where} is the hash of another patch")
        problems += [f"{where}: {text}" for text in _impossible(manifest)]
        if signature is not None:
            problems += list(misfits(signature, {"key": KEY, "value": VALUE}, "signature"))
        entries[digest] = Entry(digest, manifest, signature)
    return entries, problems


def _impossible(manifest: Mapping[str, Any]) -> Iterable[str]:
    """Yield what of a manifest, whose fields have the right types, cannot be."""
    if manifest["format"] != FORMAT:
        yield f"its format is {manifest['format']}"
    patch = manifest["patch"]
    for name, file in [("patch", patch), *manifest["files"].items()]:
        if not 0 <= file["bytes"] <= _LARGEST:
            yield f"{ascii(name)[1:-1]:.80} has {file['bytes']} bytes"
    for name in manifest["files"]:
        if not BESIDE.fullmatch(name):
            yield f"a file has the name {ascii(name):.80}"
    if not 0 < patch["tensors"] <= patch["entries"] <= _LARGEST:
        yield f"it changes {patch['entries']} entries of {patch['tensors']} tensors"
    if manifest["before"] == manifest["after"]:
        yield "it goes onto the model that it leaves"
    if "rebased" in manifest:
        yield from misfits(manifest["rebased"], _REBASED, "rebased")


def _contradictions(entries: Mapping[str, Entry], removed: Mapping[str, Any]) -> list[str]:
    """Return what of an index does not fit together."""
    problems, seen = [], set()
    for digest, entry in entries.items():
        parent = entry.parent
        if parent and parent not in seen:  # so that no line goes round in a circle
            problems.append(f"{digest[:16]} comes before its parent {parent[:16]}")
        elif parent and entries[parent].after != entry.before:
            problems.append(f"{digest[:16]} does not go onto what its parent leaves")
        elif parent in removed and digest not in removed:
            problems.append(f"{digest[:16]} goes onto {parent[:16]}, which was removed")
        seen.add(digest)
    for digest, removal in removed.items():
        if digest not in entries or removal["without"] not in removed:
            problems.append(f"{ascii(digest)[1:17]} was removed, and never there")
        elif removal["now"] and removal["now"] not in entries:
            problems.append(f"{digest[:16]} has a successor that is not there")
    return problems
