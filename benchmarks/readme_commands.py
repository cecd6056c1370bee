"""Run the commands of README.md as they stand, on a tiny model: each must end well, and write
nothing but lines of our own.

  python -m benchmarks.readme_commands                  # all that can run here: about 10 minutes
  python -m benchmarks.readme_commands --holding=sweep  # those that hold a word

Only what stands for the reader's own is replaced, by files of the same names in a new folder: DIR
(a random model), FILE (a patch of it), and the data files; small files stand for the public sets
that configs name; devices of a mesh are simulated. What cannot run is left out, each with its
reason. tests/test_readme.py runs some of them.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time

from absl import app, flags

from safepatch_jax.patch_file.create import create
from safepatch_jax.runtime.files import write_json
from safepatch_jax.testing import write_tiny_model

ROOT = pathlib.Path(__file__).absolute().parents[1]
_HOLDING = flags.DEFINE_string("holding", "", "Run the commands that hold this word.")
# What a command holds that cannot run here, and why.
LEFT_OUT = {
    "make demo": "it installs from the network, and runs the real demo for minutes",
    "make test": "it installs from the network, and runs all tests",
    "tpu_pod.sh": "it needs a TPU pod slice",
}
# of tqdm: one of something, and one of nothing
_BAR = re.compile(r"  .*: +(\d+%\||\S+ \[\d+:\d+)")
_OURS = ("error: ",)  # how our own lines begin


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command ended: exit code, what it wrote, seconds."""

    code: int
    out: str
    err: str
    seconds: float


def commands() -> list[str]:
    """Return the commands of README.md, of blocks and tables."""
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    lines = []
    for block in re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        lines += [line.partition(" #")[0] for line in block.splitlines()]
    lines += re.findall(r"^\|[^|]*\| `([^`]*)`[^|]*\|$", text, re.MULTILINE)
    ours = re.compile(r"(\w+=\S+ )*(make |safepatch |launch/|python -m )")
    return list(dict.fromkeys(" ".join(line.split()) for line in lines if ours.match(line)))


def reason(command: str) -> str:
    """Return why a command cannot run here; '' where it can."""
    return next((why for part, why in LEFT_OUT.items() if part in command), "")


def lay_out(folder: pathlib.Path) -> pathlib.Path:
    """Write the reader's files into a new folder: DIR, FILE, and data in the formats that the
    names of README.md say."""
    for name, seed in (("DIR", 0), ("other", 1)):
        write_tiny_model(folder / name, seed=seed, num_hidden_layers=1, num_key_value_heads=4)
    create(folder / "DIR", folder / "other", folder / "FILE")
    _write_data(folder, ("advbench.csv", "xstest.csv", "alpaca.json"))
    return folder


def _write_data(folder: pathlib.Path, names: tuple[str, str, str]) -> None:
    """Write small tables with the columns of AdvBench, XSTest and Alpaca, under these names."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [(f"question number {i}", f"answer number {i}") for i in range(24)]
    harmful = "".join(f"{goal},{target}\n" for goal, target in rows)
    (folder / names[0]).write_text(f"goal,target\n{harmful}")
    alike = "".join(f"{i},homonyms,safe,{prompt}\n" for i, (prompt, _) in enumerate(rows))
    (folder / names[1]).write_text(f"id,type,label,prompt\n{alike}")
    ordinary = [{"instruction": prompt, "input": "", "output": answer} for prompt, answer in rows]
    write_json(folder / names[2], ordinary)


def call(command: str, files: pathlib.Path, folder: pathlib.Path, home: pathlib.Path) -> Ended:
    """Run a command of README.md.

    Args:
      files: the reader's, see `lay_out`.
      folder: a new one, in which it runs.
      home: the home folder, in which caches are.
    """
    shutil.copytree(files, folder)
    by_hand = home / ".cache" / "safepatch_jax" / "datasets" / "manual"
    _write_data(by_hand, ("harmful_behaviors.csv", "xstest_prompts.csv", "alpaca_data.json"))
    words = shlex.split(command)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(home)}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    if words[0] == "safepatch":
        words = [sys.executable, "-m", "launch", *words[1:]]
    if mesh := re.search(r"--mesh=\w+:(\d+)", command):
        simulated = f"--xla_force_host_platform_device_count={mesh[1]}"
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {simulated}"
    start = time.monotonic()
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    return Ended(done.returncode, done.stdout, done.stderr, time.monotonic() - start)


def stray(err: str) -> list[str]:
    """Return the lines of a console's stderr that are neither bars nor messages of our own."""
    lines = [line for line in re.split(r"[\r\n]+", err) if line.strip()]
    return [line for line in lines if not _BAR.match(line) and not line.startswith(_OURS)]


def main(_: list[str]) -> None:
    bad = 0
    with tempfile.TemporaryDirectory() as name:
        scratch = pathlib.Path(name)
        files = lay_out(scratch / "files")
        for number, command in enumerate(commands()):
            if why := reason(command):
                print(f"left out: {why}  {command}")
            elif _HOLDING.value in command:
                result = call(command, files, scratch / str(number), scratch)
                lines = stray(result.err)
                bad += bool(result.code or lines)
                print(f"{result.seconds:6.1f} s  exit {result.code}  {command}")
                print("".join(f"          {line}\n" for line in lines), end="", flush=True)
    sys.exit(bool(bad))


if __name__ == "__main__":
    app.run(main)
