"""A model of the Hugging Face Hub, named ``org/name[@revision]``: a folder in the cache of
huggingface_hub, with the few files that are needed.

Fetched are config.json, the tokenizer's files, chat templates, licence and model card, then the
weights that `io.folder` would read: safetensors, or torch files where there are none. Never code.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from safepatch_jax.io import hub_access
from safepatch_jax.io.companions import COMPANIONS, TEMPLATES, VOCABULARY
from safepatch_jax.io.folder import layouts, read_index, shards_of
from safepatch_jax.io.hub_access import MODEL
from safepatch_jax.io.names import listed
from safepatch_jax.models.config import read_hf_config
from safepatch_jax.runtime import addresses, files, paths, processes
from safepatch_jax.runtime.console import say
from safepatch_jax.runtime.limits import limit, too_much
from safepatch_jax.runtime.reading import Refused

CONFIG, CARD = "config.json", "README.md"
_WORD = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_NAME = re.compile(f"{_WORD}/{_WORD}")
_REVISION = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_./-]{0,198}[A-Za-z0-9_])?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
# Of each group one file may be all that there is.
_DECIDING = (VOCABULARY, _TEMPLATE_FILES, ("generation_config.json",))
Check = Callable[[pathlib.Path], Any]


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A model at one commit, in the cache.

    Attributes:
      name: of the repository, 'org/name'.
      commit: its hash.
      folder: in Hugging Face format.
    """

    name: str
    commit: str
    folder: pathlib.Path

    @property
    def origin(self) -> str:
        return f"{self.name}@{self.commit}"


def split(text: str) -> tuple[str, str] | None:
    """Return (name, revision or '') of a text of the shape ``org/name[@revision]``; None for
    another."""
    name, at, revision = text.partition("@")
    if not _NAME.fullmatch(name) or "--" in name or ".." in text or name.endswith(".gguf"):
        return None
    if at and not _REVISION.fullmatch(revision):
        return None
    return name, revision


def named(text: str) -> tuple[str, str] | None:
    """Return what `split` does; None also where there is a file or folder of that name, which
    always goes first; and of an address of a bucket."""
    parts = split(text)
    return None if parts is None or os.path.lexists(text) else parts


def folder_of(text: str, check: Check | None = read_hf_config) -> str:
    """Return the folder of a model: of one that is named as on the Hub its snapshot, of another the
    path as it was given. All processes call this. Raises ValueError as `snapshot`."""
    if addresses.is_address(text):
        return paths.readable(text)
    parts = named(text)
    return text if parts is None else str(snapshot(*parts, check=check).folder)


def pinned(text: str) -> str:
    """Return a model's name with the commit that it stands for now, ``org/name@COMMIT``; a path as
    it was given. Small files alone are fetched."""
    parts = named(text.removeprefix("hf:"))
    if parts is None:
        return text
    if is_commit(parts[1]):
        return text.removeprefix("hf:")
    return snapshot(*parts, weights=False).origin


def is_commit(revision: str) -> bool:
    return bool(_COMMIT.fullmatch(revision))


def origin_of(folder: str | pathlib.Path) -> str:
    """Return ``org/name@COMMIT`` of a folder in the Hub's cache, '' of another."""
    path = pathlib.Path(os.path.abspath(folder))
    if path.parent.name != "snapshots" or not is_commit(path.name):
        return ""
    kind, *parts = path.parents[1].name.split("--")
    if kind != "models" or len(parts) != 2:
        return ""
    return f"{'/'.join(parts)}@{path.name}"


def short_name(origin: str) -> str:
    """Return ``org/name@COMMIT`` with a commit as short as people write it."""
    name, _, commit = origin.partition("@")
    return f"{name}@{commit[:7]}" if is_commit(commit) else origin


def at_hand(text: str) -> bool:
    """Return whether the cache holds a named model; the network is not used."""
    parts = named(text.removeprefix("hf:"))
    return parts is not None and _in_cache(*parts) is not None


def snapshot(
    name: str, revision: str = "", *, weights: bool = True, check: Check | None = None
) -> Snapshot:
    """Bring a model into the cache; all processes call this, and process 0 fetches first.

    What the cache holds of a commit is used as it is. Otherwise the Hub says what the revision
    stands for; where it cannot be reached the cache does. The console has repository, commit and
    bytes.

    Args:
      name: of the repository, 'org/name'.
      revision: branch, tag or commit; '' for the main branch.
      weights: also the weights; else what lies beside them.
      check: raises ValueError for a folder whose weights need not be fetched.

    Raises:
      ValueError: no network, no such repository or revision, a gated one, one without a model, or
        what `check` raises; says what to do.
    """
    commit = processes.on_first(_commit_of, name, revision, weights, check)
    if processes.first():
        return _obtain(name, revision, weights, check)
    return _obtain(name, commit, weights, check)


def _commit_of(name: str, revision: str, weights: bool, check: Check | None) -> str:
    return _obtain(name, revision, weights, check).commit


def _obtain(name: str, revision: str, weights: bool, check: Check | None) -> Snapshot:
    from huggingface_hub import constants

    return _obtained(name, revision, weights, check, constants.HF_HUB_CACHE)


@functools.cache
def _obtained(name: str, revision: str, weights: bool, check: Check | None, _: str) -> Snapshot:
    """Do what `snapshot` does in one process; asked again, nothing is done. The last argument is
    the cache."""
    try:
        result = _cached_commit(name, revision, weights) or _fetch(name, revision, weights, check)
    except Refused:
        raise
    except Exception as error:  # huggingface_hub has had three HTTP libraries
        result = None if _is_refusal(error) else _in_cache(name, revision, weights)
        if result is None:
            raise hub_access.problem(
                error, MODEL, name, revision, "there is no such file or folder here, and "
            ) from error
        text = f"{hub_access.silence(error)}; as in the cache, commit {result.commit}"
        if weights and (unknown := _perhaps_missing(result)):
            text += f", which may lack {listed(unknown)} of the repository"
        say(f"Hub: {name}: {text}")
    hub_access.record(MODEL, name, revision, result.commit)
    return result


def _is_refusal(error: Exception) -> bool:
    """Return whether the Hub says that there is no such thing."""
    from huggingface_hub import errors

    return isinstance(error, errors.RevisionNotFoundError | errors.HFValidationError)


def _cached_commit(name: str, revision: str, weights: bool) -> Snapshot | None:
    """Return a commit that the cache holds whole; of a branch None, as it may have moved."""
    found = _in_cache(name, revision, weights) if is_commit(revision) else None
    if found and weights and _perhaps_missing(found):
        return None  # another program may have fetched a part alone
    return found


def _perhaps_missing(found: Snapshot) -> list[str]:
    """Return which files that decide prompts and answers the cache lacks, though the repository may
    have them."""
    missing = []
    for names in _DECIDING:
        there = any((found.folder / name).is_file() for name in names)
        absent = all(hub_access.is_absent(MODEL, found.name, found.commit, x) for x in names)
        if not there and not absent:
            missing.append(names[0])
    if _TEMPLATE_FILES[0] in missing:
        config = found.folder / "tokenizer_config.json"
        if config.is_file() and b'"chat_template"' in config.read_bytes():
            missing.remove(_TEMPLATE_FILES[0])
    return missing


def _in_cache(name: str, revision: str, weights: bool = True) -> Snapshot | None:
    """Return what the cache holds of a model; None if a weight file is missing there."""
    config = hub_access.cached(MODEL, name, revision, CONFIG)
    if config is None or (weights and not _has_all_weights(config.parent)):
        return None
    return Snapshot(name, config.parent.name, config.parent)


def _has_all_weights(folder: pathlib.Path) -> bool:
    for single, index in layouts():
        if (folder / single).is_file():
            return True
        if (folder / index).is_file():
            shards = shards_of(read_index(folder / index), folder / index)
            return all((folder / shard).is_file() for shard in shards)
    return False


def _fetch(name: str, revision: str, weights: bool, check: Check | None) -> Snapshot:
    commit, sizes = hub_access.listing(MODEL, name, revision)
    if CONFIG not in sizes:
        raise Refused(_no_model(name, sizes))
    count = hub_access.Counter(MODEL, name, commit)
    with hub_access.without_bars():
        folder = count.fetch(CONFIG).parent
        for file in [CONFIG, *_beside(name, sizes)]:
            files.own_file(count.fetch(file), folder)
        if check is not None:
            check(folder)
        shards = _weights(name, sizes, count, folder) if weights else []
    for file in shards:
        files.own_file(count.fetch(file), folder)
    for file in COMPANIONS:
        if file not in sizes:
            hub_access.note_absent(MODEL, name, commit, file)
    # Last, so that the cache knows what the branch stands for once it has all of it.
    hub_access.fetch(MODEL, name, revision, CONFIG)
    say(f"Hub: {name} at {revision or 'main'}, commit {commit}: {count.text()}")
    return Snapshot(name, commit, folder)


def _beside(name: str, sizes: Mapping[str, int]) -> list[str]:
    """Return the names of the files beside the weights that are needed."""
    small = [file for file in (*COMPANIONS[1:], CARD) if file in sizes]
    templates = []
    for file in sorted(sizes):
        folder, _, rest = file.partition("/")
        if folder == TEMPLATES and rest.endswith(".jinja") and "/" not in rest:
            templates.append(f"{TEMPLATES}/{files.plain_name(rest, name)}")
    if len(templates) > limit("TEMPLATES"):
        raise Refused(f"{name}/{TEMPLATES} holds {too_much('TEMPLATES')}.")
    return small + templates


def _weights(
    name: str, sizes: Mapping[str, int], count: hub_access.Counter, folder: pathlib.Path
) -> list[str]:
    """Return the names of the weight files that are read; an index is fetched."""
    for single, index in layouts():
        if single in sizes:
            return [single]
        if index not in sizes:
            continue
        if sizes[index] > limit("INDEX_BYTES"):
            raise Refused(f"{name}: {index} has {too_much('INDEX_BYTES')}.")
        path = files.own_file(count.fetch(index), folder)
        shards = shards_of(read_index(path), path)
        if missing := [shard for shard in shards if shard not in sizes]:
            raise Refused(
                f"{name}: {index} names files that the repository does not hold: "
                f"{listed(missing)}. Look at {hub_access.page(MODEL, name)}."
            )
        return shards
    raise Refused(_no_model(name, sizes))


def _no_model(name: str, names: Collection[str]) -> str:
    """Say what a repository without config.json or weights holds instead."""
    place = f"'{name}' on the Hugging Face Hub"
    if gguf := sorted(file for file in names if file.endswith(".gguf")):
        return (
            f"{place} holds GGUF files ({listed(gguf, 3)}). Fetch one, and give its path: "
            f"{hub_access.command(MODEL, name)} {gguf[0]} --local-dir=DIR, then gguf:DIR/FILE."
        )
    if "adapter_config.json" in names:
        return (
            f"{place} holds an adapter (LoRA), which is no model by itself. Fetch it "
            f"({hub_access.command(MODEL, name)} --local-dir=DIR), merge it into its base (python "
            "-m launch.convert --source=hf:BASE --adapter=DIR --target=hf:DIR2), and give DIR2."
        )
    return (
        f"{place} holds no model of transformers: {CONFIG}, or weights as safetensors or torch "
        f"files, are not at its root. Look at {hub_access.page(MODEL, name)}."
    )


def needed(folder: pathlib.Path) -> list[str]:
    """Return the names of the files of a snapshot that go with a model, whatever else other
    programs fetched into it."""
    names = [file for file in COMPANIONS if (folder / file).is_file()]
    names += [f"{TEMPLATES}/{path.name}" for path in sorted((folder / TEMPLATES).glob("*.jinja"))]
    for single, index in layouts():
        if (folder / single).is_file():
            return [*names, single]
        if (folder / index).is_file():
            return [*names, index, *shards_of(read_index(folder / index), folder / index)]
    return names
