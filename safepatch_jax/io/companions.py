"""The files beside the weights of a model folder: config, tokenizer, chat template, licence."""

from __future__ import annotations

import pathlib

from safepatch_jax.models.config import portable_config, read_raw_config
from safepatch_jax.runtime import files

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
COMPANIONS = (
    "config.json",
    "generation_config.json",
    *TOKENIZER,
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "USE_POLICY.md",
)


def copy_companions(
    source: str | pathlib.Path, out: pathlib.Path, names: tuple[str, ...] = COMPANIONS
) -> None:
    """Copy the files byte for byte, by name: never code, never a file that is not on the list or
    lies elsewhere."""
    for name in names:
        path = pathlib.Path(source) / name
        if path.is_file():
            files.copy(files.own_file(path), out / name)


def write_config(source: str | pathlib.Path, out: pathlib.Path, dtype: str | None) -> None:
    """Copy config.json: byte for byte, unless it needs another spelling (see `portable_config`) or
    another dtype."""
    raw = read_raw_config(source)
    portable = portable_config(raw, dtype)
    if portable == raw:
        files.copy(files.own_file(pathlib.Path(source) / "config.json"), out / "config.json")
    else:
        files.write_json(out / "config.json", portable)
