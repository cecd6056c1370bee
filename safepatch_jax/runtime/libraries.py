"""Libraries that not every environment has, and such as write lines of their own between ours."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

from safepatch_jax.runtime.reading import Refused

# What prepared data sets need, TensorFlow apart.
TFDS = ("tensorflow_datasets", "array_record", "importlib_resources")
# Where pip calls a module otherwise, or not every version will do.
_PACKAGES = {
    "tensorflow_datasets": "tensorflow-datasets>=4.9.10",
    "array_record": "array-record>=0.8",
    "importlib_resources": "importlib-resources>=6",
    "tensorboardX": "tensorboardX>=2.6",
    "gguf": "gguf>=0.17",
}


def missing(*modules: str) -> list[str]:
    """Return which of some modules are not installed, by their packages' names."""
    absent = []
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError:
            absent.append(_package(module))
    return absent


def needed(what: str, *modules: str) -> ModuleType:
    """Import modules; return the first.

    Args:
      what: for what they are needed, the beginning of a sentence.

    Raises:
      ValueError: some are not installed; says what to give pip.
    """
    if absent := missing(*modules):
        names = " and ".join(absent)
        packages = " ".join(f"'{_PACKAGES.get(module, module)}'" for module in modules)
        raise Refused(f"{what} needs {names}, not installed here: pip install {packages}.")
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
