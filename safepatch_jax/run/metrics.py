"""What training measured, step by step, while a run is under way: for TensorBoard, and as JSON
lines."""

from __future__ import annotations

import datetime
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from safepatch_jax.runtime import files, libraries, processes
from safepatch_jax.runtime.console import say
from safepatch_jax.runtime.records import misfits

if TYPE_CHECKING:
    from safepatch_jax.training.journal import Recorder

FILE, EVENTS = "metrics.jsonl", "tensorboard"


class Metrics:
    """Writes into a folder: ``metrics.jsonl``, one object a step with stage, step, time and values;
    and event files in ``tensorboard/STAGE``, where tensorboardX is installed. A stage that is
    resumed, or runs again, replaces its rows from where it begins.
    """

    def __init__(self, folder: str | pathlib.Path, label: str = ""):
        self._folder, self._label = pathlib.Path(folder), label
        self._files: list[Any] = []

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: Any) -> None:
        while self._files:
            self._files.pop().close()

    def labelled(self, label: str) -> Metrics:
        """Return a writer into the same folder that puts a label before the names of stages, for
        runs whose stages have the same names; this one closes its files."""
        other = Metrics(self._folder, label)
        other._files = self._files
        return other

    def recorder(self, stage: str) -> Recorder:
        """Return what takes (step, values) of a stage; it does nothing in all but process 0."""
        if self._label:
            stage = f"{self._label}/{stage}"
        sinks: list[Any] = []

        def record(step: int, values: Mapping[str, float]) -> None:
            if not processes.first():
                return
            if not sinks:
                sinks.extend(self._begin(stage, step))
            lines, events = sinks
            time = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
            row = {"stage": stage, "step": step, "time": time} | dict(values)
            lines.write(json.dumps(row) + "\n")
            lines.flush()
            if events is not None:
                for name, value in values.items():
                    events.add_scalar(name, value, step)

        return record

    def complete(self, stage: str, nll: Sequence[float]) -> None:
        """Add the steps of a finished stage that this start did not make: before it was resumed, or
        all of them where the stage was reused. Of these the answer NLL alone is known."""
        path = self._folder / FILE
        rows = [row for line in _lines(path) if (row := _row(line))]
        known = {row["step"] for row in rows if row["stage"] == stage}
        for step, value in enumerate(nll, 1):
            if step not in known:
                rows.append({"stage": stage, "step": step, "answer_nll": value})
        files.write_jsonl(path, sorted(rows, key=lambda row: (row["stage"], row["step"])))

    def _begin(self, stage: str, step: int) -> tuple[Any, Any]:
        """Drop what an earlier start wrote of these steps; return a file and an event writer, None
        where there is no library for that."""
        path = self._folder / FILE
        kept = [line for line in _lines(path) if not _is_of(line, stage, step)]
        files.write_text(path, "".join(line + "\n" for line in kept))
        lines = files.appended(path)
        self._files.append(lines)
        # Here: it takes time, and only training needs it.
        if missing := libraries.missing("tensorboardX"):
            say(f"  {missing[0]} is not installed: {FILE} is written, no events for TensorBoard.")
            return lines, None
        folder = str(self._folder / EVENTS / stage)
        events = libraries.event_writer()(folder, purge_step=step, flush_secs=5)
        self._files.append(events)
        return lines, events


def _lines(path: pathlib.Path) -> list[str]:
    """Return the whole lines of a file; a killed process may have left half of one."""
    if not path.is_file():
        return []
    return path.read_bytes().decode(errors="replace").split("\n")[:-1]


def _row(line: str) -> dict[str, Any]:
    """Return the measurement of a line; {} if it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return {} if list(misfits(row, {"stage": str, "step": int})) else row


def _is_of(line: str, stage: str, step: int) -> bool:
    """Return whether a line is of this stage, at or after a step, or no measurement at all."""
    row = _row(line)
    return not row or (row["stage"] == stage and row["step"] >= step)
