"""What the processes of one run do together: process 0 decides, and makes the folders of all.

A run on several hosts has a process on each, and all take the same steps in the same order. What
they exchange here goes from host to host, through the coordination service that JAX starts beside
process 0, so that whoever waits notices that another process has failed. Arrays go over the
devices. With one process nothing here has an effect, and JAX need not be there.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from safepatch_jax.runtime import addresses, files, joining
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

if TYPE_CHECKING:
    import numpy as np

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
# Seconds in which all hosts must see a new file; network file systems remember for a while that it
# was not there.
_SIGHT = 60.0


class AnotherFailed(Exception):
    """Another process has failed, so this one cannot continue."""


class _State:
    """Where this process is in the exchange with the others."""

    alone = False  # within `on_first`
    step = 0  # exchanges so far, the same in all processes
    broadcasts: list[str] = []  # keys of process 0's values that are still stored


def count() -> int:
    """Return the number of processes."""
    jax = sys.modules.get("jax")  # a process without JAX is alone, and should stay without it
    return 1 if jax is None else jax.process_count()


def first() -> bool:
    """Return whether this is process 0, which prints, decides and writes all but arrays."""
    jax = sys.modules.get("jax")
    return jax is None or jax.process_index() == 0


def several() -> bool:
    """Return whether there are other processes to wait for; not within `on_first`."""
    return not _State.alone and count() > 1


def barrier(name: str) -> None:
    """Wait until all processes are here."""
    if several():
        _gather(name, None)
        broadcast()
        if first():
            # All were here, so they have read every broadcast but this last one.
            for key in _State.broadcasts[:-1]:
                client().key_value_delete(key)
            del _State.broadcasts[:-1]


def broadcast(value: Any = None) -> Any:
    """Return process 0's value, which must be JSON-able, in all processes."""
    if not several():
        return value
    key = _next_key()
    if not first():
        return json.loads(_wait(key))
    text = json.dumps(value)
    client().key_value_set(key, text)
    _State.broadcasts.append(key)
    return json.loads(text)


def everyones(value: Any) -> list[Any]:
    """Return the values of all processes, each JSON-able, in all processes."""
    if not several():
        return [value]
    return broadcast(_gather("everyones", value))


def on_first(
    function: Callable[..., Any],
    *args: Any,
    together: Callable[[Any], Any] | None = None,
    **options: Any,
) -> Any:
    """Run a function on process 0 and return its JSON-able result in all processes.

    Args:
      function: within it process 0 is alone: nothing here waits for the others.
      args, options: its arguments. Where `together` is given one more comes first, `ask`: ask(x)
        runs together(x) in all processes, and returns what process 0 gets.
      together: what needs all processes, such as bringing an array to a host; x must be JSON-able.

    Raises:
      ValueError, OSError: of process 0; in all processes, with its text.
    """
    if not several():
        first_args = () if together is None else (together,)
        return function(*first_args, *args, **options)
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
            result = function(*args, **options)
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
      ValueError: in all processes, if some differ; names them, with the values and the processes
        that have them, and ends with `fix`.
    """
    if several():
        on_first(_compare, _gather("agree", dict(values)), fix)


def _compare(everyone: Sequence[Mapping[str, Any]], fix: str) -> None:
    """Raise ValueError if the values of the processes, in their order, differ."""
    names: dict[str, None] = {}  # in the order of their first appearance
    for values in everyone:
        names |= dict.fromkeys(values)
    differences = []
    for name in names:
        by_value: dict[str, list[int]] = {}
        for i, values in enumerate(everyone):
            text = json.dumps(values[name]) if name in values else "absent"
            by_value.setdefault(text, []).append(i)
        if len(by_value) > 1:
            parts = [f"{text} in {who(indices)}" for text, indices in by_value.items()]
            differences.append(f"{name} is {', '.join(parts)}")
    if differences:
        raise ValueError(f"The processes differ: {'; '.join(differences)}. {fix}")


def agree_on_devices() -> None:
    """Refuse processes with different numbers of devices. Raises ValueError as `agree`."""
    if several():
        import jax

        agree(
            {"number of devices": jax.local_device_count()},
            "orbax, which writes checkpoints, needs as many in each process: use equal hosts.",
        )


def shared(folder: pathlib.Path) -> None:
    """Make a folder and check that all processes share it: process 0 writes a file there, which
    all must see.

    Raises:
      ValueError: some do not see it.
      OSError: process 0 cannot write there.
    """
    if not several() or addresses.address_of(folder):
        return
    token = pathlib.Path(on_first(_write_token, folder))
    try:
        _all_see(token, token.exists)
    finally:
        if first():
            token.unlink(missing_ok=True)


def _write_token(folder: pathlib.Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, path = tempfile.mkstemp(prefix=".shared.", suffix=".partial", dir=folder)
    os.close(descriptor)
    return path


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
    if addresses.address_of(path):
        with _mirrored_folder(path, replace) as folder:
            yield folder
        return
    with contextlib.ExitStack() as stack:  # of process 0; in the others it stays empty

        def begin():
            return str(stack.enter_context(files.new_folder(path, replace=replace)))

        def finish():
            stack.close()
            return sorted(os.listdir(path))

        folder = pathlib.Path(on_first(begin))
        if first():
            # On failure it stays in this set, and `fail` deletes the folder once more: others may
            # still write there while the stack deletes it.
            joining.unfinished.add(folder)
        _all_see(folder, folder.is_dir)
        yield folder
        barrier(f"{path} is filled")
        names = on_first(finish)
        joining.unfinished.discard(folder)
    _all_see(path, lambda: path.is_dir() and sorted(os.listdir(path)) == names)


@contextlib.contextmanager
def _mirrored_folder(path: pathlib.Path, replace: bool) -> Iterator[pathlib.Path]:
    """Do what `new_folder` does for a path that stands for an address of a bucket: each process
    fills a folder of its own, of which process 0's is published, and then brought to the others.

    One within another that is still being filled goes through a place of its own in the bucket.
    """
    from safepatch_jax.runtime import mirror

    with contextlib.ExitStack() as stack:  # of process 0; in the others it stays empty

        def begin():
            folder = stack.enter_context(files.new_folder(path, replace=replace))
            return str(folder.relative_to(addresses.base()))

        def finish():
            stack.close()
            return mirror.shared(path)

        folder = addresses.base() / on_first(begin)
        if not first():
            folder.mkdir(parents=True, exist_ok=True)
        joining.unfinished.add(folder)
        yield folder
        barrier(f"{addresses.address_of(path)} is filled")
        names = on_first(finish)
        joining.unfinished.discard(folder)
    if not first():
        files.delete(folder)
        mirror.take_share(path, names)
    barrier(f"{addresses.address_of(path)} is with all")
    on_first(mirror.end_share, path)


@contextlib.contextmanager
def locked(path: str | pathlib.Path) -> Iterator[None]:
    """As `files.locked`, held by process 0 for all."""
    if not first():
        lock = contextlib.nullcontext()
    elif addresses.address_of(path):
        from safepatch_jax.runtime import workspace

        lock = workspace.locked(pathlib.Path(path))
    else:
        lock = files.locked(path)
    with lock:
        # Process 0 comes here once it has the lock, so the others wait for it too.
        barrier(f"{addresses.name_of(path)} is locked")
        yield


@contextlib.contextmanager
def claimed(folder: str | pathlib.Path) -> Iterator[None]:
    """As `files.claimed`, by process 0 for all."""
    with contextlib.ExitStack() as stack:
        on_first(stack.enter_context, files.claimed(folder))
        yield


def fetch(x: Any) -> np.ndarray:
    """Return an array whole on the host, also one whose parts lie with several processes, all of
    which must call this."""
    if getattr(x, "is_fully_addressable", True) or x.is_fully_replicated:
        import numpy as np  # here: --help, which comes this way, has no need of it

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
    names, values = set(), []
    for i in range(count()):
        sender_name, sender_value = json.loads(_wait(f"{key}/{i}"))
        names.add(sender_name)
        values.append(sender_value)
    client().key_value_delete(f"{key}/")
    if len(names) > 1:
        raise RuntimeError(f"the processes are out of step: {sorted(names)}")
    return values


def _all_see(path: pathlib.Path, there: Callable[[], bool]) -> None:
    """Raise ValueError, in all processes, unless `there` soon holds in each."""
    on_first(_refuse_blind, path.parent, _gather(str(path), until(there, _SIGHT)))


def _refuse_blind(folder: pathlib.Path, seen: Sequence[bool]) -> None:
    blind = [i for i, sees in enumerate(seen) if not sees]
    if blind:
        raise ValueError(
            f"{who(blind)} cannot see what process 0 writes to {folder}. All processes need one "
            "place: give a bucket (gs://BUCKET/..., docs/buckets.md), or a folder on a network "
            "file system, under the same path on every host (--workdir, --run.cache_dir, --out, "
            "--target)."
        )
