"""The arrays that a stage of a run holds, tensor by tensor, whatever wrote them: derived models and
scores, model folders, patch files. Nothing is put on a device."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from safepatch_jax.io import checksums
from safepatch_jax.io.folder import Checkpoint
from safepatch_jax.models.config import DecoderConfig, read_hf_config
from safepatch_jax.models.table import Param, ParamTable, param_table
from safepatch_jax.patch_file.file import BITS, RUN, PatchFile
from safepatch_jax.run import manifests
from safepatch_jax.runtime import files, mirror
from safepatch_jax.runtime.console import some
from safepatch_jax.runtime.paths import resolve
from safepatch_jax.runtime.reading import Refused, reading
from safepatch_jax.runtime.workspace import Workspace

_TREES = (manifests.WEIGHTS, manifests.DIFFERENCES, manifests.SCORES)
_MODEL, _PATCH = "model", "patch.safetensors"
_SHARED = ("import", "align")  # of the stages with arrays, those that lie in the cache
_ARRAY = "/.zarray"  # ends the key under which an array is described
_NO_NAMES = "Give the model too: --model=DIR, the backbone's folder."


@dataclasses.dataclass(frozen=True)
class StageArray:
    """One HF tensor of a stage.

    Attributes:
      parameter: the path of its row in the parameter table; '' if it has none.
      flips: it holds what a patch file does to a tensor: bits to turn, 0 where nothing changes.
    """

    parameter: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    flips: bool = False


@dataclasses.dataclass(frozen=True)
class StageArrays:
    """What a stage holds: its folder, its manifest, and its arrays by HF name, in the order of the
    parameter table."""

    folder: pathlib.Path
    manifest: Mapping[str, Any]
    arrays: Mapping[str, StageArray]


def open_arrays(workdir: str, stage: str, model: str = "") -> StageArrays:
    """Open the arrays of a stage; each is read when its `read` is called.

    Args:
      workdir: of a run, finished or not.
      stage: a name, such as 'score_se'.
      model: folder of the backbone, whose architecture tells the names and order of parameters; ''
        to ask the workdir's own records.

    Raises:
      ValueError: no such stage, arrays that were deleted or are damaged, a stage without arrays.
    """
    place = resolve(workdir)
    if mirror.is_one(place):
        Workspace(place).pull()
    folder = _folder(place, stage)
    if mirror.is_one(folder):
        mirror.bring_whole(folder)
    state, manifest = manifests.read(folder)
    if state != manifests.SOUND:
        raise Refused(
            f"{folder} is no finished stage of a run: its manifest is {state}. There are "
            f"{_listed(place)}. Give --workdir the folder of a run, and --stage one of these."
        )
    if manifest["deleted"]:
        raise Refused(
            f"{folder} was finished, and its arrays were deleted after success, as those of all "
            "derived models and scores are. Give the run's command with a new --workdir and "
            "--run.keep_scratch, which keeps them."
        )
    if (folder / _PATCH).is_file():
        table = _table(place, model) or ParamTable(())
        return StageArrays(folder, manifest, _of_patch(folder / _PATCH, table))
    if (folder / _MODEL).is_dir():
        table = param_table(read_hf_config(folder / _MODEL))
        return StageArrays(folder, manifest, _of_model(folder / _MODEL, table))
    for name in _TREES:
        if (folder / name).is_dir():
            table = _table(place, model)
            if table is None:
                raise Refused(f"{place} does not say which model it patches. {_NO_NAMES}")
            return StageArrays(folder, manifest, dict(_of_tree(folder / name, table)))
    raise Refused(
        f"The stage {stage} holds no arrays, but {some(sorted(_names(folder)), ', ')}. There are "
        f"{_listed(place)}: derive_*, score_*, align, patch, export and patch_file hold some."
    )


def _names(folder: pathlib.Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def _listed(place: pathlib.Path) -> str:
    names = sorted(path.parent.name for path in place.glob(f"stages/*/{manifests.MANIFEST}"))
    return f"the stages {', '.join(names)}" if names else f"no finished stages in {place}"


def _folder(place: pathlib.Path, stage: str) -> pathlib.Path:
    files.plain_name(stage, "--stage")
    if stage not in _SHARED:
        return place / "stages" / stage
    return _shared(place, stage) or place / "stages" / stage


def _shared(place: pathlib.Path, stage: str) -> pathlib.Path | None:
    """Return the folder in the cache of a stage that other stages of a workdir have read."""
    path = place / "settings.json"
    settings = files.read_json(path) if path.is_file() else {}
    cache = settings.get("run", {}).get("cache_dir")
    if not cache:
        return None
    folders, found = sorted(place.glob("stages/*")), None
    while folders and found is None:
        _, manifest = manifests.read(folders.pop())
        for name, key in manifest.get("inputs", {}).items():
            folder = resolve(cache) / "stages" / f"{name}-{key[:16]}"
            if name == stage:
                found = folder
            elif name == "align":
                folders.append(folder)  # it reads the import
    return found


def _table(place: pathlib.Path, model: str) -> ParamTable | None:
    """Return the parameter table of a workdir's model, None where nothing tells it."""
    if model:
        return param_table(read_hf_config(resolve(model.removeprefix("hf:"))))
    for stage in ("export", "patch"):
        if (place / "stages" / stage / _MODEL / "config.json").is_file():
            return param_table(read_hf_config(place / "stages" / stage / _MODEL))
    folder = _shared(place, "import")
    manifest = manifests.read(folder)[1] if folder else {}
    config = manifest.get("result", {}).get("config")
    if not config:
        return None
    with reading(folder, "a model's architecture", _NO_NAMES):
        plain = {name: tuple(x) if isinstance(x, list) else x for name, x in config.items()}
        return param_table(DecoderConfig(**plain | {"rope_scaling": None}))


def _of_model(folder: pathlib.Path, table: ParamTable) -> dict[str, StageArray]:
    tensors, rows = Checkpoint(folder).tensors, table.hf_names()
    arrays = {}
    for name in [*filter(tensors.__contains__, rows), *sorted(tensors.keys() - rows.keys())]:
        x = tensors[name]
        arrays[name] = StageArray(_parameter(rows, name), x.dtype, tuple(x.shape), x.read)
    return arrays


def _parameter(rows: Mapping[str, tuple[Param, int]], name: str) -> str:
    return rows[name][0].path if name in rows else ""


def _of_patch(path: pathlib.Path, table: ParamTable) -> dict[str, StageArray]:
    patch, rows = PatchFile(path), table.hf_names()

    def reader(name: str) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            tensor = patch.tensors[name]
            flips = np.zeros(tensor.size, BITS[tensor.dtype])
            for number, (positions, bits) in enumerate(patch.runs(name)):
                flips[positions + number * RUN] = bits
            return flips.reshape(tensor.shape)

        return read

    names = [*filter(patch.tensors.__contains__, rows), *sorted(patch.tensors.keys() - rows.keys())]
    arrays = {}
    for name in names:
        tensor = patch.tensors[name]
        read, parameter = reader(name), _parameter(rows, name)
        arrays[name] = StageArray(parameter, tensor.dtype, tensor.shape, read, flips=True)
    return arrays


class _Tree:
    """The arrays of a checkpoint that `io.checkpoint.save_tree` wrote, by path; the one that was
    read last is held."""

    def __init__(self, folder: pathlib.Path):
        import tensorstore  # here: it takes a while, and model folders do not need it

        checksums.check(folder, "Delete the stage's folder, and the same command makes it again.")
        self._open, self._folder = tensorstore.open, folder
        self._base = {"driver": "file", "path": f"{folder}/"}
        spec = {"driver": "ocdbt", "base": self._base}
        with self._reading():
            keys = tensorstore.KvStore.open(spec).result().list().result()
        suffix = "/.zarray"
        stored = [
            key.decode().removesuffix(suffix) for key in keys if key.endswith(suffix.encode())
        ]
        self.paths = {name.replace(".", "/"): name for name in stored}
        self._path, self._held = "", np.empty(0)

    def _reading(self):
        return reading(
            self._folder,
            "the arrays of a stage",
            "Delete the stage's folder, and the same command makes it again.",
        )

    def stored(self, path: str) -> Any:
        kvstore = {"driver": "ocdbt", "base": self._base, "path": f"{self.paths[path]}/"}
        with self._reading():
            return self._open({"driver": "zarr", "kvstore": kvstore}).result()

    def part(self, row: Param, layer: int) -> np.ndarray:
        """Return a layer of a parameter as its HF tensor."""
        if self._path != row.path:
            self._path, self._held = "", np.empty(0)  # makes room before the next one is read
            with self._reading():
                self._held = self.stored(row.path).read().result()
            self._path = row.path
        return row.as_matrices(self._held)[layer]


def _of_tree(folder: pathlib.Path, table: ParamTable) -> Iterator[tuple[str, StageArray]]:
    tree = _Tree(folder)
    strangers = sorted(tree.paths.keys() - table.by_path.keys())
    if strangers:
        raise Refused(
            f"{folder} holds {some(strangers, ', ')}, which the model has not; was it made from "
            f"another? {_NO_NAMES}"
        )
    for row in table:
        if row.path not in tree.paths:
            continue
        stored = tree.stored(row.path)
        if stored.shape != row.shape:
            raise Refused(
                f"{folder}: {row.path} has the shape {stored.shape}, and in the model "
                f"{row.shape}; was it made from another? {_NO_NAMES}"
            )
        dtype = stored.dtype.name
        for layer, name in enumerate(row.hf_names):
            yield name, StageArray(row.path, dtype, row.hf_shape, _reader(tree, row, layer))


def _reader(tree: _Tree, row: Param, layer: int) -> Callable[[], np.ndarray]:
    return lambda: tree.part(row, layer)
