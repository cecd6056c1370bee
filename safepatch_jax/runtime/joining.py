"""How the processes of a run join one another, show that they are alive, and end together.

What they do in between is in `processes`.

Left to itself JAX aborts a process whose peer is gone, after minutes and without cleaning up, and a
process that ends in an error waits as long for an orderly shutdown of all. So a thread of each
process watches the others.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import pathlib
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from safepatch_jax.runtime.meeting import meet
from safepatch_jax.runtime.reading import reason
from safepatch_jax.runtime.text import printable

Failure = tuple[str, bool, int]  # text, whether it follows from another failure, exit code
ROOT = "safepatch_jax/"  # of keys in the store of JAX's coordination service
_ALIVE, _FAILED = ROOT + "alive/", ROOT + "failed/"  # one key a process
_PRINTED, _GONE = ROOT + "printed", ROOT + "gone/"
_GRACE = 5.0  # seconds in which a process may end by itself after another has failed
_PATIENCE = 10.0  # seconds in which process 0 waits for the others' errors after a failure
_MOMENT = 1.0  # seconds from a process's last message to its end, on a busy machine
LOST = 75  # exit code after another process vanished: EX_TEMPFAIL, so that a scheduler starts anew
_SILENCE = 40.0  # seconds without a sign of life after which a process is taken for dead


class _State:
    """What this process knows of the run."""

    called = False  # `initialize` was
    index, count = 0, 1  # as JAX says, once joined
    silent: set[int] = set()  # processes that are taken for dead: nobody waits for these


unfinished: set[pathlib.Path] = set()  # folders that are deleted when this process ends in an error
# The main thread and the watching one may fail at once. The first to come prints and ends the
# process; the other one waits here until then.
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
      coordinator: HOST:PORT of process 0, which opens it. Without arguments JAX finds all: on TPU
        pod slices, and under SLURM, Open MPI and Kubernetes.
      num_processes: how many there are.
      process_id: which one this is, from 0.
      timeout: seconds in which all must have joined.

    Raises:
      ValueError: arguments that are incomplete or wrong; no cluster is found; not all joined in
        time; the port is in use.
    """
    _check_addresses(coordinator, num_processes, process_id)
    if coordinator is not None:
        meet(coordinator, num_processes, process_id, timeout)
    import jax

    _State.called = True
    # The preemption service would take SIGTERM for itself, and nothing would end.
    jax.config.update("jax_enable_preemption_service", False)
    failure: list[Exception] = []

    def connect():
        try:
            jax.distributed.initialize(
                coordinator, num_processes, process_id, initialization_timeout=int(timeout) + 3600
            )
        except Exception as error:  # raised by the thread that waits
            failure.append(error)

    # When JAX's own timeout is over it ends the process without an explanation. So JAX is given a
    # longer one, in a thread; that cannot be interrupted, and a daemon does not keep the process
    # from ending.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        raise ValueError(
            f"Not all processes of this run came within {timeout:.0f} s. Start the same command "
            "on every host (worker, task), and see that the hosts reach one another."
        )
    if failure:
        raise ValueError(
            f"The processes of this run could not be found ({reason(failure[0])}). --distributed "
            "alone works on TPU pod slices and under SLURM (srun), Open MPI and Kubernetes; "
            "elsewhere give --coordinator=HOST:PORT, --num_processes and --process_id."
        ) from failure[0]
    state = runtime()
    _State.index, _State.count = state.process_id, state.num_processes
    if _State.count > 1:
        # At exit, as JAX shuts down later still, when its client is destroyed: it waits for all
        # processes there, and the watching thread must not take that silence for a failure.
        atexit.register(_finish)
        # A daemon, so that it does not keep a process alive that is done.
        threading.Thread(target=_watch, daemon=True).start()


def _check_addresses(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    flags = {
        "--coordinator": coordinator,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [name for name, value in flags.items() if value is None]
    if len(missing) == len(flags):
        return
    if missing:
        raise ValueError(
            f"{' and '.join(missing)} must be given too: a process needs all of "
            f"{', '.join(flags)}; or --distributed alone where they can be found (TPU pod slices, "
            "SLURM, Open MPI, Kubernetes)."
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
            "numbered from 0 to one less than their number, each number once."
        )


def joined() -> bool:
    """Return whether `initialize` has joined this process to others, which `fail` would end too."""
    return _State.count > 1


def index() -> int:
    """Return which process of the run this is, from 0."""
    return _State.index


def fail(text: str, code: int, *, consequence: bool = False, at_once: bool = False) -> NoReturn:
    """Print an error and end this process; where there are several, end them all.

    Process 0 prints: an error that all have once, else each error with the processes that have it.
    A process that waits for the devices is ended by its watching thread, which takes seconds. A
    process that was killed is missed by whoever computes with it, often at once, by the watching
    thread of process 0 after 40 seconds, or by JAX after 100.

    Args:
      text: the error.
      code: exit code.
      consequence: of another process's failure; printed only if no process has an error of its own.
        The exit code is then that of the cause, or LOST.
      at_once: without Python's orderly end, in which a program that is being compiled would crash.
    """
    if _State.count == 1:
        _print_error("", text)
        if not (_State.called or at_once):
            sys.exit(code)
        os._exit(code)  # a thread may still wait for processes that do not come
    with _ending:
        try:
            _announce(text, consequence, code)
            if consequence:
                code = _code_of_cause()
        finally:
            for folder in tuple(unfinished):
                shutil.rmtree(folder, ignore_errors=True)
            _leave()
            os._exit(code)  # an orderly shutdown would wait for all processes


def _announce(text: str, consequence: bool, code: int) -> None:
    """Store this process's error, and wait until process 0 has printed those of all."""
    try:
        client().key_value_set(f"{_FAILED}{_State.index}", json.dumps([text, consequence, code]))
        if _State.index == 0:
            until(lambda: _all(failures()), _PATIENCE)
            _print_failures(failures())
            client().key_value_set(_PRINTED, "")
        else:
            client().blocking_key_value_get(_PRINTED, int(2000 * _PATIENCE))
    except Exception:  # process 0 is gone, or does not answer
        _print_error(f"process {_State.index}: ", text)


def _code_of_cause() -> int:
    """Return the exit code of a process that has failed by itself; LOST if none is left to say."""
    with contextlib.suppress(Exception):  # process 0 is gone
        for _, consequence, code in failures().values():
            if not consequence:
                return code
    return LOST


def _leave() -> None:
    """Store that this process is about to end; process 0 ends last, as the coordination service
    ends with it, which the others would take for an error."""
    with contextlib.suppress(Exception):
        client().key_value_set(f"{_GONE}{_State.index}", "")
        if _State.index == 0:
            until(lambda: _all(map(_index, client().key_value_dir_get(_GONE))), _GRACE)
            # Between its last message and its end a process may have to wait for a processor.
            time.sleep(_MOMENT)


def _all(processes: Iterable[int]) -> bool:
    """Return whether these are all that live."""
    return len(_State.silent.union(processes)) == _State.count


def _index(pair: tuple[str, str]) -> int:
    """Return the process of a key and its value."""
    return int(pair[0].rpartition("/")[2])


def _print_failures(failed: Mapping[int, Failure]) -> None:
    """Print each error once, with the processes that have it; consequences only if nothing else."""
    causes = {i: text for i, (text, consequence, _) in sorted(failed.items()) if not consequence}
    if not causes:
        i = min(failed)
        causes = {i: failed[i][0]}
    by_text: dict[str, list[int]] = {}
    for i, text in causes.items():
        by_text.setdefault(text, []).append(i)
    for text, indices in by_text.items():
        plain = len(indices) == _State.count or indices == [0]
        _print_error("" if plain else f"{who(indices)}: ", text)


def _print_error(whose: str, text: str) -> None:
    # The watching thread may print while the main thread shows a progress bar: below it, then.
    above = "" if threading.current_thread() is threading.main_thread() else "\n"
    with contextlib.suppress(OSError):  # the disk may be full where the output goes
        print(f"{above}{whose}error: {printable(text)}", file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):
        sys.stdout.flush()


def _watch() -> None:
    """Give signs of life, and end this process soon after another has failed, whatever its main
    thread waits for."""
    last: dict[int, tuple[str, float]] = {}  # each process's last sign of life, and when it came
    beat = 0
    while not _finished.wait(max(1.0, _State.count / 200)):  # process 0 answers them all
        beat += 1
        try:
            client().key_value_set(f"{_ALIVE}{_State.index}", str(beat), allow_overwrite=True)
            signs = client().key_value_dir_get(_ALIVE) if _State.index == 0 else []
            failed = failures()
        except RuntimeError:
            continue  # the network fails for a moment; if the service is gone, JAX ends the process
        except ValueError:
            return  # JAX has left the run
        if failed.keys() - {_State.index}:
            if not _finished.wait(_GRACE):
                fail("another process failed", 2, consequence=True)
            return
        silent = _silent(signs, last)
        if silent:
            _State.silent.update(silent)
            fail(
                f"{who(silent)} gave no sign of life for {_SILENCE:.0f} s: killed, or the host or "
                "its network is down. The same command, given to all again, resumes this run.",
                LOST,
            )


def _silent(signs: Sequence[tuple[str, str]], last: dict[int, tuple[str, float]]) -> list[int]:
    """Return the processes whose last sign of life is too old; `last` is brought up to date. One
    that is done has deleted its sign, and nobody waits for another."""
    now, silent = time.monotonic(), []
    for key, sign in signs:
        i = _index((key, sign))
        if i not in last or last[i][0] != sign:
            last[i] = sign, now
        if now - last[i][1] > _SILENCE:
            silent.append(i)
    return sorted(silent)


def _finish() -> None:
    """Give no more signs of life, and let nobody wait for any."""
    _finished.set()
    with contextlib.suppress(Exception):
        client().key_value_delete(f"{_ALIVE}{_State.index}")


def until(condition: Callable[[], bool], seconds: float) -> bool:
    """Return whether a condition holds within some seconds; wait for it until then."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def who(processes: list[int]) -> str:
    """Return 'process 3' or 'processes 1, 2'."""
    noun = "processes" if len(processes) > 1 else "process"
    return f"{noun} {', '.join(map(str, processes))}"


def failures() -> dict[int, Failure]:
    """Return the errors of processes that have failed."""
    result = {}
    for pair in client().key_value_dir_get(_FAILED):
        result[_index(pair)] = tuple(json.loads(pair[1]))
    return result


def runtime() -> Any:
    """Return JAX's state of the run: client, process_id, num_processes."""
    # JAX has no public name for the store of its coordination service.
    from jax._src import distributed

    return distributed.global_state


def client() -> Any:
    """Return the client of the coordination service. Raises ValueError if JAX has several processes
    and none."""
    result = runtime().client
    if result is None:
        raise ValueError(
            "JAX sees several processes, which have not joined one another. Start all with "
            "--distributed, or call safepatch_jax.runtime.processes.initialize() before anything "
            "else."
        )
    return result
