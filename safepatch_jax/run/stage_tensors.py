"""The HF tensors of a stage's checkpoint, read as those of a model folder are."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from safepatch_jax.io.checkpoint import StoredTree
from safepatch_jax.io.stored import DTYPES, Stored
from safepatch_jax.mesh import Sharder, make_mesh
from safepatch_jax.models.table import Param, ParamTable
from safepatch_jax.patching.source import Readable


class StageTensors(Mapping[str, Readable]):
    """The HF tensors of a stage's checkpoint, which `save_tree` wrote, float32; of its parameters
    the one that was read last is held. `backbone`: to whose tensors they are differences."""

    def __init__(
        self,
        path: pathlib.Path,
        scope: ParamTable,
        backbone: Mapping[str, Stored] | None = None,
    ):
        sharder = Sharder(make_mesh("data:1,fsdp:1,tensor:1", jax.local_devices()[:1]))
        self._tree = StoredTree(path, scope.abstract(sharder))
        self._places, self._backbone = scope.hf_names(), backbone  # by HF name: row and layer
        self._path, self._held = "", np.empty(0)

    def matrices(self, row: Param) -> np.ndarray:
        """Return a parameter as [layers, entries]."""
        if self._path != row.path:
            self._path, self._held = "", np.empty(0)  # makes room before the next one is read
            self._held = np.asarray(self._tree[row.path]).reshape(row.num_layers, -1)
            self._path = row.path
        return self._held

    def __getitem__(self, name: str) -> Readable:
        backbone = self._backbone[name] if self._backbone else None
        return StageTensor(self, *self._places[name], backbone)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


@dataclasses.dataclass(frozen=True)
class StageTensor:
    """One HF tensor of `StageTensors`."""

    stage: StageTensors
    row: Param
    layer: int
    backbone: Stored | None = None  # to which it is a difference
    dtype: str = "float32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.row.hf_shape

    def read(self, out: np.ndarray, start: int) -> np.ndarray:
        out[...] = self.stage.matrices(self.row)[self.layer, start : start + len(out)]
        if self.backbone is not None:
            stored = np.empty(len(out), DTYPES[self.backbone.dtype])
            self.backbone.read(stored, start)
            out += stored.astype(np.float32)
        return out
