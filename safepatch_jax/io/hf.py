"""Model folders in Hugging Face format: safetensors in, safetensors out, no torch."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from safepatch_jax import files
from safepatch_jax.mesh import Sharder
from safepatch_jax.models.config import DecoderConfig, read_hf_config
from safepatch_jax.models.table import Param, ParamTable, nest, param_table, unnest

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_COMPANIONS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
               "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
               "chat_template.jinja", "chat_template.json", "LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md")
_FLOATS = {"F32": jnp.float32, "BF16": jnp.bfloat16, "F16": jnp.float16}


class Checkpoint:
    """The weight files of a model folder, opened for reading part by part.

    Raises:
      ValueError: no weights, an index that names an absent or unsafe file, or a truncated or damaged file.
    """

    def __init__(self, folder: str | pathlib.Path):
        self.folder = pathlib.Path(folder)
        self._files: dict[str, Any] = {}
        index = self.folder / INDEX
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                if not isinstance(weight_map, dict):
                    raise ValueError("weight_map is no object")
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{index} is not a weight index ({error!r}); copy the file again.") from error
            self.weight_map = {name: files.plain_name(f, str(index)) for name, f in weight_map.items()}
            missing = sorted({f for f in self.weight_map.values() if not (self.folder / f).is_file()})
            if missing:
                raise ValueError(f"{index} names weight files that are not there: {', '.join(missing)}. "
                                 f"Copy them into {self.folder}.")
        elif (self.folder / SINGLE).is_file():
            self.weight_map = {name: SINGLE for name in self._open(SINGLE).keys()}
        else:
            found = sorted(p.name for p in self.folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
            hint = f" Found {', '.join(found)}: convert to safetensors first." if found else ""
            raise ValueError(f"'{self.folder}' holds no weights: neither {SINGLE} nor {INDEX} is there.{hint}")
        absent = sorted(name for name, f in self.weight_map.items() if name not in self._open(f).keys())
        if absent:
            raise ValueError(f"{index} places tensors in files that do not hold them: {_few(absent)}.")

    def _open(self, name: str):
        if name not in self._files:
            path = self.folder / name
            try:
                self._files[name] = safe_open(path, framework="np")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} cannot be read as safetensors ({error}). It is truncated or damaged "
                                 f"({path.stat().st_size} bytes): copy or download it again.") from error
        return self._files[name]

    def slice_of(self, name: str):
        """Return a lazily read tensor with `get_shape`, `get_dtype` and indexing."""
        return self._open(self.weight_map[name]).get_slice(name)


def check_keys(checkpoint: Checkpoint, table: ParamTable, config: DecoderConfig) -> None:
    """Check names, shapes and dtypes against the table; collect every mismatch and raise ValueError once."""
    wanted = table.hf_names()
    have = set(checkpoint.weight_map)
    problems = []
    if missing := sorted(set(wanted) - have):
        problems.append(f"{len(missing)} missing: {_few(missing)}")
    unexpected = have - set(wanted)
    if config.tied_head:
        unexpected.discard("lm_head.weight")  # some exporters write the tied head again
    unexpected = sorted(n for n in unexpected if not n.endswith("rotary_emb.inv_freq"))
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected: {_few(unexpected)}")
    for name in sorted(set(wanted) & have):
        piece = checkpoint.slice_of(name)
        if tuple(piece.get_shape()) != wanted[name][0].hf_shape:
            problems.append(f"{name} has shape {tuple(piece.get_shape())}, config.json says {wanted[name][0].hf_shape}")
        if piece.get_dtype() not in _FLOATS:
            problems.append(f"{name} has dtype {piece.get_dtype()}, supported are {', '.join(_FLOATS)}")
    if problems:
        raise ValueError(f"{checkpoint.folder}: the weights do not fit config.json: " + "; ".join(problems) + ".")


def load_params(folder: str | pathlib.Path, sharder: Sharder) -> tuple[DecoderConfig, dict[str, Any]]:
    """Read a model folder into sharded arrays, each device's part alone, in the stored dtype.

    Args:
      folder: a folder with config.json and safetensors.
      sharder: the mesh.

    Returns:
      (architecture, nested parameter dictionary).

    Raises:
      ValueError: see `read_hf_config`, `Checkpoint`, `check_keys`; also if the layers of one parameter are stored
        in different dtypes.
    """
    config = read_hf_config(folder)
    table = param_table(config)
    checkpoint = Checkpoint(folder)
    check_keys(checkpoint, table, config)
    flat = {}
    for row in table:
        dtypes = {checkpoint.slice_of(name).get_dtype() for name in row.hf_names}
        if len(dtypes) > 1:
            raise ValueError(f"{folder}: the layers of {row.hf_name} are stored as {', '.join(sorted(dtypes))}; "
                             "a stacked parameter needs one dtype. Convert the folder to one dtype first.")
        dtype = _FLOATS[dtypes.pop()]
        sharding = sharder.sharding(row.axes, row.shape, row.path)
        flat[row.path] = jax.make_array_from_callback(
            row.shape, sharding, lambda index, row=row, dtype=dtype: _read_part(checkpoint, row, index, dtype))
    return config, nest(flat)


def _read_part(checkpoint: Checkpoint, row: Param, index: tuple[slice, ...], dtype) -> np.ndarray:
    """Read one device's part of a parameter, tensor by tensor."""
    layers = range(*index[0].indices(row.shape[0])) if row.stacked else [0]
    inner = index[1:] if row.stacked else index
    parts = []
    for layer in layers:
        tensor = checkpoint.slice_of(row.hf_names[layer])
        lead = inner[0] if row.out_axes == 1 else slice(None)  # a contiguous range of rows can be read by itself
        if lead == slice(None) or lead.start in (None, 0) and lead.stop in (None, row.layer_shape[0]):
            parts.append(row.from_hf(tensor[:])[inner])
        else:
            rows = tensor[lead.start:lead.stop].reshape((-1, *row.layer_shape[1:]))
            parts.append(rows[(slice(None), *inner[1:])])
    return (np.stack(parts) if row.stacked else parts[0]).astype(dtype, copy=False)


def save_model(folder: str | pathlib.Path, params: Mapping[str, Any], config: DecoderConfig, source: str | pathlib.Path,
               *, dtype: str = "keep", shard_bytes: int = 5_000_000_000, replace: bool = False) -> None:
    """Write a model folder that `transformers` loads as it is; the folder appears whole or not at all.

    Args:
      folder: where to write; must not exist or be empty, unless `replace` is set.
      params: nested parameter dictionary.
      config: architecture of `params`.
      source: the folder whose config, tokenizer, template and generation config are carried over.
      dtype: 'keep', or the name of a float dtype to which every tensor is cast.
      shard_bytes: weight files are cut at this size; one file is held in host memory at a time.
    """
    table = param_table(config)
    flat = unnest(params)
    target = {path: np.dtype(x.dtype) if dtype == "keep" else np.dtype(jnp.dtype(dtype)) for path, x in flat.items()}
    pieces = [(name, row, layer) for row in table for layer, name in enumerate(row.hf_names)]
    sizes = [int(np.prod(row.hf_shape)) * target[row.path].itemsize for _, row, _ in pieces]
    shards: list[list[int]] = [[]]
    room = shard_bytes
    for i, size in enumerate(sizes):
        if shards[-1] and size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(i)
        room -= size
    with files.new_folder(folder, replace=replace) as out:
        copy_companions(source, out, dtype)
        weight_map = {}
        for number, members in enumerate(shards, 1):
            file_name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors = {}
            for i in members:
                name, row, layer = pieces[i]
                part = flat[row.path][layer] if row.stacked else flat[row.path]
                tensors[name] = np.ascontiguousarray(row.to_hf(np.asarray(part)).astype(target[row.path], copy=False))
                weight_map[name] = file_name
            save_tensors(tensors, out / file_name)
        if len(shards) > 1:
            files.write_json(out / INDEX, {
                "metadata": {"total_size": sum(sizes), "total_parameters": table.size}, "weight_map": weight_map})


def save_tensors(tensors: dict[str, np.ndarray], path: pathlib.Path) -> None:
    """Write one safetensors file. Raises OSError, with what to do, if the disk is full or not writable."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(0o666 & ~files.umask())  # safetensors makes files that only their owner can read
    except SafetensorError as error:
        need = sum(x.nbytes for x in tensors.values())
        raise OSError(f"Cannot write {path}: {error}. It needs {need:,} bytes; free space or use another "
                      "folder, then give the same command again.") from error


def copy_companions(source: str | pathlib.Path, out: pathlib.Path, dtype: str = "keep") -> None:
    """Copy config, tokenizer, template and licence by name, never code; with a new dtype, say so in config.json."""
    for name in _COMPANIONS:
        if (path := pathlib.Path(source) / name).is_file():
            shutil.copyfile(path, out / name)
    if dtype != "keep":
        raw = json.loads((out / "config.json").read_text(encoding="utf-8"))
        for key in {"dtype", "torch_dtype"} & set(raw) or {"torch_dtype"}:
            raw[key] = dtype
        files.write_json(out / "config.json", raw)


def _few(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
