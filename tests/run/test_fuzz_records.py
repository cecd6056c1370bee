"""Records with flipped bytes and replaced values, with a fixed seed: each is read as it was, made
again, or refused in one line; never a traceback, never a half-written result."""

import functools
import json

import numpy as np
import pytest

from safepatch_jax.evaluation.lines import Lines
from safepatch_jax.io import checksums
from safepatch_jax.patch_file.apply import apply
from safepatch_jax.patch_file.create import create
from safepatch_jax.patch_file.file import inspect
from safepatch_jax.patch_file.log import PatchLog
from safepatch_jax.patch_file.log_lines import FORMAT
from safepatch_jax.run import environment
from safepatch_jax.run.job import Job
from safepatch_jax.run.metrics import Metrics
from safepatch_jax.runtime import files
from safepatch_jax.runtime.text import printable
from safepatch_jax.settings import Settings
from safepatch_jax.studies.compare import record
from safepatch_jax.studies.sweep.rows import read_rows
from safepatch_jax.testing import write_tiny_model
from tests.jobs import FAST, write_data
from tests.patch_file.models import patched_copy
from tests.run.test_stage_folders import Stages
from tests.studies.test_sweep_analysis import measures, row

ODD = (None, True, -1, 1e308, 10**400, "", "x" * 20_000, "\x1b[2J\nerror: ok", [], {}, [[[]]])


def flipped(data, rng):
    """Some bytes replaced, cut off, or put in twice."""
    data = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        place = int(rng.integers(len(data)))
        data[place] = int(rng.integers(256))
    kind = rng.integers(6)
    if kind == 0:
        del data[int(rng.integers(len(data))) :]
    elif kind == 1:
        data += data[: int(rng.integers(len(data)))]
    return bytes(data)


def replaced(text, rng):
    """One value or name somewhere in a JSON text replaced by an odd one."""
    value = json.loads(text)
    places = []

    def walk(inner):
        if isinstance(inner, (dict, list)):
            for key in inner if isinstance(inner, dict) else range(len(inner)):
                places.append((inner, key))
                walk(inner[key])

    walk(value)
    if not places:
        return json.dumps(ODD[rng.integers(len(ODD))])
    inner, key = places[rng.integers(len(places))]
    if isinstance(inner, dict) and rng.integers(3) == 0:
        inner[f"{key}x"] = inner.pop(key)
    else:
        inner[key] = ODD[rng.integers(len(ODD))]
    return json.dumps(value)


def damaged(path, kept, rng):
    """Damage a file of one JSON value, of JSON lines, or of anything."""
    if path.suffix not in (".json", ".jsonl") or rng.integers(2):
        path.write_bytes(flipped(kept, rng))
    elif path.suffix == ".json":
        path.write_text(replaced(kept.decode(), rng))
    else:
        lines = kept.decode().splitlines()
        i = int(rng.integers(len(lines)))
        lines[i] = replaced(lines[i], rng)
        path.write_text("\n".join(lines) + "\n")


def fuzz(path, use, times, seed=0):
    """Damage a file so many times; return how often it was refused."""
    rng, kept, refused = np.random.default_rng(seed), path.read_bytes(), 0
    for _ in range(times):
        damaged(path, kept, rng)
        left = files.folder_hashes(path.parent).keys()
        try:
            use()
        except (ValueError, OSError) as error:
            refused += 1
            assert len(printable(str(error))) < 2100
            assert files.folder_hashes(path.parent).keys() == left, error
        path.write_bytes(kept)
    return refused


def test_manifests_of_stages(tmp_path):
    stages = Stages(tmp_path)
    stages.finish()
    path = stages.work / "stages" / "kept" / "manifest.json"

    def use():
        stages.finish()
        assert stages.file("kept").stat().st_size == 200
        assert stages.runner().result("kept") == {"number": 1.5}

    assert fuzz(path, use, 80) <= 30  # one in which neither key nor stage is left is no manifest


def test_settings_and_environment_of_a_run(tmp_path, tiny, sharder):
    own = {"model.source": str(tiny), "run.cache_dir": str(tmp_path / "cache")}
    settings = Settings().override(FAST | write_data(tmp_path) | own)
    work = tmp_path / "work"
    files.write_json(work / "settings.json", settings.to_dict())
    Job(settings, work)
    assert fuzz(work / "settings.json", lambda: Job(settings, work), 25) >= 12
    environment.write(work, ["a"], sharder)
    path = work / "environment.json"
    assert fuzz(path, lambda: environment.write(work, ["a"], sharder), 10) == 0


def test_measures_of_training(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"stage": "a", "step": step, "time": "now", "answer_nll": 1.5} for step in (1, 2, 3)]
    files.write_jsonl(path, rows)
    wanted = [1.0, 2.0, 3.0]

    def use():
        Metrics(tmp_path).complete("a", wanted)
        assert {row["step"] for row in files.read_jsonl(path)} >= {1, 2, 3}

    assert fuzz(path, use, 150) == 0


def test_rows_of_sweeps_answers_and_records(tmp_path):
    path = tmp_path / "sweep.jsonl"
    whole = row(measures(1, 2, 10.0)) | {"keys": {}, "seconds": 1.5}
    files.write_jsonl(path, [whole, whole])
    assert fuzz(path, lambda: read_rows(path), 150) > 50
    for kind, line in {
        "answers": {"id": "a", "answer": "text", "tokens": 3},
        "verdicts": {"id": "a", "of": "b", "outcome": "complied", "degree": "", "raw": "yes"},
    }.items():
        path = tmp_path / kind / "model" / "harm.jsonl"
        path.parent.mkdir(parents=True)
        files.write_jsonl(path, [line, line | {"id": "b"}])
        assert fuzz(path, functools.partial(Lines, path), 100) > 50
    wanted = {"settings": {"a": 1}, "methods": {"ga": {}}, "suite": [1], "backbone": "x"}
    path = tmp_path / record.RECORD
    files.write_json(path, wanted | {"where": {"mesh": {}}})
    assert fuzz(path, lambda: record.check(tmp_path, wanted), 100) > 50


@pytest.fixture
def pair(tmp_path):
    base = write_tiny_model(tmp_path / "base", num_hidden_layers=1)
    model = patched_copy(base, tmp_path / "model", density=0.01)
    (tmp_path / "file").mkdir()
    create(base, model, tmp_path / "file" / "patch", {"seed": 3})
    return base, tmp_path / "file" / "patch"


def test_patch_files(pair, tmp_path):
    base, patch = pair
    before = files.folder_hashes(base)

    def use():
        for line in inspect(patch):
            printable(line)
        apply(patch, base, tmp_path / "out")

    def kept():
        try:
            use()
        except (ValueError, OSError):
            assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
            raise
        raise AssertionError("damaged bytes were applied")

    assert fuzz(patch, kept, 150) == 150
    assert files.folder_hashes(base) == before


def test_patch_logs_and_checksums(tmp_path):
    entry = {
        "format": FORMAT,
        "source": "x",
        "aligned": False,
        "folder": "/x",
        "model": "0" * 64,
        "companions": {},
        "settings": {},
        "versions": {},
    }
    PatchLog.begin(tmp_path, entry)
    assert fuzz(tmp_path / "log.jsonl", lambda: PatchLog(tmp_path), 150) > 100
    folder = tmp_path / "arrays"
    folder.mkdir()
    (folder / "x").write_bytes(b"abc")
    checksums.write(folder)
    path = folder / checksums.NAME
    assert fuzz(path, lambda: checksums.check(folder, "Copy it again."), 150) > 75
