"""Config files: Python files that are executed, a user's own or one of those that are shipped."""

from __future__ import annotations

import pathlib
import runpy
import sys
import traceback
from typing import Any

from safepatch_jax.runtime import paths
from safepatch_jax.runtime.console import some
from safepatch_jax.runtime.reading import Refused, reason

_SHIPPED = pathlib.Path(__file__).resolve().parents[2] / "configs"  # also where it is installed


def read(path: str | pathlib.Path) -> tuple[pathlib.Path, dict[str, Any]]:
    """Execute a config file; return its path and its names.

    Args:
      path: the file, or the name of one that is shipped: demo, or configs/demo.py.

    Raises:
      ValueError: there is none, or it raises anything.
    """
    path = _find(pathlib.Path(paths.plain(path)))
    # Shipped configs import configs.common. Last, so that nothing else is found there.
    place = str(path.resolve().parents[1])
    sys.path.append(place)
    try:
        return path, runpy.run_path(str(path))
    except (Exception, SystemExit) as error:
        raise Refused(
            f"{path} is no config file, or a wrong one: {_line_of(error, path)}{reason(error)}. A "
            "config is Python code that sets CONFIG, as configs/demo.py does; mend that line."
        ) from error
    finally:
        sys.path.remove(place)


def _find(path: pathlib.Path) -> pathlib.Path:
    if path.is_file():
        return path
    shipped = _shipped()
    if path.parts in ((path.name,), ("configs", path.name)) and path.stem in shipped:
        return shipped[path.stem]
    fix = "Give the path of a Python file with a CONFIG dictionary, or the name of a shipped one"
    if others := sorted(map(str, path.parent.glob("*.py"))):
        raise Refused(f"No config file '{path}'. Found beside it: {some(others, ', ')}.")
    raise Refused(f"No config file '{path}'. {fix}: {some(sorted(shipped), ', ')}.")


def shipped_file(name: str) -> pathlib.Path:
    """Return the path of a file that is shipped in configs/."""
    return _SHIPPED / name


def _shipped() -> dict[str, pathlib.Path]:
    """Return the shipped config files by name."""
    return {file.stem: file for file in _SHIPPED.glob("*.py") if file.stem != "common"}


def _line_of(error: BaseException, path: pathlib.Path) -> str:
    """Say in which line of a config file an error arose."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"line {error.lineno}: "
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    return f"line {lines[-1]}: " if lines else ""
