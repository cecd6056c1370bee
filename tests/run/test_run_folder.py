"""What a run's folder is while it is under way: one writer, metrics, environment."""

import json
import os
import subprocess
import sys

import pytest

from safepatch_jax.run import metrics
from safepatch_jax.run.job import Job
from safepatch_jax.runtime.files import read_json

STEPS = {"align": 2, "derive_se": 2, "derive_osm": 2}
HOLD = """
import sys
from safepatch_jax.runtime import files
with files.claimed(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def rows(folder):
    return [json.loads(line) for line in (folder / metrics.FILE).read_text().splitlines()]


def test_metrics_have_every_step_of_training(finished):
    measured = rows(finished.workdir)
    expected = []
    for stage, steps in STEPS.items():
        expected += [(stage, step) for step in range(1, steps + 1)]
    assert [(row["stage"], row["step"]) for row in measured] == expected
    for stage in ("derive_se", "derive_osm"):
        nll = [row["answer_nll"] for row in measured if row["stage"] == stage]
        assert nll == finished.runner.result(stage)["nll"]
    folder = finished.workdir / metrics.EVENTS / "derive_se"
    content = b"".join(path.read_bytes() for path in folder.iterdir())
    assert content.count(b"answer_nll") == content.count(b"gradient_norm") == 2


def test_what_ran_where(finished, monkeypatch):
    path = finished.workdir / "environment.json"
    starts = read_json(path)["starts"]
    assert starts[0]["packages"]["jax"]
    assert starts[0]["devices"]["number"] == starts[0]["devices"]["mesh"]["fsdp"] == 8
    monkeypatch.setenv("HF_ENDPOINT", "https://me:open@mirror:8443/hub")
    monkeypatch.setenv("TFDS_HTTP_PROXY", "me:open@proxy:80")
    monkeypatch.setenv("TFDS_HTTPS_PROXY", "https://proxy:80/@")
    Job(finished.settings, finished.workdir).run(["python", "-m", "launch.safepatch", "--a b"])
    again = read_json(path)["starts"]
    assert again[:-1] == starts
    assert again[-1]["command"] == "python -m launch.safepatch '--a b'"
    variables = again[-1]["variables"]
    assert variables["HF_ENDPOINT"] == "https://***@mirror:8443/hub"
    assert variables["TFDS_HTTP_PROXY"] == "***@proxy:80"
    assert variables["TFDS_HTTPS_PROXY"] == "https://proxy:80/@"


def test_a_second_run_in_a_workdir_is_refused_while_the_first_lives(finished):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(finished.workdir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(
        ValueError,
        match=rf"Another run is at work in .* \(process {holder.pid} on .*\). Wait until",
    ):
        Job(finished.settings, finished.workdir).run()
    holder.kill()
    holder.wait()
    Job(finished.settings, finished.workdir).run()  # a dead process holds nothing


def test_rows_that_an_earlier_start_wrote_are_replaced(tmp_path):
    with metrics.Metrics(tmp_path) as first:
        record = first.recorder("a")
        for step in (1, 2, 3):
            record(step, {"x": float(step)})
        first.recorder("b")(1, {"x": 0.0})
    with open(tmp_path / metrics.FILE, "a") as f:
        f.write('{"stage": "a", "st')  # a kill in the middle of a line
    with metrics.Metrics(tmp_path) as second:
        second.recorder("a")(3, {"x": 9.0})
    assert [(r["stage"], r["step"], r["x"]) for r in rows(tmp_path)] == [
        ("a", 1, 1.0),
        ("a", 2, 2.0),
        ("b", 1, 0.0),
        ("a", 3, 9.0),
    ]
