"""The files beside the weights of a model folder: config, tokenizer, chat template, licence."""

from __future__ import annotations

import pathlib

from safepatch_jax.models.config import portable_config, read_raw_config
from safepatch_jax.runtime import files
from safepatch_jax.runtime.limits import limit, too_much
from safepatch_jax.runtime.reading import Refused

VOCABULARY = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
TOKENIZER = (
    *VOCABULARY,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
LEGAL = (
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "LICENCE",
    "LICENCE.md",
    "LICENCE.txt",
    "COPYING",
    "NOTICE",
    "NOTICE.md",
    "NOTICE.txt",
    "USE_POLICY.md",
)
UNTOKENIZED = ("config.json", "generation_config.json", *LEGAL)
COMPANIONS = (*UNTOKENIZED, *TOKENIZER)


MODEL = "model.json"  # of an orbax checkpoint
TEMPLATES = "additional_chat_templates"  # a folder of NAME.jinja


def copy_companions(
    source: str | pathlib.Path, out: pathlib.Path, names: tuple[str, ...] = COMPANIONS
) -> None:
    """Copy the files byte for byte, by name: never code, never a file that is not on the list or
    lies elsewhere. The additional chat templates go with the tokenizer's.

    Raises:
      ValueError: a file is a link to elsewhere; there are too many templates, or too large ones.
    """
    source = pathlib.Path(source)
    templates = _template_names(source) if "chat_template.jinja" in names else []
    for name in (*names, *templates):
        path = source / name
        if path.is_file():
            (out / name).parent.mkdir(exist_ok=True)
            files.copy(files.own_file(path, source), out / name)


def companion_names(folder: pathlib.Path) -> list[str]:
    """Return which of the files that `copy_companions` copies are there."""
    there = [name for name in COMPANIONS if (folder / name).is_file()]
    return there + _template_names(folder)


def _template_names(folder: pathlib.Path) -> list[str]:
    """Return the names of the additional chat templates, relative to the model's folder."""
    paths = sorted((folder / TEMPLATES).glob("*.jinja"))
    fix = "Delete those that nobody needs."
    if len(paths) > limit("TEMPLATES"):
        raise Refused(f"{folder / TEMPLATES} holds {too_much('TEMPLATES')}. {fix}")
    for path in paths:
        if path.stat().st_size > limit("TEMPLATE_BYTES"):
            raise Refused(f"{path} has {too_much('TEMPLATE_BYTES')}. {fix}")
    return [f"{TEMPLATES}/{path.name}" for path in paths]


def write_config(source: str | pathlib.Path, out: pathlib.Path, dtype: str | None) -> None:
    """Copy config.json: byte for byte, unless it needs another spelling (see `portable_config`) or
    another dtype, or names code, which is not copied."""
    raw = read_raw_config(source)
    portable = portable_config(raw, dtype)
    portable.pop("auto_map", None)
    if portable == raw:
        path = pathlib.Path(source) / "config.json"
        files.copy(files.own_file(path), out / "config.json")
    else:
        files.write_json(out / "config.json", portable)
