"""Give a patched model, or its patch file alone, to the Hugging Face Hub. Needs no JAX.

What is sent is on a list: config, tokenizer, chat templates, licence, safetensors, card and
certificate; of a patch the file and a card. One commit, so that nobody ever sees a half of it.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from safepatch_jax.io import hub, hub_access
from safepatch_jax.io.folder import Checkpoint, has_weights
from safepatch_jax.io.hub_access import MODEL
from safepatch_jax.io.safetensors_file import INDEX, SINGLE
from safepatch_jax.patch_file.file import PatchFile
from safepatch_jax.run import manifests
from safepatch_jax.run.card_data import TAGS, Base, front_matter
from safepatch_jax.run.published import CARD, CERTIFICATE
from safepatch_jax.runtime import files, paths
from safepatch_jax.runtime.console import say
from safepatch_jax.runtime.reading import Refused, reason

PATCH = "patch.safetensors"
_RUN, _MERGE = "settings.json", "merge.json"
# Stages of a run whose folders hold a model that is no derived one.
_SHARED = ("import", "align", "patch", "export")
_CARD_OF_PATCH = """
# A safety patch

A SafePatching patch file (arXiv 2405.13820): the bits in which a patched model differs from its
backbone{base}, and the SHA-256 of every tensor before and after. It is no model: it turns that
backbone into the patched one, and back.

```
python -m launch.patch apply --patch={file} --model={model} --out=NEW_DIR
python -m launch.patch revert --patch={file} --model=NEW_DIR
```

{entries:,} entries in {tensors} tensors change. `python -m launch.patch inspect --patch={file}` has
the settings with which it was made. Another backbone is refused.{licence}
"""


@dataclasses.dataclass(frozen=True)
class Parcel:
    """What is sent.

    Attributes:
      what: in words.
      contents: of each file, by its name in the repository: where it lies, or its text.
    """

    what: str
    contents: Mapping[str, pathlib.Path | str]

    def lines(self) -> list[str]:
        """Return a line for each file with its size."""
        sizes = {name: _size(content) for name, content in self.contents.items()}
        width = max(map(len, sizes))
        lines = [f"  {name:{width}}  {size:>16,} bytes" for name, size in sizes.items()]
        return [*lines, f"  {'all':{width}}  {sum(sizes.values()):>16,} bytes"]

    def card(self) -> str:
        """Return the model card, '' where there is none."""
        card = self.contents.get(CARD, "")
        return card if isinstance(card, str) else card.read_text(encoding="utf-8")


def _size(content: pathlib.Path | str) -> int:
    if isinstance(content, str):
        return len(content.encode())
    return content.stat().st_size


def parcel_of_model(folder: str | pathlib.Path) -> Parcel:
    """Look at a model folder that is to be sent.

    Raises:
      ValueError: half written, no model, torch weights (pickles), a link that leaves the folder, or
        a derived (jailbroken or broken) model.
    """
    folder = pathlib.Path(paths.readable(folder)).absolute()
    if files.half_written(folder.name):
        raise Refused(f"{folder} is half-written: what makes it has not finished, or was killed.")
    safe = any((folder / name).is_file() for name in (SINGLE, INDEX))
    if not safe and has_weights(folder):
        raise Refused(
            f"{folder} has torch weights, which hold pickles and are not sent. Convert it: python "
            f"-m launch.convert --source=hf:{folder} --target=hf:DIR."
        )
    Checkpoint(folder)
    _refuse_derived(folder)
    contents = {}
    for name in [*hub.needed(folder), CARD, CERTIFICATE, _MERGE]:
        if (folder / name).is_file():
            contents[name] = files.own_file(folder / name, folder)
    return Parcel(f"the model {folder}", contents)


def parcel_of_patch(path: str | pathlib.Path) -> Parcel:
    """Look at a patch file that is to be sent; its card is made from what the file records. Raises
    ValueError for no patch file, a damaged one, or one that makes a derived model or was made from
    one that does."""
    path = pathlib.Path(paths.readable(path)).absolute()
    patch = PatchFile(path)
    made_from = _origins(patch.about)
    for about in made_from:
        settings = about.get("settings")
        _refuse_one_sided(path, settings if isinstance(settings, dict) else {})
    sources = {about["source"] for about in made_from if isinstance(about.get("source"), str)}
    origin = sources.pop() if len(sources) == 1 else ""
    if hub.split(origin) is None:
        origin = ""
    name, base = origin.partition("@")[0], ""
    licence = " Its backbone is not named here: fill in `base_model` above."
    if origin:
        base, licence = f" `{origin}`", ""
    text = _CARD_OF_PATCH.format(
        base=base,
        model=origin or "DIR",
        file=PATCH,
        entries=patch.entries(),
        tensors=len(patch.changed()),
        licence=licence + " The licence of the backbone applies.",
    )
    front = front_matter(Base(name), "adapter", tags=list(TAGS))
    return Parcel(f"the patch {path}", {PATCH: path, CARD: front + text})


def _origins(about: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return what a patch file records of its making, and of that of each patch it was made from:
    scaled, combined, or without another one."""
    found, waiting = [], [about]
    while waiting:
        record = waiting.pop()
        if not isinstance(record, dict):
            continue
        found.append(record)
        made_from = record.get("of", ())
        for part in made_from if isinstance(made_from, list) else [made_from]:
            if isinstance(part, dict):
                waiting.append(part.get("about"))
    return found


def push(parcel: Parcel, repository: str, *, private: bool | None = None) -> str:
    """Send a parcel in one commit to a repository, which is made if it is not there; files that are
    there already are not sent again, so that the same command goes on after an interruption.

    Returns:
      the address of the commit.

    Raises:
      ValueError: a wrong name, no network, or no right to write there; says what to do.
    """
    check_repository(repository)
    from huggingface_hub import CommitOperationAdd, HfApi, constants

    if constants.HF_HUB_OFFLINE:
        raise Refused("HF_HUB_OFFLINE is set, so nothing can be sent. Unset it.")
    hub_access.hide_token()
    operations = []
    for name, content in parcel.contents.items():
        data = content.encode() if isinstance(content, str) else str(content)
        operations.append(CommitOperationAdd(path_in_repo=name, path_or_fileobj=data))
    api = HfApi(library_name="safepatch_jax")
    say(f"Sending {parcel.what} to {hub_access.page(MODEL, repository)}")
    try:
        api.create_repo(repository, repo_type=MODEL, private=private, exist_ok=True)
        commit = api.create_commit(
            repository, operations, commit_message="Upload by safepatch_jax", repo_type=MODEL
        )
    except Exception as error:  # huggingface_hub has had three HTTP libraries
        raise _problem(error, repository) from error
    return str(commit.commit_url)


def check_repository(name: str) -> None:
    """Raise ValueError if a text is not ``org/name``."""
    parts = hub.split(name)
    if parts is None or parts[1]:
        raise Refused(f"--repo: '{name}' is not org/name, the name of a repository on the Hub.")


def _problem(error: Exception, repository: str) -> Refused:
    """Say in one line why nothing could be sent."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403, 404):
        said = hub_access.server_text(error)
        return Refused(
            f"{repository}: the Hub answers {status}: {said}. Run hf auth login with a token that "
            "may write there, then the same command."
        )
    if isinstance(error, ValueError):  # what the Hub finds wrong in the card
        return Refused(f"{repository}: {' '.join(str(error).split())[:300]} Nothing was committed.")
    if status:
        said = hub_access.server_text(error)
        return Refused(f"{repository}: the Hub answers {status}: {said}. Nothing was committed.")
    return Refused(
        f"{repository}: nothing was committed ({reason(error)}). The same command, given again, "
        "sends what is still missing."
    )


def _refuse_derived(folder: pathlib.Path) -> None:
    """Raise Refused for a folder that holds a derived model, as far as what lies in and above it
    tells."""
    for place in (folder, *folder.parents[:2]):
        _, manifest = manifests.read(place)
        stage = manifest.get("stage", "export")
        if stage == manifests.KEPT and isinstance(manifest.get("settings"), dict):
            _refuse_one_sided(folder, manifest["settings"])
        elif stage == manifests.KEPT:
            raise Refused(
                f"{folder} was made by an earlier version, which did not note the settings of the "
                "merge. Delete the patch (Patch.delete), make it again, and send that."
            )
        elif stage not in _SHARED:
            raise Refused(
                f"{folder} is of the stage {stage} of a run: a derived model, jailbroken or "
                "broken, or what is made of one. Send the run's stages/export/model."
            )
    records = [folder / _MERGE]
    if len(folder.parents) > 2 and folder.parents[1].name == "stages":
        records.append(folder.parents[2] / _RUN)
    for record in records:
        if record.is_file():
            _refuse_one_sided(folder, _settings_of(record))


def _settings_of(record: pathlib.Path) -> Mapping[str, Any]:
    content = files.read_json(record)
    settings = content.get("settings", content)
    return settings if isinstance(settings, dict) else {}


def _refuse_one_sided(path: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Raise Refused where recorded settings merge one of the two patches alone, which is to give a
    jailbroken or a broken model."""
    patch = settings.get("patch")
    if not isinstance(patch, dict):
        return
    weights = [("alpha", "OSM"), ("beta", "SE")]
    merge = patch.get("merge", "safepatching")
    if merge == "resta":
        weights = [("beta", "SE")]  # it has no alpha
    if merge == "safepatching":
        weights += [("top_rate_se", "OSM"), ("top_rate_osm", "SE")]
    for weight, alone in weights:
        if patch.get(weight) == 0:
            raise Refused(
                f"{path} was merged with patch.{weight}=0: it is the {alone} patch alone, a "
                f"{'jailbroken' if alone == 'OSM' else 'broken'} model, and is not sent."
            )
