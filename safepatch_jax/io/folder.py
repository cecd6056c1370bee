"""Which files of a model folder in Hugging Face format hold its weights, and where each tensor lies
in them; no JAX."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Mapping

from safepatch_jax.io import safetensors_file, torch_file
from safepatch_jax.io.beside import left_aside, unread_weights
from safepatch_jax.io.names import listed, refuse_adapter, standard_names
from safepatch_jax.io.safetensors_file import INDEX, SINGLE
from safepatch_jax.io.stored import Stored
from safepatch_jax.io.torch_file import TorchTensor
from safepatch_jax.models.strays import other_kind, refuse_no_model
from safepatch_jax.runtime import files
from safepatch_jax.runtime.console import progress, some
from safepatch_jax.runtime.limits import limit, too_much
from safepatch_jax.runtime.reading import Refused, reading
from safepatch_jax.runtime.unfinished import refuse as refuse_unfinished
from safepatch_jax.runtime.workers import Workers

Tensors = dict[str, Stored] | dict[str, TorchTensor]
_Lister = Callable[[pathlib.Path], Tensors]

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
# In the order in which transformers looks for them.
_LAYOUTS: tuple[tuple[str, str, _Lister], ...] = (
    (SINGLE, INDEX, safetensors_file.list_tensors),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", torch_file.list_tensors),
)
_SETS = (".safetensors", ".bin")  # kinds of files that hold a model for transformers


class Checkpoint:
    """The tensors of a model folder.

    Attributes:
      folder: as given.
      layout: the name of the weight file, or of the index.
      tensors: where each one lies, by its name in transformers.
      renamed: what was done to the names in the files for that, in words; '' for nothing.
      notes: a line for each kind of thing in the folder that is not used, and for `renamed`.

    Args:
      folder: of the model.
      unfinished: it may be half patched, see `runtime.unfinished`.

    Raises:
      ValueError: half patched; no weights (says what the folder is), those of an adapter, an index
        that names an absent or unsafe file, or a truncated or damaged file; torch weights where
        torch is not installed.
    """

    def __init__(self, folder: str | pathlib.Path, *, unfinished: bool = False):
        self.folder = pathlib.Path(folder)
        if not unfinished:
            refuse_unfinished(self.folder)
        if not self.folder.is_dir():
            refuse_no_model(self.folder)
        for single, index, list_tensors in _LAYOUTS:
            if (self.folder / single).is_file():
                self.layout = single
                tensors = list_tensors(files.own_file(self.folder / single))
                break
            if (self.folder / index).is_file():
                self.layout = index
                tensors = self._from_index(self.folder / index, list_tensors)
                break
        else:
            raise Refused(
                other_kind(self.folder)
                or f"'{self.folder}' holds no weights: none of {', '.join(_layout_names())} is "
                "there."
                + self._hint()
            )
        refuse_adapter(tensors, self.folder)
        names, self.renamed = standard_names(tensors)
        self.tensors: Tensors = {names[name]: tensor for name, tensor in tensors.items()}

    def refuse_second_set(self) -> None:
        """Raise ValueError if a file beside the weights may hold them again: a change in place
        would leave it as it was, and programs differ in which they read."""
        read = {tensor.path.name for tensor in self.tensors.values()}
        others = [name for name in unread_weights(self.folder, read) if name.endswith(_SETS)]
        if others:
            raise Refused(
                f"{self.folder} holds weights beside those that are read ({self.layout}): "
                f"{listed(others, 3)}. They would stay as they are. Delete them, or write to a new "
                "folder (--out)."
            )

    @functools.cached_property
    def notes(self) -> tuple[str, ...]:
        read = {tensor.path.name for tensor in self.tensors.values()}
        notes = left_aside(self.folder, read)
        return (self.renamed, *notes) if self.renamed else tuple(notes)

    def _hint(self) -> str:
        """Say what to do with the weight files of other names, or links to none, that are there."""
        dangling = [name for name in _layout_names() if (self.folder / name).is_symlink()]
        if dangling:
            return (
                f" {some(dangling, ', ')} is a link to a file that is not there: download the "
                "model again, or copy it with the files that its links name (cp -rL)."
            )
        others = sorted(p.name for p in self.folder.glob("*") if p.suffix in _WEIGHT_SUFFIXES)
        if not others:
            return ""
        return (
            f" Found {some(others, ', ')}. If they are parts of a model, its index is missing: "
            "copy it too."
        )

    def _from_index(self, index: pathlib.Path, list_tensors: _Lister) -> Tensors:
        weight_map = read_index(index)
        shards = shards_of(weight_map, index)
        with reading(index, "an index of weights", "Copy the file again."):
            missing = [name for name in shards if not (self.folder / name).is_file()]
        if missing:
            raise Refused(
                other_kind(self.folder)
                or f"{index} names weight files that are not there: {listed(missing)}. Copy them "
                f"into {self.folder}."
            )
        held = {name: list_tensors(files.own_file(self.folder / name)) for name in shards}
        absent = sorted(name for name, shard in weight_map.items() if name not in held[shard])
        if absent:
            raise Refused(
                f"{index} places {len(absent)} tensors in files that do not hold them: "
                f"{listed(absent)}. Copy the index and the weight files again."
            )
        tensors = {name: held[shard][name] for name, shard in weight_map.items()}
        for shard in shards:
            for name, tensor in held[shard].items():
                tensors.setdefault(name, tensor)  # one that the index does not list
        return tensors


def layouts() -> list[tuple[str, str]]:
    """Return the names of a weight file and of an index, in the order in which they are looked
    for."""
    return [(single, index) for single, index, _ in _LAYOUTS]


def _layout_names() -> list[str]:
    names = []
    for pair in layouts():
        names += pair
    return names


def read_index(index: pathlib.Path) -> dict[str, str]:
    """Return the name of the file in which each tensor lies, as an index has it; names of files are
    not checked. Raises ValueError for one that is no index or too large."""
    if index.stat().st_size > limit("INDEX_BYTES"):
        raise Refused(f"{index} has {too_much('INDEX_BYTES')}. Copy the file again.")
    weight_map = files.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise Refused(f"{index} is not a weight index (it has no weight_map); copy the file again.")
    return weight_map


def shards_of(weight_map: Mapping[str, str], index: pathlib.Path) -> list[str]:
    """Return the weight files that an index names. Raises ValueError if one could lie outside the
    folder, or there are too many."""
    shards = sorted({files.plain_name(name, str(index)) for name in weight_map.values()})
    if len(shards) > limit("INDEX_FILES"):
        raise Refused(f"{index} names {too_much('INDEX_FILES')}. Copy the file again.")
    return shards


def has_weights(folder: str | pathlib.Path) -> bool:
    """Return whether a folder holds weight files of a kind that `Checkpoint` reads."""
    return any((pathlib.Path(folder) / name).is_file() for name in _layout_names())


def stored_dtypes(folder: str | pathlib.Path) -> dict[str, str]:
    """Return the dtype in which each tensor of a model folder is stored, by HF name. Raises
    ValueError as Checkpoint."""
    return {name: x.dtype for name, x in Checkpoint(folder).tensors.items()}


def tensor_hashes(tensors: Mapping[str, Stored | TorchTensor]) -> dict[str, str]:
    """Return the SHA-256 of each tensor's bytes, by name."""
    total = sum(x.size for x in tensors.values())
    with Workers(2) as pool, progress(total, "hash", "B") as bar:
        hashes = {}
        digests = pool.map(lambda x: x.sha256(), tensors.values())
        for (name, x), digest in zip(tensors.items(), digests):
            hashes[name] = digest
            bar.update(x.size)
    return hashes
