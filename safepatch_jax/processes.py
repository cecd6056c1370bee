"""Several processes as one run: who is first, one process's word for all, and ending together.

A run on several hosts has a process on each, and all take the same steps in the same order. What they tell one another here
goes from host to host, through the coordination service that JAX starts beside process 0, so whoever waits notices that
another process has failed. Arrays go over the devices. With one process nothing here does anything, and JAX need not be there.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import pathlib
import shutil
import socket
import sys
import tempfile
import threading
import time
from typing import Any, Callable, Iterator, Mapping, NoReturn

import numpy as np

from safepatch_jax import files

_TURN = 2.0  # seconds between two looks whether another process has failed
_GRACE = 5.0  # seconds in which a process may end by itself after another has failed
_PATIENCE = 10.0  # seconds in which process 0 waits for what the others have to say about a failure
_SILENCE = 40.0  # seconds after which a process that gives no sign of life is taken for dead
_SIGHT = 60.0  # seconds until a new file must be seen on all hosts; network file systems remember what was not there
_ROOT = "safepatch_jax/"
_ALIVE, _FAILED, _TOLD, _LEFT = _ROOT + "alive/", _ROOT + "failed/", _ROOT + "told", _ROOT + "left/"


class AnotherFailed(Exception):
    """Another process has failed, so this one cannot go on."""


class _State:
    """What this process knows of the run."""

    asked = False  # `initialize` was called
    index, count = 0, 1  # as JAX says, once joined
    alone = False  # within `on_first`
    step = 0  # exchanges so far, the same in all processes
    spent: list[str] = []  # what process 0 told and all have read by the next `barrier`
    unfinished: set[pathlib.Path] = set()  # folders that process 0 deletes if it must end from another thread


_ending = threading.RLock()
_finished = threading.Event()


def initialize(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None, *,
               timeout: float = 300.0) -> None:
    """Join the other processes of this run; comes before anything else that uses JAX.

    Args:
      coordinator: HOST:PORT of process 0, which opens it. Without arguments all are found by JAX: on TPU pod slices, and under
        SLURM, Open MPI and Kubernetes.
      num_processes: how many there are.
      process_id: which one this is, from 0.
      timeout: seconds in which all must have come.

    Raises:
      ValueError: arguments that are incomplete or wrong; no cluster is found; not all came in time; the port is in use.
    """
    _check_addresses(coordinator, num_processes, process_id)
    import jax

    _State.asked = True
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM for itself, and nothing would end
    failure: list[Exception] = []

    def connect():
        try:  # JAX ends the process when its own timeout is over, without a word that helps
            jax.distributed.initialize(coordinator, num_processes, process_id, initialization_timeout=int(timeout) + 3600)
        except Exception as error:
            failure.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        raise ValueError(_nobody(coordinator, num_processes, process_id, timeout))
    if failure and "start RPC server" in str(failure[0]):
        raise ValueError(f"Process 0 cannot open {coordinator or 'its port'}: it is in use. Give all processes another port in "
                         "--coordinator, or end what uses it.") from failure[0]
    if failure:
        reason = str(failure[0]).partition("\n")[0]
        raise ValueError(f"The processes of this run could not be found ({reason}). --distributed alone works on TPU pod slices "
                         "and under SLURM (srun), Open MPI and Kubernetes; elsewhere give --coordinator=HOST:PORT, "
                         "--num_processes and --process_id.") from failure[0]
    state = _runtime()
    _State.index, _State.count = state.process_id, state.num_processes
    if _State.count > 1:
        atexit.register(_finish)
        threading.Thread(target=_watch, daemon=True).start()


def _check_addresses(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    given = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return
    if missing:
        raise ValueError(f"{' and '.join(missing)} must be given too: a process needs all of {', '.join(given)}; or "
                         "--distributed alone where they can be found (TPU pod slices, SLURM, Open MPI, Kubernetes).")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"--coordinator={coordinator} is not HOST:PORT, such as 10.0.0.1:8476: a free port of process 0's host.")
    if not 0 <= process_id < num_processes:
        raise ValueError(f"--process_id={process_id} of --num_processes={num_processes}: the processes are numbered from 0 to one "
                         "less than their number, each number once.")


def _nobody(coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: float) -> str:
    """Say who did not come."""
    if coordinator is None:
        return (f"Not all processes of this run came within {timeout:.0f} s. Start the same command on every host (worker, "
                "task), and see that the hosts reach one another.")
    host, _, port = coordinator.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        return (f"Process {process_id} found nobody at {coordinator} within {timeout:.0f} s ({error.strerror or error}). "
                "Start process 0 on that host, give its address as this host sees it, and let the port through a firewall.")
    return (f"Of {num_processes} processes not all came to {coordinator} within {timeout:.0f} s. Start the same command with "
            f"each of --process_id=0 ... --process_id={num_processes - 1}, each once.")


def count() -> int:
    """Return the number of processes."""
    jax = sys.modules.get("jax")  # a process without JAX is alone, and should stay without it
    return 1 if jax is None else jax.process_count()


def first() -> bool:
    """Return whether this is process 0, which prints, decides and writes what is no array."""
    jax = sys.modules.get("jax")
    return jax is None or jax.process_index() == 0


def joined() -> bool:
    """Return whether `initialize` has joined this process to others, which `fail` would end too."""
    return _State.count > 1


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
                _client().key_value_delete(key)
            del _State.spent[:-1]


def broadcast(value: Any = None) -> Any:
    """Return process 0's value, which must be JSON-able, in all processes."""
    if not several():
        return value
    key = _next_key()
    if not first():
        return json.loads(_wait(key))
    text = json.dumps(value)
    _client().key_value_set(key, text)
    _State.spent.append(key)
    return json.loads(text)


def on_first(function: Callable[..., Any], together: Callable[[Any], Any] | None = None) -> Any:
    """Run a function on process 0 and return its JSON-able result in all processes.

    Args:
      function: within it process 0 is alone: nothing here waits for the others. Where `together` is given the function takes
        one argument, `ask`: ask(x) runs together(x) in all processes, and returns what process 0 gets.
      together: what needs all processes, such as bringing an array to a host; x must be JSON-able.

    Raises:
      ValueError, OSError: of process 0; in all processes, with its text.
    """
    if not several():
        return function() if together is None else function(together)
    if not first():
        while True:
            kind, value = broadcast()
            if kind == "ask":
                together(value)
            elif kind == "result":
                return value
            else:
                raise (ValueError if kind == "ValueError" else OSError)(value)

    def ask(argument):
        with _alone(False):
            broadcast(["ask", argument])
            return together(argument)

    try:
        with _alone(True):
            result = function() if together is None else function(ask)
    except (ValueError, OSError) as error:
        broadcast(["ValueError" if isinstance(error, ValueError) else "OSError", str(error)])
        raise
    return broadcast(["result", result])[1]


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
      ValueError: in all processes, if some differ; names them with the values and whose they are, and says the fix.
    """
    if not several():
        return
    everyone = _gather("agree", dict(values))

    def compare():
        differences = []
        for name in dict.fromkeys(name for own in everyone for name in own):
            by_value: dict[str, list[int]] = {}
            for i, own in enumerate(everyone):
                by_value.setdefault(json.dumps(own[name]) if name in own else "absent", []).append(i)
            if len(by_value) > 1:
                differences.append(f"{name} is " + ", ".join(f"{value} in {_who(i)}" for value, i in by_value.items()))
        if differences:
            raise ValueError(f"The processes differ: {'; '.join(differences)}. {fix}")

    on_first(compare)


def agree_on_devices() -> None:
    """Refuse processes with different numbers of devices. Raises ValueError as `agree`."""
    if several():
        import jax

        agree({"number of devices": jax.local_device_count()},
              "orbax, which writes checkpoints, needs as many in each process: use equal hosts.")


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
    """As `files.new_folder`, with one temporary folder for all processes, which process 0 makes and renames.

    Raises:
      ValueError: as there; or the processes do not share the file system.
    """
    if not several():
        with files.new_folder(path, replace=replace) as folder:
            yield folder
        return
    path = pathlib.Path(path).absolute()
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(on_first(lambda: str(stack.enter_context(files.new_folder(path, replace=replace)))))
        if first():
            _State.unfinished.add(folder)  # stays there on failure: others may write on while this process deletes
        _all_see(folder, folder.is_dir)
        yield folder
        barrier(f"{path} is filled")
        held = on_first(lambda: (stack.close(), sorted(os.listdir(path)))[1])
        _State.unfinished.discard(folder)
    _all_see(path, lambda: path.is_dir() and sorted(os.listdir(path)) == held)


@contextlib.contextmanager
def locked(path: str | pathlib.Path) -> Iterator[None]:
    """As `files.locked`, held by process 0 for all."""
    with files.locked(path) if first() else contextlib.nullcontext():
        barrier(f"{path} is locked")
        yield


def fetch(x: Any) -> np.ndarray:
    """Return an array whole on the host, also one whose parts lie with several processes, all of which must ask for it."""
    if getattr(x, "is_fully_addressable", True) or x.is_fully_replicated:
        return np.asarray(x)
    assert not _State.alone, "process 0 alone cannot bring parts that lie with others"
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(x, tiled=True)


def fail(text: str, code: int, *, consequence: bool = False) -> NoReturn:
    """Print an error and end this process; where there are several, end them all.

    Process 0 prints: what all say, once; else each error with the processes that have it. A process that waits for the devices
    is ended by a thread that watches for failures, so it takes seconds; a process that was killed is missed by whoever computes
    with it, often at once, by that thread of process 0 after 40 seconds, or by JAX after 100.

    Args:
      text: the error.
      code: exit code.
      consequence: printed only if no process has an error of its own.
    """
    if _State.count == 1:
        _print_error("", text)
        if not _State.asked:
            sys.exit(code)
        os._exit(code)  # a thread may still wait for processes that do not come
    with _ending:  # the main thread or the watching one
        try:
            _part(text, consequence)
        finally:
            for folder in tuple(_State.unfinished):
                shutil.rmtree(folder, ignore_errors=True)
            os._exit(code)  # an orderly shutdown would wait for all processes


def _part(text: str, consequence: bool) -> None:
    """Tell the others of this process's end, wait until process 0 has printed what all say, and let it be the last."""
    try:
        _client().key_value_set(f"{_FAILED}{_State.index}", json.dumps([text, consequence]))
        if _State.index == 0:
            _until(lambda: len(_failures()) == _State.count, _PATIENCE)
            _print_failures(_failures())
            _client().key_value_set(_TOLD, "")
        else:
            _client().blocking_key_value_get(_TOLD, int(2000 * _PATIENCE))
    except Exception:  # process 0 is gone, or does not answer
        _print_error(f"process {_State.index}: ", text)
    with contextlib.suppress(Exception):
        _client().key_value_set(f"{_LEFT}{_State.index}", "")
        if _State.index == 0:  # the coordination service ends with it, which the others would take for an error
            _until(lambda: len(_client().key_value_dir_get(_LEFT)) == _State.count, _GRACE)


def _print_failures(failures: Mapping[int, tuple[str, bool]]) -> None:
    own = {i: text for i, (text, consequence) in sorted(failures.items()) if not consequence}
    if not own:
        i, (text, _) = min(failures.items())
        own = {i: text}
    by_text: dict[str, list[int]] = {}
    for i, text in own.items():
        by_text.setdefault(text, []).append(i)
    for text, who in by_text.items():
        _print_error("" if len(who) == _State.count or who == [0] else f"{_who(who)}: ", text)


def _print_error(whose: str, text: str) -> None:
    begun = "" if threading.current_thread() is threading.main_thread() else "\n"  # below a progress bar
    with contextlib.suppress(OSError):  # the disk may be full where the output goes
        print(f"{begun}{whose}error: {text}", file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):
        sys.stdout.flush()


def _watch() -> None:
    """Give signs of life, and end this process soon after another has failed, whatever its main thread waits for."""
    heard: dict[int, tuple[str, float]] = {}
    beat = 0
    while not _finished.wait(max(1.0, _State.count / 200)):  # process 0 answers them all
        beat += 1
        try:
            _client().key_value_set(f"{_ALIVE}{_State.index}", str(beat), allow_overwrite=True)
            signs = _client().key_value_dir_get(_ALIVE) if _State.index == 0 else []
            failed = _failures()
        except RuntimeError:  # the network fails for a moment; if the service is gone, JAX ends the process
            continue
        except ValueError:  # JAX has left the run
            return
        if failed.keys() - {_State.index}:
            if not _finished.wait(_GRACE):
                fail("another process failed", 2, consequence=True)
            return
        now, signs = time.monotonic(), {int(key.rpartition("/")[2]): sign for key, sign in signs}
        heard = {i: heard[i] if i in heard and heard[i][0] == sign else (sign, now) for i, sign in signs.items()}
        if lost := [i for i, (_, when) in sorted(heard.items()) if now - when > _SILENCE]:
            fail(f"{_who(lost)} gave no sign of life for {_SILENCE:.0f} s: killed, or the host or its network is down. The same "
                 "command, given to all again, goes on where this run stopped.", 2)


def _finish() -> None:
    """Give no more signs of life, and let nobody wait for any."""
    _finished.set()
    with contextlib.suppress(Exception):
        _client().key_value_delete(f"{_ALIVE}{_State.index}")


def _failures() -> dict[int, tuple[str, bool]]:
    return {int(key.rpartition("/")[2]): tuple(json.loads(text)) for key, text in _client().key_value_dir_get(_FAILED)}


def _runtime() -> Any:
    from jax._src import distributed  # JAX has no public name for the store of its coordination service

    return distributed.global_state


def _client() -> Any:
    client = _runtime().client
    if client is None:
        raise ValueError(f"JAX sees {count()} processes that have not joined one another. Start all with --distributed, or "
                         "call safepatch_jax.processes.initialize() before anything else.")
    return client


def _next_key() -> str:
    _State.step += 1
    return f"{_ROOT}{_State.step}"


def _wait(key: str) -> str:
    """Return a value as soon as some process has set it. Raises AnotherFailed."""
    while True:
        try:
            return _client().blocking_key_value_get(key, int(1000 * _TURN))
        except RuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        if failed := _failures():
            raise AnotherFailed(f"{_who(sorted(failed))} failed")


def _gather(name: str, value: Any) -> list[Any]:
    """Return all processes' values in process 0, nothing in the others."""
    key = _next_key()
    _client().key_value_set(f"{key}/{_runtime().process_id}", json.dumps([name, value]))
    if not first():
        return []
    everyone = [json.loads(_wait(f"{key}/{i}")) for i in range(count())]
    _client().key_value_delete(f"{key}/")
    if len(names := {name for name, _ in everyone}) > 1:
        raise RuntimeError(f"the processes are out of step: {sorted(names)}")
    return [value for _, value in everyone]


def _all_see(path: pathlib.Path, there: Callable[[], bool]) -> None:
    seen = _gather(str(path), _until(there, _SIGHT))

    def compare():
        if blind := [i for i, sees in enumerate(seen) if not sees]:
            raise ValueError(f"{_who(blind)} cannot see what process 0 writes to {path.parent}. All processes need one file "
                             "system, under the same path on every host: use a folder on a network file system or a mounted "
                             "bucket (--workdir, --run.cache_dir, --out, --target).")

    on_first(compare)


def _until(there: Callable[[], bool], seconds: float) -> bool:
    """Return whether something holds, now or soon."""
    deadline = time.monotonic() + seconds
    while not there():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _who(processes: list[int]) -> str:
    return f"process{'es' if len(processes) > 1 else ''} " + ", ".join(map(str, processes))
