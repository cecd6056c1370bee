"""Which files of a model folder in Hugging Face format hold its weights, and where each tensor lies
in them; no JAX."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

from safepatch_jax.io import safetensors_file, torch_file
from safepatch_jax.io.safetensors_file import INDEX, SINGLE
from safepatch_jax.io.stored import Stored
from safepatch_jax.runtime import files
from safepatch_jax.runtime.console import progress, some
from safepatch_jax.runtime.workers import Workers

# In the order in which transformers looks for them.
_LAYOUTS = (
    (SINGLE, INDEX, safetensors_file.list_tensors),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", torch_file.list_tensors),
)


class Checkpoint:
    """The tensors of a model folder: `tensors` says where each one lies.

    Raises:
      ValueError: no weights, an index that names an absent or unsafe file, or a truncated or
        damaged file.
    """

    def __init__(self, folder: str | pathlib.Path):
        self.folder = pathlib.Path(folder)
        for single, index, list_tensors in _LAYOUTS:
            if (self.folder / single).is_file():
                self.layout = single
                self.tensors: dict[str, Stored] = list_tensors(files.own_file(self.folder / single))
                return
            if (self.folder / index).is_file():
                self.layout = index
                self.tensors = self._from_index(self.folder / index, list_tensors)
                return
        found = sorted(
            p
            for p in self.folder.glob("*")
            if p.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf")
        )
        hint = f" Found {', '.join(p.name for p in found)}." if found else ""
        if any(p.suffix == ".gguf" for p in found):
            hint += f" Read a GGUF file with --source=gguf:FILE (launch.convert) or --model.source={self.folder}/FILE."
        elif found:
            hint += " If they are parts of a model, its index is missing: copy it too."
        raise ValueError(
            f"'{self.folder}' holds no weights: none of "
            f"{', '.join(n for pair in _LAYOUTS for n in pair[:2])} "
            f"is there.{hint}"
        )

    def _from_index(self, index: pathlib.Path, list_tensors) -> dict[str, Stored]:
        weight_map = files.read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(
                f"{index} is not a weight index (it has no weight_map); copy the file again."
            )
        shards = {files.plain_name(name, str(index)) for name in weight_map.values()}
        if missing := sorted(name for name in shards if not (self.folder / name).is_file()):
            raise ValueError(
                f"{index} names weight files that are not there: {', '.join(missing)}. "
                f"Copy them into {self.folder}."
            )
        held = {name: list_tensors(files.own_file(self.folder / name)) for name in sorted(shards)}
        if absent := sorted(
            tensor for tensor, name in weight_map.items() if tensor not in held[name]
        ):
            raise ValueError(
                f"{index} places tensors in files that do not hold them: {some(absent, ', ')}."
            )
        strays = {
            tensor: x
            for tensors in held.values()
            for tensor, x in tensors.items()
            if tensor not in weight_map
        }
        return {tensor: held[name][tensor] for tensor, name in weight_map.items()} | strays


def has_weights(folder: str | pathlib.Path) -> bool:
    """Return whether a folder holds weight files of a kind that `Checkpoint` reads."""
    return any(
        (pathlib.Path(folder) / name).is_file()
        for single, index, _ in _LAYOUTS
        for name in (single, index)
    )


def stored_dtypes(folder: str | pathlib.Path) -> dict[str, str]:
    """Return the dtype in which each tensor of a model folder is stored, by HF name. Raises
    ValueError as Checkpoint."""
    return {name: x.dtype for name, x in Checkpoint(folder).tensors.items()}


def tensor_hashes(tensors: Mapping[str, Stored]) -> dict[str, str]:
    """Return the SHA-256 of each tensor's bytes, by name."""
    with Workers(2) as pool, progress(sum(x.size for x in tensors.values()), "hash", "B") as bar:
        hashes = {}
        for (name, x), digest in zip(
            tensors.items(), pool.map(lambda x: x.sha256(), tensors.values())
        ):
            hashes[name] = digest
            bar.update(x.size)
    return hashes
