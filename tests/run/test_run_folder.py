"""What a run's folder is while it is under way: one writer, metrics, environment, a copy
elsewhere."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from safepatch_jax.run import metrics
from safepatch_jax.run.job import Job
from safepatch_jax.runtime import files
from tests.conftest import sharder_of
from tests.run.test_job import finished, model_hash, settings  # noqa: F401  fixtures

STEPS = {"align": 2, "derive_se": 2, "derive_osm": 2}


def rows(folder):
    return [json.loads(line) for line in (folder / metrics.FILE).read_text().splitlines()]


def test_metrics_have_every_step_of_training(finished):  # noqa: F811
    job = finished
    found = [(row["stage"], row["step"]) for row in rows(job.workdir)]
    assert found == [(stage, step) for stage, n in STEPS.items() for step in range(1, n + 1)]
    for stage in ("derive_se", "derive_osm"):
        assert [
            row["answer_nll"] for row in rows(job.workdir) if row["stage"] == stage
        ] == job.runner.result(stage)["nll"]
    content = b"".join(
        p.read_bytes() for p in (job.workdir / metrics.EVENTS / "derive_se").iterdir()
    )
    assert content.count(b"answer_nll") == content.count(b"gradient_norm") == 2


def test_what_ran_where(finished):  # noqa: F811
    starts = json.loads((finished.workdir / "environment.json").read_text())["starts"]
    told = starts[0]
    assert (
        told["packages"]["jax"]
        and told["devices"]["number"] == 8
        and told["devices"]["mesh"]["fsdp"] == 8
    )
    before = len(starts)
    Job(finished.settings, finished.workdir).run(["python", "-m", "launch.safepatch", "--a b"])
    after = json.loads((finished.workdir / "environment.json").read_text())["starts"]
    assert len(after) == before + 1 and after[-1]["command"] == "python -m launch.safepatch '--a b'"


def test_a_second_run_in_a_workdir_is_refused_while_the_first_lives(finished):  # noqa: F811
    hold = (
        "import sys\nfrom safepatch_jax.runtime import files\n"
        "with files.claimed(sys.argv[1]):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(finished.workdir)],
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


def test_a_workdir_may_be_copied_elsewhere(finished, tmp_path, capsys):  # noqa: F811
    copied = Job(finished.settings, shutil.copytree(finished.workdir, tmp_path / "elsewhere"))
    capsys.readouterr()
    copied.run()
    assert ": running" not in capsys.readouterr().out
    assert model_hash(copied) == model_hash(finished)


def test_going_on_with_half_the_devices_gives_the_same_selection_and_merge(
    settings, finished, tmp_path, capsys
):  # noqa: F811
    kept = settings.override({"run.keep_scratch": True})
    job = Job(kept, tmp_path / "work")
    for stage in ("score_se", "score_osm"):
        job.runner.need(stage)
    fewer = Job(kept, tmp_path / "work")
    fewer.state.context.__dict__["sharder"] = sharder_of(4)  # as on a machine with four devices
    capsys.readouterr()
    fewer.run()
    out = capsys.readouterr().out
    assert "Devices: 4 x cpu" in out
    assert (
        "derive_se: running" not in out
        and "score_se: running" not in out
        and "patch: running" in out
    )
    assert model_hash(fewer) == model_hash(finished)
    assert fewer.runner.result("patch") == finished.runner.result("patch")


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


def test_claims_end_with_their_block(tmp_path):
    with files.claimed(tmp_path):
        pass
    with files.claimed(tmp_path), pytest.raises(ValueError, match="Another run is at work"):
        with files.claimed(tmp_path):
            pass
