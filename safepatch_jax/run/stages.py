"""Stages with manifests: a stage whose inputs are unchanged is not run again.

A stage's key is the hash of its name, its settings, the hashes of its outside inputs and the keys
of the stages it reads. Its folder appears whole, with a manifest, or not at all, so a killed run
is resumed where it stopped. What a finished stage holds is compared with its manifest: by size, and
by SHA-256 where it leaves the run, where a file is newer than the manifest, or where all is to be
verified. Scratch stages (derived models and scores) are emptied after success; their manifests
remain. Where a run has several processes, process 0 reads and writes manifests and
decides for all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import os
import pathlib
import platform
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from safepatch_jax import __version__
from safepatch_jax.run import manifests
from safepatch_jax.run.manifests import MANIFEST
from safepatch_jax.run.pace import Pace, recorded
from safepatch_jax.runtime import files, mirror, processes
from safepatch_jax.runtime.console import detail, say, some
from safepatch_jax.runtime.reading import Refused

_ASIDE = ".steps"
_IMPORT = "import"  # the stage whose key stands for a model
_ASIDE_NAME = re.compile(r"\.(.+)\.[0-9a-f]{16}\.steps", re.DOTALL)
CACHE = "--run.cache_dir"
FINISHED = ("done", "deleted")
FORMAT = 5  # raise when a stage's outputs change their meaning
# Versions on which a stage's bits may depend: arithmetic, token ids, dequantised weights.
KEYED = ("safepatch_jax", "jax", "jaxlib", "flax", "optax", "transformers", "tokenizers", "gguf")
_PACKAGES = (*KEYED[1:], "orbax-checkpoint", "safetensors", "numpy")


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
      leaves: its outputs are what the run gives away, and are verified by hash.
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
    leaves: bool = False

    @functools.cached_property
    def source_hashes(self) -> dict[str, str]:
        """The hashes of `sources`."""
        return dict(self.sources() if callable(self.sources) else self.sources)


class Runner:
    """Runs the stages of one workdir.

    Args:
      stages: in the order in which they run.
      workdir, cache_dir: where their folders lie.
      verify: compare all outputs by SHA-256 before they are used.
    """

    def __init__(
        self,
        stages: Iterable[Stage],
        workdir: pathlib.Path,
        cache_dir: pathlib.Path,
        verify: bool = False,
    ):
        self.stages = {stage.name: stage for stage in stages}
        self._workdir, self._cache_dir, self._verify = workdir, cache_dir, verify
        self._keys: dict[str, str] = {}
        self._verified: dict[str, list[int]] = {}  # times of the files that were hashed, by stage
        self._pace = Pace((), {}, {})
        self._damages: dict[str, str] = {}  # what is wrong with a stage, as process 0 sees it
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
        state, manifest = manifests.read(self.folder(name))
        if state == manifests.DAMAGED and name not in self._damages:
            self._damages[name] = "its manifest is damaged"
            say(f"{name}: its manifest is damaged; the stage runs again.")
        return manifest if manifest.get("key") == self.key(name) else None

    def status(self, name: str) -> str:
        """Return 'done', 'deleted' (finished, outputs deleted as scratch), 'damaged' or 'to run';
        process 0 decides. Raises ValueError if the stage's folder is a link."""
        return processes.on_first(self._status, name)

    def _status(self, name: str) -> str:
        folder = self.folder(name)
        files.refuse_link(folder, folder.parent if self.stages[name].shared else self._workdir)
        mirror.refresh(folder)
        manifest = self.manifest(name)
        if manifest is None:
            return "to run"
        if manifest["deleted"]:
            return "deleted"
        damage = self._damage(name, manifest)
        if damage:
            self._damages[name] = damage
        return "damaged" if damage else "done"

    def _damage(self, name: str, manifest: Mapping[str, Any]) -> str:
        """Say what of a stage's outputs is not as its manifest says; '' if nothing is."""
        folder = self.folder(name)
        if mirror.is_one(folder):
            whole = self._verify or self.stages[name].leaves
            return mirror.damage(folder, manifest["outputs"], whole)
        if manifests.changed_output(folder, manifest):
            return "outputs are missing or have another size than its manifest says"
        own, *times = look = manifests.look(folder, manifest)
        newer = max(times, default=0) > own
        if not (newer or self._verify or self.stages[name].leaves):
            return ""
        if self._verified.get(name) != look:
            if other := manifests.other_output(folder, manifest):
                return f"{other} has other bytes than its manifest says (SHA-256)"
            if newer:  # it was copied, say: so that it is not hashed at every start
                with contextlib.suppress(OSError):
                    os.utime(folder / MANIFEST)
            self._verified[name] = manifests.look(folder, manifest)
        return ""

    def result(self, name: str) -> dict[str, Any]:
        """Return what a finished stage reported."""
        return processes.on_first(self._result, name)

    def _result(self, name: str) -> dict[str, Any]:
        manifest = self.manifest(name)
        if manifest is None:
            raise Refused(
                f"{self.folder(name) / MANIFEST} is gone or damaged. Give the same command again, "
                "and the stage is made again."
            )
        return manifest["result"]

    def need(self, name: str) -> pathlib.Path:
        """Return the folder of a stage with its outputs in place, running it and what it reads
        where needed."""
        stage, folder, status = self.stages[name], self.folder(name), self.status(name)
        if status == "done":
            return self.outputs(name)
        if status == "damaged":
            say(f"{name}: {self._damages.get(name, '')}; the stage runs again.")
        for dependency in stage.inputs:
            self.need(dependency)
        for dependency in stage.results:
            if self.status(dependency) not in FINISHED:
                self.need(dependency)
        if stage.shared:
            processes.on_first(files.make_usable, self._cache_dir / "stages", CACHE)
        with processes.locked(folder.with_name(f".{folder.name}.lock")):
            # Another run that shares the stage may have finished it meanwhile.
            if self.status(name) != "done":
                self._execute(stage)
        return self.outputs(name)

    def outputs(self, name: str) -> pathlib.Path:
        """Return the folder of a finished stage, whose outputs are brought here if they lie in a
        bucket."""
        folder = self.folder(name)
        if mirror.is_one(folder):
            if not processes.first():  # process 0 has done so, see `_status`
                mirror.refresh(folder)
            mirror.bring(folder, processes.on_first(self._outputs, name))
        return folder

    def _outputs(self, name: str) -> dict[str, Any]:
        manifest = self.manifest(name)
        return {} if manifest is None or manifest["deleted"] else manifest["outputs"]

    def waiting(self) -> list[str]:
        """Return the stages that a run to the end will run, in their order: what is not finished,
        and what that reads and is not there."""
        status = {name: self.status(name) for name in self.stages}
        wanted = [name for name in self.stages if status[name] not in FINISHED]
        found: set[str] = set()
        while wanted:
            name = wanted.pop()
            if name not in found:
                found.add(name)
                wanted += [x for x in self.stages[name].inputs if status[x] != "done"]
        return [name for name in self.stages if name in found]

    def expect(self, names: Sequence[str], work: Mapping[str, float]) -> None:
        """Take note of the stages that will run, so that each one says how far the run is.

        Args:
          names: in their order, see `waiting`.
          work: see `pace.work`.
        """
        folders = (self._workdir / "stages", self._cache_dir / "stages")
        known = recorded(names, folders, self._model_key()) if processes.first() else {}
        self._pace = Pace(names, known, work)

    def _model_key(self) -> str:
        """Return what stands for the model in manifests; '' where no stage imports one."""
        return self.key(_IMPORT) if _IMPORT in self.stages else ""

    def complete(self) -> None:
        """Run what of all stages is not finished, as where a manifest was lost."""
        for name in self.stages:
            if self.status(name) not in FINISHED:
                self.need(name)

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
        """Return the folders that hold outputs of scratch stages, also what killed runs left of
        them, or checkpoints of any stage; as this process sees it."""
        folders = []
        for name, stage in self.stages.items():
            if stage.scratch:
                folders += [self.folder(name), *files.half_written_of(self.folder(name))]
            if stage.shared:
                folders.append(self.aside(name))
        folders += sorted((self._workdir / "stages").glob(f".*{_ASIDE}"))
        return [folder for folder in folders if _has_outputs(folder) or mirror.has_any(folder)]

    def _clear_aside(self, name: str) -> None:
        """Delete what a finished stage kept while it was under way; of stages in the workdir also
        what it kept under other settings."""
        folders = [self.aside(name)]
        if not self.stages[name].shared:
            for folder in self.folder(name).parent.glob(f".*{_ASIDE}"):
                if _stage_aside(folder.name) == name:
                    folders.append(folder)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)  # refuses a link
            mirror.delete(folder)

    def delete_scratch(self) -> None:
        """Delete the outputs of scratch stages, keeping their manifests, and whatever a killed run
        left half-made."""
        left = delete_stages(self._workdir / "stages", keep=self.stages)
        mirror.delete_others(self._workdir / "stages", keep=self.stages)
        for name, stage in self.stages.items():
            if stage.scratch:
                left += self.delete_outputs(name)
        if left:
            say(f"Left in {self._workdir / 'stages'}, as no run has made it: {some(left, ', ')}")

    def delete_outputs(self, name: str) -> list[str]:
        """Delete the outputs of a stage, keeping its manifest; return the names of what is left, as
        no run has made it."""
        stage, manifest = self.stages[name], self.manifest(name)
        if manifest is None:
            return []
        folder = self.folder(name)
        files.refuse_link(folder, folder.parent if stage.shared else self._workdir)
        # The manifest first: a kill in between must not leave a stage that seems damaged.
        manifests.write(folder, {**manifest, "deleted": True})
        manifests.delete_outputs(folder, manifest)
        mirror.rewritten(folder)
        return [f"{name}/{other}" for other in manifests.strangers(folder)]

    def _refuse_strangers(self, name: str) -> None:
        """Raise ValueError if a stage's folder, which is to be replaced, holds what no run has
        made."""
        folder = self.folder(name)
        strangers = [] if mirror.is_one(folder) else manifests.strangers(folder)
        if strangers:  # where a folder stands for one of a bucket, all in it is a copy
            raise Refused(
                f"{folder} holds files that no run has made ({some(strangers, ', ')}), and the "
                f"stage {name} needs that folder for itself. They were left as they are; move them "
                "away, then give the same command again."
            )

    def _execute(self, stage: Stage) -> None:
        processes.on_first(self._refuse_strangers, stage.name)
        say(f"{stage.name}: running{self._pace.before(stage.name)}")
        detail(f"{stage.name}: key {self.key(stage.name)[:16]}, {self._reason(stage)}")
        start = time.monotonic()
        with processes.new_folder(self.folder(stage.name), replace=True) as folder:
            result = stage.run(folder)
            processes.barrier(f"{stage.name} has run")  # so that all outputs are there to be hashed
            processes.on_first(self._write_manifest, stage, folder, dict(result), start)
        processes.on_first(self._clear_aside, stage.name)
        seconds = time.monotonic() - start
        self._pace.done(stage.name, seconds)
        say(f"{stage.name}: done in {seconds:.0f} s")

    def _reason(self, stage: Stage) -> str:
        """Say why a stage runs: what its folder's manifest has otherwise."""
        state, manifest = manifests.read(self.folder(stage.name))
        if state != manifests.SOUND:
            return f"its manifest is {state}"
        now = {
            "settings": dict(stage.settings),
            "sources": stage.source_hashes,
            "inputs": self._input_keys(stage),
        }
        changes = []
        for part, values in now.items():
            before = manifest.get(part, {})
            names = sorted(x for x in {*before, *values} if before.get(x) != values.get(x))
            if names:
                changes.append(f"{part} {some(names, ', ')}")
        return f"other {' and '.join(changes)}" if changes else "its outputs are not there"

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
            "outputs": files.folder_hashes(folder) | mirror.array_hashes(folder),
            "deleted": False,
            "versions": versions(),
            "model": self._model_key(),
            "seconds": round(time.monotonic() - start, 1),
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        manifests.write(folder, manifest)


def delete_stages(folder: pathlib.Path, keep: Iterable[str] = ()) -> list[str]:
    """Delete the stages in a folder but for some, and what killed runs left half-made there; return
    the names of what is left, as no run has made it."""
    keep, left = set(keep), []
    if not folder.is_dir():
        return []
    files.refuse_link(folder)
    for path in sorted(folder.iterdir()):
        if not path.is_symlink() and (files.half_written(path.name) or _stage_aside(path.name)):
            files.delete(path)
        elif path.is_dir() and path.name not in keep:
            left += manifests.delete_stage(path)
        elif _is_idle_lock(path, keep):
            path.unlink()
    return left


def _is_idle_lock(path: pathlib.Path, keep: Collection[str]) -> bool:
    """Return whether a file is the lock of a stage that is not kept."""
    name = path.name.removeprefix(".").removesuffix(files.LOCK)
    is_lock = path.name == f".{name}{files.LOCK}" and name not in keep
    return is_lock and not path.is_symlink() and path.is_file() and not path.stat().st_size


def _stage_aside(name: str) -> str:
    """Return the stage whose checkpoints a folder of this name holds; '' if it is no such name."""
    match = _ASIDE_NAME.fullmatch(name)
    return match[1] if match else ""


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
