"""Libraries that write lines of their own between ours, imported without these."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import sys
from types import ModuleType

_PCI = pathlib.Path("/sys/bus/pci/devices")
_GOOGLE = "0x1ae0"  # the vendor of a TPU chip


def quiet_jax() -> None:
    """Keep JAX from starting libtpu on a host without a TPU, where it writes warnings: it is
    installed there to compile alone. A choice of platforms by the user stays; with a plugin for
    other devices JAX looks for all as ever."""
    if "jax" in sys.modules or os.environ.get("JAX_PLATFORMS") is not None:
        return
    if importlib.util.find_spec("libtpu") is None or os.environ.get("JAX_FORCE_TPU_INIT"):
        return
    from importlib import metadata  # here: it takes time, and libtpu is seldom installed

    plugins = metadata.entry_points(group="jax_plugins")
    if importlib.util.find_spec("jax_plugins") is None and not plugins and not _has_tpu():
        os.environ["JAX_PLATFORMS"] = "cpu"


def _has_tpu() -> bool:
    return any(path.read_text().strip() == _GOOGLE for path in _PCI.glob("*/vendor"))


def transformers() -> ModuleType:
    """Import transformers (which takes seconds) without its advice on what else to install and its
    bars; warnings and errors stay."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers
