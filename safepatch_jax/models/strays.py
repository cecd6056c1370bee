"""What a folder is that is no model folder, or holds no whole model: an adapter, a cache of the
hub, a checkpoint of training; and what to give instead."""

from __future__ import annotations

import pathlib
from typing import Any, NoReturn

from safepatch_jax.runtime import files
from safepatch_jax.runtime.console import some
from safepatch_jax.runtime.reading import Refused
from safepatch_jax.runtime.text import printable

_ADAPTER = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_CONFIG = "config.json"
_MOST_INNER = 200  # folders within a folder that are looked at
FORMAT = "Give a folder in Hugging Face format (config.json, *.safetensors, tokenizer files)"


def adapter_of(folder: pathlib.Path) -> str | None:
    """Say what adapter lies in a folder, and of which base; None if there is none."""
    there = [name for name in (_ADAPTER, *_ADAPTER_WEIGHTS) if (folder / name).is_file()]
    if not there:
        return None
    settings: dict[str, Any] = {}
    if there[0] == _ADAPTER:
        try:
            settings = files.read_json(folder / _ADAPTER)
        except ValueError:
            pass  # a damaged file is an adapter's all the same
    kind, base = settings.get("peft_type"), settings.get("base_model_name_or_path")
    kind = f"a {printable(kind, 20)}" if isinstance(kind, str) else "an"
    base = printable(base, 100) if isinstance(base, str) and base else "an unnamed base model"
    return f"{kind} adapter ({there[0]}) of {base}"


MERGE = (
    "merge it into its base first (python -m launch.convert --source=hf:BASE --adapter=ADAPTER "
    "--target=hf:DIR; another kind than LoRA with PEFT's merge_and_unload())"
)


def refuse_no_model(folder: pathlib.Path) -> NoReturn:
    """Raise Refused for what has no config.json: says what it is, as far as that is seen."""
    if folder.is_file():
        raise Refused(_file_advice(folder))
    if not folder.is_dir():
        raise Refused(
            f"No model folder '{folder}'. {FORMAT}, org/name of the Hugging Face Hub, a .gguf "
            "file, or 'smollm2'."
        )
    advice = other_kind(folder) or _inner_advice(folder)
    if advice is None:
        advice = f"{folder} has no config.json, so it is not a model folder. {FORMAT}."
    raise Refused(advice)


def _file_advice(path: pathlib.Path) -> str:
    if path.suffix == ".gguf":
        return f"{path} is a GGUF file, not a folder: give gguf:{path}."
    if (path.parent / _CONFIG).is_file():
        return f"{path} is a file; give the folder of the model: {path.parent}."
    return f"{path} is a file, not a model folder. {FORMAT}."


def other_kind(folder: pathlib.Path) -> str | None:
    """Say what a folder without readable weights is, and the way out; None if it is not known."""
    if adapter := adapter_of(folder):
        return f"{folder} holds {adapter}, not a model: {MERGE}, and give DIR."
    names = _names(folder)
    if "zero_to_fp32.py" in names or _any(names, "global_step", "zero_pp_rank", "mp_rank"):
        return (
            f"{folder} is a checkpoint of DeepSpeed, whose weights are cut over processes. Gather "
            "them first (python zero_to_fp32.py . DIR --safe_serialization, in that folder), copy "
            "config.json and the tokenizer files to DIR, and give DIR."
        )
    if any(name.endswith(".distcp") for name in names) or _any(names, "pytorch_model_fsdp"):
        return (
            f"{folder} is a checkpoint of FSDP, whose weights are cut over processes. Gather them "
            "first (accelerate merge-weights CHECKPOINT DIR; python -m "
            "torch.distributed.checkpoint.format_utils dcp_to_torch CHECKPOINT FILE), copy "
            "config.json and the tokenizer files to DIR, and give DIR."
        )
    originals = sorted(name for name in names if name.startswith("consolidated."))
    if originals:
        return (
            f"{folder} holds {some(originals, ', ', 2)}, weights in the original format of Meta or "
            "Mistral. Give the model's folder in Hugging Face format."
        )
    parts = sorted(name for name in names if name.endswith(".gguf"))
    if parts:
        return f"{folder} holds {some(parts, ', ', 3)}: give the file, gguf:{folder}/{parts[0]}."
    if "model.json" in names:
        return f"{folder} is a checkpoint of launch.convert: give orbax:{folder}."
    return None


def _inner_advice(folder: pathlib.Path) -> str | None:
    """Say which folder within this one is a model."""
    snapshots = folder / "snapshots"
    if snapshots.is_dir():
        models = _models(snapshots)
        if not models:
            return (
                f"{folder} is the root of a model in a Hugging Face cache, and none of its "
                "snapshots holds a config.json: download the model again."
            )
        return (
            f"{folder} is the root of a model in a Hugging Face cache. Give its snapshot: "
            f"{_newest(folder, models)}."
        )
    cached = sorted(path for path in folder.glob("models--*") if path.is_dir())
    if cached:
        names = some([path.name for path in cached], ", ", 3)
        return (
            f"{folder} is a Hugging Face cache of {names}. Give the snapshot of a model: "
            f"{cached[0]}/snapshots/REVISION."
        )
    models = _models(folder)
    if not models:
        return None
    names = some([path.name for path in models], ", ", 3)
    return f"{folder} has no config.json, but {names} in it has: give {models[0]}."


def _newest(folder: pathlib.Path, models: list[pathlib.Path]) -> pathlib.Path:
    """Return the snapshot that the branch 'main' of a cached model names, or else the first."""
    main = folder / "refs" / "main"
    if main.is_file():
        with open(main, "rb") as file:
            revision = file.read(100).decode("ascii", "replace").strip()
        for path in models:
            if path.name == revision:
                return path
    return models[0]


def _models(folder: pathlib.Path) -> list[pathlib.Path]:
    inner = sorted(path for path in folder.iterdir() if path.is_dir())
    return [path for path in inner[:_MOST_INNER] if (path / _CONFIG).is_file()]


def _names(folder: pathlib.Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _any(names: set[str], *beginnings: str) -> bool:
    return any(name.startswith(beginnings) for name in names)
