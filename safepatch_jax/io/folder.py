"""Which files of a model folder in Hugging Face format hold its weights, and where each tensor lies
in them; no JAX."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping

from safepatch_jax.io import safetensors_file, torch_file
from safepatch_jax.io.safetensors_file import INDEX, SINGLE
from safepatch_jax.io.stored import Stored
from safepatch_jax.io.torch_file import TorchTensor
from safepatch_jax.runtime import files
from safepatch_jax.runtime.console import progress, some
from safepatch_jax.runtime.unfinished import refuse as refuse_unfinished
from safepatch_jax.runtime.workers import Workers

Tensors = dict[str, Stored] | dict[str, TorchTensor]
_Lister = Callable[[pathlib.Path], Tensors]

# In the order in which transformers looks for them.
_LAYOUTS: tuple[tuple[str, str, _Lister], ...] = (
    (SINGLE, INDEX, safetensors_file.list_tensors),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", torch_file.list_tensors),
)
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


class Checkpoint:
    """The tensors of a model folder: `tensors` says where each one lies.

    Args:
      folder: of the model.
      unfinished: it may be half patched, see `runtime.unfinished`.

    Raises:
      ValueError: half patched, no weights, an index that names an absent or unsafe file, or a
        truncated or damaged file; torch weights where torch is not installed.
    """

    def __init__(self, folder: str | pathlib.Path, *, unfinished: bool = False):
        self.folder = pathlib.Path(folder)
        if not unfinished:
            refuse_unfinished(self.folder)
        for single, index, list_tensors in _LAYOUTS:
            if (self.folder / single).is_file():
                self.layout = single
                self.tensors = list_tensors(files.own_file(self.folder / single))
                return
            if (self.folder / index).is_file():
                self.layout = index
                self.tensors = self._from_index(self.folder / index, list_tensors)
                return
        raise ValueError(
            f"'{self.folder}' holds no weights: none of {', '.join(_layout_names())} is there."
            + self._hint()
        )

    def _hint(self) -> str:
        """Say what to do with the weight files of other names that are there."""
        others = sorted(p for p in self.folder.glob("*") if p.suffix in _WEIGHT_SUFFIXES)
        if not others:
            return ""
        hint = f" Found {', '.join(p.name for p in others)}."
        if any(p.suffix == ".gguf" for p in others):
            return (
                f"{hint} Read a GGUF file with --source=gguf:FILE (launch.convert) or "
                f"--model.source={self.folder}/FILE."
            )
        return f"{hint} If they are parts of a model, its index is missing: copy it too."

    def _from_index(self, index: pathlib.Path, list_tensors: _Lister) -> Tensors:
        weight_map = files.read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(
                f"{index} is not a weight index (it has no weight_map); copy the file again."
            )
        shards = sorted({files.plain_name(name, str(index)) for name in weight_map.values()})
        missing = [name for name in shards if not (self.folder / name).is_file()]
        if missing:
            raise ValueError(
                f"{index} names weight files that are not there: {', '.join(missing)}. "
                f"Copy them into {self.folder}."
            )
        held = {name: list_tensors(files.own_file(self.folder / name)) for name in shards}
        absent = sorted(name for name, shard in weight_map.items() if name not in held[shard])
        if absent:
            raise ValueError(
                f"{index} places tensors in files that do not hold them: {some(absent, ', ')}."
            )
        tensors = {name: held[shard][name] for name, shard in weight_map.items()}
        for shard in shards:
            for name, tensor in held[shard].items():
                tensors.setdefault(name, tensor)  # one that the index does not list
        return tensors


def _layout_names() -> list[str]:
    names = []
    for single, index, _ in _LAYOUTS:
        names += [single, index]
    return names


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
