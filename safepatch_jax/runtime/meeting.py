"""How processes that are numbered by hand find one another, before JAX joins them.

JAX aborts a process whose number another one has, or whose coordinator's port something else uses,
with a stack and no reason. So process 0 opens the port first, hears from each process its number
and theirs, and tells all to go on, or why not; JAX then opens the same port.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from typing import Any

_RUN = "safepatch_jax"
_MOST = 4096  # bytes of a message
_HELLO = 10.0  # seconds in which who connects says who it is
_PAUSE = 0.2  # seconds between two attempts to connect


def meet(coordinator: str, count: int, index: int, timeout: float) -> None:
    """Return once all processes of a run have come.

    Args:
      coordinator: HOST:PORT of process 0.
      count: how many processes there are.
      index: which one this is.
      timeout: seconds in which all must come.

    Raises:
      ValueError: they did not, two have one number or differ in `count`; the port is in use, or
        what answers is no process 0 of a run.
    """
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + timeout
    if index == 0:
        _gather(coordinator, int(port), count, deadline, timeout)
    else:
        _report(coordinator, (host.strip("[]"), int(port)), count, index, deadline, timeout)


def _gather(coordinator: str, port: int, count: int, deadline: float, timeout: float) -> None:
    """Hear from all other processes, and tell them what comes of it."""
    come: set[int] = set()
    connections, problem = [], ""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_open(coordinator, port))
        while len(come) < count - 1 and not problem:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection = stack.enter_context(server.accept()[0])
            except TimeoutError:
                problem = _describe_missing(coordinator, count, come, timeout)
                break
            hello = _receive(connection, _HELLO)
            if hello is None or hello.get("run") != _RUN:
                continue  # someone else, who looks what is at this port
            connections.append(connection)
            problem = _problem(hello, count, come)
            if not problem:
                come.add(hello["index"])
        for connection in connections:
            with contextlib.suppress(OSError):
                _send(connection, {"run": _RUN, "problem": problem})
    if problem:
        raise ValueError(problem)


def _open(coordinator: str, port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        raise ValueError(
            f"Process 0 cannot open {coordinator}: {os.strerror(error.errno)}. Give all processes "
            "another port in --coordinator, or end what uses it."
        ) from error


def _problem(hello: dict[str, Any], count: int, come: set[int]) -> str:
    """Say what is wrong with what a process says of itself; '' if nothing is."""
    index, theirs = hello.get("index"), hello.get("count")
    if theirs != count:
        return (
            f"Process 0 has --num_processes={count}, process {index!r:.20} has {theirs!r:.20}. "
            "Give all the same number."
        )
    if type(index) is not int or not 0 < index < count or index in come:
        return (
            f"Two processes have --process_id={index!r:.20}. Start the same command with each of "
            f"--process_id=0 ... --process_id={count - 1}, each once."
        )
    return ""


def _describe_missing(coordinator: str, count: int, come: set[int], timeout: float) -> str:
    missing = [str(i) for i in range(1, count) if i not in come]
    shown = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
    return (
        f"Of {count} processes not all came to {coordinator} within {timeout:.0f} s: there is none "
        f"with --process_id={shown}. Start the same command with each of --process_id=0 ... "
        f"--process_id={count - 1}, each once, and let the port through a firewall."
    )


def _report(
    coordinator: str,
    address: tuple[str, int],
    count: int,
    index: int,
    deadline: float,
    timeout: float,
) -> None:
    """Tell process 0 who this is, and hear whether all goes well."""
    with _connect(coordinator, address, index, deadline, timeout) as connection:
        _send(connection, {"run": _RUN, "index": index, "count": count})
        # Process 0 has until its own deadline, which may be later.
        answer = _receive(connection, timeout + _HELLO)
    if answer is None or answer.get("run") != _RUN or "problem" not in answer:
        raise ValueError(
            f"What answers process {index} at {coordinator} is no process 0 of a run, or it has "
            "ended. Start process 0 there, or give all processes another port in --coordinator."
        )
    if answer["problem"]:
        raise ValueError(str(answer["problem"]))


def _connect(
    coordinator: str, address: tuple[str, int], index: int, deadline: float, timeout: float
) -> socket.socket:
    while True:
        try:
            return _refuse_itself(socket.create_connection(address, timeout=_HELLO))
        except (OSError, UnicodeError) as error:
            if time.monotonic() > deadline:
                reason = getattr(error, "strerror", None) or str(error)
                raise ValueError(
                    f"Process {index} found nobody at {coordinator} within {timeout:.0f} s "
                    f"({reason}). Start process 0 on that host, give its address as this host sees "
                    "it, and let the port through a firewall."
                ) from error
        time.sleep(_PAUSE)


def _refuse_itself(connection: socket.socket) -> socket.socket:
    """Return a connection, unless both its ends are one.

    TCP lets a socket connect to itself: nobody listens at a port of this host, and the system
    happens to give the socket that very port as its own.
    """
    if connection.getsockname() == connection.getpeername():
        connection.close()
        raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    return connection


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket, seconds: float) -> dict[str, Any] | None:
    """Return a message of one line; None if what comes is none."""
    deadline, data = time.monotonic() + seconds, b""
    try:
        while not data.endswith(b"\n") and len(data) < _MOST:
            connection.settimeout(max(0.01, deadline - time.monotonic()))
            part = connection.recv(_MOST)
            if not part:
                break
            data += part
        message = json.loads(data)
    except (OSError, ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None
