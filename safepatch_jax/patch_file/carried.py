"""What a patch file knows and other formats of sparse weight updates do not: its manifest, carried
along as a JSON text beside what they hold, which their readers pass over; no JAX."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from safepatch_jax.patch_file.create import Change, write_patch
from safepatch_jax.patch_file.file import BITS, KEY, KINDS, PatchFile
from safepatch_jax.runtime.console import some

_REVERSE = "reverse"


def manifest_text(patch: PatchFile, reverse: bool) -> str:
    """Return what is carried: kind, about, versions, and the hashes of every tensor; of the way
    back, if `reverse`."""
    tensors = {}
    for name, tensor in patch.tensors.items():
        hashes = [tensor.before, tensor.after]
        tensors[name] = [*(hashes[::-1] if reverse else hashes), tensor.optional]
    about = {_REVERSE: patch.about} if reverse else patch.about
    manifest = {"kind": patch.kind, "about": about, "versions": patch.versions}
    return json.dumps(manifest | {"tensors": tensors})


def read_manifest(metadata: Mapping[str, Any], source: str | pathlib.Path) -> dict[str, Any] | None:
    """Return what was carried along, None if nothing was.

    Raises:
      ValueError: it is damaged.
    """
    text = metadata.get(KEY)
    if text is None:
        return None
    try:
        manifest = json.loads(text)
        for before, after, optional in manifest["tensors"].values():
            if not (isinstance(before, str) and isinstance(after, str)):
                raise TypeError("a hash is no text")
            if type(optional) is not bool:
                raise TypeError("optional is neither true nor false")
        if manifest["kind"] not in KINDS:
            raise TypeError("unknown kind")
        if not all(isinstance(manifest[key], dict) for key in ("about", "versions")):
            raise TypeError("no about or no versions")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"What {source} says of its patch file cannot be read ({error}): it is damaged. Copy "
            "it again."
        ) from error
    return manifest


def write_back(
    out: str | pathlib.Path,
    changes: Mapping[str, Change],
    manifest: Mapping[str, Any] | None,
    origin: Mapping[str, Any],
    model: str | pathlib.Path,
) -> PatchFile:
    """Write a patch file of what was read from another format; where a manifest was carried along,
    the file is that of the manifest.

    Raises:
      ValueError: tensors in a dtype that patch files do not have, or the hashes are not those of
        the manifest; no file is left.
    """
    _refuse_other_dtypes(changes, model)
    if manifest is None:
        return write_patch(out, "difference", {"converted": dict(origin)}, changes)
    kind, about, versions = manifest["kind"], manifest["about"], manifest["versions"]
    patch = write_patch(out, kind, about, changes, versions)
    wrong = []
    for name in sorted(patch.tensors.keys() | manifest["tensors"].keys()):
        tensor = patch.tensors.get(name)
        hashes = manifest["tensors"].get(name, (None, None))[:2]
        if name in manifest["tensors"] and tensor is None and manifest["tensors"][name][2]:
            continue  # a folder may lack it
        if tensor is None or [tensor.before, tensor.after] != list(hashes):
            wrong.append(name)
    if wrong:
        pathlib.Path(out).unlink()
        raise ValueError(
            f"{model} is not the model that {origin['file']} was made for, or one of them was "
            f"damaged: the hashes of {len(wrong)} tensors differ: {some(wrong, ', ')}. Nothing was "
            "written. Give the backbone of the patch."
        )
    return patch


def _refuse_other_dtypes(changes: Mapping[str, Change], model: str | pathlib.Path) -> None:
    others = [f"{name} is {x.dtype}" for name, x in changes.items() if x.dtype not in BITS]
    if others:
        raise ValueError(
            f"A patch file has {', '.join(BITS)}, and {len(others)} tensors of {model} are in "
            f"other dtypes: {some(others, ', ')}. Nothing was written. Give the model in one of "
            "these dtypes, not quantised, and without buffers of integers or truth values."
        )
