"""Libraries that not every environment has, and such as write lines of their own between ours."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pathlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from safepatch_jax.runtime.reading import Refused

_PCI = pathlib.Path("/sys/bus/pci/devices")
_GOOGLE = "0x1ae0"  # the vendor of a TPU chip
# What prepared data sets need, TensorFlow apart.
TFDS = ("tensorflow_datasets", "array_record", "importlib_resources")
# Where pip calls a module otherwise, or not every version will do.
_PACKAGES = {
    "tensorflow_datasets": "tensorflow-datasets>=4.9.10",
    "array_record": "array-record>=0.8",
    "importlib_resources": "importlib-resources>=6",
    "tensorboardX": "tensorboardX>=2.6",
    "gguf": "gguf>=0.17",
    "jinja2": "jinja2>=3.1",
    "matplotlib": "matplotlib>=3.9",
}


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


def missing(*modules: str) -> list[str]:
    """Return which of some modules are not installed, by their packages' names; none is
    imported."""
    absent = []
    for module in modules:
        try:
            known = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            known = False
        if not known:
            absent.append(_package(module))
    return absent


def refuse_missing(what: str, *modules: str) -> None:
    """Raise ValueError, with what to give pip, if some modules are not installed.

    Args:
      what: for what they are needed, the beginning of a sentence.
    """
    if absent := missing(*modules):
        packages = " ".join(f"'{_PACKAGES.get(module, module)}'" for module in modules)
        raise Refused(
            f"{what}: needs {' and '.join(absent)}, not installed here. Run: pip install {packages}"
        )


def needed(what: str, *modules: str) -> ModuleType:
    """Import the first of some modules, all of which are needed. Raises ValueError as
    `refuse_missing` does."""
    refuse_missing(what, *modules)
    return importlib.import_module(modules[0])


def _package(module: str) -> str:
    return _PACKAGES.get(module, module).partition(">=")[0]


def transformers() -> ModuleType:
    """Import transformers (which takes seconds) without its advice on what else to install and its
    bars; warnings and errors stay."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers


def event_writer() -> Any:
    """Import tensorboardX and return its SummaryWriter.

    Torch and clients of object stores stay out: it would import those that are installed, for
    seconds, and numbers in files need none. In this process it then writes no torch tensors and to
    no address, unless it was imported before.
    """
    if "tensorboardX" not in sys.modules:
        with _left_out("torch", "boto3", "google.cloud.storage"):
            importlib.import_module("tensorboardX")
    return sys.modules["tensorboardX"].SummaryWriter


@contextlib.contextmanager
def _left_out(*modules: str) -> Iterator[None]:
    """Let an import fail within the block, in all threads, of modules that have not been imported
    before."""
    absent = [module for module in modules if module not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))
    try:
        yield
    finally:
        for module in absent:
            if sys.modules.get(module, module) is None:
                del sys.modules[module]
