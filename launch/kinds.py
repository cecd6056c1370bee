"""Flags whose values are paths: read by one set of functions, `safepatch_jax.runtime.paths`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from absl import flags

from safepatch_jax.runtime import paths

flags.disclaim_key_flags()  # what is defined by these functions is the caller's


class _Read(flags.ArgumentParser):
    """Passes a value through a function that raises ValueError; an empty one stays as it is."""

    def __init__(self, read: Callable[[str], str]):
        super().__init__()
        self._read = read

    def parse(self, argument: str) -> str:
        return self._read(argument) if argument else argument

    def flag_type(self) -> str:
        return "string"


class _ReadEach(flags.ListParser):
    """Passes each value of a list through a function that raises ValueError."""

    def __init__(self, read: Callable[[str], str]):
        super().__init__()
        self._read = read

    def parse(self, argument: str | list[str]) -> list[str]:
        return [self._read(part) for part in super().parse(argument)]


def path(name: str, default: str | None, help_text: str, **keywords: Any) -> flags.FlagHolder:
    """Define a flag for a file or folder."""
    return text(name, default, help_text, paths.plain, **keywords)


def local(name: str, default: str | None, help_text: str, **keywords: Any) -> flags.FlagHolder:
    """Define a flag for a file or folder that cannot lie in a bucket."""
    return text(name, default, help_text, paths.on_disk, **keywords)


def model(name: str, default: str | None, help_text: str, **keywords: Any) -> flags.FlagHolder:
    """Define a flag for a model: a path, one after hf:, orbax: or gguf:, or org/name[@revision]."""
    return text(name, default, help_text, paths.model, **keywords)


def several(name: str, default: list[str] | None, help_text: str) -> flags.FlagHolder:
    """Define a flag for files or folders, with commas between."""
    return flags.DEFINE(
        _ReadEach(paths.plain), name, default, help_text, serializer=flags.CsvListSerializer(",")
    )


def text(
    name: str, default: str | None, help_text: str, read: Callable[[str], str], **keywords: Any
) -> flags.FlagHolder:
    """Define a flag whose value `read` makes of what the user wrote."""
    return flags.DEFINE(
        _Read(read),
        name,
        default,
        help_text,
        serializer=flags.ArgumentSerializer(),
        **keywords,
    )
