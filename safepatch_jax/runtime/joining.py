"""How the processes of a run join one another, give signs of life, and end together; `processes`
has what they do meanwhile.

Left to itself JAX aborts a process whose peer is gone, after minutes and without cleaning up, and a
process that ends in an error waits as long for an orderly shutdown of all. So a thread of each
process looks after the others.
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
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

ROOT = "safepatch_jax/"  # of keys in the store of JAX's coordination service
_ALIVE, _FAILED, _TOLD, _LEFT = ROOT + "alive/", ROOT + "failed/", ROOT + "told", ROOT + "left/"
_GRACE = 5.0  # seconds in which a process may end by itself after another has failed
_PATIENCE = 10.0  # seconds in which process 0 waits for what the others have to say about a failure
_MOMENT = 1.0  # seconds from a process's last word to its end, on a busy machine
_SILENCE = 40.0  # seconds after which a process that gives no sign of life is taken for dead


class _State:
    """What this process knows of the run."""

    asked = False  # `initialize` was called
    index, count = 0, 1  # as JAX says, once joined


unfinished: set[pathlib.Path] = set()  # folders that are deleted when this process ends in an error
_ending = threading.RLock()
_finished = threading.Event()


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: float = 300.0,
) -> None:
    """Join the other processes of this run; comes before anything else that uses JAX.

    Args:
      coordinator: HOST:PORT of process 0, which opens it. Without arguments all are found by JAX:
        on TPU pod slices, and under SLURM, Open MPI and Kubernetes.
      num_processes: how many there are.
      process_id: which one this is, from 0.
      timeout: seconds in which all must have come.

    Raises:
      ValueError: arguments that are incomplete or wrong; no cluster is found; not all came in time;
        the port is in use.
    """
    _check_addresses(coordinator, num_processes, process_id)
    import jax

    _State.asked = True
    jax.config.update(
        "jax_enable_preemption_service", False
    )  # it takes SIGTERM for itself, and nothing would end
    failure: list[Exception] = []

    def connect():
        try:  # JAX ends the process when its own timeout is over, without a word that helps
            jax.distributed.initialize(
                coordinator, num_processes, process_id, initialization_timeout=int(timeout) + 3600
            )
        except Exception as error:
            failure.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        raise ValueError(_nobody(coordinator, num_processes, process_id, timeout))
    if failure and "start RPC server" in str(failure[0]):
        raise ValueError(
            f"Process 0 cannot open {coordinator or 'its port'}: it is in use. Give all processes "
            "another port in "
            "--coordinator, or end what uses it."
        ) from failure[0]
    if failure:
        reason = str(failure[0]).partition("\n")[0]
        raise ValueError(
            f"The processes of this run could not be found ({reason}). --distributed alone works "
            "on TPU pod slices "
            "and under SLURM (srun), Open MPI and Kubernetes; elsewhere give "
            "--coordinator=HOST:PORT, "
            "--num_processes and --process_id."
        ) from failure[0]
    state = runtime()
    _State.index, _State.count = state.process_id, state.num_processes
    if _State.count > 1:
        atexit.register(_finish)
        threading.Thread(target=_watch, daemon=True).start()


def _check_addresses(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    given = {
        "--coordinator": coordinator,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return
    if missing:
        raise ValueError(
            f"{' and '.join(missing)} must be given too: a process needs all of "
            f"{', '.join(given)}; or "
            "--distributed alone where they can be found (TPU pod slices, SLURM, Open MPI, "
            "Kubernetes)."
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(
            f"--coordinator={coordinator} is not HOST:PORT, such as 10.0.0.1:8476: a free port of "
            "process 0's host."
        )
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process_id={process_id} of --num_processes={num_processes}: the processes are "
            "numbered from 0 to one "
            "less than their number, each number once."
        )


def _nobody(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: float
) -> str:
    """Say who did not come."""
    if coordinator is None:
        return (
            f"Not all processes of this run came within {timeout:.0f} s. Start the same command "
            "on every host (worker, "
            "task), and see that the hosts reach one another."
        )
    host, _, port = coordinator.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        return (
            f"Process {process_id} found nobody at {coordinator} within {timeout:.0f} s "
            f"({error.strerror or error}). "
            "Start process 0 on that host, give its address as this host sees it, and let the "
            "port through a firewall."
        )
    return (
        f"Of {num_processes} processes not all came to {coordinator} within {timeout:.0f} s. "
        "Start the same command with "
        f"each of --process_id=0 ... --process_id={num_processes - 1}, each once."
    )


def joined() -> bool:
    """Return whether `initialize` has joined this process to others, which `fail` would end too."""
    return _State.count > 1


def fail(text: str, code: int, *, consequence: bool = False) -> NoReturn:
    """Print an error and end this process; where there are several, end them all.

    Process 0 prints: what all say, once; else each error with the processes that have it. A process
    that waits for the devices is ended by a thread that watches for failures, so it takes seconds;
    a process that was killed is missed by whoever computes with it, often at once, by that thread
    of process 0 after 40 seconds, or by JAX after 100.

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
            for folder in tuple(unfinished):
                shutil.rmtree(folder, ignore_errors=True)
            _leave()
            os._exit(code)  # an orderly shutdown would wait for all processes


def _part(text: str, consequence: bool) -> None:
    """Tell the others of this process's end, and wait until process 0 has printed what all say."""
    try:
        client().key_value_set(f"{_FAILED}{_State.index}", json.dumps([text, consequence]))
        if _State.index == 0:
            until(lambda: len(failures()) == _State.count, _PATIENCE)
            _print_failures(failures())
            client().key_value_set(_TOLD, "")
        else:
            client().blocking_key_value_get(_TOLD, int(2000 * _PATIENCE))
    except Exception:  # process 0 is gone, or does not answer
        _print_error(f"process {_State.index}: ", text)


def _leave() -> None:
    """Say that nothing is left to do here; process 0 is the last to go."""
    with contextlib.suppress(Exception):
        client().key_value_set(f"{_LEFT}{_State.index}", "")
        if (
            _State.index == 0
        ):  # the coordination service ends with it, which the others would take for an error
            until(lambda: len(client().key_value_dir_get(_LEFT)) == _State.count, _GRACE)
            time.sleep(
                _MOMENT
            )  # from its last word to its end a process may have to wait for the processor


def _print_failures(told: Mapping[int, tuple[str, bool]]) -> None:
    own = {i: text for i, (text, consequence) in sorted(told.items()) if not consequence}
    if not own:
        i, (text, _) = min(told.items())
        own = {i: text}
    by_text: dict[str, list[int]] = {}
    for i, text in own.items():
        by_text.setdefault(text, []).append(i)
    for text, whose in by_text.items():
        _print_error("" if len(whose) == _State.count or whose == [0] else f"{who(whose)}: ", text)


def _print_error(whose: str, text: str) -> None:
    begun = (
        "" if threading.current_thread() is threading.main_thread() else "\n"
    )  # below a progress bar
    with contextlib.suppress(OSError):  # the disk may be full where the output goes
        print(f"{begun}{whose}error: {text}", file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):
        sys.stdout.flush()


def _watch() -> None:
    """Give signs of life, and end this process soon after another has failed, whatever its main
    thread waits for."""
    heard: dict[int, tuple[str, float]] = {}
    beat = 0
    while not _finished.wait(max(1.0, _State.count / 200)):  # process 0 answers them all
        beat += 1
        try:
            client().key_value_set(f"{_ALIVE}{_State.index}", str(beat), allow_overwrite=True)
            signs = client().key_value_dir_get(_ALIVE) if _State.index == 0 else []
            failed = failures()
        except (
            RuntimeError
        ):  # the network fails for a moment; if the service is gone, JAX ends the process
            continue
        except ValueError:  # JAX has left the run
            return
        if failed.keys() - {_State.index}:
            if not _finished.wait(_GRACE):
                fail("another process failed", 2, consequence=True)
            return
        now, signs = time.monotonic(), {int(key.rpartition("/")[2]): sign for key, sign in signs}
        heard = {
            i: heard[i] if i in heard and heard[i][0] == sign else (sign, now)
            for i, sign in signs.items()
        }
        if lost := [i for i, (_, when) in sorted(heard.items()) if now - when > _SILENCE]:
            fail(
                f"{who(lost)} gave no sign of life for {_SILENCE:.0f} s: killed, or the host or "
                "its network is down. The same "
                "command, given to all again, goes on where this run stopped.",
                2,
            )


def _finish() -> None:
    """Give no more signs of life, and let nobody wait for any."""
    _finished.set()
    with contextlib.suppress(Exception):
        client().key_value_delete(f"{_ALIVE}{_State.index}")


def until(there: Callable[[], bool], seconds: float) -> bool:
    """Return whether something holds, now or soon."""
    deadline = time.monotonic() + seconds
    while not there():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def who(processes: list[int]) -> str:
    """Return 'process 3' or 'processes 1, 2'."""
    return f"process{'es' if len(processes) > 1 else ''} " + ", ".join(map(str, processes))


def failures() -> dict[int, tuple[str, bool]]:
    """Return what processes that have failed say: text, and whether it is a consequence of another
    failure."""
    return {
        int(key.rpartition("/")[2]): tuple(json.loads(text))
        for key, text in client().key_value_dir_get(_FAILED)
    }


def runtime() -> Any:
    """Return JAX's state of the run: client, process_id, num_processes."""
    from jax._src import (
        distributed,  # JAX has no public name for the store of its coordination service
    )

    return distributed.global_state


def client() -> Any:
    """Return the client of the coordination service. Raises ValueError if JAX has several processes
    and none."""
    found = runtime().client
    if found is None:
        raise ValueError(
            "JAX sees several processes, which have not joined one another. Start all with "
            "--distributed, or "
            "call safepatch_jax.runtime.processes.initialize() before anything else."
        )
    return found
