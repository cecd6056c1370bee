"""What lies beside the weights that are read, and is left aside: nothing of it goes unsaid."""

from __future__ import annotations

import pathlib
from collections.abc import Collection, Sequence

from safepatch_jax.models.strays import MERGE, adapter_of
from safepatch_jax.runtime import files
from safepatch_jax.runtime.console import say, some

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
# What trainers leave beside a model, and adapters, which have a line of their own.
_TRAINING = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "adapter_model")
_said: set[str] = set()  # lines that this process has printed


def left_aside(folder: pathlib.Path, read: Collection[str]) -> list[str]:
    """Return one line for each kind of thing in a model folder that is not used.

    Args:
      folder: the model's.
      read: names of the weight files that are read.
    """
    names = sorted(path.name for path in folder.iterdir())
    notes = []
    if adapter := adapter_of(folder):
        notes.append(f"{adapter} lies beside the weights and is not applied; to apply it, {MERGE}")
    others = unread_weights(folder, read)
    if (folder / "original").is_dir():
        others.append("original/")
    if others:
        used = some(sorted(read), ", ", 2)
        notes.append(f"weights that are not read: {some(others, ', ', 4)} (read: {used})")
    code = [name for name in names if name.endswith(".py")]
    for config in ("config.json", "tokenizer_config.json"):
        if config in names and _names_code(folder / config):
            code.append(f"what auto_map of {config} names")
    if code:
        notes.append(f"code is neither run nor copied: {some(code, ', ', 4)}")
    return notes


def unread_weights(folder: pathlib.Path, read: Collection[str]) -> list[str]:
    """Return the names of weight files in a folder that are not among those that are read."""
    names = []
    for path in sorted(folder.iterdir()):
        training = path.name.startswith(_TRAINING)
        if path.name.endswith(_WEIGHTS) and not training and path.name not in read:
            names.append(path.name)
    return names


def _names_code(path: pathlib.Path) -> bool:
    try:
        return bool(files.read_json(path).get("auto_map"))
    except ValueError:
        return False  # who needs the file says what is wrong with it


def say_notes(folder: pathlib.Path, notes: Sequence[str]) -> None:
    """Print the notes about a folder, each once a process."""
    for note in notes:
        line = f"note: {folder}: {note}"
        if line not in _said:
            _said.add(line)
            say(line)
