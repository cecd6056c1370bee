"""Flags shared by the launchers: a config file, and one flag for every setting."""

from __future__ import annotations

from absl import flags

from safepatch_jax.settings import Settings, declared_options, load_config

_CONFIG = flags.DEFINE_string("config", None, "Python file with a CONFIG dictionary; see configs/demo.py.")
_DATA = flags.DEFINE_list(
    "data", [], "Data files by role, e.g. harmful:advbench.csv,lookalike:xstest.csv,ordinary:alpaca.json; short for "
    "--data.harmful=... and so on.")
_MERGE = flags.DEFINE_enum(
    "merge", None, list(declared_options()["patch.merge"].metadata["choices"]), "The merging method; short for --patch.merge.")
_MESH = flags.DEFINE_string(
    "mesh", None, "Devices per mesh axis, e.g. data:1,fsdp:-1,tensor:4; short for --mesh.shape.")


def _define_settings() -> None:
    """Define one flag for each setting, named group.option; the default is the config file's."""
    for name, field in declared_options().items():
        text = f"{field.metadata['help']} [{field.default!r}]"
        kind = type(field.default)
        if field.metadata["choices"]:
            flags.DEFINE_enum(name, None, list(field.metadata["choices"]), text)
        elif kind is bool:
            flags.DEFINE_bool(name, None, text)
        else:
            define = {int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}[kind]
            define(name, None, text)


_define_settings()


def read_settings() -> Settings:
    """Build the settings: defaults, then the config file, then --data, --merge and --mesh, then single flags."""
    settings = load_config(_CONFIG.value) if _CONFIG.value else Settings()
    by_role = {}
    for entry in _DATA.value:
        role, colon, path = entry.partition(":")
        if not colon:
            raise ValueError(f"--data: '{entry}' is not ROLE:FILE with a role of harmful, lookalike, ordinary.")
        by_role[f"data.{role}"] = path
    short = by_role | {
        name: flag.value for name, flag in (("patch.merge", _MERGE), ("mesh.shape", _MESH)) if flag.value is not None}
    given = {name: flags.FLAGS[name].value for name in declared_options() if flags.FLAGS[name].value is not None}
    return settings.override(short, "--data, --merge, --mesh").override(given, "command line")
