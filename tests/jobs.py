"""Whole jobs in seconds: their settings and data, machines with fewer devices, and what the console
says of them."""

import contextlib
import io
import pathlib
import sys

import jax
import pytest

ROLES = ("harmful", "lookalike", "ordinary")
SPLITS = ("train",) * 5 + ("search",) * 2 + ("report",) * 3
FAST = {
    "align.enabled": False,
    "align.steps": 2,
    "align.batch_size": 4,
    "derive.batch_size": 4,
    "derive.se_steps": 2,
    "derive.osm_steps": 2,
    "derive.se_learning_rate": 1e-3,
    "derive.osm_learning_rate": 1e-3,
    "score.samples": 3,
    "evaluate.max_new_tokens": 4,
    "evaluate.batch_size": 3,
    "patch.top_rate_se": 0.2,
    "patch.top_rate_osm": 0.2,
    "run.certify": "hashes",
}


def write_table(path: pathlib.Path, rows: list[str], columns: str = "prompt,answer,split") -> str:
    """Write a data file; return its path."""
    path.write_text("\n".join([columns, *rows]) + "\n")
    return str(path)


def write_data(folder: pathlib.Path) -> dict[str, str]:
    """Write a small data file for each role; return them as settings."""
    settings = {}
    for role in ROLES:
        rows = [f"{role} {i},the answer {i},{split}" for i, split in enumerate(SPLITS)]
        settings[f"data.{role}"] = write_table(folder / f"{role}.csv", rows)
    return settings


def stages_run(text: str) -> list[str]:
    """Return the stages that ran, as a console says."""
    names = []
    for line in text.splitlines():
        name, _, state = line.partition(": ")
        if state.startswith("running"):
            names.append(name)
    return names


@contextlib.contextmanager
def machine_of(devices: int):
    """Be on a machine with fewer devices: to compile for all of them is slow."""
    every = jax.devices
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *backend: every(*backend)[:devices])
        yield


@contextlib.contextmanager
def interrupted_at(line: str):
    """Interrupt the block, as Ctrl-C does, when it prints a line that begins so."""

    stdout = sys.stdout

    class Console(io.StringIO):
        def write(self, text):
            if text.startswith(line):
                raise KeyboardInterrupt
            return stdout.write(text)

    with pytest.raises(KeyboardInterrupt), contextlib.redirect_stdout(Console()):
        yield


@contextlib.contextmanager
def looking_at(line: str, look):
    """Call `look` when the block prints a line that begins so."""
    stdout = sys.stdout

    class Console(io.StringIO):
        def write(self, text):
            if text.startswith(line):
                look()
            return stdout.write(text)

    with contextlib.redirect_stdout(Console()):
        yield
