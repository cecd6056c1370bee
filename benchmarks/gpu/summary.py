"""The summary: a Markdown page of what the records hold. Imports no JAX."""

from __future__ import annotations

import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gpu.parts import MODES, PARTS
from safepatch_jax.reporting.tables import code, escaped, percent, table
from safepatch_jax.runtime import files

FILE = "summary.md"
GIB = 2**30
Figures = Mapping[str, Any]
Records = Mapping[str, Mapping[str, Any]]


def write(out: pathlib.Path, facts: Mapping[str, Any], records: Records) -> None:
    """Write the page of a machine's facts and the parts' records; a part that was cut shows what it
    had measured."""
    figures = {name: records.get(name, {}).get("figures", {}) for name in PARTS}
    sections = [_machine(facts), _parts(records)]
    if any(record.get("shapes") == "tiny" for record in records.values()):
        sections.append("The shapes are 'tiny': the figures say nothing of speed.")
    for section in (_train, _score, _patch, _decode, _folders, _cpu_bits, _repeat, _memory):
        sections.append(section(figures))
    text = "\n\n".join(["# A first half hour on a GPU", *filter(None, sections)])
    files.write_text(out / FILE, text + "\n")


def _machine(facts: Mapping[str, Any]) -> str:
    memory = facts["memory"]
    room = f", {memory / GIB:.1f} GiB for programs" if memory else ""
    load = " ".join(f"{x:.2f}" for x in facts["load"])
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    variables = " ".join(f"{name}={value}" for name, value in facts["variables"].items())
    lines = [
        f"- device: {escaped(facts['kind'])} ({facts['platform']}), the first of "
        f"{facts['devices']}{room}; {escaped(facts['runtime'])}",
        f"- host: {escaped(facts['host'])}, {facts['cores']} cores, "
        f"{facts['host_memory'] / GIB:.0f} GiB, load at the start {load}",
        f"- Python {facts['python']}; {escaped(versions)}",
        f"- variables: {code(variables) if variables else 'none'}",
    ]
    if facts["driver"]:
        lines.append(f"- nvidia-smi: {escaped(facts['driver'])}")
    return "\n".join(lines)


def _parts(records: Records) -> str:
    rows = []
    for name, part in PARTS.items():
        record = records.get(name, {"status": "not run", "reason": ""})
        seconds = f"{record['seconds']:.0f} of {record['limit']:.0f}" if "limit" in record else ""
        status = f"{record['status']}: {record['reason']}" if record["reason"] else record["status"]
        rows.append([name, part.title, seconds, escaped(status)])
    return table(["part", "what", "seconds", "how it ended"], rows)


def _peak(f: Figures) -> tuple[float, str]:
    """Return the FLOP/s that shares are of, and what they are."""
    if f["rated_flops"]:
        return f["rated_flops"], "of the data sheet"
    return f["product_rate"], "of the measured product"


def _train(figures: Mapping[str, Figures]) -> str:
    rows, shape = [], ""
    for mode in MODES:
        f = figures[f"train_{mode}"]
        if "median" not in f:
            continue
        peak, of = _peak(f)
        shape = f"{f['batch']} x {f['length']} tokens, {f['answer']} of answers, {f['dtype']}"
        rows.append(
            [
                MODES[mode].title,
                f["layers"],
                f"{f['parameters'] / 1e6:,.1f}",
                _spread(f["step_seconds"], 1e3),
                f"{f['batch'] * f['length'] / f['median']:,.0f}",
                f"{f['needed_flops'] / peak * 1e3:,.1f}",
                f"{percent(f['needed_flops'] / peak / f['median'], 1)} {of}",
                percent(f["needed_flops"] / f["product_rate"] / f["median"], 1),
                percent(f["program_flops"] / f["needed_flops"]),
            ]
        )
    head = [
        "train step",
        "blocks",
        "M parameters",
        "ms",
        "tokens/s",
        "floor, ms",
        "MFU",
        "of the measured product",
        "products computed, of those needed",
    ]
    floor = (
        "The floor is the products that a step needs (6 FLOPs a weight and token, the head at "
        "answers alone, attention's lower triangle) at the peak."
    )
    return _section("Train step", rows, head, f"{shape}. {floor}")


def _score(figures: Mapping[str, Figures]) -> str:
    f = figures["score"]
    if "median" not in f:
        return ""
    peak, _ = _peak(f)
    floors = {
        "compute": f["needed_flops"] / peak,
        "weights and sums at the speed of a copy": f["needed_bytes"] / f["copy_rate"],
    }
    rows = [["measured", _spread(f["sample_seconds"], 1e3), f"{1 / f['median']:.2f}", "100%"]]
    for name, seconds in floors.items():
        cells = [f"{1e3 * seconds:.2f}", f"{1 / seconds:.2f}", percent(seconds / f["median"])]
        rows.append([f"floor: {name}", *cells])
    text = (
        f"{f['layers']} blocks, {f['parameters'] / 1e6:,.1f} M parameters, samples of "
        f"{f['length']} tokens ({f['answer']} of the answer), {f['dtype']}. The second floor "
        "is of one sample at a time: 16 bytes a weight of the scope."
    )
    return _section("Score pass", rows, ["", "ms a sample", "samples/s", "of the time"], text)


def _patch(figures: Mapping[str, Figures]) -> str:
    f = figures["patch"]
    if "median" not in f:
        return ""
    floor = f["needed_bytes"] / f["copy_rate"]
    rows = [
        ["measured", _spread(f["patch_seconds"], 1e3), _rate(f["needed_bytes"] / f["median"])],
        ["floor", f"{1e3 * floor:.1f}", _rate(f["copy_rate"])],
    ]
    rated = f"; the data sheet has {_rate(f['rated_bandwidth'])}" if f["rated_bandwidth"] else ""
    text = (
        f"{f['layers']} blocks, {f['scope'] / 1e6:,.1f} M entries, "
        f"{percent(f['kept_share'], 2)} of them kept for SE. The floor is each input read and "
        f"the result written once, 20 bytes an entry, at the speed of a copy on the device{rated}. "
        f"The operation takes {f['median'] / floor:.1f} times as long."
    )
    return _section("Patch operation", rows, ["", "ms", "GB/s"], text)


def _decode(figures: Mapping[str, Figures]) -> str:
    ours, theirs = figures["decode"], figures["decode_hf"]
    sides = ours.get("batches", {}), theirs.get("batches", {})
    rows = []
    for number in sides[0] or sides[1]:
        f, other = (side.get(number) for side in sides)
        mine, beside, floor = ["", ""], ["", ""], ""
        if f:
            mine = [f"{f['tokens_per_second']:,.0f}", _spread(f["seconds"], 1e3)]
            seconds = f["needed_bytes"] / ours["copy_rate"]
            floor = f"{int(number) * ours['new'] / seconds:,.0f}"
        if other:
            beside[0] = f"{other['tokens_per_second']:,.0f}"
        if f and other and ours["layers"] == theirs["layers"]:
            beside[1] = f"{f['tokens_per_second'] / other['tokens_per_second']:.2f}"
        rows.append([number, *mine, *beside, floor])
    text = f"{ours.get('layers')} blocks, prompts of {ours.get('prompt')} tokens, "
    text += f"{ours.get('new')} new ones, weights and arithmetic {ours.get('dtype')}, greedy"
    if theirs.get("version"):
        text += f"; {escaped(theirs['version'])}, attention {theirs['attention']}"
    text += (
        ". The floor is all weights but the embedding's table, and keys and values, read once a "
        "token at the speed of a copy; the prompt is in the time and not in the floor."
    )
    head = ["batch", "tokens/s", "ms", "HF generate, tokens/s", "ours / HF", "floor, tokens/s"]
    return _section("Decode", rows, head, text)


def _folders(figures: Mapping[str, Figures]) -> str:
    f = figures["import_export"]
    rows = []
    for name, seconds in f.get("folder_seconds", {}).items():
        rows.append([name, _spread(seconds, 1, ".2f"), _rate(f["rates"][name])])
    for name in ("to_device", "to_host"):
        if f"{name}_rate" in f:
            rows.append([f"array {name.replace('_', ' ')}", "", _rate(f[f"{name}_rate"])])
    text = ""
    if "equal" in f:
        same = "equals" if f["equal"] else "DIFFERS from"
        text = f"{f['bytes'] / 1e9:.3g} GB, from the page cache. What is read {same} what was "
        text += "written. An export waits for the disk and computes SHA-256."
    return _section("Export and import", rows, ["", "seconds", "GB/s"], text)


def _cpu_bits(figures: Mapping[str, Figures]) -> str:
    f = figures["cpu_bits"]
    rows = []
    for way, found in f.get("ways", {}).items():
        rows.append([way, found["device"][:16], found["cpu"][:16], _yes(found["equal"])])
    text = f"{f.get('entries', 0) / 1e6:.1f} M entries, the same inputs on both."
    if f.get("same_device"):
        text += " The device is the CPU: this says nothing of a GPU."
    return _section("Selection and merge", rows, ["way", "device", "CPU", "equal"], text)


def _repeat(figures: Mapping[str, Figures]) -> str:
    parts = [figures["repeat"], figures["repeat_again"]]
    rows = []
    for attention in parts[0].get("attentions", {}):
        hashes = []
        for f in parts:
            hashes.append([run["weights"] for run in f.get("attentions", {}).get(attention, [])])
        within = [len(set(found)) == 1 if len(found) > 1 else None for found in hashes]
        across = None if not hashes[1] else hashes[0][0] == hashes[1][0]
        rows.append([attention, *map(_yes, within), _yes(across)])
    f = parts[0]
    text = (
        f"{f.get('steps')} steps at {f.get('layers')} block(s), {f.get('length')} tokens: are the "
        "weights of two runs equal, bit for bit?"
    )
    head = ["model.attention", "in one process", "in the other", "between the two"]
    return _section("Training twice", rows, head, text)


def _memory(figures: Mapping[str, Figures]) -> str:
    rows, shares = [], {}
    for name, f in figures.items():
        if not f:
            continue
        plan, peak = f.get("predicted_bytes"), f.get("peak_bytes")
        ratio = ""
        if plan and peak:
            shares[name], ratio = peak / plan, percent(peak / plan)
        host = _gib(f.get("host"))
        refused = ", ".join(map(str, f.get("layers_refused", [])))
        rows.append([name, f.get("layers", ""), _gib(plan), _gib(peak), ratio, host, refused])
    head = ["part", "blocks", "plan", "peak", "peak / plan", "host", "refused blocks"]
    text = (
        "GiB. The plan is XLA's buffers of the program (arguments, temporaries, results) and what "
        "is held beside it; the peak is the process's on the device, with what made the weights "
        "and measured the device's speeds; a CPU keeps no account of it. Blocks for which the "
        "device had no memory, against the plan, are named."
    )
    return _section("Memory", rows, head, " ".join([text, *_above_plan(shares)]))


def _above_plan(shares: Mapping[str, float]) -> list[str]:
    """Say which parts' peaks, {part: peak / plan}, are above the plan; nothing where none was
    measured."""
    if not shares:
        return []
    above = [f"{name} ({percent(share, 1)})" for name, share in shares.items() if share > 1]
    if not above:
        return ["**No peak is above its plan.**"]
    return [f"**Above the plan: {', '.join(above)}.**"]


def _section(title: str, rows: Sequence[Any], head: Sequence[str], text: str) -> str:
    """Return a section, nothing where it has no rows."""
    return "\n\n".join([f"## {title}", text, table(head, rows)]) if rows else ""


def _spread(values: Sequence[float], unit: float, form: str = ",.1f") -> str:
    values = [unit * x for x in values]
    return f"{statistics.median(values):{form}} ({min(values):{form}} - {max(values):{form}})"


def _rate(value: float) -> str:
    """Return bytes a second as GB/s."""
    value /= 1e9
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _gib(value: float | None) -> str:
    return f"{value / GIB:.3g}" if value else ""


def _yes(value: bool | None) -> str:
    return {None: "", True: "yes", False: "**no**"}[value]
