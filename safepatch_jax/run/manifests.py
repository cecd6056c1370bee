"""The manifest of a stage: what its folder holds, and so what of a folder is ours.

Nothing in a stage's folder is deleted that its manifest does not name, and no link is followed
there.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from safepatch_jax.runtime import files, unfinished
from safepatch_jax.runtime.records import HASH, Each, misfits

MANIFEST = "manifest.json"
# What a stage of derivation or scoring holds; the name says how a derived model is kept.
WEIGHTS, DIFFERENCES, SCORES = "params", "differences", "sensitivity"
KEPT = "kept"  # what a notebook keeps of a patch: its manifest has the settings of the merge
ABSENT, FOREIGN, DAMAGED, SOUND = "absent", "foreign", "damaged", "sound"
# What a run puts beside the outputs of a stage once it is done: the card and certificate of a model
# that is published, and what patching it in place leaves there.
_ADDED = ("README.md", "certificate.json", unfinished.MARK)
_PATCHING = ".patching"
_FIELDS = {
    "stage": str,
    "key": HASH,
    "result": dict,
    "outputs": Each({"bytes": int, "sha256": HASH}),
    "deleted": bool,
}


def write(folder: pathlib.Path, manifest: Mapping[str, Any]) -> None:
    """Write a manifest with a hash of its own content, by which a damaged one is known."""
    content = json.loads(json.dumps({**manifest, "id": ""}))  # as it will be read
    del content["id"]
    files.write_json(folder / MANIFEST, content | {"id": files.text_hash(content)})


def read(folder: pathlib.Path) -> tuple[str, dict[str, Any]]:
    """Return the state of a folder's manifest, and its content where that is sound.

    Returns:
      ABSENT, FOREIGN (no stage has written it), DAMAGED or SOUND; and the manifest or {}.
    """
    path = folder / MANIFEST
    if not os.path.lexists(path):
        return ABSENT, {}
    if path.is_symlink() or not path.is_file():
        return FOREIGN, {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return DAMAGED, {}
    if not isinstance(manifest, dict):
        return FOREIGN, {}
    content = {name: value for name, value in manifest.items() if name != "id"}
    sound = not list(misfits(manifest, _FIELDS)) and all(map(_is_inside, manifest["outputs"]))
    if sound and manifest.get("id", files.text_hash(content)) == files.text_hash(content):
        return SOUND, manifest
    # One that tells a stage and its key, if in damaged words, is ours.
    return (DAMAGED if {"stage", "key"} <= manifest.keys() else FOREIGN), {}


def _is_inside(name: str) -> bool:
    path = pathlib.PurePosixPath(name)
    return name not in ("", ".") and not path.is_absolute() and ".." not in path.parts


def strangers(folder: pathlib.Path) -> list[str]:
    """Return the names of files in a stage's folder that its manifest does not name; of a damaged
    manifest, whose folder is known by it, none."""
    state, manifest = read(folder)
    if state == DAMAGED:
        return []
    named = manifest.get("outputs", {}).keys() | ({MANIFEST} if manifest else set())
    found = []
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        beside = path.name in _ADDED or path.name.endswith(_PATCHING)
        ours = name in named or files.half_written(path.name) or (manifest and beside)
        if not ours:
            found.append(name)
    return sorted(found)


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return all in a folder that is no folder; links are not followed."""
    found = []
    for root, folders, names in os.walk(folder):
        found += [pathlib.Path(root, name) for name in names]
        found += [path for name in folders if (path := pathlib.Path(root, name)).is_symlink()]
    return found


def delete_outputs(folder: pathlib.Path, manifest: Mapping[str, Any]) -> None:
    """Delete the files of a stage that its manifest names, and folders that are then empty. Raises
    ValueError if a link leads out of the stage's folder."""
    for name in manifest["outputs"]:
        path = folder / name
        files.refuse_link(path.parent, folder)
        path.unlink(missing_ok=True)
    _delete_empty(folder, keep=[folder])


def delete_stage(folder: pathlib.Path) -> list[str]:
    """Delete the folder of a stage that no run needs; return the names of what is left, as it is
    not ours."""
    state, manifest = read(folder)
    if folder.is_symlink() or state not in (SOUND, DAMAGED):
        return [folder.name]
    if state == DAMAGED:
        files.delete(folder)
        return []
    left = [f"{folder.name}/{name}" for name in strangers(folder)]
    delete_outputs(folder, manifest)
    for path in _files(folder):
        if f"{folder.name}/{path.relative_to(folder).as_posix()}" not in left:
            path.unlink()
    _delete_empty(folder)
    return left


def _delete_empty(folder: pathlib.Path, keep: Collection[pathlib.Path] = ()) -> None:
    for root, *_ in os.walk(folder, topdown=False):
        path = pathlib.Path(root)
        if path not in keep and not any(path.iterdir()):
            path.rmdir()


def changed_output(folder: pathlib.Path, manifest: Mapping[str, Any]) -> str:
    """Return the name of an output that is missing or has another size than the manifest says; ''
    for none."""
    for name, entry in manifest["outputs"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            return name
    return ""


def look(folder: pathlib.Path, manifest: Mapping[str, Any]) -> list[int]:
    """Return when each output was last changed, in nanoseconds, after the same of the manifest."""
    times = []
    for name in (MANIFEST, *manifest["outputs"]):
        status = (folder / name).stat()
        times.append(max(status.st_mtime_ns, status.st_ctime_ns))
    return times


def other_output(folder: pathlib.Path, manifest: Mapping[str, Any]) -> str:
    """Return the name of an output that has other bytes than the manifest says, by SHA-256; ''
    for none."""
    for name, entry in manifest["outputs"].items():
        if files.file_sha256(folder / name) != entry["sha256"]:
            return name
    return ""
