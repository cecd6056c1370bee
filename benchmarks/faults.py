"""Kill a run again and again, and compare what it ends with to that of a run that was never
disturbed.

  python -m benchmarks.faults --folder=DIR --kills=20 -- launch.safepatch --config=configs/demo.py
  python -m benchmarks.faults --folder=DIR --kills=20 -- \\
      launch.continual run --config=... --links=...

The launcher's --workdir and --run.cache_dir are set here: DIR/undisturbed and DIR/killed, each with
a cache of its own (--cache=DIR2 starts both from a copy of one). First the run is not disturbed,
and the moments are noted at which its stages begin. Then it is started again from nothing, killed
(SIGKILL, or --signal=SIGTERM) at a random moment of a stage, started by the same command, killed in
the next stage, and so on: in each stage at least once where --kills allows it, the others in stages
drawn by their duration. Finally it is not disturbed, and every file of both that --compare names is
compared by its SHA-256. A start that had ended before its signal came is listed, and not counted as
killed.

Ends with 1 if a file differs or is missing.
"""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import signal
import sys
import time

import numpy as np
from absl import app, flags

from benchmarks.common import BEGINS
from benchmarks.started import Started
from safepatch_jax.runtime.files import file_sha256

_FOLDER = flags.DEFINE_string(
    "folder", None, "Where the two runs are made; new or empty.", required=True
)
_KILLS = flags.DEFINE_integer("kills", 20, "How often the second run is killed.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments.")
_SIGNAL = flags.DEFINE_enum(
    "signal", "SIGKILL", ["SIGKILL", "SIGTERM"], "What the run is killed with."
)
_CACHE = flags.DEFINE_string(
    "cache", "", "A cache folder of which each run gets a copy, such as one with compiled programs."
)
_MINUTES = flags.DEFINE_float(
    "checkpoint_minutes", 0.05, "Minutes between checkpoints in the run that is killed."
)
_COMPARE = flags.DEFINE_list(
    "compare",
    [
        "**/export/model/*.safetensors",
        "**/patch_file/patch.safetensors",
        "**/stages/evaluate_*/answers.jsonl",
    ],
    "Files that must be equal, by pattern.",
)


def started(name: str, arguments: list[str], minutes: float) -> Started:
    """Start a launcher in the folder of this name."""
    folder, (module, *rest) = pathlib.Path(_FOLDER.value).expanduser(), arguments
    places = [
        f"--workdir={folder / name}",
        f"--run.cache_dir={folder / ('cache ' + name)}",
        f"--run.checkpoint_minutes={minutes}",
    ]
    return Started(module, [*rest, *places], folder / f"{name}.log")


def undisturbed(arguments: list[str]) -> tuple[list[str], list[float], float]:
    """Run to the end; return the stages in order, the seconds of each, and those of all."""
    run, stages, moments, begun = started("undisturbed", arguments, 0.0), [], [], time.monotonic()
    for moment, line in run.lines():
        if match := BEGINS.match(line):
            stages.append(match[1])
            moments.append(moment)
    if code := run.end():
        sys.exit(f"The undisturbed run ended with {code}; see {_FOLDER.value}/undisturbed.log.")
    now = time.monotonic()
    return stages, list(np.diff([*moments, now])), now - begun


def planned(seconds: list[float], kills: int, rng: np.random.Generator) -> list[int]:
    """Return how many kills each stage gets."""
    times = np.ones(len(seconds), int) if kills >= len(seconds) else np.zeros(len(seconds), int)
    further = rng.choice(len(seconds), kills - times.sum(), p=np.array(seconds) / sum(seconds))
    return list(times + np.bincount(further, minlength=len(seconds)))


def killed(
    arguments: list[str],
    stages: list[str],
    seconds: list[float],
    times: list[int],
    rng: np.random.Generator,
) -> list[dict]:
    """Run with kills; return the stage, moment and exit code of each."""
    kills = []
    for stage, duration, count in zip(stages, seconds, times):
        for _ in range(count):
            run = started("killed", arguments, _MINUTES.value)
            delay = float(rng.uniform(0, duration))
            begins = (BEGINS.match(line) for _, line in run.lines())
            if any(match and match[1] == stage for match in begins):
                # It may be faster than in the undisturbed run, which compiled.
                run.wait(delay, f"{stage}: done")
                code = run.end(getattr(signal, _SIGNAL.value))
            else:
                # The stage was finished by the start before, just ahead of its signal.
                code = run.end()
            kills.append({"stage": stage, "after": round(delay, 1), "exit": code})
            print(
                f"{len(kills):3d}. {stage}, {delay:.1f} s after its begin: exit code {code}",
                flush=True,
            )
    if code := started("killed", arguments, _MINUTES.value).end():
        sys.exit(
            f"The last start, which was not disturbed, ended with {code}; see "
            f"{_FOLDER.value}/killed.log."
        )
    return kills


def compared(folder: pathlib.Path) -> tuple[int, list[str]]:
    """Return how many files are equal, and the names of those that are not."""
    digests: dict[str, dict[str, str]] = {}
    for run in ("undisturbed", "killed"):
        for pattern in _COMPARE.value:
            for path in (folder / run).glob(pattern):
                name = str(path.relative_to(folder / run))
                digests.setdefault(name, {})[run] = file_sha256(path)
    different = []
    for name, runs in sorted(digests.items()):
        if len(runs) < 2 or runs["undisturbed"] != runs["killed"]:
            different.append(name)
    return len(digests) - len(different), different


def main(argv: list[str]) -> None:
    folder, arguments = pathlib.Path(_FOLDER.value).expanduser(), argv[1:]
    if not arguments:
        sys.exit(
            "Give a launcher and its flags after --, such as: -- launch.safepatch "
            "--config=configs/demo.py"
        )
    if folder.exists() and any(folder.iterdir()):
        sys.exit(f"{folder} is not empty.")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("undisturbed", "killed"):
        if _CACHE.value:
            shutil.copytree(pathlib.Path(_CACHE.value).expanduser(), folder / f"cache {name}")
    rng = np.random.default_rng(_SEED.value)
    stages, seconds, whole = undisturbed(arguments)
    print(f"Undisturbed: {whole:.0f} s, {len(stages)} stages.", flush=True)
    begun = time.monotonic()
    kills = killed(arguments, stages, seconds, planned(seconds, _KILLS.value, rng), rng)
    took = time.monotonic() - begun
    equal, different = compared(folder)
    log = (folder / "killed.log").read_text(encoding="utf-8")
    resumed = re.findall(r"resumed after step (\d+) of \d+", log)
    hit = sum(entry["exit"] != 0 for entry in kills)
    print(
        f"{hit} times {_SIGNAL.value}, then not disturbed: {took:.0f} s. Training resumed within a "
        f"stage {len(resumed)} times (after steps {', '.join(resumed)}); damaged checkpoints: "
        f"{log.count('is damaged')}. {equal} files equal, {len(different)} not."
    )
    for name in different:
        print(f"differs: {name}")
    (folder / "faults.json").write_text(
        json.dumps(
            {
                "kills": kills,
                "seconds": took,
                "undisturbed": whole,
                "equal": equal,
                "different": different,
                "resumed": resumed,
            },
            indent=2,
        )
        + "\n"
    )
    sys.exit(1 if different or not equal else 0)


if __name__ == "__main__":
    app.run(main)
