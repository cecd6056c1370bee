"""Model folders in Hugging Face format: weights from files into sharded arrays, and back."""

from __future__ import annotations

import functools
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from safepatch_jax.io.beside import say_notes
from safepatch_jax.io.companions import COMPANIONS, copy_companions, write_config
from safepatch_jax.io.folder import Checkpoint
from safepatch_jax.io.names import dtype_problems, listed, refuse_unusable
from safepatch_jax.io.safetensors_file import SHARD_BYTES, Planned, write_shards
from safepatch_jax.io.stored import DTYPES, Stored, aligned_empty
from safepatch_jax.io.torch_file import TorchTensor
from safepatch_jax.mesh import Sharder
from safepatch_jax.models.config import DecoderConfig, read_hf_config
from safepatch_jax.models.table import Param, ParamTable, nest, param_table, unnest
from safepatch_jax.numerics import cast, random_bits, tensor_keys
from safepatch_jax.runtime import processes
from safepatch_jax.runtime.console import some
from safepatch_jax.runtime.reading import Refused
from safepatch_jax.runtime.workers import Workers

_READERS = 4  # threads; reading is copying from the page cache or waiting for a disk
_HEAD = "lm_head.weight"


def check_keys(checkpoint: Checkpoint, table: ParamTable, config: DecoderConfig) -> dict[str, Any]:
    """Check names, shapes and dtypes against the table.

    Returns:
      an account: layout, number of tensors, of those matched, and those left out with the reason.

    Raises:
      ValueError: tensors that are empty or quantised; any mismatch, all of which are collected and
        raised once.
    """
    rows, tensors = table.hf_names(), checkpoint.tensors
    refuse_unusable(tensors, checkpoint.folder)
    problems = []
    missing = sorted(rows.keys() - tensors.keys())
    if missing:
        problems.append(f"{len(missing)} missing: {listed(missing)}")
    if missing == [_HEAD]:
        problems[-1] += (
            " (if the head is the embedding, set tie_word_embeddings to true in config.json; if "
            "AutoModel saved the model, which leaves the head out, save it with "
            "AutoModelForCausalLM)"
        )
    left_out = _left_out(tensors, config, problems)
    unexpected = sorted(tensors.keys() - rows.keys() - left_out.keys())
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected: {listed(unexpected)}")
    known = {name: tensors[name] for name in sorted(rows.keys() & tensors.keys())}
    shapes = []
    for name, x in known.items():
        shape = rows[name][0].hf_shape
        if x.shape != shape:
            shapes.append(f"{name} has shape {x.shape!s:.60}, config.json says {shape}")
    if shapes:
        problems.append(some(shapes, "; ", 3))
    problems += dtype_problems(known)
    if problems:
        raise Refused(f"{checkpoint.folder}: the weights do not fit config.json: {some(problems)}.")
    return {
        "layout": checkpoint.layout,
        "tensors": len(tensors),
        "matched": len(rows),
        "left_out": left_out,
    }


def _left_out(
    tensors: Mapping[str, Stored | TorchTensor], config: DecoderConfig, problems: list[str]
) -> dict[str, str]:
    """Return why each tensor that the table need not have is left out, by name."""
    reasons = {}
    for name in tensors:
        if name.endswith("rotary_emb.inv_freq"):
            reasons[name] = "rotary frequencies, computed from config.json"
    if config.tied_head and _HEAD in tensors:  # some exporters write the tied head again
        head, embedding = tensors[_HEAD], tensors.get("model.embed_tokens.weight")
        if embedding is None or (head.size, head.sha256()) != (embedding.size, embedding.sha256()):
            problems.append(
                f"{_HEAD} differs from the embedding, though config.json ties the two (set "
                "tie_word_embeddings to false if the head is its own)"
            )
        reasons[_HEAD] = "equal to the embedding, to which config.json ties it"
    return reasons


def load_params(
    folder: str | pathlib.Path, sharder: Sharder
) -> tuple[DecoderConfig, dict[str, Any]]:
    """Read a model folder into sharded arrays, each device's part alone, in the stored dtype.

    A parameter whose layers are stored in different dtypes becomes float32; `save_model` stores
    each layer as it was.

    Args:
      folder: a folder with config.json and safetensors or torch weights.
      sharder: the mesh.

    Returns:
      (architecture, nested parameter dictionary).

    Raises:
      ValueError: see `read_hf_config`, `Checkpoint`, `check_keys`.
    """
    stored = StoredModel(folder, sharder)
    with Workers(_READERS) as pool:
        params = {row.path: stored.read(row, pool) for row in param_table(stored.config)}
    return stored.config, nest(params)


class StoredModel(Mapping[str, jax.Array]):
    """The parameters of a model folder by path; each is read when it is looked up, and not kept.

    Args, raises: see `load_params`.

    Attributes:
      config: its architecture.
    """

    def __init__(self, folder: str | pathlib.Path, sharder: Sharder):
        self.config = read_hf_config(folder)
        self._table, self._sharder = param_table(self.config), sharder
        self._checkpoint = Checkpoint(folder)
        check_keys(self._checkpoint, self._table, self.config)
        say_notes(self._checkpoint.folder, self._checkpoint.notes)

    def read(self, row: Param, pool: Workers) -> jax.Array:
        """Read one parameter with the workers of a pool."""
        return _read_row(self._checkpoint, row, self._sharder, pool)

    def __getitem__(self, path: str) -> jax.Array:
        with Workers(_READERS) as pool:
            return self.read(self._table[path], pool)

    def __iter__(self) -> Iterator[str]:
        return iter(self._table.by_path)

    def __len__(self) -> int:
        return len(self._table.by_path)


def _read_row(checkpoint: Checkpoint, row: Param, sharder: Sharder, pool: Workers) -> jax.Array:
    tensors = [checkpoint.tensors[name] for name in row.hf_names]
    names = {x.dtype for x in tensors}
    dtype = DTYPES[names.pop() if len(names) == 1 else "float32"]

    @functools.cache  # devices that hold the same part share one reading
    def read(bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        part = aligned_empty(tuple(stop - start for start, stop in bounds), dtype)
        if not row.stacked:
            _read_layer(tensors[0], row.layer_shape, bounds, part)
            return part
        layers = [tensors[layer] for layer in range(*bounds[0])]
        done = pool.map(
            lambda layer, out: _read_layer(layer, row.layer_shape, bounds[1:], out), layers, part
        )
        list(done)  # waits, and raises what a thread raised
        return part

    def callback(index: tuple[slice, ...]) -> np.ndarray:
        return read(tuple(s.indices(size)[:2] for s, size in zip(index, row.shape)))

    return jax.make_array_from_callback(
        row.shape, sharder.sharding(row.axes, row.shape, row.path), callback
    )


def _read_layer(
    tensor: Stored | TorchTensor,
    shape: tuple[int, ...],
    bounds: tuple[tuple[int, int], ...],
    out: np.ndarray,
) -> None:
    """Read a part of one HF tensor, viewed under `shape`, into `out`."""
    is_run = all(b == (0, size) for b, size in zip(bounds[1:], shape[1:]))
    if not is_run:
        out[...] = tensor.read_box(tuple(slice(*b) for b in bounds), shape)
        return
    start = bounds[0][0] * math.prod(shape[1:])
    if out.dtype == DTYPES[tensor.dtype]:
        tensor.read(out, start)
    else:
        out[...] = tensor.read(aligned_empty(out.shape, DTYPES[tensor.dtype]), start)


def save_model(
    folder: str | pathlib.Path,
    params: Mapping[str, Any],
    config: DecoderConfig,
    source: str | pathlib.Path,
    *,
    stored: Mapping[str, str] | None = None,
    dtype: str = "keep",
    rounding: str = "nearest",
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    replace: bool = False,
) -> dict[str, str]:
    """Write a model folder that `transformers` loads as it is; the folder appears whole or not at
    all.

    Of several processes the first one writes; all send it their parts, tensor by tensor.

    Args:
      folder: where to write; must not exist or be empty, unless `replace` is set.
      params: nested parameter dictionary.
      config: architecture of `params`.
      source: the folder whose config, tokenizer, template and generation config are copied.
      stored: by HF name, the dtype that 'keep' means, see `stored_dtypes`; by default that of the
        array.
      dtype: 'keep', or the name of a float dtype to which every tensor is cast.
      rounding: of a cast, 'nearest' or 'stochastic' with bits from `seed`, the tensor's name and
        the position.
      shard_bytes: weight files are cut at this size; a tensor or two are held in host memory at a
        time.

    Returns:
      SHA-256 of each tensor's bytes.

    Raises:
      ValueError: a number is beyond the range of its dtype; `folder` is in use.
      OSError: the disk is full or not writable.
    """
    flat, rows = unnest(params), param_table(config).hf_names()
    plan = {}
    for name, (row, _) in rows.items():
        kept = (stored or {}).get(name, str(flat[row.path].dtype))
        plan[name] = Planned(row.hf_shape, kept if dtype == "keep" else dtype)

    def part_of(name: str) -> jax.Array | np.ndarray:
        row, layer = rows[name]
        x = flat[row.path]
        return row.to_hf(_whole(_layer_of(x, layer) if row.stacked else x))

    def stored_as_planned(name: str, part: jax.Array | np.ndarray) -> np.ndarray:
        if str(part.dtype) == plan[name].dtype:
            return np.asarray(part)
        key = tensor_keys(seed, "rounding", (name,))[0]
        out = np.asarray(_cast(jnp.asarray(part), key, dtype=plan[name].dtype, rounding=rounding))
        if not np.all(np.isfinite(out)) and np.all(np.isfinite(np.asarray(part))):
            raise ValueError(
                f"{name} holds numbers beyond the range of {plan[name].dtype}. Use bfloat16, "
                "float32 or keep."
            )
        return out

    with processes.new_folder(folder, replace=replace) as out:

        def write(part_of: Callable[[str], Any]) -> dict[str, str]:
            copy_companions(source, out, COMPANIONS[1:])
            write_config(source, out, None if dtype == "keep" else dtype)
            return write_shards(
                out,
                plan,
                lambda name: stored_as_planned(name, part_of(name)),
                shard_bytes,
                "export",
            )

        return processes.on_first(write, together=part_of)


@functools.partial(jax.jit, static_argnames=("dtype", "rounding"))
def _cast(x: jax.Array, key: jax.Array, dtype: str, rounding: str) -> jax.Array:
    return cast(x, dtype, rounding, lambda: random_bits(key, x.shape))


def _whole(x: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """Bring what lies with several processes to the host; the rest stays where it is."""
    return x if getattr(x, "is_fully_addressable", True) else processes.fetch(x)


def _layer_of(x: jax.Array, layer: int) -> jax.Array | np.ndarray:
    if not x.is_fully_addressable or any(device.platform != "cpu" for device in x.devices()):
        return x[layer]
    assert x.sharding.shard_shape(x.shape)[0] == x.shape[0], "layers are not cut over the mesh"
    views = [
        (shard.index[1:], np.asarray(shard.data))
        for shard in x.addressable_shards
        if shard.replica_id == 0
    ]
    assert sum(view.size for _, view in views) == x.size
    if len(views) == 1:  # the array lies in host memory already
        return views[0][1][layer]
    out = np.empty(x.shape[1:], x.dtype)
    for index, view in views:
        out[index] = view[layer]
    return out
