"""What a comparison's workdir is for: a record that later calls of the command must fit."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from safepatch_jax.evaluation.lines import Lines
from safepatch_jax.mesh import Sharder
from safepatch_jax.methods.registry import METHODS
from safepatch_jax.run.stages import KEYED, delete_stages, versions
from safepatch_jax.runtime import files
from safepatch_jax.runtime.console import say, some
from safepatch_jax.runtime.records import read_record

ANSWERS, NOTES, RECORD = "answers", "notes", "comparison.json"
STEPS = "steps"  # within the seeds' folder: what methods keep while they are made


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
        if name in METHODS and name not in made and settings != wanted["methods"].get(name):
            for kind in (ANSWERS, NOTES, "verdicts/*", "grades/*"):
                for path in workdir.glob(f"{kind}/{name}"):
                    files.refuse_link(path, workdir)
                    files.delete(path)
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
    if not path.is_file():
        return {}
    fix = "Copy it back from a backup, or use another --workdir; nothing was changed in this one."
    return read_record(path, {"methods": dict, "settings": dict, "where": dict}, fix)


def _made(workdir: pathlib.Path, record: Mapping[str, Any]) -> set[str]:
    """Return the recorded methods of which one run at least is wholly answered."""
    made = set()
    for name in record.get("methods", {}):
        if name not in METHODS:
            continue
        for path in (workdir / NOTES / name).rglob("notes.jsonl"):
            if "made" in Lines(path).rows:
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
                there, here = f"{old.get(key)!s:.400}", f"{value.get(key)!s:.400}"
                lines.append(f"{name} ({key}: {there} there, {here} here)")
    return lines


def delete_seeds(seeds: pathlib.Path) -> None:
    """Delete the stages of all seeds, and what methods kept while they were made."""
    if not seeds.is_dir():
        return
    files.refuse_link(seeds)
    left = []
    for folder in sorted(seeds.iterdir()):
        if folder.is_symlink() or not folder.is_dir():
            left.append(folder.name)
        elif folder.name == STEPS:
            files.delete(folder)
        else:
            left += [f"{folder.name}/{name}" for name in delete_stages(folder / "stages")]
            for empty in (folder / "stages", folder):
                if empty.is_dir() and not any(empty.iterdir()):
                    empty.rmdir()
    if left:
        say(f"Left in {seeds}, as no run has made it: {some(left, ', ')}")
    elif not any(seeds.iterdir()):
        seeds.rmdir()
