"""What the steps of one run share: settings, data and programs, the model's source, the stages."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from safepatch_jax.data.records import load_records
from safepatch_jax.io import gguf, hub
from safepatch_jax.io.companions import LEGAL, TEMPLATES
from safepatch_jax.io.folder import Checkpoint
from safepatch_jax.models.config import read_hf_config
from safepatch_jax.run.inputs import Inputs, Read
from safepatch_jax.run.metrics import Metrics
from safepatch_jax.run.place import Place
from safepatch_jax.run.stages import Runner
from safepatch_jax.runtime import files
from safepatch_jax.runtime.programs import keep_programs
from safepatch_jax.settings import Settings

if TYPE_CHECKING:
    from safepatch_jax.run.context import Context


class Run:
    """One run in a folder.

    Args:
      settings: of the run.
      folder: where its stages lie.
      read: see `Inputs`.

    Attributes:
      inputs: its data.
      source: where the model is.
      runner: the stages, once `job.open_run` has laid them out.
      metrics: where training is recorded step by step; None for nowhere.
    """

    runner: Runner

    def __init__(self, settings: Settings, folder: pathlib.Path, read: Read = load_records):
        if not settings.model.source:
            raise ValueError(
                "No model given. Set --model.source to a Hugging Face folder, org/name of the "
                "Hugging Face Hub, a .gguf file, or 'smollm2'."
            )
        self.settings, self.workdir = settings, folder
        self.inputs = Inputs(settings, read)
        self.source = Place.parse(settings.model.source).absolute()
        self.metrics: Metrics | None = None

    @functools.cached_property
    def context(self) -> Context:
        """Data, devices and programs. Made on first use, for it imports JAX; from then on compiled
        programs are kept in the run's cache."""
        from safepatch_jax.run.context import Context

        keep_programs(self.inputs.cache_dir)
        context = Context(self.settings, inputs=self.inputs)
        self.inputs = context  # so that nothing is read twice
        return context

    def folder(self, name: str) -> pathlib.Path:
        """Return the model folder that a stage stands for."""
        if name == "import" and self.source.kind == "hf":
            return self.source.path
        return self.runner.outputs(name) / "model"

    @property
    def imported(self) -> pathlib.Path:
        """The source as a Hugging Face folder; its tokenizer and architecture are the result's."""
        return self.folder("import")

    @property
    def backbone(self) -> pathlib.Path:
        """The model that is patched."""
        return self.folder("align" if self.settings.align.enabled else "import")

    @property
    def patch_file(self) -> pathlib.Path | None:
        """The difference of backbone and result; None where their dtypes differ."""
        if "patch_file" not in self.runner.stages:
            return None
        return self.runner.outputs("patch_file") / "patch.safetensors"


def check_source(source: Place) -> None:
    """Raise ValueError if a model's source is not there or no model; nothing large is read."""
    if source.kind == "gguf":
        if not source.path.is_file():
            raise ValueError(f"No model file '{source.path}'.")
    elif source.kind == "orbax":
        from safepatch_jax.io.checkpoint import read_description

        read_description(source.path)
    else:
        read_hf_config(source.path)
        Checkpoint(source.path)


def source_hashes(source: Place) -> Mapping[str, str]:
    """Return the SHA-256 of every file of a model's source."""
    if source.kind == "gguf":
        parts = gguf.parts_of(source.path)
        if parts == [source.path]:
            return {"gguf": files.file_sha256(source.path)}
        return {part.name: files.file_sha256(part) for part in parts if part.is_file()}
    if source.kind == "orbax":
        paths = source.path.rglob("*")
    elif source.origin:  # other programs may bring more into the cache, licences too
        paths = [source.path / name for name in hub.needed(source.path) if name not in LEGAL]
    else:
        paths = [*source.path.iterdir(), *(source.path / TEMPLATES).glob("*.jinja")]
    hashes = {}
    for path in sorted(paths):
        if path.is_file():
            hashes[str(path.relative_to(source.path))] = files.file_sha256(path)
    return hashes
