"""Several processes as one run: who is first, one process's word for all, one folder for all.

A run on several hosts has a process on each, and all take the same steps in the same order. What
they tell one another here goes from host to host, through the coordination service that JAX starts
beside process 0, so whoever waits notices that another process has failed. Arrays go over the
devices. With one process nothing here does anything, and JAX need not be there.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from safepatch_jax.runtime import files, joining
from safepatch_jax.runtime.joining import (
    client,
    fail,
    failures,
    initialize,
    joined,
    runtime,
    until,
    who,
)

__all__ = [
    "AnotherFailed",
    "agree",
    "agree_on_devices",
    "barrier",
    "broadcast",
    "claimed",
    "count",
    "everyones",
    "fail",
    "fetch",
    "first",
    "initialize",
    "joined",
    "locked",
    "new_folder",
    "on_first",
    "several",
    "shared",
]

_TURN = 2.0  # seconds between two looks whether another process has failed
# seconds until a new file must be seen on all hosts; network file systems remember what was not
# there
_SIGHT = 60.0


class AnotherFailed(Exception):
    """Another process has failed, so this one cannot go on."""


class _State:
    """Where this process is in what the processes tell one another."""

    alone = False  # within `on_first`
    step = 0  # exchanges so far, the same in all processes
    spent: list[str] = []  # what process 0 told and all have read by the next `barrier`


def count() -> int:
    """Return the number of processes."""
    jax = sys.modules.get("jax")  # a process without JAX is alone, and should stay without it
    return 1 if jax is None else jax.process_count()


def first() -> bool:
    """Return whether this is process 0, which prints, decides and writes what is no array."""
    jax = sys.modules.get("jax")
    return jax is None or jax.process_index() == 0


def several() -> bool:
    """Return whether there are others to wait for; not within `on_first`."""
    return not _State.alone and count() > 1


def barrier(name: str) -> None:
    """Wait until all processes are here."""
    if several():
        _gather(name, None)
        broadcast()
        if first():
            for key in _State.spent[:-1]:
                client().key_value_delete(key)
            del _State.spent[:-1]


def broadcast(value: Any = None) -> Any:
    """Return process 0's value, which must be JSON-able, in all processes."""
    if not several():
        return value
    key = _next_key()
    if not first():
        return json.loads(_wait(key))
    text = json.dumps(value)
    client().key_value_set(key, text)
    _State.spent.append(key)
    return json.loads(text)


def everyones(value: Any) -> list[Any]:
    """Return the values of all processes, each JSON-able, in all processes."""
    if not several():
        return [value]
    return broadcast(_gather("everyones", value))


def on_first(
    function: Callable[..., Any], *args: Any, together: Callable[[Any], Any] | None = None
) -> Any:
    """Run a function on process 0 and return its JSON-able result in all processes.

    Args:
      function: within it process 0 is alone: nothing here waits for the others.
      args: its arguments. Where `together` is given one more comes first, `ask`: ask(x) runs
        together(x) in all processes, and returns what process 0 gets.
      together: what needs all processes, such as bringing an array to a host; x must be JSON-able.

    Raises:
      ValueError, OSError: of process 0; in all processes, with its text.
    """
    if not several():
        return function(*args) if together is None else function(together, *args)
    if not first():
        return _follow(together)

    def ask(argument):
        with _alone(False):
            broadcast(["ask", argument])
            return together(argument)

    if together is not None:
        args = (ask, *args)
    try:
        with _alone(True):
            result = function(*args)
    except ValueError as error:
        broadcast(["ValueError", str(error)])
        raise
    except OSError as error:
        broadcast(["OSError", str(error)])
        raise
    return broadcast(["result", result])[1]


def _follow(together: Callable[[Any], Any] | None) -> Any:
    """Do what process 0 asks for within `on_first`; return its result, or raise its error."""
    while True:
        kind, value = broadcast()
        if kind == "ask":
            together(value)
        elif kind == "result":
            return value
        elif kind == "ValueError":
            raise ValueError(value)
        else:
            raise OSError(value)


@contextlib.contextmanager
def _alone(alone: bool) -> Iterator[None]:
    before, _State.alone = _State.alone, alone
    try:
        yield
    finally:
        _State.alone = before


def agree(values: Mapping[str, Any], fix: str) -> None:
    """Compare values, which must be JSON-able, between all processes.

    Raises:
      ValueError: in all processes, if some differ; names them with the values and whose they are,
        and says the fix.
    """
    if not several():
        return
    everyone = _gather("agree", dict(values))

    def compare():
        differences = []
        for name in dict.fromkeys(name for own in everyone for name in own):
            by_value: dict[str, list[int]] = {}
            for i, own in enumerate(everyone):
                by_value.setdefault(json.dumps(own[name]) if name in own else "absent", []).append(
                    i
                )
            if len(by_value) > 1:
                differences.append(
                    f"{name} is "
                    + ", ".join(f"{value} in {who(i)}" for value, i in by_value.items())
                )
        if differences:
            raise ValueError(f"The processes differ: {'; '.join(differences)}. {fix}")

    on_first(compare)


def agree_on_devices() -> None:
    """Refuse processes with different numbers of devices. Raises ValueError as `agree`."""
    if several():
        import jax

        agree(
            {"number of devices": jax.local_device_count()},
            "orbax, which writes checkpoints, needs as many in each process: use equal hosts.",
        )


def shared(folder: pathlib.Path) -> None:
    """Make a folder and see that all processes share it: process 0 writes a file that all must see.

    Raises:
      ValueError: some do not see it.
      OSError: process 0 cannot write there.
    """
    if not several():
        return

    def make():
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, path = tempfile.mkstemp(prefix=".shared.", suffix=".partial", dir=folder)
        os.close(descriptor)
        return path

    token = pathlib.Path(on_first(make))
    try:
        _all_see(token, token.exists)
    finally:
        if first():
            token.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: str | pathlib.Path, *, replace: bool = False) -> Iterator[pathlib.Path]:
    """As `files.new_folder`, with one temporary folder for all processes, which process 0 makes and
    renames.

    Raises:
      ValueError: as there; or the processes do not share the file system.
    """
    if not several():
        with files.new_folder(path, replace=replace) as folder:
            yield folder
        return
    path = pathlib.Path(path).absolute()
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(
            on_first(lambda: str(stack.enter_context(files.new_folder(path, replace=replace))))
        )
        if first():
            joining.unfinished.add(
                folder
            )  # stays there on failure: others may write on while this process deletes
        _all_see(folder, folder.is_dir)
        yield folder
        barrier(f"{path} is filled")
        held = on_first(lambda: (stack.close(), sorted(os.listdir(path)))[1])
        joining.unfinished.discard(folder)
    _all_see(path, lambda: path.is_dir() and sorted(os.listdir(path)) == held)


@contextlib.contextmanager
def locked(path: str | pathlib.Path) -> Iterator[None]:
    """As `files.locked`, held by process 0 for all."""
    with files.locked(path) if first() else contextlib.nullcontext():
        barrier(f"{path} is locked")
        yield


@contextlib.contextmanager
def claimed(folder: str | pathlib.Path) -> Iterator[None]:
    """As `files.claimed`, by process 0 for all."""
    with contextlib.ExitStack() as stack:
        on_first(lambda: stack.enter_context(files.claimed(folder)))
        yield


def fetch(x: Any) -> np.ndarray:
    """Return an array whole on the host, also one whose parts lie with several processes, all of
    which must ask for it."""
    if getattr(x, "is_fully_addressable", True) or x.is_fully_replicated:
        return np.asarray(x)
    assert not _State.alone, "process 0 alone cannot bring parts that lie with others"
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(x, tiled=True)


def _next_key() -> str:
    _State.step += 1
    return f"{joining.ROOT}{_State.step}"


def _wait(key: str) -> str:
    """Return a value as soon as some process has set it. Raises AnotherFailed."""
    while True:
        try:
            return client().blocking_key_value_get(key, int(1000 * _TURN))
        except RuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        if failed := failures():
            raise AnotherFailed(f"{who(sorted(failed))} failed")


def _gather(name: str, value: Any) -> list[Any]:
    """Return all processes' values in process 0, nothing in the others."""
    key = _next_key()
    client().key_value_set(f"{key}/{runtime().process_id}", json.dumps([name, value]))
    if not first():
        return []
    everyone = [json.loads(_wait(f"{key}/{i}")) for i in range(count())]
    client().key_value_delete(f"{key}/")
    if len(names := {name for name, _ in everyone}) > 1:
        raise RuntimeError(f"the processes are out of step: {sorted(names)}")
    return [value for _, value in everyone]


def _all_see(path: pathlib.Path, there: Callable[[], bool]) -> None:
    seen = _gather(str(path), until(there, _SIGHT))

    def compare():
        if blind := [i for i, sees in enumerate(seen) if not sees]:
            raise ValueError(
                f"{who(blind)} cannot see what process 0 writes to {path.parent}. All processes "
                "need one file "
                "system, under the same path on every host: use a folder on a network file system "
                "or a mounted "
                "bucket (--workdir, --run.cache_dir, --out, --target)."
            )

    on_first(compare)
