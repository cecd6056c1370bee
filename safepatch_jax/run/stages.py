"""Stages with manifests: a stage whose inputs are unchanged is not run again.

A stage's key is the hash of its name, its settings, the hashes of its outside inputs and the keys
of the stages it reads. Its folder appears whole, with a manifest, or not at all, so a killed run
goes on where it stopped. Scratch stages (derived models and scores) are emptied after success;
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

from safepatch_jax.runtime import files, processes
from safepatch_jax.runtime.console import say

MANIFEST, _ASIDE = "manifest.json", ".steps"
FINISHED = ("done", "deleted")
FORMAT = 4  # raise when a stage's outputs change their meaning
# Versions on which a stage's bits may depend: arithmetic, token ids, dequantised weights.
KEYED = ("safepatch_jax", "jax", "jaxlib", "flax", "optax", "transformers", "tokenizers", "gguf")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of a job.

    Attributes:
      name: its folder's name.
      inputs: names of the stages whose folders it reads.
      results: names of the stages of which it reads the reported result alone, so that deleted
        outputs do not matter.
      settings: the settings that its outputs depend on.
      sources: hashes of outside inputs (model files, data files).
      run: fills the given empty folder and returns a result for the manifest.
      scratch: its outputs are deleted after success.
      shared: it lives in the cache and serves other runs too.
    """

    name: str
    inputs: tuple[str, ...]
    settings: Mapping[str, Any]
    sources: Mapping[str, str]
    run: Callable[[pathlib.Path], Mapping[str, Any]]
    scratch: bool = False
    shared: bool = False
    results: tuple[str, ...] = ()


class Runner:
    """Runs the stages of one workdir."""

    def __init__(self, stages: Iterable[Stage], workdir: pathlib.Path, cache_dir: pathlib.Path):
        self.stages = {stage.name: stage for stage in stages}
        self._workdir, self._cache_dir = workdir, cache_dir

    @functools.cache
    def key(self, name: str) -> str:
        stage = self.stages[name]
        return files.text_hash(
            {
                "format": FORMAT,
                "versions": {p: versions()[p] for p in KEYED},
                "stage": name,
                "settings": dict(stage.settings),
                "sources": dict(stage.sources),
                "inputs": self._input_keys(stage),
            }
        )

    def _input_keys(self, stage: Stage) -> dict[str, str]:
        return {name: self.key(name) for name in (*stage.inputs, *stage.results)}

    def folder(self, name: str) -> pathlib.Path:
        if self.stages[name].shared:
            return self._cache_dir / "stages" / f"{name}-{self.key(name)[:16]}"
        return self._workdir / "stages" / name

    def aside(self, name: str) -> pathlib.Path:
        """Return a folder for what a stage keeps while it is under way: it survives a kill, and
        goes when the stage is done."""
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
        return processes.on_first(lambda: self._status(name))

    def _status(self, name: str) -> str:
        manifest = self.manifest(name)
        if manifest is None:
            return "to run"
        if manifest["deleted"]:
            return "deleted"
        intact = all(
            (p := self.folder(name) / relative).is_file() and p.stat().st_size == entry["bytes"]
            for relative, entry in manifest["outputs"].items()
        )
        return "done" if intact else "damaged"

    def result(self, name: str) -> dict[str, Any]:
        """Return what a finished stage reported."""
        return processes.on_first(lambda: self.manifest(name)["result"])

    def need(self, name: str) -> pathlib.Path:
        """Return the folder of a stage with its outputs in place, running it and what it reads
        where needed."""
        status = self.status(name)
        if status != "done":
            if status == "damaged":
                say(
                    f"{name}: outputs are missing or have another size than its manifest says; "
                    "the stage runs again."
                )
            for dependency in self.stages[name].inputs:
                self.need(dependency)
            for dependency in self.stages[name].results:
                if self.status(dependency) not in FINISHED:
                    self.need(dependency)
            with processes.locked(self.folder(name).with_name(f".{self.folder(name).name}.lock")):
                if (
                    self.status(name) != "done"
                ):  # another run that shares the stage may have finished it meanwhile
                    self._execute(self.stages[name])
        return self.folder(name)

    def finish(self, names: Iterable[str]) -> None:
        """Bring the named stages up to date; what is finished is not run again."""
        for name in names:
            if self.status(name) in FINISHED:
                self._clear_aside(
                    name
                )  # where a kill came between a stage's end and that of its checkpoints
                say(f"{name}: reused, inputs unchanged")
            else:
                self.need(name)

    def scratch_left(self) -> list[pathlib.Path]:
        """Return the folders that hold outputs of scratch stages, or checkpoints of any stage; as
        this process sees it."""
        folders = [self.folder(name) for name, stage in self.stages.items() if stage.scratch]
        folders += [self.aside(name) for name, stage in self.stages.items() if stage.shared]
        folders += sorted((self._workdir / "stages").glob(f".*{_ASIDE}"))
        return [f for f in folders if f.is_dir() and any(p.name != MANIFEST for p in f.iterdir())]

    def _clear_aside(self, name: str) -> None:
        """Delete what a finished stage had kept while it was under way; of the workdir's own also
        under other settings."""

        def delete():
            folder = self.folder(name)
            others = [] if self.stages[name].shared else folder.parent.glob(f".{name}.*{_ASIDE}")
            for path in (self.aside(name), *others):
                shutil.rmtree(path, ignore_errors=True)

        processes.on_first(delete)

    def delete_scratch(self) -> None:
        """Delete the outputs of scratch stages, keeping their manifests, and whatever a killed run
        left half-made."""
        for path in (self._workdir / "stages").iterdir():
            if path.is_dir() and path.name not in self.stages:
                shutil.rmtree(path)
        for name, stage in self.stages.items():
            manifest = self.manifest(name) if stage.scratch else None
            if manifest is None:
                continue
            files.write_json(self.folder(name) / MANIFEST, {**manifest, "deleted": True})
            for path in self.folder(name).iterdir():
                if path.name != MANIFEST:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _execute(self, stage: Stage) -> None:
        say(f"{stage.name}: running")
        begun = time.monotonic()
        with processes.new_folder(self.folder(stage.name), replace=True) as folder:
            result = stage.run(folder)
            processes.barrier(f"{stage.name} has run")  # so that all outputs are there to be hashed
            processes.on_first(
                lambda: files.write_json(
                    folder / MANIFEST,
                    {
                        "stage": stage.name,
                        "key": self.key(stage.name),
                        "settings": dict(stage.settings),
                        "sources": dict(stage.sources),
                        "inputs": self._input_keys(stage),
                        "result": dict(result),
                        "outputs": files.folder_hashes(folder),
                        "deleted": False,
                        "versions": versions(),
                        "seconds": round(time.monotonic() - begun, 1),
                        "finished": datetime.datetime.now(datetime.UTC).isoformat(
                            timespec="seconds"
                        ),
                    },
                )
            )
        self._clear_aside(stage.name)
        say(f"{stage.name}: done in {time.monotonic() - begun:.0f} s")


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results may depend on."""
    packages = (
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
    from safepatch_jax import __version__

    return {"safepatch_jax": __version__, "python": platform.python_version()} | {
        p: version_of(p) for p in packages
    }


def version_of(package: str) -> str:
    """Return the version of a package, or 'absent'."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
