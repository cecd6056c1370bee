"""Flags of settings: one for each, named group.option."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from absl import flags

from launch import kinds
from safepatch_jax.settings import Settings, declared_options, load_config

CONFIG = kinds.local(
    "config",
    None,
    "Python file with a CONFIG dictionary, or the name of a shipped one: demo, llama3_8b_instruct.",
)
MERGE = flags.DEFINE_enum(
    "merge",
    None,
    list(declared_options()["patch.merge"].metadata["choices"]),
    "The merging method; short for --patch.merge.",
)


def define(groups: Iterable[str]) -> list[str]:
    """Define one flag for each setting of some groups (or one setting, as group.option); return
    their names.

    The default is the config file's.
    """
    groups = set(groups)
    names = []
    for name in declared_options():
        if name in groups or name.partition(".")[0] in groups:
            names.append(name)
    for name in names:
        field = declared_options()[name]
        text = f"{field.metadata['help']} [{field.default!r}]"
        kind = type(field.default)
        if field.metadata["choices"]:
            flags.DEFINE_enum(name, None, list(field.metadata["choices"]), text)
        elif kind is bool:
            flags.DEFINE_bool(name, None, text)
        else:
            declare = {
                int: flags.DEFINE_integer,
                float: flags.DEFINE_float,
                str: flags.DEFINE_string,
            }[kind]
            declare(name, None, text)
    return names


def read(
    names: Iterable[str], short: Mapping[str, object] | None = None, shorthands: str = "--merge"
) -> Settings:
    """Build the settings: defaults, then the config file, then the short flags, then those named
    group.option."""
    settings = load_config(CONFIG.value) if CONFIG.value else Settings()
    short = dict(short or {})
    if MERGE.value is not None:
        short["patch.merge"] = MERGE.value
    values = {name: flags.FLAGS[name].value for name in names}
    values = {name: value for name, value in values.items() if value is not None}
    return settings.override(short, shorthands).override(values, "command line")
