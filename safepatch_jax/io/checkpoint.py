"""Models and nested dictionaries of arrays on disk, through orbax: sharded, and restored onto any
mesh.

A model checkpoint is a folder with ``params/`` (orbax), ``model.json`` (the dtype of each tensor)
and ``hf/`` (config, tokenizer and the other companions of the Hugging Face folder it came from), so
the way back needs nothing else. Arrays and the files beside them have checksums, which are compared
before they are read.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import math
import pathlib
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from safepatch_jax.io import checksums
from safepatch_jax.io.companions import MODEL, copy_companions
from safepatch_jax.io.stored import DTYPES
from safepatch_jax.mesh import Sharder
from safepatch_jax.models.config import DecoderConfig, read_hf_config
from safepatch_jax.models.table import ParamTable, nest, param_table, unnest
from safepatch_jax.runtime import addresses, files, processes
from safepatch_jax.runtime.console import some
from safepatch_jax.runtime.objects import for_emulator
from safepatch_jax.runtime.reading import reading, reason

PARAMS = "params"
COMPANIONS_FOLDER = "hf"
_FORMAT = 1
_AGAIN = "Convert the model again, or copy the folder again."
_FIX = (
    "Delete the stage's folder, and the same command makes it again; a model that was converted or "
    "copied, convert or copy again."
)
# What orbax and what it uses raise over files that are not as it wrote them.
_UNREADABLE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    RecursionError,
)


def save_tree(path: str | pathlib.Path, tree: dict[str, Any]) -> None:
    """Write a nested dictionary of arrays, with checksums; the folder appears whole or not at
    all."""
    path = pathlib.Path(path).absolute()
    try:
        with literal(path) as place, _checkpointer(tree) as checkpointer:
            checkpointer.save(place, args=ocp.args.PyTreeSave(tree))
        if not addresses.address_of(path):  # a bucket's objects are hashed for the stage's list
            processes.on_first(checksums.write, path)
    except Exception as error:  # Orbax wraps a full disk in errors of several libraries
        if not from_disk(error):
            raise
        size = sum(x.nbytes for x in jax.tree.leaves(tree))
        raise OSError(
            f"Cannot write the checkpoint {path}: {_reason(error)}. It needs {size:,} bytes; free "
            "space or use another folder, then give the same command again."
        ) from error


def load_tree(path: str | pathlib.Path, abstract: dict[str, Any]) -> dict[str, Any]:
    """Read a nested dictionary of arrays.

    Args:
      abstract: ShapeDtypeStructs with shardings: the mesh and the dtypes to read into.

    Raises:
      ValueError: the checkpoint is absent, damaged, or of another structure.
    """
    path = pathlib.Path(path).absolute()
    if addresses.address_of(path):
        return _load_objects(path, abstract)
    _check_arrays(path)
    try:
        with literal(path) as place, _checkpointer(abstract) as checkpointer:
            return checkpointer.restore(
                place,
                args=ocp.args.PyTreeRestore(
                    abstract,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
                ),
            )
    except Exception as error:  # as above; what is neither is raised again
        if not (isinstance(error, _UNREADABLE) or from_disk(error)):
            raise
        raise ValueError(
            f"Cannot restore the checkpoint {path}, it is absent, damaged or another one: "
            f"{_reason(error)}"
        ) from error


def _load_objects(path: pathlib.Path, abstract: dict[str, Any]) -> dict[str, Any]:
    """Do what `load_tree` does with arrays in a bucket: each process reads its own parts. Orbax
    would ask for metadata first, several requests an array."""
    return nest({name: _load_array(path, name, x) for name, x in unnest(abstract).items()})


def _load_array(path: pathlib.Path, name: str, abstract: jax.ShapeDtypeStruct) -> jax.Array:
    """Read one array, the parts of this process's devices alone, all at once and each once. Raises
    ValueError."""
    try:
        stored = opened(path, name.replace("/", "."))
        if stored.shape != abstract.shape:
            raise ValueError(f"its shape is {stored.shape}, not {abstract.shape}")
        places = abstract.sharding.addressable_devices_indices_map(abstract.shape).values()
        reads = {str(place): stored[place].read() for place in places}

        def part(place):
            return reads[str(place)].result().astype(abstract.dtype, copy=False)

        return jax.make_array_from_callback(abstract.shape, abstract.sharding, part)
    except (*_UNREADABLE, NotImplementedError) as error:  # tensorstore raises what orbax does
        where = addresses.name_of(path)
        raise ValueError(
            f"Cannot restore {name} of {where}, which is absent, damaged or another checkpoint: "
            f"{reason(error)}. {_FIX}"
        ) from error


def opened(folder: pathlib.Path, name: str) -> ts.TensorStore:
    """Return an array that orbax has written, to be read in parts.

    Args:
      folder: of arrays; it may stand for an address of a bucket.
      name: of the array, its keys joined by dots.

    Raises:
      ValueError: it is absent or damaged.
    """
    base: Any = {"driver": "file", "path": f"{folder}/"}
    if address := addresses.address_of(folder):
        for_emulator()
        base = f"{address}/"
    return ts.open(
        {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}}
    ).result()


def _check_arrays(path: pathlib.Path) -> None:
    """Compare the files of arrays with their checksums. Raises ValueError, in all processes."""
    processes.on_first(_check_files, path)


def _check_files(path: pathlib.Path) -> None:
    try:
        checksums.check(path, _FIX)
    except ValueError as error:
        raise ValueError(
            f"Cannot restore the checkpoint {path}, which is damaged: {error}"
        ) from error


@contextlib.contextmanager
def literal(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a path of the same place without the signs of patterns in its folders' names: orbax
    looks for its files by patterns, and would not find them below 'run [2]'. Of a path that stands
    for an address of a bucket this is the address, to which all processes write."""
    if address := addresses.address_of(path):
        for_emulator()
        yield epath.Path(address)
        return
    if not glob.has_magic(str(path)):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="safepatch-") as folder:
        link = pathlib.Path(folder) / "place"
        link.symlink_to(path.parent)
        yield link / path.name


class StoredTree(Mapping[str, jax.Array]):
    """The arrays of a checkpoint by path; each is read when it is looked up, and not kept.

    Args:
      path: written by `save_tree`.
      abstract: as for `load_tree`; the checkpoint may hold more.
    """

    def __init__(self, path: str | pathlib.Path, abstract: dict[str, Any]):
        self._path, self._abstract = pathlib.Path(path).absolute(), unnest(abstract)

    def __getitem__(self, name: str) -> jax.Array:
        """Read one array; orbax would read the metadata of all each time. Raises ValueError if the
        checkpoint is absent or damaged, or has no such array."""
        if not addresses.address_of(self._path):
            _check_arrays(self._path)
        return _load_array(self._path, name, self._abstract[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._abstract)

    def __len__(self) -> int:
        return len(self._abstract)


def from_disk(error: Exception) -> bool:
    """Return whether an error of orbax is about the disk or what is on it; orbax raises some of
    these as a bare Exception."""
    return isinstance(error, (OSError, ValueError, KeyError)) or type(error) is Exception


def _reason(error: Exception) -> str:
    return reason(error.__cause__ or error)


def _checkpointer(tree: dict[str, Any]) -> ocp.Checkpointer:
    return ocp.Checkpointer(handler(tree))


def handler(tree: Any) -> ocp.PyTreeCheckpointHandler:
    """Return orbax's handler of a tree, one that reads and writes about one array at a time.

    From accelerators orbax copies a host's part of all arrays into host memory before it writes.

    By default orbax holds up to 96 GB, and copies of all arrays while it compresses them, which
    saves a quarter of the disk at best.
    """
    sizes = [
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    ]
    limit = max(1, math.ceil(max(sizes) / 1e9))
    return ocp.PyTreeCheckpointHandler(
        use_compression=False,
        save_concurrent_gb=limit,
        restore_concurrent_gb=limit,
        save_device_host_concurrent_gb=limit,
    )


def save_checkpoint(
    folder: str | pathlib.Path,
    params: dict[str, Any],
    source: str | pathlib.Path,
    stored: Mapping[str, str],
) -> None:
    """Write a model checkpoint; the folder appears whole or not at all.

    Args:
      folder: must not exist or be empty.
      params: nested parameter dictionary.
      source: the model folder whose config, tokenizer and so on are kept beside it.
      stored: dtype of each tensor in that folder, by HF name.
    """
    with processes.new_folder(folder) as out:
        save_tree(out / PARAMS, params)
        processes.on_first(_describe, out, source, stored)


def _describe(out: pathlib.Path, source: str | pathlib.Path, stored: Mapping[str, str]) -> None:
    """Write what a checkpoint has beside the arrays."""
    (out / COMPANIONS_FOLDER).mkdir()
    copy_companions(source, out / COMPANIONS_FOLDER)
    # The names of the table alone: an import leaves out some tensors, such as a tied head's copy.
    names = param_table(read_hf_config(source)).hf_names()
    described = {name: stored[name] for name in names}
    files.write_json(out / MODEL, {"format": _FORMAT, "stored": described})
    hashes = files.folder_hashes(out, leave_out=PARAMS)  # the arrays have a list of their own
    checksums.write(out, hashes)


def load_checkpoint(
    folder: str | pathlib.Path, sharder: Sharder
) -> tuple[DecoderConfig, dict[str, Any], dict[str, str]]:
    """Read a model checkpoint onto a mesh, which need not be the one it was written from.

    Returns:
      (architecture, nested parameter dictionary in the dtypes of the checkpoint, dtype of each HF
      tensor).

    Raises:
      ValueError: not a model checkpoint, damaged, or its arrays are of another architecture than
        its config.json.
    """
    folder = pathlib.Path(folder).absolute()
    stored = read_description(folder)
    config = read_hf_config(folder / COMPANIONS_FOLDER)
    table = param_table(config)
    if stored.keys() != table.hf_names().keys():
        raise ValueError(
            f"{folder / MODEL} lists other tensors than the architecture of "
            f"{COMPANIONS_FOLDER}/config.json has. Convert the model again."
        )
    _check_arrays(folder / PARAMS)
    dtypes = _check_architecture(folder, table)
    processes.on_first(check_companions, folder)
    abstract = {}
    for row in table:
        sharding = sharder.sharding(row.axes, row.shape, row.path)
        abstract[row.path] = jax.ShapeDtypeStruct(row.shape, dtypes[row.path], sharding=sharding)
    return config, load_tree(folder / PARAMS, nest(abstract)), stored


def check_companions(folder: pathlib.Path) -> None:
    """Raise ValueError if a file beside the arrays of a model checkpoint, such as its tokenizer, is
    not as it was written."""
    fix = f"{_AGAIN} If you changed it yourself, delete {checksums.NAME} beside {MODEL}."
    checksums.check(folder, fix)


def array_hashes(
    config: DecoderConfig, params: dict[str, Any], stored: Mapping[str, str]
) -> dict[str, str]:
    """Return the SHA-256 that each HF tensor would have if it were written to a model folder in its
    stored dtype."""
    flat, rows = unnest(params), param_table(config).hf_names()

    def part_of(name):
        row, layer = rows[name]
        return processes.fetch(flat[row.path][layer] if row.stacked else flat[row.path])

    def digest(part, name):
        x = part.astype(DTYPES[stored[name]], copy=False)
        return hashlib.sha256(np.ascontiguousarray(x)).hexdigest()

    return processes.on_first(
        lambda part_of: {name: digest(part_of(name), name) for name in rows}, together=part_of
    )


def read_description(folder: str | pathlib.Path) -> dict[str, str]:
    """Return the dtype of each HF tensor that a model checkpoint was made from. Raises ValueError
    if it is none."""
    path = pathlib.Path(folder) / MODEL
    if not path.is_file():
        raise ValueError(
            f"'{folder}' is no model checkpoint: {MODEL} is not there. Make one with "
            "python -m launch.convert --source=hf:DIR --target=orbax:DIR."
        )
    described = files.read_json(path, _AGAIN)
    stored = described.get("stored")
    known = described.get("format") == _FORMAT and isinstance(stored, dict)
    if not known or not set(map(str, stored.values())) <= set(DTYPES):
        raise ValueError(
            f"{path} is damaged or of another version than {_FORMAT}; convert the model again."
        )
    checksums.check(path.parent, _AGAIN, [MODEL])
    return stored


def _check_architecture(folder: pathlib.Path, table: ParamTable) -> dict[str, Any]:
    """Compare the arrays of a checkpoint with the table before anything is read; return their
    dtypes by path."""
    if not (folder / PARAMS).is_dir():
        raise ValueError(f"{folder / PARAMS} is no orbax checkpoint: it is not there. {_AGAIN}")
    with reading(folder / PARAMS, "an orbax checkpoint", _AGAIN):
        with (
            literal(folder / PARAMS) as place,
            ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer,
        ):
            metadata = checkpointer.metadata(place)
        tree = getattr(metadata, "item_metadata", metadata)
        if tree is None:
            raise ValueError("its metadata is gone")
        arrays = unnest(tree)
    problems = [f"{path} is missing" for path in table.by_path if path not in arrays]
    problems += [f"{path} is unexpected" for path in arrays if path not in table.by_path]
    for row in table:
        shape = tuple(arrays[row.path].shape) if row.path in arrays else row.shape
        if shape != row.shape:
            problems.append(f"{row.path} has shape {shape}, the architecture needs {row.shape}")
    if problems:
        raise ValueError(
            f"{folder}: the arrays are of another architecture than "
            f"{COMPANIONS_FOLDER}/config.json: {some(problems)}. Convert the right model again."
        )
    return {path: x.dtype for path, x in arrays.items()}
