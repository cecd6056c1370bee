"""Flags shared by the launchers of runs: a config file, and one flag for every setting."""

from __future__ import annotations

from absl import flags

from launch import options
from safepatch_jax.settings import Settings

_DATA = flags.DEFINE_list(
    "data",
    [],
    "Data files by role, e.g. harmful:advbench.csv,lookalike:xstest.csv,ordinary:alpaca.json; "
    "short for --data.harmful=... and so on.",
)
_MESH = flags.DEFINE_string(
    "mesh", None, "Devices per mesh axis, e.g. data:1,fsdp:-1,tensor:4; short for --mesh.shape."
)
_NAMES = options.define(Settings().to_dict())
flags.adopt_module_key_flags(options)


def read_settings(fitted: bool = False) -> Settings:
    """Build the settings: defaults, then the config file, then --data, --merge and --mesh, then
    single flags.

    Args:
      fitted: the launcher handles derive.memory=auto; else it is refused.
    """
    short = {}
    for entry in _DATA.value:
        role, colon, path = entry.partition(":")
        if not colon:
            raise ValueError(
                f"--data: '{entry}' is not ROLE:FILE with a role of harmful, lookalike, ordinary."
            )
        short[f"data.{role}"] = path
    if _MESH.value is not None:
        short["mesh.shape"] = _MESH.value
    settings = options.read(_NAMES, short, "--data, --merge, --mesh")
    if settings.derive.memory == "auto" and not fitted:
        raise ValueError(
            "--derive.memory=auto is for launch.safepatch alone. Run launch.safepatch --dry_run "
            "with it, and give the flags that it prints here."
        )
    return settings
