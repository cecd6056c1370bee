"""The whole job (launch.safepatch) on a random chat model: time and peak of resident memory of each
stage, and the most scratch that lay on disk.

  python -m benchmarks.whole_job --out=DIR              # 1.1B; 2 cores, 24 GiB of memory
  python -m benchmarks.whole_job --out=DIR --before     # settings at their defaults
  python -m benchmarks.whole_job --out=DIR --shape=tiny -- --run.certify=logits

DIR/model is made once (bfloat16, SmolLM2's tokenizer and vocabulary) and used again; DIR/run and
DIR/cache are made afresh, so that the time holds all compilation, and deleted at the end (--keep
leaves them). All that only costs time is tiny (LEAST: few steps, samples, tokens), all that costs
memory is the whole model's. Settings with a dot are handed to the job, after the others.

The memory is that of the job's process and what it starts: the kernel's own peak of resident pages
since the last look (/proc/PID/clear_refs), twice a second, so that nothing between two looks is
missed; files that are mapped count. Where the machine has less than --spare GiB left, the job is
killed and the peaks so far are the result. On disk: bytes that are allocated in the run's folder of
stages; derived models, scores and checkpoints (scratch) apart from what stays. The patched model,
which the patch stage writes and the export links, counts as staying.

Linux alone. DIR/whole_job.json has all figures.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from absl import app, flags

from benchmarks.common import BEGINS, SHAPES, available, on_disk
from benchmarks.models import write_chat_model
from safepatch_jax.runtime import files

_OUT = flags.DEFINE_string("out", None, "Folder of model, run and figures.", required=True)
_SHAPE = flags.DEFINE_enum("shape", "1b", sorted(SHAPES), "Shape of the model.")
_LAYERS = flags.DEFINE_integer("layers", None, "Its blocks; default: all.", lower_bound=1)
_BEFORE = flags.DEFINE_bool("before", False, "Settings of memory at their defaults.")
_KEEP = flags.DEFINE_bool("keep", False, "Leave the run and its cache in place.")
_SPARE = flags.DEFINE_float(
    "spare", 1.5, "The job is killed where the machine has less memory left, in GiB.", lower_bound=0
)

# What costs time alone. Rows are at most 48 + 16 tokens.
LEAST = {
    "align.enabled": False,
    "data.max_prompt_tokens": 48,
    "data.max_answer_tokens": 16,
    "data.train_limit": 8,
    "data.eval_limit": 2,
    "derive.batch_size": 4,
    "derive.se_steps": 2,
    "derive.osm_steps": 2,
    "derive.se_nll_ceiling": 100.0,  # random weights begin above the default
    "derive.osm_seed": 1,  # opposite steps would be ranked alike, and leave nothing of SE
    "score.samples": 4,
    "evaluate.max_new_tokens": 4,
    "evaluate.batch_size": 2,
    "export.rounding": "stochastic",
    "run.keep_scratch": False,
    "run.certify": "hashes",  # logits would hold a float32 model in torch
}
# What memory and scratch depend on.
SMALL = {
    "derive.train": "scope",
    "derive.backward": "layerwise",
    "derive.optimizer": "adafactor",
    "derive.clip_norm": 0.0,
    "derive.store": "bfloat16",
    "score.store": "bfloat16",
    "run.checkpoint_minutes": 0.0,
}
_EVERY = 0.5  # seconds between two looks
_BETWEEN = "(start, between stages)"
_SCRATCH = re.compile(r"\.?(derive|score|evaluate_(se|osm|intersection))(_(se|osm))?(\.|$)")
_ENDS = re.compile(r"^(\w+): done in ")


class Memory:
    """Peaks of resident memory of a process and what it starts."""

    def __init__(self, process: int):
        self._process = process

    def peak(self) -> int:
        """Return the most bytes that were resident since the last call; 0 if it has ended."""
        total = 0
        for process in _tree(self._process):
            folder = pathlib.Path(f"/proc/{process}")
            with contextlib.suppress(OSError):
                status = (folder / "status").read_text()
                if match := re.search(r"VmHWM:\s+(\d+)", status):
                    total += 1024 * int(match.group(1))
                (folder / "clear_refs").write_text("5")  # the peak begins again
        return total


def _tree(process: int) -> Iterator[int]:
    yield process
    for path in pathlib.Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in path.read_text().split():
                yield from _tree(int(child))


class Watch:
    """Starts the job and looks at it until it ends.

    Attributes:
      stages: {name: {seconds, peak, scratch}} in the order in which they ran; bytes.
      most: the most bytes on disk, 'scratch', 'stays' and of 'both' at one time.
      ended: 'done', 'failed', or why it was killed.
    """

    def __init__(self, command: list[str], workdir: pathlib.Path, log: pathlib.Path):
        self.stages: dict[str, dict[str, float]] = {}
        self.most = {"scratch": 0, "stays": 0, "both": 0}
        self.fullest: dict[str, int] = {}
        self.ended = ""
        self._stage, self._workdir = _BETWEEN, workdir
        environment = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        begun = time.monotonic()
        with open(log, "w", buffering=1) as self._log:
            self._process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
                env=os.environ | environment,
            )
            reader = threading.Thread(target=self._read, daemon=True)
            reader.start()
            try:
                self._look_until_end()
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                code = self._process.wait()
                reader.join(timeout=10)
        self.seconds = time.monotonic() - begun
        self.ended = self.ended or ("failed" if code else "done")

    def _entry(self, stage: str) -> dict[str, float]:
        return self.stages.setdefault(stage, {"seconds": 0.0, "peak": 0, "scratch": 0})

    def _read(self) -> None:
        """Follow what the job says: which stage is under way, and for how long."""
        begun = time.monotonic()
        for line in self._process.stdout:
            self._log.write(line)
            starts, ends = BEGINS.match(line), _ENDS.match(line)
            if not (starts or ends):
                continue
            now = time.monotonic()
            self._entry(self._stage)["seconds"] += now - begun
            self._stage, begun = starts.group(1) if starts else _BETWEEN, now
        self._entry(self._stage)["seconds"] += time.monotonic() - begun

    def _look_until_end(self) -> None:
        memory = Memory(self._process.pid)
        stage = self._stage
        while self._process.poll() is None:
            time.sleep(_EVERY)
            entry = self._entry(stage)
            entry["peak"] = max(entry["peak"], memory.peak())
            entry["scratch"] = max(entry["scratch"], self._look_at_disk())
            stage = self._stage
            if available() < _SPARE.value * 2**30:
                self.ended = (
                    f"killed in {stage}: the machine had less than {_SPARE.value:g} GiB of memory "
                    "left"
                )
                return

    def _look_at_disk(self) -> int:
        sizes = on_disk(self._workdir / "stages")
        scratch = sum(size for name, size in sizes.items() if _SCRATCH.match(name))
        both = sum(sizes.values())
        if scratch > self.most["scratch"]:
            self.fullest = sizes
        for name, size in (("scratch", scratch), ("stays", both - scratch), ("both", both)):
            self.most[name] = max(self.most[name], size)
        return scratch


def machine() -> dict[str, Any]:
    """Return what of the machine times and memory depend on."""
    text = pathlib.Path("/proc/cpuinfo").read_text()
    found = {"model": re.search(r"model name\s*:\s*(.*)", text)}
    sets = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": found["model"].group(1) if found["model"] else platform.machine(),
        "instructions": [name for name in sets if re.search(rf"\b{name}\b", text)],
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load": list(os.getloadavg()),
    }


def table(figures: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a report."""
    on, most = figures["machine"], figures["most"]
    yield (
        f"{figures['model']}, {on['cores']} cores ({', '.join(on['instructions'])}), "
        f"{on['memory'] / 2**30:.0f} GiB: {figures['ended']} after {figures['seconds']:.0f} s"
    )
    yield f"\n{' '.join(figures['settings'])}\n"
    yield "| stage | seconds | peak resident, GiB | scratch on disk, GB |\n|---|---|---|---|"
    for name, x in figures["stages"].items():
        sizes = f"{x['peak'] / 2**30:.2f} | {x['scratch'] / 1e9:.2f}"
        yield f"| {name} | {x['seconds']:.1f} | {sizes} |"
    sizes = f"{figures['peak'] / 2**30:.2f} | {most['scratch'] / 1e9:.2f}"
    yield f"| all | {figures['seconds']:.1f} | {sizes} |"
    stays, both = most["stays"] / 1e9, most["both"] / 1e9
    yield f"\nWhat stays: {stays:.2f} GB. At most {both:.2f} GB at one time. Scratch at its most:"
    for name, size in sorted(figures["fullest"].items()):
        if _SCRATCH.match(name) and size > 1e6:
            yield f"  {name}: {size / 1e9:.2f} GB"


def main(argv) -> None:
    out = pathlib.Path(_OUT.value).absolute()
    model, run, cache = (out / name for name in ("model", "run", "cache"))
    if not model.is_dir():
        print(f"Writing {model}", flush=True)
        write_chat_model(model, _SHAPE.value, _LAYERS.value)
    for folder in (run, cache):
        shutil.rmtree(folder, ignore_errors=True)
    given = LEAST if _BEFORE.value else LEAST | SMALL
    settings = [f"--{name}={value}" for name, value in given.items()] + argv[1:]
    command = [sys.executable, "-m", "launch.safepatch", "--config=configs/demo.py"]
    places = [f"--model.source={model}", f"--workdir={run}", f"--run.cache_dir={cache}"]
    log = out / "whole_job.log"
    watch = Watch([*command, *places, *settings], run, log)
    figures = {
        "command": shlex.join(["python", "-m", "benchmarks.whole_job", *sys.argv[1:]]),
        "model": f"{_SHAPE.value}, {_describe(model)}",
        "settings": settings,
        "machine": machine(),
        "ended": watch.ended,
        "seconds": watch.seconds,
        "peak": max((x["peak"] for x in watch.stages.values()), default=0),
        "stages": watch.stages,
        "most": watch.most,
        "fullest": watch.fullest,
    }
    files.write_json(out / "whole_job.json", figures)
    for line in table(figures):
        print(line)
    if not _KEEP.value:
        for folder in (run, cache):
            shutil.rmtree(folder, ignore_errors=True)
    if watch.ended == "failed":
        sys.exit(f"The job failed:\n{log.read_text()[-3000:]}")


def _describe(model: pathlib.Path) -> str:
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    raw = json.loads((model / "config.json").read_text())
    return (
        f"{size / 2e9:.2f} B parameters in bfloat16 ({raw['num_hidden_layers']} blocks of width "
        f"{raw['hidden_size']}, vocabulary {raw['vocab_size']})"
    )


if __name__ == "__main__":
    app.run(main)
