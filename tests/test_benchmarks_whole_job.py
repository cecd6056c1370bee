"""The benchmark of the whole job, on a tiny model. No time is asserted."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks.common import on_disk

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def run(out, *arguments):
    command = [sys.executable, "-m", "benchmarks.whole_job", f"--out={out}", "--shape=tiny"]
    done = subprocess.run(
        [*command, "--layers=1", *arguments],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=600,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    return done, json.loads((out / "whole_job.json").read_text())


def test_every_stage_has_its_time_memory_and_scratch(tmp_path):
    done, figures = run(tmp_path, "--", "--evaluate.max_new_tokens=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert figures["ended"] == "done" and "| derive_se |" in done.stdout
    stages = figures["stages"]
    assert {"import", "derive_osm", "score_se", "patch", "export", "report"} <= stages.keys()
    assert sum(x["seconds"] for x in stages.values()) == pytest.approx(figures["seconds"], abs=2)
    assert figures["peak"] == max(x["peak"] for x in stages.values()) > 50e6
    # Of the one block 46 thousand weights are trained and scored, both in bfloat16, twice.
    assert figures["most"]["scratch"] > 4 * 2 * 40_000
    assert figures["most"]["stays"] > 2 * 6e6  # the exported model, mostly vocabulary
    assert "--evaluate.max_new_tokens=2" in figures["settings"]
    assert not (tmp_path / "run").exists() and (tmp_path / "model").is_dir()


def test_a_job_that_leaves_the_machine_no_memory_is_killed_and_told(tmp_path):
    done, figures = run(tmp_path, "--before", "--spare=1e6")
    assert done.returncode == 0, done.stderr
    assert figures["ended"].startswith("killed in") and figures["ended"] in done.stdout
    assert not any(setting.startswith("--derive.train") for setting in figures["settings"])
    assert figures["peak"] > 0


def test_allocated_bytes_are_counted_by_stage(tmp_path):
    for name, size in (("score_se/a/b", 10_000), (".patch.1.partial/c", 5_000), ("lock", 5_000)):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)
    sizes = on_disk(tmp_path)
    assert sizes.keys() == {"score_se", ".patch.1.partial"}
    assert sizes["score_se"] > sizes[".patch.1.partial"] >= 5_000
