"""The half hour on a GPU, on a CPU with tiny shapes: all parts, one that is cut, a second call. No
time is asserted."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import pytest

from benchmarks.gpu import machine, records, summary
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.parts import PARTS, SIZES, layers_that_fit, limit
from safepatch_jax.runtime import files

ROOT = pathlib.Path(__file__).parents[1]


def command(out, *arguments):
    return [sys.executable, "-m", "benchmarks.gpu", f"--out={out}", *arguments]


def run(out, *arguments, **environment):
    return subprocess.run(
        command(out, *arguments),
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=600,
        # Of the two parts that train twice, one would compile anew each time; torch's threads wait
        # for one another on a busy machine.
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_COMPILATION_CACHE": "true",
            "OMP_NUM_THREADS": "1",
            **environment,
        },
    )


def record(out, name):
    return json.loads((out / "parts" / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu") / "out"
    done = run(out, "--minutes=20")
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


def test_all_parts_on_a_cpu(whole):
    out, said = whole
    assert "shapes 'tiny'" in said
    torch = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    for name in PARTS:
        there = torch or name != "decode_hf"
        assert record(out, name)["status"] == ("done" if there else "skipped"), name
    assert not (out / "scratch").exists()
    page = (out / "summary.md").read_text()
    sections = re.findall("^## (.*)$", page, re.M)
    assert sections == [
        "Train step",
        "Score pass",
        "Patch operation",
        "Decode",
        "Export and import",
        "Selection and merge",
        "Training twice",
        "Memory",
    ]
    assert "| whole tree, AdamW | 2 |" in page and "| whole tree, Adafactor | 2 |" in page
    assert "What is read equals what was written." in page
    assert "say nothing of speed" in page
    assert "| xla | yes | yes | yes |" in page and "**no**" not in page


def test_figures_go_together(whole):
    out, _ = whole
    train, score, patch = (
        record(out, name)["figures"] for name in ("train_adamw", "score", "patch")
    )
    sizes = SIZES["tiny"]
    assert len(train["step_seconds"]) == sizes.steps and min(train["step_seconds"]) > 0
    # The program computes all that is needed, and the upper triangle too.
    assert 1 < train["program_flops"] / train["needed_flops"] < 2
    # Weights and both moments, float32, stay; the gradient comes on top.
    assert 12 * train["parameters"] < train["predicted_bytes"]
    assert record(out, "train_adafactor")["figures"]["predicted_bytes"] < train["predicted_bytes"]
    assert len(score["sample_seconds"]) == len(patch["patch_seconds"]) == sizes.repeats
    assert patch["needed_bytes"] == 20 * patch["scope"] < patch["predicted_bytes"]
    assert 0 < patch["kept_share"] < 0.03  # of a tenth, retained with probability 0.3
    decode = record(out, "decode")["figures"]["batches"]
    assert [int(number) for number in decode] == list(sizes.decode_batches)


def test_a_second_call_runs_nothing_again(whole):
    out, _ = whole
    names = [name for name in PARTS if record(out, name)["status"] == "done"]
    before = {path: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}
    done = run(out, f"--parts={','.join(names)}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done before") == len(names) and "at most" not in done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}
    done = run(out, "--parts=score", "--shapes=full")
    assert done.returncode and "figures of the shapes 'tiny', not 'full'" in done.stderr


def test_a_part_over_its_limit_is_cut_and_the_next_one_runs(tmp_path):
    parts = "--parts=train_adamw,import_export"
    done = run(tmp_path, parts, "--limits=train_adamw:0.5")
    assert done.returncode == 1
    cut = record(tmp_path, "train_adamw")
    assert (cut["status"], cut["reason"]) == ("cut", "cut after 0.5 s")
    assert record(tmp_path, "import_export")["status"] == "done"
    page = (tmp_path / "summary.md").read_text()
    assert "cut: cut after 0.5 s" in page and "## Export and import" in page
    # The next call takes it up, and it alone.
    done = run(tmp_path, parts)
    assert done.returncode == 0, done.stdout
    assert "import_export: done before" in done.stdout
    assert "| whole tree, AdamW | 2 |" in (tmp_path / "summary.md").read_text()


def test_a_part_that_was_cut_keeps_what_it_had_measured(tmp_path):
    path = tmp_path / "score.json"
    records.Record(path, "tiny", 9.0).note(median=0.5)
    records.ended(path, "cut", "cut after 9 s", 9.1, "tiny")
    assert files.read_json(path) == {
        "part": "score",
        "shapes": "tiny",
        "limit": 9.0,
        "status": "cut",
        "reason": "cut after 9 s",
        "seconds": 9.1,
        "figures": {"median": 0.5},
    }


def test_a_part_ends_with_the_process_that_started_it(tmp_path):
    driver = subprocess.Popen(
        command(tmp_path, "--parts=cpu_bits", "--limits=cpu_bits:500"),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"},
    )
    children = pathlib.Path(f"/proc/{driver.pid}/task/{driver.pid}/children")
    until = time.monotonic() + 120
    while not (tmp_path / "parts" / "cpu_bits.json").is_file():
        assert time.monotonic() < until and driver.poll() is None
        time.sleep(0.05)
    (child,) = map(int, children.read_text().split())
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    while pathlib.Path(f"/proc/{child}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not pathlib.Path(f"/proc/{child}").exists()
    assert record(tmp_path, "cpu_bits")["status"] == "running"


def test_time_that_a_part_leaves_goes_to_the_others():
    names = ["train_adamw", "score", "decode"]
    assert limit("train_adamw", names, 130) == 130 * 6 / 13
    assert limit("score", names, 130) == 130 * 4 / 7
    assert limit("decode", names, 130) == 130


def test_blocks_that_fit():
    def of_blocks(n):
        return 100 + 10 * n

    assert layers_that_fit(of_blocks, 149, 32) == 4
    assert layers_that_fit(of_blocks, 150, 32) == 5
    assert layers_that_fit(of_blocks, 1000, 32) == 32
    assert layers_that_fit(of_blocks, 119, 32) == layers_that_fit(of_blocks, 50, 32) == 1


def test_fewer_blocks_where_the_device_has_no_memory_for_them(tmp_path):
    sizes = dataclasses.replace(SIZES["tiny"], layers=20)
    record = records.Record(tmp_path / "x.json", "tiny", 9.0)
    tried = []

    def attempt(layers):
        tried.append(layers)
        if layers > 15:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    bench = Bench(sizes, record, tmp_path)
    bench.as_many_layers(lambda layers: layers, attempt)
    assert tried == [20, 18, 17, 16, 15]
    assert record.figures["layers"] == 15 and record.figures["layers_refused"] == tried[:-1]


@pytest.mark.parametrize(
    "peak, says",
    [
        (None, "are named.\n"),
        (3 << 30, "are named. **No peak is above its plan.**"),
        (5 << 30, "are named. **Above the plan: decode (125.0%).**"),
    ],
)
def test_the_devices_peak_beside_the_plan(tmp_path, peak, says):
    path = tmp_path / "decode.json"
    plan = {"layers": 2, "predicted_bytes": 4 << 30, "peak_bytes": peak, "host": 1 << 30}
    records.Record(path, "full", 9.0).note(**plan)
    records.ended(path, "done", "", 1.0, "full")
    summary.write(tmp_path, machine.facts(), {"decode": files.read_json(path)})
    page = (tmp_path / "summary.md").read_text()
    (row,) = re.findall(r"^\| decode \| 2 \| 4 \| .*$", page, re.M)
    assert says in page and ("75%" in row) == (peak == 3 << 30)


@pytest.mark.parametrize(
    "arguments, environment, says",
    [
        (("--parts=train",), {}, "Unknown part 'train'; there are train_adamw"),
        (("--limits=score",), {}, "'score' is not NAME:SECONDS"),
        (("--parts=score",), {"JAX_PLATFORMS": "nowhere"}, "could not say what device it has"),
    ],
)
def test_mistakes_of_a_call(tmp_path, arguments, environment, says):
    done = run(tmp_path / "out", *arguments, **environment)
    assert done.returncode and says in done.stdout + done.stderr
