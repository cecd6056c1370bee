"""Compiles every paper config's whole job for TPU slices and prints what fits: the table of
docs/tpu.md.

  python -m benchmarks.tpu                     # hours on 2 cores
  python -m benchmarks.tpu --only=llama2_7b    # rows whose command has this text

Rows that are stored in docs/tpu.json are not compiled again, unless their config has changed since.
Each row is one `python -m \
launch.compile_tpu` in a process of its own; needs `pip install -e
'.[tpu-aot]'`, no TPU.
"""

from __future__ import annotations

import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable

from absl import app, flags

from safepatch_jax.runtime import files

_OUT = flags.DEFINE_string("out", "docs/tpu.json", "Where the figures are kept.")
_ONLY = flags.DEFINE_string("only", "", "Compile only rows whose command has this text.")

GIB = 2**30
Row = tuple[str, str, str, str]
LEAN = "--derive.optimizer=adafactor"
# Config, topology, mesh, further flags: the slices on which the whole job fits, and next smaller
# ones on which it does not.
ROWS = [
    ("llama2_7b_chat", "v4:2x2x1", "fsdp:4", ""),
    ("llama2_7b_chat", "v5e:2x4", "fsdp:8", ""),
    ("llama2_7b_chat", "v5e:4x4", "fsdp:4,tensor:4", ""),
    ("llama2_7b_chat", "v5p:2x2x1", "fsdp:4", ""),
    ("llama2_7b_chat", "v6e:2x2", "fsdp:4", ""),
    ("llama2_7b_chat", "v6e:2x4", "fsdp:4,tensor:2", ""),
    ("mistral_7b_instruct_v0_1", "v4:2x2x1", "fsdp:4", ""),
    ("mistral_7b_instruct_v0_1", "v5e:2x4", "fsdp:8", LEAN),
    ("mistral_7b_instruct_v0_1", "v5e:4x4", "fsdp:4,tensor:4", ""),
    ("mistral_7b_instruct_v0_1", "v5p:2x2x1", "fsdp:4", ""),
    ("mistral_7b_instruct_v0_1", "v6e:2x2", "fsdp:4", ""),
    ("mistral_7b_instruct_v0_1", "v6e:2x4", "fsdp:4,tensor:2", ""),
    ("llama3_8b_instruct", "v4:2x2x2", "fsdp:4,tensor:2", ""),
    ("llama3_8b_instruct", "v5e:2x4", "fsdp:4,tensor:2", LEAN),
    ("llama3_8b_instruct", "v5e:4x4", "fsdp:4,tensor:4", ""),
    ("llama3_8b_instruct", "v5p:2x2x1", "fsdp:4", ""),
    ("llama3_8b_instruct", "v6e:2x4", "fsdp:4,tensor:2", ""),
    ("gemma_1_1_7b_it", "v4:2x2x2", "fsdp:4,tensor:2", ""),
    ("gemma_1_1_7b_it", "v5e:2x4", "fsdp:4,tensor:2", LEAN),
    ("gemma_1_1_7b_it", "v5e:4x4", "fsdp:4,tensor:4", ""),
    ("gemma_1_1_7b_it", "v5p:2x2x1", "fsdp:4", ""),
    ("gemma_1_1_7b_it", "v6e:2x4", "fsdp:4,tensor:2", ""),
    ("llama2_13b_chat", "v4:2x2x2", "fsdp:4,tensor:2", ""),
    ("llama2_13b_chat", "v5e:4x4", "fsdp:4,tensor:4", ""),
    ("llama2_13b_chat", "v5p:2x2x1", "fsdp:4", ""),
    ("llama2_13b_chat", "v6e:2x4", "fsdp:4,tensor:2", ""),
    ("llama3_70b_instruct", "v4:4x4x4", "fsdp:8,tensor:8", ""),
    ("llama3_70b_instruct", "v5e:8x8", "fsdp:8,tensor:8", LEAN),
    ("llama3_70b_instruct", "v5e:8x16", "fsdp:16,tensor:8", ""),
    ("llama3_70b_instruct", "v5p:2x2x4", "fsdp:4,tensor:4", ""),
    ("llama3_70b_instruct", "v5p:4x4x4", "fsdp:8,tensor:8", ""),
    ("llama3_70b_instruct", "v6e:8x8", "fsdp:8,tensor:8", ""),
]


def command(config: str, topology: str, mesh: str, more: str) -> list[str]:
    return [
        "python",
        "-m",
        "launch.compile_tpu",
        f"--config=configs/{config}.py",
        f"--topology={topology}",
        f"--mesh={mesh}",
        *more.split(),
    ]


def measured(row: Row, path: pathlib.Path) -> dict | None:
    """Return the figures of one row, compiled if they are not stored; None if that failed."""
    text, stored = " ".join(command(*row)), files.read_json(path) if path.is_file() else {}
    configs = pathlib.Path("configs")
    sources = [(configs / name).read_text() for name in (f"{row[0]}.py", "common.py")]
    config = files.text_hash(sources)
    fresh = stored.get(text, {}).get("config", config) == config
    if (text not in stored or not fresh) and _ONLY.value in text:
        with tempfile.TemporaryDirectory() as folder:
            out = pathlib.Path(folder) / "figures.json"
            ended = subprocess.run(
                [sys.executable, *command(*row)[1:], "--noremedy", f"--json={out}"]
            )
            if ended.returncode not in (0, 3):
                print(f"failed: {text}", file=sys.stderr)
                return None
            figures = files.read_json(out)
        stored = files.read_json(path) if path.is_file() else {}
        stored[text] = {name: figures[name] for name in ("chips", "memory", "fits", "programs")}
        stored[text]["config"] = config
        files.write_json(path, stored)
    return stored.get(text)


def peaks_of(figures: dict) -> dict[str, int]:
    """Return the bytes that each kind of program needs on a device, {kind: bytes}."""
    peaks: dict[str, int] = {}
    for p in figures["programs"]:
        peak = p["peak"] if p["needed"] is None else p["needed"] + p["resident"]
        peaks[p["kind"]] = max(peaks.get(p["kind"], 0), peak)
    return peaks


def table(header: list[str], rows: list[Row], path: pathlib.Path, line: Callable) -> str:
    """Return a table of the rows whose figures are stored or could be compiled."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        figures = measured(row, path)
        if figures is not None:
            lines.append(line(row, figures))
    return "\n".join(lines)


def line(row: Row, figures: dict) -> str:
    """Return one line of the table: the peak of each kind of program in GiB, and the floor of a
    train step."""
    config, topology, mesh, more = row
    peaks = peaks_of(figures)
    train = next(p for p in figures["programs"] if p["kind"] == "train")  # the whole tree's is one
    floor = ""
    if train["floor"]:
        floor = f"{max(train['floor'].values()) * 1e3:,.0f} ms, {train['bound_by']}"
    if more == LEAN:
        mesh += " lean"
    cells = [
        config,
        topology,
        str(figures["chips"]),
        mesh,
        *(f"{peaks[kind] / GIB:.1f}" for kind in ("train", "score", "patch", "decode")),
        f"{max(peaks.values()) / figures['memory']:.0%}",
        "yes" if figures["fits"] else "**no**",
        floor,
    ]
    return "| " + " | ".join(cells) + " |"


def main(argv) -> None:
    del argv
    header = "config, slice, chips, mesh, train, score, patch, decode, of memory, fits"
    columns = [*header.split(", "), "floor of a train step"]
    print(table(columns, ROWS, pathlib.Path(_OUT.value), line))


if __name__ == "__main__":
    app.run(main)
