"""Stages with manifests: a stage whose inputs are unchanged is not run again.

A stage's key is the hash of its name, its settings, the hashes of its outside inputs and the keys
of the stages it reads. Its folder appears whole, with a manifest, or not at all, so a killed run
is resumed where it stopped. Scratch stages (derived models and scores) are emptied after success;
their manifests remain. Where a run has several processes, process 0 reads and writes manifests and
decides for all.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import pathlib
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from safepatch_jax import __version__
from safepatch_jax.runtime import files, processes
from safepatch_jax.runtime.console import say

MANIFEST, _ASIDE = "manifest.json", ".steps"
FINISHED = ("done", "deleted")
FORMAT = 4  # raise when a stage's outputs change their meaning
# Versions on which a stage's bits may depend: arithmetic, token ids, dequantised weights.
KEYED = ("safepatch_jax", "jax", "jaxlib", "flax", "optax", "transformers", "tokenizers", "gguf")
_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "transformers",
    "tokenizers",
    "gguf",
    "safetensors",
    "numpy",
)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of a run.

    Attributes:
      name: its folder's name.
      run: fills the given empty folder and returns a result for the manifest.
      inputs: names of the stages whose folders it reads.
      settings: the settings that its outputs depend on.
      sources: hashes of outside inputs (model files, data files), or what returns them: it is
        called when the stage's key is first needed, in all processes.
      results: names of the stages of which it reads the reported result alone, so that deleted
        outputs do not matter.
      scratch: its outputs are deleted after success.
      shared: it lives in the cache and serves other runs too.
    """

    name: str
    run: Callable[[pathlib.Path], Mapping[str, Any]]
    inputs: tuple[str, ...] = ()
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sources: Mapping[str, str] | Callable[[], Mapping[str, str]] = dataclasses.field(
        default_factory=dict
    )
    results: tuple[str, ...] = ()
    scratch: bool = False
    shared: bool = False

    @functools.cached_property
    def source_hashes(self) -> dict[str, str]:
        """The hashes of `sources`."""
        return dict(self.sources() if callable(self.sources) else self.sources)


class Runner:
    """Runs the stages of one workdir."""

    def __init__(self, stages: Iterable[Stage], workdir: pathlib.Path, cache_dir: pathlib.Path):
        self.stages = {stage.name: stage for stage in stages}
        self._workdir, self._cache_dir = workdir, cache_dir
        self._keys: dict[str, str] = {}
        if processes.several():
            # A key may need hashes that process 0 takes and sends to all. So all take them now: a
            # key that is first needed within `on_first` would never be sent, and the others would
            # later wait for it.
            for name in self.stages:
                self.key(name)

    def key(self, name: str) -> str:
        """Return the hash of all that a stage's outputs depend on."""
        if name not in self._keys:
            stage = self.stages[name]
            self._keys[name] = files.text_hash(
                {
                    "format": FORMAT,
                    "versions": {package: versions()[package] for package in KEYED},
                    "stage": name,
                    "settings": dict(stage.settings),
                    "sources": stage.source_hashes,
                    "inputs": self._input_keys(stage),
                }
            )
        return self._keys[name]

    def _input_keys(self, stage: Stage) -> dict[str, str]:
        return {name: self.key(name) for name in (*stage.inputs, *stage.results)}

    def folder(self, name: str) -> pathlib.Path:
        if self.stages[name].shared:
            return self._cache_dir / "stages" / f"{name}-{self.key(name)[:16]}"
        return self._workdir / "stages" / name

    def aside(self, name: str) -> pathlib.Path:
        """Return a folder for what a stage keeps while it is under way: it survives a kill, and is
        deleted when the stage is done."""
        folder = self.folder(name)
        return folder.with_name(f".{folder.name}.{self.key(name)[:16]}{_ASIDE}")

    def manifest(self, name: str) -> dict[str, Any] | None:
        """Return the manifest if the stage was finished with these very inputs, else None; as this
        process sees it."""
        try:
            manifest = json.loads((self.folder(name) / MANIFEST).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except json.JSONDecodeError:
            say(f"{name}: its manifest is damaged; the stage runs again.")
            return None
        return manifest if manifest.get("key") == self.key(name) else None

    def status(self, name: str) -> str:
        """Return 'done', 'deleted' (finished, outputs deleted as scratch), 'damaged' or 'to run';
        process 0 decides."""
        return processes.on_first(self._status, name)

    def _status(self, name: str) -> str:
        manifest = self.manifest(name)
        if manifest is None:
            return "to run"
        if manifest["deleted"]:
            return "deleted"
        for relative, entry in manifest["outputs"].items():
            path = self.folder(name) / relative
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                return "damaged"
        return "done"

    def result(self, name: str) -> dict[str, Any]:
        """Return what a finished stage reported."""
        return processes.on_first(self._result, name)

    def _result(self, name: str) -> dict[str, Any]:
        return self.manifest(name)["result"]

    def need(self, name: str) -> pathlib.Path:
        """Return the folder of a stage with its outputs in place, running it and what it reads
        where needed."""
        stage, folder, status = self.stages[name], self.folder(name), self.status(name)
        if status == "done":
            return folder
        if status == "damaged":
            say(
                f"{name}: outputs are missing or have another size than its manifest says; "
                "the stage runs again."
            )
        for dependency in stage.inputs:
            self.need(dependency)
        for dependency in stage.results:
            if self.status(dependency) not in FINISHED:
                self.need(dependency)
        with processes.locked(folder.with_name(f".{folder.name}.lock")):
            # Another run that shares the stage may have finished it meanwhile.
            if self.status(name) != "done":
                self._execute(stage)
        return folder

    def finish(self, names: Iterable[str]) -> None:
        """Bring the named stages up to date; what is finished is not run again."""
        for name in names:
            if self.status(name) in FINISHED:
                # A kill may have come between a stage's end and that of its checkpoints.
                processes.on_first(self._clear_aside, name)
                say(f"{name}: reused, inputs unchanged")
            else:
                self.need(name)

    def scratch_left(self) -> list[pathlib.Path]:
        """Return the folders that hold outputs of scratch stages, or checkpoints of any stage; as
        this process sees it."""
        folders = []
        for name, stage in self.stages.items():
            if stage.scratch:
                folders.append(self.folder(name))
            if stage.shared:
                folders.append(self.aside(name))
        folders += sorted((self._workdir / "stages").glob(f".*{_ASIDE}"))
        return [folder for folder in folders if _has_outputs(folder)]

    def _clear_aside(self, name: str) -> None:
        """Delete what a finished stage kept while it was under way; of stages in the workdir also
        what it kept under other settings."""
        folders = [self.aside(name)]
        if not self.stages[name].shared:
            folders += self.folder(name).parent.glob(f".{name}.*{_ASIDE}")
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)

    def delete_scratch(self) -> None:
        """Delete the outputs of scratch stages, keeping their manifests, and whatever a killed run
        left half-made."""
        for path in (self._workdir / "stages").iterdir():
            if path.is_dir() and path.name not in self.stages:
                shutil.rmtree(path)
        for name, stage in self.stages.items():
            if not stage.scratch:
                continue
            manifest = self.manifest(name)
            if manifest is None:
                continue
            # The manifest first: a kill in between must not leave a stage that seems damaged.
            files.write_json(self.folder(name) / MANIFEST, {**manifest, "deleted": True})
            for path in self.folder(name).iterdir():
                if path.name != MANIFEST:
                    files.delete(path)

    def _execute(self, stage: Stage) -> None:
        say(f"{stage.name}: running")
        start = time.monotonic()
        with processes.new_folder(self.folder(stage.name), replace=True) as folder:
            result = stage.run(folder)
            processes.barrier(f"{stage.name} has run")  # so that all outputs are there to be hashed
            processes.on_first(self._write_manifest, stage, folder, dict(result), start)
        processes.on_first(self._clear_aside, stage.name)
        say(f"{stage.name}: done in {time.monotonic() - start:.0f} s")

    def _write_manifest(
        self, stage: Stage, folder: pathlib.Path, result: Mapping[str, Any], start: float
    ) -> None:
        manifest = {
            "stage": stage.name,
            "key": self.key(stage.name),
            "settings": dict(stage.settings),
            "sources": stage.source_hashes,
            "inputs": self._input_keys(stage),
            "result": result,
            "outputs": files.folder_hashes(folder),
            "deleted": False,
            "versions": versions(),
            "seconds": round(time.monotonic() - start, 1),
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        files.write_json(folder / MANIFEST, manifest)


def _has_outputs(folder: pathlib.Path) -> bool:
    return folder.is_dir() and any(path.name != MANIFEST for path in folder.iterdir())


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results may depend on."""
    result = {"safepatch_jax": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        result[package] = version_of(package)
    return result


def version_of(package: str) -> str:
    """Return the version of a package, or 'absent'."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
