"""A chain of many links: time, memory and disk of each, killed at random moments, reverted.

  python -m benchmarks.chain --folder=DIR                      # a tiny random model: minutes
  python -m benchmarks.chain --folder=DIR --model=DIR2         # such as SmolLM2: hours
  python -m benchmarks.chain --folder=DIR --links=6 --kills=0 -- --keep_models=0

Settings after -- go to launch.continual. A gate (--gate, by default rules under which some links of
the tiny model pass and some fail; no advice) judges every link. First the chain is not disturbed:
of each link seconds, CPU seconds, the peak of resident memory, memory maps, and what the workdir
holds afterwards are printed. Then it is made again from nothing, killed (SIGKILL) at --kills random
moments, drawn evenly over the time that the first one took, and started by the same command each
time, until it is through. Log, patch files, measurements, gates' reports, the report and the head's
model of both must be equal. Then link --remove is taken out; the model must be the old one but for
what that link alone has changed. At last --revert links are taken off, and the model before them
must be the one that replay builds from the start.

DIR/chain.json and chain.md have the figures. The same command goes on behind the undisturbed chain
where that is there. Ends with 1 if something differs.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import app, flags

from benchmarks.common import machine, on_disk
from benchmarks.started import Started
from safepatch_jax.io.folder import Checkpoint, has_weights
from safepatch_jax.patch_file.file import runs_of
from safepatch_jax.patch_file.log import EXPORT, LINKS, PatchLog, folder_hash
from safepatch_jax.patch_file.log_lines import START
from safepatch_jax.patch_file.stack import flips_of
from safepatch_jax.reporting.tables import table
from safepatch_jax.runtime.files import file_sha256, read_json, write_json, write_text

_FOLDER = flags.DEFINE_string("folder", None, "Where all is made; new or empty.", required=True)
_MODEL = flags.DEFINE_string("model", "", "A model folder; without it a tiny one is made.")
flags.DEFINE_bool("tiny", True, "Make a tiny random model, if there is no --model.")
_LINKS = flags.DEFINE_integer("links", 20, "Links of the chain.", lower_bound=1)
_KILLS = flags.DEFINE_integer("kills", 20, "How often the second chain is killed.", lower_bound=0)
_REVERT = flags.DEFINE_integer("revert", 5, "Links that are taken off at last.", lower_bound=0)
_REMOVE = flags.DEFINE_integer("remove", 7, "A link that is taken out before; 0: none.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments.")
_GATE = flags.DEFINE_string("gate", "", "Rules, in place of this program's; 'none' for no gate.")

BEGINS = re.compile(r"^Link (\S+): on ")
_PERIOD = 0.2  # seconds between two looks at a process
_TINY_STEPS = (
    "--derive.batch_size=4",
    "--derive.se_steps=2",
    "--derive.osm_steps=2",
    "--derive.se_learning_rate=1e-3",
    "--derive.osm_learning_rate=1e-3",
    "--score.samples=2",
    "--patch.combine=intersection",
    "--evaluate.max_new_tokens=3",
    "--data.max_answer_tokens=12",
    "--run.certify=hashes",
)
# What makes the ordinary answers more likely, and what does not, or so it is at first.
_ANSWERS = ("sure: {link} {i}", "an answer, {link}", "~~^^||{link}~~^^||")
# Near a test of signs, as the tiny model's links differ by a thousandth of a nat and less.
_RULES = """undecided = "accept"

[text]
margin = 0.00001
fail_above = 0.0
bound = 0.0001
confidence = 0.8
"""
# What both chains must have, with the same bytes.
_SAME = (
    f"{LINKS}/*/stages/patch_file/patch.safetensors",
    f"{LINKS}/*/{EXPORT}/*.safetensors",
    "measures/stages/*/answers.jsonl",
    "gates/*/gate.json",
)


@dataclasses.dataclass
class Cost:
    """What a link took, and what was there when it ended; bytes."""

    name: str
    seconds: float
    cpu: float
    memory: int
    maps: int
    disk: int
    most_disk: int


class Watch(threading.Thread):
    """Looks at a process and its workdir until the process has ended."""

    def __init__(self, pid: int, workdir: pathlib.Path):
        super().__init__(daemon=True)
        self._pid, self._workdir = pid, workdir
        self.memory, self.maps, self.disk, self._now = 0, 0, 0, 0

    def run(self) -> None:
        proc = pathlib.Path(f"/proc/{self._pid}")
        while True:
            try:
                status = (proc / "status").read_text()
                maps = (proc / "maps").read_bytes().count(b"\n")
            except OSError:
                return
            resident = re.search(r"VmRSS:\s+(\d+)", status)
            if not resident:
                return  # it has ended, and its parent has not yet asked
            self.memory = max(self.memory, 1024 * int(resident[1]))
            self.maps = max(self.maps, maps)
            self.disk = max(self.disk, held(self._workdir))
            time.sleep(_PERIOD)

    def taken(self) -> tuple[int, int, int]:
        """Return the most of memory, maps and disk since the last call."""
        values = self.memory, self.maps, self.disk
        self.memory, self.maps, self.disk = 0, 0, 0
        return values

    def cpu(self) -> float:
        """Return the CPU seconds of the process so far, of its own and the kernel's."""
        fields = pathlib.Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def held(folder: pathlib.Path) -> int:
    """Return the bytes that are allocated in a folder."""
    return sum(on_disk(folder).values())


def write_records(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Write a data file of each role, the harmful records in as many categories as links: made up
    for the tiny model, else those that come with the package, dealt out."""
    if _MODEL.value:
        return {"harmful": _dealt(folder)}
    rows = []
    for place, link in enumerate(names()):
        answer = _ANSWERS[place % len(_ANSWERS)]
        for i, split in enumerate(("train",) * 4 + ("search",) + ("report",) * 2):
            rows.append([f"{link} request {i}", answer.format(link=link, i=i), link, split])
    paths = {"harmful": _write(folder / "harmful.csv", rows)}
    for role, count in (("lookalike", 4), ("ordinary", 16)):
        rows = []
        for i, split in enumerate(("train",) * 4 + ("search",) + ("report",) * count):
            rows.append([f"{role} text {i}", f"an answer, {i * 37}", "", split])
        paths[role] = _write(folder / f"{role}.csv", rows)
    return paths


def _dealt(folder: pathlib.Path) -> pathlib.Path:
    """Deal the package's harmful records out to the links: each split of each category by turns, so
    that every link has some of each split."""
    from safepatch_jax.data.records import load_records

    records = load_records("harmful", "builtin", "", folder)
    records = sorted(records, key=lambda record: record.split)
    rows, links = [], names()
    for i, record in enumerate(records):
        rows.append([record.prompt, record.answer, links[i % len(links)], record.split])
    return _write(folder / "harmful.csv", rows)


def _write(path: pathlib.Path, rows: Sequence[Sequence[str]]) -> pathlib.Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("prompt", "answer", "category", "split"), *rows])
    return path


def names() -> list[str]:
    return [f"c{i:02d}" for i in range(1, _LINKS.value + 1)]


def words(folder: pathlib.Path, more: Sequence[str]) -> list[str]:
    """Write model, data and rules; return the words of the chain's command but for its places."""
    data = [f"{role}:{path}" for role, path in write_records(folder).items()]
    words = ["run", f"--links={';'.join(names())}", f"--data={','.join(data)}"]
    if _MODEL.value:
        words += ["--config=demo", f"--model.source={_MODEL.value}"]
    else:
        from safepatch_jax.testing import write_tiny_model

        model = write_tiny_model(folder / "model", num_key_value_heads=4, intermediate_size=32)
        words += [*_TINY_STEPS, f"--model.source={model}"]
    if _GATE.value != "none":
        rules = folder / "rules.toml"
        rules.write_text(_RULES)
        words.append(f"--gate={_GATE.value or rules}")
    return [*words, *more]


def started(name: str, command: Sequence[str]) -> Started:
    folder = pathlib.Path(_FOLDER.value).expanduser()
    places = [f"--workdir={folder / name}", f"--run.cache_dir={folder / 'cache'}"]
    return Started("launch.continual", [*command, *places], folder / f"{name}.log")


def undisturbed(command: Sequence[str]) -> list[Cost]:
    """Make the chain; return the cost of what came before the first link, and of each link."""
    workdir = pathlib.Path(_FOLDER.value).expanduser() / "undisturbed"
    run = started("undisturbed", command)
    watch = Watch(run.pid, workdir)
    watch.start()
    costs, name, begun, cpu = [], "start", time.monotonic(), 0.0

    def add(now: float, cpu_now: float) -> None:
        memory, maps, most = watch.taken()
        cost = Cost(name, now - begun, cpu_now - cpu, memory, maps, held(workdir), most)
        costs.append(cost)
        print(line(cost), flush=True)

    for moment, text in run.lines():
        cpu_now = watch.cpu()
        if match := BEGINS.match(text):
            add(moment, cpu_now)
            name, begun, cpu = match[1], moment, cpu_now
    add(time.monotonic(), cpu_now)
    if code := run.end():
        sys.exit(f"The undisturbed chain ended with {code}; see {workdir}.log.")
    return costs


def line(cost: Cost) -> str:
    return (
        f"{cost.name:10} {cost.seconds:7.1f} s {cost.cpu:7.1f} CPU s "
        f"{cost.memory / 2**20:7.0f} MiB {cost.maps:6d} maps {cost.disk / 1e6:8.1f} MB kept "
        f"{cost.most_disk / 1e6:8.1f} MB at most"
    )


def killed(command: Sequence[str], costs: Sequence[Cost]) -> list[dict[str, Any]]:
    """Make the chain with kills; return the link, moment and exit code of each."""
    rng, kills = np.random.default_rng(_SEED.value), []
    ends = np.cumsum([cost.seconds for cost in costs])
    for moment in sorted(rng.uniform(0, ends[-1], _KILLS.value)):
        place = int(np.searchsorted(ends, moment))
        cost = costs[place]
        delay = float(moment - (ends[place] - cost.seconds))
        run = started("killed", command)
        reached = place == 0
        if not reached:  # the link is under way, or a later one is
            later = {other.name for other in costs[place:]}
            begins = (BEGINS.match(text) for _, text in run.lines())
            reached = any(match and match[1] in later for match in begins)
        if reached:
            run.wait(delay, "Link ")
        code = run.end(signal.SIGKILL if reached else None)
        kills.append({"link": cost.name, "after": round(delay, 1), "exit": code})
        print(f"{len(kills):3d}. {cost.name}, {delay:.1f} s: exit code {code}", flush=True)
    if code := started("killed", command).end():
        sys.exit(f"The last start, which was not disturbed, ended with {code}; see killed.log.")
    return kills


def differences(folder: pathlib.Path) -> tuple[int, list[str]]:
    """Compare the two chains; return how many files and lines are equal, and what is not."""
    contents: dict[str, dict[str, Any]] = {}
    for run in ("undisturbed", "killed"):
        workdir = folder / run
        for pattern in _SAME:
            for path in workdir.glob(pattern):
                name = str(path.relative_to(workdir))
                contents.setdefault(name, {})[run] = file_sha256(path)
        for i, entry in enumerate(PatchLog(workdir).entries):
            contents.setdefault(f"log, line {i + 1}", {})[run] = _timeless(entry)
        report = read_json(workdir / "continual.json")
        contents.setdefault("continual.json", {})[run] = _timeless(report)
    different = []
    for name, runs in sorted(contents.items()):
        if len(runs) < 2 or runs["undisturbed"] != runs["killed"]:
            different.append(name)
    return len(contents) - len(different), different


def _timeless(value: Any) -> Any:
    """Return JSON without the moments that it names, and the hashes over these."""
    if isinstance(value, list):
        return [_timeless(item) for item in value]
    if isinstance(value, dict):
        kept = value.keys() - {"date", "id", "previous"}
        return {key: _timeless(value[key]) for key in sorted(kept)}
    return value


def removed(folder: pathlib.Path, number: int) -> dict[str, Any]:
    """Take a link out of the chain; later links keep what they have written. Compare the head's
    model with the old one, in which what that link alone has changed is as it was before it."""
    workdir = last_chain(folder)
    before = PatchLog(workdir)
    later = [before.patch(n) for n in before.live[before.live.index(number) + 1 :]]
    patch, old = before.patch(number), Checkpoint(before.folder(before.head)).tensors
    begun = time.monotonic()
    _call("remove", str(number), f"--workdir={workdir}", "--overlap=later")
    seconds = time.monotonic() - begun
    log, unequal, shared = PatchLog(workdir), [], 0
    new = Checkpoint(log.folder(log.head)).tensors
    for name, tensor in old.items():
        bits = np.concatenate(list(runs_of(tensor)))
        flips = flips_of([patch], name, patch.tensors[name])
        for other in later:
            for positions, _ in other.chunks(name):
                shared += int(np.count_nonzero(flips[positions]))
                flips[positions] = 0
        if not np.array_equal(bits ^ flips, np.concatenate(list(runs_of(new[name])))):
            unequal.append(name)
    whole = folder_hash(log.folder(log.head)) == log.hash(log.head)
    equal = whole and not unequal and len(log.live) == len(before.live) - 1
    return {"link": number, "seconds": seconds, "overwritten": shared, "equal": equal}


def last_chain(folder: pathlib.Path) -> pathlib.Path:
    """Return the chain that was killed, or the only one."""
    workdir = folder / "killed"
    return workdir if workdir.exists() else folder / "undisturbed"


def reverted(folder: pathlib.Path, last: int) -> dict[str, Any]:
    """Take links off, and compare the head's model with the one that is built from the start."""
    workdir, out = last_chain(folder), folder / "replayed"
    before = PatchLog(workdir)
    target = before.live[-last - 1] if last < len(before.live) else START
    there = has_weights(before.folder(target))
    begun = time.monotonic()
    _call("revert", f"--workdir={workdir}", f"--last={last}")
    seconds = time.monotonic() - begun
    log = PatchLog(workdir)
    equal = log.head == target and folder_hash(log.folder(target)) == log.hash(target)
    if target != START:
        model = f"--model={log.folder(START)}"
        _call("replay", f"--workdir={workdir}", f"--to={target}", model, f"--out={out}")
        equal = equal and folder_hash(out) == log.hash(target)
    was = "there" if there else "built from patch files"
    return {"links": last, "seconds": seconds, "model": was, "equal": equal}


def _call(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "launch.continual", *arguments], check=True)


def written(folder: pathlib.Path, content: dict[str, Any], costs: Sequence[Cost]) -> str:
    """Write chain.json and chain.md; return the latter."""
    log = PatchLog(folder / "undisturbed")
    states = {entry["name"]: entry["entry"] for entry in log.decided}
    rows = []
    for cost in costs:
        state = states.get(cost.name.partition("-")[2], "")
        sizes = (f"{x / 1e6:.1f}" for x in (cost.disk, cost.most_disk))
        memory = f"{cost.memory / 2**20:.0f}"
        rows.append([cost.name, state, f"{cost.seconds:.1f}", f"{cost.cpu:.1f}", memory, *sizes])
    head = ("", "", "seconds", "CPU seconds", "peak, MiB", "kept, MB", "at most, MB")
    text = f"{machine()}\n\n{table(head, rows)}\n\n"
    third = max(1, (len(costs) - 1) // 3)
    for part, some in (("first", costs[1 : third + 1]), ("last", costs[-third:])):
        cpu = statistics.median(cost.cpu for cost in some)
        memory = max(cost.memory for cost in some) / 2**20
        text += f"The {part} {len(some)} links: median {cpu:.1f} CPU s, peak {memory:.0f} MiB.\n"
    grown = (costs[-1].disk - costs[1].disk) / max(1, len(costs) - 2)
    text += f"Disk grows by {grown / 1e6:.2f} MB a link.\n"
    write_json(folder / "chain.json", content | {"links": [dataclasses.asdict(x) for x in costs]})
    write_text(folder / "chain.md", text)
    return text


def main(argv: list[str]) -> None:
    folder = pathlib.Path(_FOLDER.value).expanduser()
    record = folder / "chain.json"
    if record.is_file():
        content = read_json(record)
        costs = [Cost(**cost) for cost in content["links"]]
        print(f"The undisturbed chain is there; {len(costs) - 1} links.", flush=True)
    elif folder.exists() and any(folder.iterdir()):
        sys.exit(f"{folder} is not empty.")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        content = {"command": words(folder, argv[1:])}
        costs = undisturbed(content["command"])
        print(written(folder, content, costs), flush=True)
    if _KILLS.value:
        shutil.rmtree(folder / "killed", ignore_errors=True)
        begun = time.monotonic()
        kills = killed(content["command"], costs)
        took = time.monotonic() - begun
        hit = sum(entry["exit"] == -signal.SIGKILL for entry in kills)
        equal, different = differences(folder)
        print(f"{hit} times SIGKILL, {took:.0f} s. {equal} equal, {len(different)} not.")
        content |= {"kills": kills, "seconds": took, "equal": equal, "different": different}
        written(folder, content, costs)
    if _REMOVE.value in PatchLog(last_chain(folder)).live:
        content["removal"] = removed(folder, _REMOVE.value)
    if _REVERT.value:
        content["revert"] = reverted(folder, _REVERT.value)
    for name in ("removal", "revert"):
        print(f"{name}: {json.dumps(content.get(name))}")
        if not content.get(name, {"equal": True})["equal"]:
            content.setdefault("different", []).append(f"the model after the {name}")
    written(folder, content, costs)
    for name in content.get("different", ()):
        print(f"differs: {name}")
    sys.exit(1 if content.get("different") else 0)


if __name__ == "__main__":
    app.run(main)
