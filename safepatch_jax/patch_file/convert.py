"""Patch files to and from the formats in which others exchange sparse weight updates; no JAX."""

from __future__ import annotations

import pathlib

from safepatch_jax.patch_file import delta_folder, sparse_file
from safepatch_jax.patch_file.entries import opened
from safepatch_jax.patch_file.file import PatchFile

FORMATS = {module.FORMAT: module for module in (delta_folder, sparse_file)}


def write_format(
    patch: PatchFile | str | pathlib.Path,
    to: str,
    model: str | pathlib.Path,
    out: str | pathlib.Path,
    reverse: bool = False,
) -> str:
    """Write a patch in another format.

    Args:
      patch: the patch file.
      to: one of FORMATS.
      model: the folder of the backbone or of the patched model, which has what a patch file lacks.
      out: a new folder (disk-delta) or file (sparse-safetensors).
      reverse: write the way back, from the patched model to the backbone.

    Returns:
      what was written, in words.

    Raises:
      ValueError: an unknown format, another model, or `out` exists.
    """
    patch, out = opened(patch), pathlib.Path(out)
    _format(to).write(patch, model, out, reverse)
    size = sum(path.stat().st_size for path in (out.iterdir() if out.is_dir() else [out]))
    way = ", the way back" if reverse else ""
    return f"{out}: {to}{way}, {patch.entries():,} entries, {size:,} bytes"


def read_format(
    source: str | pathlib.Path,
    format: str,
    model: str | pathlib.Path,
    out: str | pathlib.Path,
) -> PatchFile:
    """Write the patch file of an update in another format.

    Args:
      source: the update.
      format: one of FORMATS.
      model: the folder of the model that the update is for, before it.
      out: the patch file; must not exist.

    Returns:
      the patch file, opened and checked.

    Raises:
      ValueError: an unknown format, a damaged update, another model, or `out` exists.
    """
    return _format(format).read(source, model, out)


def _format(name: str):
    if name not in FORMATS:
        raise ValueError(f"Unknown format '{name}'. There are {', '.join(FORMATS)}.")
    return FORMATS[name]
