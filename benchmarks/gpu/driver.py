"""Runs the parts one after another, each in a process with a time limit; the summary is written
again after each. Imports no JAX: it would take the device's memory."""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gpu import machine, records, summary
from benchmarks.gpu.parts import PARTS, SIZES, limit
from safepatch_jax.runtime import files
from safepatch_jax.runtime.console import say
from safepatch_jax.runtime.text import printable

PROBE_SECONDS = 120
LOG_END = 4000  # bytes of a log that are looked at
# Beside the process of a part nothing needs the device. A caller's own value counts.
MEMORY_FRACTION = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}


def run(
    out: pathlib.Path,
    minutes: float,
    names: Sequence[str],
    shapes: str,
    limits: Mapping[str, float],
) -> bool:
    """Measure the parts that are not done; return whether all of them are done or skipped now.

    Args:
      out: the folder of records, logs and summary.
      minutes: for all parts together.
      names: which parts; all of them if there are none.
      shapes: 'full', 'tiny', or 'auto': tiny on a CPU.
      limits: seconds of parts that have limits of their own.

    Raises:
      ValueError: an unknown part; a folder that holds another device's or other shapes' figures; no
        device.
    """
    names = _checked([*names, *limits], names)
    for folder in ("parts", "logs"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    with files.claimed(out):
        state = _records(out)
        if shapes != "auto":
            _check_shapes(out, state, shapes)
        todo = [name for name in names if state.get(name, {}).get("status") != "done"]
        for name in names:
            if name not in todo:
                say(f"{name}: done before")
        if todo:
            _measure(out, todo, shapes, 60 * minutes, limits)
        state = _records(out)
    say(f"Summary: {out / summary.FILE}")
    return all(state[name]["status"] in ("done", "skipped") for name in names)


def _checked(given: Sequence[str], names: Sequence[str]) -> list[str]:
    for name in given:
        if name not in PARTS:
            raise ValueError(f"Unknown part '{name}'; there are {', '.join(PARTS)}.")
    return [name for name in PARTS if not names or name in names]


def _records(out: pathlib.Path) -> dict[str, dict[str, Any]]:
    state = {name: records.read(out / "parts" / f"{name}.json") for name in PARTS}
    return {name: record for name, record in state.items() if record}


def _check_shapes(out: pathlib.Path, state: Mapping[str, Any], shapes: str) -> None:
    others = {record["shapes"] for record in state.values() if "shapes" in record} - {shapes}
    if others:
        raise ValueError(
            f"{out} holds figures of the shapes '{others.pop()}', not '{shapes}'. Give another "
            "--out, or the same --shapes."
        )


def _measure(
    out: pathlib.Path,
    names: list[str],
    shapes: str,
    seconds: float,
    limits: Mapping[str, float],
) -> None:
    begun = time.monotonic()
    environment = MEMORY_FRACTION | os.environ
    facts = _machine(out, environment)
    if shapes == "auto":
        shapes = "tiny" if facts["platform"] == "cpu" else "full"
        _check_shapes(out, _records(out), shapes)
    assert shapes in SIZES
    say(f"{facts['kind']}, shapes '{shapes}', {len(names)} parts in {seconds / 60:g} minutes")
    for name in names:
        left = max(0.0, seconds - (time.monotonic() - begun))
        allowed = limits.get(name, limit(name, names, left))
        say(f"{name}: {PARTS[name].title}, at most {round(allowed, 1):g} s")
        summary.write(out, facts, _records(out))
        _run_part(out, name, shapes, facts["platform"], allowed, environment)
        state = _records(out)
        summary.write(out, facts, state)
        reason = state[name]["reason"]
        say(f"  {state[name]['status']}{f': {reason}' if reason else ''}")


def _machine(out: pathlib.Path, environment: dict[str, str]) -> dict[str, Any]:
    """Return the facts of this machine, and keep them. Raises ValueError if the folder is that of
    another device."""
    path, log = out / "machine.json", out / "logs" / "machine.log"
    facts = machine.probe(environment, log, PROBE_SECONDS)
    before = records.read(path)
    if before and before["kind"] != facts["kind"]:
        raise ValueError(
            f"{out} holds figures of '{before['kind']}', and this is '{facts['kind']}'. Give "
            "another --out."
        )
    files.write_json(path, facts)
    return facts


def _run_part(
    out: pathlib.Path,
    name: str,
    shapes: str,
    platform: str,
    allowed: float,
    environment: Mapping[str, str],
) -> None:
    """Run one part, at most so many seconds, and see to it that its record says how it ended."""
    path, log = out / "parts" / f"{name}.json", out / "logs" / f"{name}.log"
    scratch, begun = out / "scratch", time.monotonic()
    path.unlink(missing_ok=True)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    flags = {"out": out, "part": name, "shapes": shapes, "platform": platform, "limit": allowed}
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu", *(f"--{k}={v}" for k, v in flags.items())],
            stdin=subprocess.PIPE,  # its end tells the part that this process has ended
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**PARTS[name].environment, **environment},
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=allowed)
            reason = f"exit code {code}: {_last_line(log)}"
        except subprocess.TimeoutExpired:
            code, reason = None, f"cut after {round(allowed, 1):g} s"
        finally:
            _end(process)
            shutil.rmtree(scratch, ignore_errors=True)
    if code != 0:
        status = "cut" if code is None else "failed"
        records.ended(path, status, reason, time.monotonic() - begun, shapes)


def _end(process: subprocess.Popen) -> None:
    """End a part and what it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it has ended by itself
    process.wait()
    process.stdin.close()


def _last_line(log: pathlib.Path) -> str:
    """Return the last line of a log, as an error's is the one that says what happened."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_END))
        lines = file.read().decode(errors="replace").split("\n")
    return printable(next((line for line in reversed(lines) if line.strip()), "no output"), 500)
