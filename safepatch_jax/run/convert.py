"""Conversions between Hugging Face folders, GGUF files and orbax checkpoints, each with a
certificate."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from safepatch_jax.io import gguf, hub
from safepatch_jax.io.adapter import FILES, has_tokenizer, merge_adapter
from safepatch_jax.io.checkpoint import (
    COMPANIONS_FOLDER,
    array_hashes,
    check_companions,
    load_checkpoint,
    read_description,
    save_checkpoint,
)
from safepatch_jax.io.folder import Checkpoint, has_weights, stored_dtypes, tensor_hashes
from safepatch_jax.io.hf import check_keys, load_params, save_model
from safepatch_jax.io.safetensors_file import SHARD_BYTES
from safepatch_jax.mesh import Sharder, make_mesh
from safepatch_jax.models.config import read_hf_config
from safepatch_jax.models.describe import describe
from safepatch_jax.models.strays import other_kind
from safepatch_jax.models.table import param_table
from safepatch_jax.run import certificate
from safepatch_jax.run.place import Place, source_facts
from safepatch_jax.run.published import CERTIFICATE
from safepatch_jax.runtime import addresses, files, paths, processes
from safepatch_jax.runtime.console import say, some
from safepatch_jax.runtime.text import printable


def convert(
    source: str,
    target: str,
    *,
    mesh: str = "data:1,fsdp:-1,tensor:1",
    dtype: str = "keep",
    rounding: str = "nearest",
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    tokenizer: str | None = None,
    adapter: str | None = None,
    certify: str = "logits",
) -> pathlib.Path:
    """Convert a model; the target folder appears whole, with its certificate, or not at all.

    Args:
      source, target: see `Place.parse`.
      mesh: onto which devices the arrays are laid.
      dtype, rounding, seed, shard_bytes: see `save_model`; a target hf:DIR alone has them.
      tokenizer: folder whose tokenizer goes with a GGUF file.
      adapter: folder of a LoRA adapter that is merged into a source hf:DIR.
      certify: 'logits' or 'hashes', see `certificate.certify`.

    Returns:
      path of the certificate.

    Raises:
      ValueError: bad source, target, weights or mesh, or processes that differ in them; see
        `load_params`, `load_checkpoint` and `convert_gguf`.
    """
    goal = Place.local(target)
    if goal.kind == "orbax" and addresses.address_of(goal.path):
        raise ValueError(
            f"{target}: a checkpoint is written to a local folder; copy that to the bucket, or use "
            "hf:."
        )
    processes.on_first(files.refuse_full_folder, goal.path)  # before a model is fetched
    origin = Place.parse(source)
    tokenizer = paths.readable(tokenizer) if tokenizer else None
    _refuse_contradictions(origin, goal, dtype, rounding, tokenizer)
    if adapter and origin.kind != "hf":
        raise ValueError("an adapter is merged into a source hf:DIR; convert the source first.")
    export = {"dtype": dtype, "rounding": rounding, "seed": seed, "shard_bytes": shard_bytes}
    processes.agree(
        {
            "source": [origin.kind, origin.origin or str(origin.path.absolute())],
            "target": [goal.kind, str(goal.path.absolute())],
            "mesh": mesh,
            "tokenizer": tokenizer,
            "adapter": adapter,
            "certify": certify,
        }
        | export
        | source_facts(origin),
        "Start every process with the same command, and give every host the same files.",
    )
    processes.agree_on_devices()
    sharder, logits = Sharder(make_mesh(mesh)), certify == "logits"
    with processes.new_folder(goal.path) as scratch:
        out = scratch / "model"
        if origin.kind == "gguf":
            straight = goal.kind == "hf" and dtype == "keep"
            folder = out if straight else scratch / "source"
            say(f"Dequantising {origin.path}")
            options = {"tokenizer": tokenizer, "shard_bytes": shard_bytes}
            processes.on_first(gguf.convert_gguf, origin.path, folder, **options)
            origin = Place("hf", folder)
        base, merged = origin, {}
        if adapter:
            folder, lora = scratch / "merged", paths.readable(adapter)
            merged = processes.on_first(_merged, origin.path, lora, folder, shard_bytes)
            origin = Place("hf", folder, origin.origin)
        if goal.kind == "orbax":
            result = _to_orbax(origin.path, out, sharder, logits)
        elif origin.path == out:
            result = certificate.certify(out, sharder, logits=logits, kind="import")
        else:
            result = _to_hf(origin, base, out, sharder, logits, export)
        if origin.origin:
            result["source"] = origin.origin
        if merged:
            result["adapter"] = merged
        # Another process may still read the tokenizer in `out`, which is moved below.
        processes.barrier(f"{addresses.name_of(goal.path)} is examined")
        processes.on_first(files.write_json, out / CERTIFICATE, result)
        processes.on_first(files.keep_only, scratch, out)
    say(certificate.summary(result))
    return goal.path / CERTIFICATE


def _merged(
    base: pathlib.Path, adapter: str, out: pathlib.Path, shard_bytes: int
) -> dict[str, str]:
    """Merge an adapter into a model; return its files' SHA-256 by name."""
    out.mkdir()
    count = merge_adapter(base, adapter, out, shard_bytes)
    say(f"Merged {adapter} into {count} tensors of {base}")
    if has_tokenizer(adapter):
        say("Tokenizer and chat template: the adapter's, in place of the base's")
    paths_of = [pathlib.Path(adapter) / name for name in FILES]
    return {path.name: files.file_sha256(path) for path in paths_of if path.is_file()}


def _refuse_contradictions(
    origin: Place,
    goal: Place,
    dtype: str,
    rounding: str,
    tokenizer: str | None,
) -> None:
    if goal.kind == "gguf":
        raise ValueError(f"target '{goal.path}': only hf:DIR and orbax:DIR can be written.")
    if tokenizer and origin.kind != "gguf":
        raise ValueError(
            "a tokenizer folder goes with GGUF sources; hf and orbax models carry their own."
        )
    if goal.kind == "orbax" and dtype != "keep":
        raise ValueError("dtype is for a target hf:DIR; an orbax checkpoint keeps the stored one.")
    if rounding != "nearest" and dtype == "keep":
        raise ValueError("rounding says how a cast rounds, and there is none; give a dtype too.")
    if origin.kind == goal.kind == "orbax":
        raise ValueError(
            "source and target are both orbax: a checkpoint restores onto any mesh, so copying "
            "the folder is enough."
        )


def _to_orbax(
    folder: pathlib.Path, out: pathlib.Path, sharder: Sharder, logits: bool
) -> dict[str, Any]:
    """Write a checkpoint and read it back: what it gives must have the hashes of the
    certificate."""
    result = certificate.certify(folder, sharder, logits=logits, kind="import")
    say(f"Writing the checkpoint of {folder}")
    save_checkpoint(out, load_params(folder, sharder)[1], folder, stored_dtypes(folder))
    hashes = array_hashes(*load_checkpoint(out, sharder))
    tensors = result["tensors"]
    wrong = [name for name, digest in hashes.items() if digest != tensors[name]["sha256"]]
    if wrong:
        raise ValueError(
            f"The checkpoint does not give back what was written ({some(wrong)}). Is the disk "
            "sound? Nothing is kept."
        )
    return result


def _to_hf(
    origin: Place,
    base: Place,
    out: pathlib.Path,
    sharder: Sharder,
    logits: bool,
    export: Mapping[str, Any],
) -> dict[str, Any]:
    """Write a folder and its certificate, which says what differs from `base`: `origin`, or what an
    adapter was merged into."""
    say(f"Reading {origin.path}")
    if origin.kind == "orbax":
        config, params, stored = load_checkpoint(origin.path, sharder)
        companions = origin.path / COMPANIONS_FOLDER
        before, notes = certificate.recorded_hashes(origin.path), ()
    else:
        config, params = load_params(origin.path, sharder)
        companions, stored = origin.path, stored_dtypes(origin.path)
        checkpoint = Checkpoint(base.path)
        before, notes = processes.on_first(tensor_hashes, checkpoint.tensors), checkpoint.notes
    save_model(out, params, config, companions, stored=stored, **export)
    del params
    return certificate.certify(
        out, sharder, logits=logits, kind="export", before=before, notes=notes
    )


def inspect_model(model: str, scope: str) -> list[str]:
    """Return the lines that describe a model folder or checkpoint, see `describe`. Raises
    ValueError for a GGUF file."""
    if parts := hub.named(model.removeprefix("hf:")):
        found = hub.snapshot(*parts, weights=False)
        return describe(read_hf_config(found.folder), scope, None)
    place = Place.local(model)
    if place.kind == "gguf":
        raise ValueError(
            f"{place.path}: convert the file first: python -m launch.convert "
            f"--source=gguf:{place.path} --target=hf:DIR."
        )
    if place.kind == "orbax":
        check_companions(place.path)
        config = read_hf_config(place.path / COMPANIONS_FOLDER)
        return describe(config, scope, read_description(place.path))
    config = read_hf_config(place.path)
    if not has_weights(place.path):
        lines = describe(config, scope, None)
        if kind := other_kind(place.path):
            lines.append(f"WARNING: {kind}")
        return lines
    checkpoint = Checkpoint(place.path)
    lines = describe(config, scope, {name: x.dtype for name, x in checkpoint.tensors.items()})
    lines += [printable(f"note: {note}") for note in checkpoint.notes]
    try:
        check_keys(checkpoint, param_table(config), config)
    except ValueError as error:
        lines.append(f"WARNING: {error}")
    return lines
