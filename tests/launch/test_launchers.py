"""The launchers as a user calls them: help, plan, errors, and a run that is killed."""

import signal
import subprocess
import sys
import time

import pytest

from launch.command import MODULES
from safepatch_jax.models.config import read_hf_config
from safepatch_jax.runtime.files import read_json, read_jsonl
from safepatch_jax.testing import write_tiny_model
from tests.calls import ROOT, call, call_and_kill, command
from tests.jobs import stages_run


def test_help_is_a_manual():
    result = call("launch.safepatch", "--help_all")
    assert result.returncode == 0
    assert "python -m launch.safepatch --config=configs/demo.py" in result.stdout
    assert "--patch.retention\n      p: probability" in result.stdout and "[0.3]" in result.stdout


@pytest.mark.parametrize("name", [name for name in MODULES if name != "lm-eval"])
def test_flags_are_read_without_what_computes(name):
    """Each of these takes longer to import than --help may."""
    script = f"import {MODULES[name]}, sys; print(sorted(set(sys.argv[1:]) & set(sys.modules)))"
    heavy = ("jax", "numpy", "transformers", "torch", "matplotlib")
    call = [sys.executable, "-c", script, *heavy]
    assert subprocess.check_output(call, cwd=ROOT, text=True) == "[]\n"


def test_convert_and_inspect(tiny, tmp_path):
    result = call(
        "launch.convert",
        f"--source=hf:{tiny}",
        f"--target=orbax:{tmp_path / 'checkpoint'}",
        "--certify=hashes",
    )
    assert result.returncode == 0, result.stderr
    assert f"Certificate: {tmp_path / 'checkpoint' / 'certificate.json'}" in result.stdout
    result = call("launch.inspect", f"--model={tmp_path / 'checkpoint'}", "--scope=all")
    assert result.returncode == 0, result.stderr
    assert "model.layers.*.mlp.up_proj.weight" in result.stdout
    result = call(
        "launch.convert", f"--source=orbax:{tmp_path / 'checkpoint'}", f"--target=hf:{tiny}"
    )
    assert result.returncode == 2 and "exists and is not empty" in result.stderr
    assert "Traceback" not in result.stderr
    for launcher in ("launch.convert", "launch.inspect"):
        assert f"python -m {launcher} --" in call(launcher, "--help").stdout


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_killed_conversion_leaves_nothing_that_the_next_does_not_clear(how, tmp_path):
    """Killed while it writes; SIGTERM clears at once, after SIGKILL the same command does."""
    target = tmp_path / "target"
    source = write_tiny_model(tmp_path / "source", intermediate_size=60_000, num_hidden_layers=4)
    args = command(
        "launch.convert",
        f"--source=hf:{source}",
        f"--target=hf:{target}",
        "--certify=hashes",
        "--shard_bytes=1000000",
    )
    with subprocess.Popen(
        args, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob(".target.*/*model*/*.safetensors")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(how)
        assert process.wait(60) in (143, -signal.SIGKILL)
    assert not target.exists()
    assert bool(list(tmp_path.glob(".target.*"))) == (how == signal.SIGKILL)
    assert subprocess.run(args, cwd=ROOT, capture_output=True).returncode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source", "target"]
    assert len(list(target.glob("*.safetensors"))) > 2


def test_dry_run_prints_the_plan_and_writes_nothing(flags, tmp_path):
    result = call(
        "launch.safepatch",
        f"--workdir={tmp_path / 'work'}",
        "--dry_run",
        "--merge=ties",
        "--derive.memory=auto",
        *flags,
    )
    assert result.returncode == 0, result.stderr
    for word in (
        "Memory:  settings as given;",
        "Memory of score:",
        "Devices:",
        "Model:",
        "Data:",
        "Patch:",
        "Merged by TIES",
        "derive_se,",
    ):
        assert word in result.stdout
    assert not (tmp_path / "work").exists()


def test_a_killed_run_resumes_with_its_stage(flags, tmp_path, monkeypatch):
    """That it has the same bits is in test_faults."""
    args = ("launch.safepatch", f"--workdir={tmp_path / 'work'}", *flags)
    call_and_kill("score_se: running", *args)
    resumed = call(*args, "--verbosity=0")
    assert resumed.returncode == 0, resumed.stderr
    assert "score_se: running, stage 1 of " in resumed.stdout
    assert "score_se: key " in resumed.stdout and "its manifest is absent" in resumed.stdout
    assert "derive_se: running" not in resumed.stdout and "score_se: running" in resumed.stdout
    assert (tmp_path / "work" / "stages" / "export" / "model" / "config.json").is_file()
    (tmp_path / "work" / "report.png").unlink()
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    again = call(*args)
    _check_idle(again, tmp_path / "work")
    head, *rows = again.stdout.partition("Report: ")[0].splitlines()[-4:]
    assert head.split() == ["before", "after", "difference", "verdict"]
    assert [row.split()[0] for row in rows] == ["harm", "over-refusal", "perplexity,"]
    assert all(row in resumed.stdout for row in rows)
    assert ": key " not in again.stdout and "\033" not in again.stdout


def _check_idle(again, work):
    """A finished run runs no stage and imports nothing that computes or draws; it publishes again
    what was deleted."""
    assert again.returncode == 0 and stages_run(again.stdout) == []
    imported = {line.rpartition("|")[2].strip() for line in again.stderr.splitlines()}
    heavy = {"jax", "flax", "orbax", "grain", "transformers", "matplotlib", "jinja2"}
    assert "safepatch_jax.run.job" in imported and not imported & heavy
    assert (work / "report.png").is_file()
    starts = read_json(work / "environment.json")["starts"]
    assert [start["devices"] is None for start in starts[-2:]] == [False, True]


@pytest.mark.parametrize(
    "args, message",
    [
        (["--patch.retntion=0.5"], "Did you mean --patch.retention"),
        (["--patch.retention=2"], "'patch.retention' must be at most 1"),
        (["--config=configs/absent.py"], "No config file 'configs/absent.py'. Found beside it"),
        (["--model.source=/nowhere"], "No model folder '/nowhere'"),
        (["--data=alpaca.json"], "is not ROLE:FILE"),
        (["stray"], "unexpected argument 'stray'"),
        (["--derive.memory=auto", "--model.source=smollm2"], "architecture is not known"),
    ],
)
def test_mistakes_end_with_one_clear_line(args, message, tmp_path):
    result = call("launch.safepatch", f"--workdir={tmp_path / 'work'}", *args)
    assert result.returncode != 0 and message in result.stderr and "Traceback" not in result.stderr


def test_memory_is_chosen_for_a_run_alone(flags, tmp_path):
    result = call("launch.align", f"--out={tmp_path / 'aligned'}", "--derive.memory=auto", *flags)
    assert result.returncode == 2 and "launch.safepatch --dry_run" in result.stderr


def test_full_disk_leaves_nothing_half_written(flags, tmp_path):
    """A limit on file size stands for the full disk: the write fails in the same way, in the middle
    of a file."""
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); import runpy; "
        "sys.argv[0] = 'align'; runpy.run_module('launch.align', run_name='__main__')"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, f"--out={tmp_path / 'aligned'}", "--align.steps=1", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode != 0 and "File too large" in result.stderr
    assert not (tmp_path / "aligned").exists()


def test_align_writes_a_model_and_refuses_to_overwrite(flags, tmp_path):
    args = ("launch.align", f"--out={tmp_path / 'aligned'}", "--align.steps=2", *flags)
    result = call(*args)
    assert result.returncode == 0, result.stderr
    assert read_hf_config(tmp_path / "aligned").family == "llama"
    rows = read_jsonl(tmp_path / "aligned" / "metrics.jsonl")
    assert [(row["stage"], row["step"]) for row in rows] == [("align", 1), ("align", 2)]
    assert all(row["gradient_norm"] > 0 for row in rows)
    again = call(*args)
    assert again.returncode == 2 and "exists and is not empty" in again.stderr
    reused = call("launch.align", f"--out={tmp_path / 'again'}", *args[2:])
    assert "align: reused" in reused.stdout, reused.stderr
    again = read_jsonl(tmp_path / "again" / "metrics.jsonl")
    assert [row["answer_nll"] for row in again] == [row["answer_nll"] for row in rows]
