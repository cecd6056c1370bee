"""What a chain needs of its settings and its starting model."""

from __future__ import annotations

import pathlib
from typing import Any

from safepatch_jax.io.folder import Checkpoint
from safepatch_jax.io.hf import check_keys
from safepatch_jax.io.safetensors_file import INDEX, SINGLE
from safepatch_jax.models.config import read_hf_config
from safepatch_jax.models.table import param_table
from safepatch_jax.outcome import outcome_settings
from safepatch_jax.patch_file.file import BITS
from safepatch_jax.patch_file.log import companion_hashes, folder_hash
from safepatch_jax.patch_file.log_lines import FORMAT, START_DIR
from safepatch_jax.run.context import Context
from safepatch_jax.run.convert import convert
from safepatch_jax.run.job import align_model
from safepatch_jax.run.place import Place
from safepatch_jax.run.stages import versions
from safepatch_jax.runtime import files, mirror, processes
from safepatch_jax.runtime.addresses import is_address, name_of
from safepatch_jax.runtime.console import say, some
from safepatch_jax.settings import Settings


def check_settings(settings: Settings) -> None:
    """Raise ValueError for settings with which no chain can be made."""
    if not settings.model.source:
        raise ValueError(
            "No model given. Set --model.source to a Hugging Face folder, org/name of the "
            "Hugging Face Hub, a .gguf file, or 'smollm2'."
        )
    if settings.export.dtype != "keep":
        raise ValueError(
            f"export.dtype is {settings.export.dtype}, and a chain is kept as patch files, which "
            "hold differences of bits. Set --export.dtype=keep; where updates are lost in "
            "bfloat16, also --export.rounding=stochastic, or convert the model first: python -m "
            "launch.convert --source=hf:DIR --target=hf:DIR2 --dtype=float32."
        )
    if settings.data.category:
        raise ValueError(
            f"data.category is {settings.data.category!r}, and --links gives each link its own. "
            "Leave it out."
        )


def make_start(settings: Settings, context: Context, workdir: pathlib.Path) -> dict[str, Any]:
    """Bring the starting model of a chain into place; return what the log says of it.

    Args:
      settings, workdir: of the chain.
      context: of these settings, without an alignment.

    Raises:
      ValueError: as `refuse_unpatchable`.
    """
    place, outcome = Place.parse(settings.model.source), outcome_settings(settings)
    name = START_DIR.format(files.text_hash([outcome, context.data_hashes])[:8])
    copy = workdir / name
    if place.kind == "hf" and not settings.align.enabled:
        folder = place.path.absolute()
        logged = name_of(folder)
    else:
        folder, logged = copy, name
        _make_copy(settings, place, copy)
        if not processes.first() and is_address(name_of(copy)):
            mirror.fetch(copy)
    read_hf_config(folder)
    processes.on_first(refuse_unpatchable, folder)
    return {
        "format": FORMAT,
        "source": settings.model.source,
        "aligned": settings.align.enabled,
        "folder": logged,
        "model": processes.on_first(folder_hash, folder),
        "companions": processes.on_first(companion_hashes, folder),
        "settings": outcome,
        "versions": versions(),
    }


def _make_copy(settings: Settings, place: Place, copy: pathlib.Path) -> None:
    """Align or convert the source into the workdir, if that is not done yet."""
    if processes.on_first(mirror.is_published, copy):
        return
    if settings.align.enabled:
        say(f"The starting model: aligned into {copy}")
        align_model(settings, copy)
    else:
        say(f"The starting model: converted into {copy}")
        mesh = settings.mesh.shape
        source = f"{place.kind}:{name_of(place.path)}"
        convert(source, f"hf:{name_of(copy)}", mesh=mesh, certify="hashes")


def refuse_unpatchable(folder: pathlib.Path) -> None:
    """Raise ValueError unless the starting model is stored as links are: safetensors, of each
    tensor one, in known dtypes."""
    checkpoint, config = Checkpoint(folder), read_hf_config(folder)
    table = param_table(config)
    check_keys(checkpoint, table, config)
    names = set(table.hf_names())
    problems = []
    if checkpoint.layout not in (SINGLE, INDEX):
        problems.append(f"its weights are {checkpoint.layout}")
    for name, tensor in checkpoint.tensors.items():
        if name not in names:
            problems.append(f"{name} is a copy or a buffer")
        if tensor.dtype not in BITS:
            problems.append(f"{name} is {tensor.dtype}")
    if problems:
        raise ValueError(
            f"{folder} cannot begin a chain: {some(problems)}. Convert it first and give the "
            f"result as --model.source: python -m launch.convert --source=hf:{folder} "
            "--target=hf:DIR."
        )
