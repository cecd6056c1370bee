"""The patch: made from scores, applied to folders and to live tensors, taken off again."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from safepatch_jax.api.pair import Scores
from safepatch_jax.api.session import Model, refuse_upstream
from safepatch_jax.api.shown import Picture, Shown
from safepatch_jax.io import hub
from safepatch_jax.patch_file import apply as folders
from safepatch_jax.patch_file import convert, entries
from safepatch_jax.patch_file import tensors as live
from safepatch_jax.patch_file.apply import Outcome
from safepatch_jax.patch_file.entries import Entries
from safepatch_jax.patch_file.file import PatchFile
from safepatch_jax.run import manifests
from safepatch_jax.run.job import Job
from safepatch_jax.run.published import CERTIFICATE, describe_patch
from safepatch_jax.runtime import files
from safepatch_jax.runtime.console import say
from safepatch_jax.runtime.paths import resolve

if TYPE_CHECKING:
    import torch

    from safepatch_jax.models.config import DecoderConfig

    Target = str | os.PathLike[str] | Model | torch.nn.Module | Mapping[str, torch.Tensor]

PATCHES = "patches"  # folder of a session
_FILE = "patch.safetensors"
_MODEL = "patched"  # a model's folder names it in reports
_PATCH = ("patch", "export", "run", "evaluate")


@dataclasses.dataclass(frozen=True, repr=False)
class Patch(Shown):
    """A sparse patch of a model, see `patch` and `read_patch`.

    Attributes:
      file: the patch file, for launch.patch too; None where export.dtype names another dtype than
        the backbone's, of which there is no difference in bits.
      folder: the patched model as a Hugging Face folder; None for one of `read_patch`.
      model: the backbone; None for one of `read_patch`.
      total: what was kept and how much survives the cast, see `patching.statistics.totals`.
      tensors: the same of each tensor.
      made_by: the settings of the merge, in words.
    """

    file: pathlib.Path | None
    folder: pathlib.Path | None = None
    model: Model | None = None
    total: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tensors: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    made_by: str = ""

    def apply(
        self,
        target: Target,
        out: str | os.PathLike[str] | None = None,
        ignore: Sequence[str] = (),
    ) -> Outcome:
        """Patch a model; what is patched already stays as it is.

        Args:
          target: a Hugging Face folder or org/name of the Hub; a `Model`; or live torch tensors: a
            module or its `state_dict()`, by the names that transformers or an inference server
            gives them (docs/hot_patch.md).
          out: of a folder, the new folder for the result; without it the folder is changed in
            place. A `Model` and a model of the Hub need it, tensors take none.
          ignore: of live tensors, patterns of names that are not the checkpoint's.

        Returns:
          which tensors were changed, and which were as they should be.

        Raises:
          ValueError: another model, or one that was changed since: all tensors are compared with
            the patch by dtype, shape and SHA-256 before any is written.
        """
        return self._move(target, out, ignore, folders.apply, live.apply_tensors)

    def revert(
        self,
        target: Target,
        out: str | os.PathLike[str] | None = None,
        ignore: Sequence[str] = (),
    ) -> Outcome:
        """Give a patched model the backbone's bits back; see `apply`."""
        return self._move(target, out, ignore, folders.revert, live.revert_tensors)

    def apply_tree(
        self, params: Mapping[str, Any], config: DecoderConfig, donate: bool = False
    ) -> dict[str, Any]:
        """Patch a live tree of JAX arrays, such as `io.hf.load_params` gives; see
        `api.trees.apply_tree`."""
        from safepatch_jax.api.trees import apply_tree

        return apply_tree(self._opened(), params, config, donate)

    def revert_tree(
        self, params: Mapping[str, Any], config: DecoderConfig, donate: bool = False
    ) -> dict[str, Any]:
        """Give a patched tree the backbone's bits back; see `apply_tree`."""
        from safepatch_jax.api.trees import revert_tree

        return revert_tree(self._opened(), params, config, donate)

    def entries(self, model: str | os.PathLike[str] | None = None) -> Iterator[Entries]:
        """Yield what is changed, tensor by tensor: checkpoint name, flat indices, bits, hashes; and
        the values before and after, from the folder of the backbone or of the patched model.

        Raises:
          ValueError: another model.
        """
        return entries.entries(self._opened(), None if model is None else resolve(model))

    def convert(
        self,
        to: str,
        model: str | os.PathLike[str],
        out: str | os.PathLike[str],
        reverse: bool = False,
    ) -> str:
        """Write the patch in a format of inference servers, see `patch_file.convert`; returns what
        was written, in words."""
        return convert.write_format(self._opened(), to, resolve(model), resolve(out), reverse)

    def _opened(self) -> PatchFile:
        if self.file is None:
            raise ValueError(
                "There is no patch file: export.dtype is not the backbone's, so the two differ in "
                "every tensor. Make the patch with dtype='keep', or take patch.folder."
            )
        return PatchFile(self.file)

    def _move(
        self, target: Any, out: Any, ignore: Sequence[str], in_folder: Any, in_memory: Any
    ) -> Outcome:
        if self.file is None:
            self._opened()  # says why there is none
        if isinstance(target, str | os.PathLike | Model):
            if isinstance(target, Model) and out is None:
                raise ValueError(
                    f"{target.source} is the backbone of a session, which is kept. Give out=DIR "
                    "for the patched model, or the path of a folder that may be changed."
                )
            if ignore:
                raise ValueError("ignore= is about live tensors; a folder is patched whole.")
            folder = _folder_of(target, out)
            return in_folder(self.file, folder, None if out is None else resolve(out))
        if out is not None:
            raise ValueError("Tensors are patched where they are: leave out= out.")
        if not isinstance(target, Mapping):
            if not hasattr(target, "state_dict"):
                raise ValueError(
                    f"A patch goes onto a folder, a model of sp.load, a torch module or its "
                    f"state_dict(), got {type(target).__name__}."
                )
            target = target.state_dict()
        return in_memory(self.file, target, ignore)

    @property
    def picture(self) -> Picture:
        """Where in the model the patch lies, and how large its entries are. Raises ValueError for
        one of `read_patch`, whose file does not say."""
        if self.folder is None:
            raise ValueError("A patch file holds no statistics; draw the patch where it was made.")
        path = self.folder.parent / "patch.png"
        if not path.is_file():
            from safepatch_jax.run.figures import draw_patch  # it imports JAX

            draw_patch(self.tensors, path)
        return Picture(path)

    def delete(self) -> None:
        """Delete the patch and the patched model. Raises ValueError for one of `read_patch`."""
        if self.folder is None:
            raise ValueError(f"This patch was only read: delete {self.file} yourself.")
        files.delete(self.folder.parent)

    def _title(self) -> str:
        return f"Patch of {self.model.source}" if self.model else f"Patch {self.file}"

    def _rows(self) -> Iterable[Sequence[str]]:
        if self.file is not None:
            opened = PatchFile(self.file)
            size, entries = self.file.stat().st_size, opened.entries()
            changed = f"{entries:,} in {len(opened.changed())} tensors"
            yield "changed entries", changed
            yield "patch file", f"{self.file}, {size / 1e6:,.1f} MB"
        if self.folder is not None:
            total = self.total
            yield "kept", f"SE {total['kept_se']:,}, OSM {total['kept_osm']:,}"
            yield "overlap of the top sets", f"{total['overlap']:.1%}"
            yield "survive the cast", f"{total['survival']:.1%}"
            yield "settings", self.made_by
            yield "patched model", str(self.folder)


def _folder_of(target: str | os.PathLike[str] | Model, out: Any) -> pathlib.Path:
    if isinstance(target, Model):
        return target.folder()
    name = os.fspath(target)
    if out is None and hub.named(name):
        raise ValueError(f"{name} is a model of the Hub, whose cache is kept: give out=DIR.")
    return resolve(hub.folder_of(name))


def patch(
    scores: Scores,
    *,
    top_rate_se: float | None = None,
    top_rate_osm: float | None = None,
    retention: float | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    **settings: Any,
) -> Patch:
    """Select, retain and merge entries of both patches; write the patched model and the patch file.

    Derived models and scores are deleted then, unless keep_scratch=True was given here or before:
    keep them to try several patches.

    Args:
      scores: of `score`.
      top_rate_se, top_rate_osm: share of each matrix that is a candidate, by importance.
      retention: probability with which a kept entry stays.
      alpha, beta: weights of the SE and of the OSM patch.
      settings: by keyword: those of patch and export first, see docs/api.md.

    Raises:
      ValueError: as `score`; a patch that keeps nothing or changes nothing.
    """
    values = {
        "top_rate_se": top_rate_se,
        "top_rate_osm": top_rate_osm,
        "retention": retention,
        "alpha": alpha,
        "beta": beta,
    }
    values = {name: value for name, value in values.items() if value is not None} | settings
    session = scores.session.with_keywords(values, _PATCH, "patch")
    job = session.job()
    refuse_upstream(scores.keys, job, values, "patch", "score")
    # Of the export as it was certified: in its folder another patch may lie by then.
    place = session.workdir / PATCHES / job.runner.key("certify_export")[:16]
    if not _is_whole(place):
        made = ["export", "patch_file", "certify_export"]
        job.make([name for name in made if name in job.runner.stages])
        _keep(job, place)
        say(f"Patched model: {place / _MODEL}")
    if not session.settings.run.keep_scratch:
        session.delete_scratch()
    result = manifests.read(place)[1]["result"]
    file = place / _FILE
    return Patch(
        file if file.is_file() else None,
        place / _MODEL,
        dataclasses.replace(scores.pair.model, session=session),
        result["total"],
        result["tensors"],
        describe_patch(session.settings.to_dict()),
    )


def _is_whole(place: pathlib.Path) -> bool:
    state, manifest = manifests.read(place)
    return state == manifests.SOUND and not manifests.changed_output(place, manifest)


def _keep(job: Job, place: pathlib.Path) -> None:
    """Keep a patch where no other one takes its place: files are linked, or copied where there are
    no links."""
    runner, outputs = job.runner, {}
    with files.new_folder(place, replace=True) as folder:
        for name in ("export", "patch_file"):
            if name in runner.stages:
                manifest = runner.manifest(name)
                kept = _placed(manifest["outputs"])
                outputs |= kept
                for output, name_here in zip(manifest["outputs"], kept):
                    _link(runner.folder(name) / output, folder / name_here)
        _link(runner.folder("certify_export") / CERTIFICATE, folder / _MODEL / CERTIFICATE)
        result = runner.result("patch")
        record = {"stage": manifests.KEPT, "key": runner.key("certify_export"), "deleted": False}
        record["settings"] = {"patch": dataclasses.asdict(job.settings.patch)}
        manifests.write(folder, record | {"result": result, "outputs": outputs})


def _placed(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the outputs of a stage by their names among what is kept."""
    places = {}
    for name, entry in outputs.items():
        first, slash, rest = name.partition("/")
        places[f"{_MODEL}/{rest}" if slash and first == "model" else name] = entry
    return places


def _link(source: pathlib.Path, target: pathlib.Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def read_patch(path: str | os.PathLike[str]) -> Patch:
    """Open a patch file, made here or by launch.patch, to apply or revert it.

    Raises:
      ValueError: no patch file, or a damaged one.
    """
    file = PatchFile(resolve(path))
    return Patch(file.path)
