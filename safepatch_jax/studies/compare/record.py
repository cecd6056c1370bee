"""What a comparison's workdir is for: a record that later calls of the command must fit."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Collection, Mapping
from typing import Any

from safepatch_jax.mesh import Sharder
from safepatch_jax.run.stages import KEYED, versions
from safepatch_jax.runtime import files
from safepatch_jax.runtime.console import say, some

ANSWERS, NOTES, RECORD = "answers", "notes", "comparison.json"


def check(workdir: pathlib.Path, wanted: Mapping[str, Any]) -> None:
    """Raise ValueError if the workdir is of a comparison with other settings, data or methods."""
    record = _read(workdir)
    if not record:
        return
    wanted = json.loads(json.dumps(wanted))
    changes = _differences(record, wanted, _made(workdir, record))
    if changes:
        raise ValueError(
            f"{workdir} is a comparison with other {some(changes)}. Give another --workdir, or "
            "delete it."
        )


def write(workdir: pathlib.Path, wanted: Mapping[str, Any], sharder: Sharder) -> None:
    """Write down what the workdir is for, after `check`.

    Of methods that no run of theirs has made, what they left under other settings is deleted.
    """
    wanted = json.loads(json.dumps(wanted))
    check(workdir, wanted)
    record = _read(workdir)
    made = _made(workdir, record)
    for name, settings in record.get("methods", {}).items():
        if name not in made and settings != wanted["methods"].get(name):
            for kind in (ANSWERS, NOTES, "verdicts/*", "grades/*"):
                for path in workdir.glob(f"{kind}/{name}"):
                    shutil.rmtree(path)
    where = {
        "mesh": dict(sharder.mesh.shape),
        "devices": sharder.mesh.devices.flat[0].device_kind,
        "versions": {name: versions()[name] for name in KEYED},
    }
    before = record.get("where", where)
    if any(where.get(name) != value for name, value in before.items()):
        say(
            f"NOTE: this comparison was begun on {before}; what is trained now, on {where}, may "
            "differ from that in the last bits."
        )
    files.write_json(workdir / RECORD, wanted | {"where": before})


def _read(workdir: pathlib.Path) -> dict[str, Any]:
    path = workdir / RECORD
    return files.read_json(path) if path.is_file() else {}


def _made(workdir: pathlib.Path, record: Mapping[str, Any]) -> set[str]:
    """Return the recorded methods of which one run at least is wholly answered."""
    made = set()
    for name in record.get("methods", {}):
        for path in (workdir / NOTES / name).rglob("notes.jsonl"):
            if any(row["id"] == "made" for row in files.read_jsonl(path)):
                made.add(name)
    return made


def _differences(
    record: Mapping[str, Any], wanted: Mapping[str, Any], made: Collection[str]
) -> list[str]:
    """Say in what two records differ: of settings, and of the methods that are made, which; of the
    rest the name alone."""
    lines = []
    for name, value in wanted.items():
        old = record.get(name)
        if old == value:
            continue
        if name not in ("settings", "methods") or not isinstance(old, dict):
            lines.append(name)
            continue
        for key in {**old, **value}:
            counts = name == "settings" or key in made
            if counts and old.get(key) != value.get(key):
                lines.append(f"{name} ({key}: {old.get(key)} there, {value.get(key)} here)")
    return lines
