"""Compiles the whole job of the block-by-block configs for small TPU slices: the table of
docs/fit.md. Cards are compiled by `launch.compile_gpu` (docs/gpu.md).

  python -m benchmarks.fit                   # half an hour on 2 cores
  python -m benchmarks.fit --only=v5e        # rows whose command has this text

Rows that are stored in docs/fit.json are not compiled again. Each row is one `python -m \
launch.compile_tpu` in a process of its own, by the TPU compiler (`pip install -e '.[tpu-aot]'`); no
TPU is needed.
"""

from __future__ import annotations

import pathlib
from typing import Any

from absl import app, flags

from benchmarks.tpu import GIB, Row, peaks_of, table
from safepatch_jax.planning.programs import PROGRAMS

_FIGURES = flags.DEFINE_string("figures", "docs/fit.json", "Where the figures are kept.")

ONE, EIGHT = "--score.in_flight=1 --programs=score", "--score.in_flight=8 --programs=score"
# Config, devices, mesh, further flags.
ROWS: list[Row] = [
    ("llama2_7b_v5e_2x2", "v5e:2x2", "fsdp:4", ""),
    ("llama2_7b_v5e_2x2", "v6e:2x2", "fsdp:4", ""),
    ("llama3_8b_v5e_2x2", "v5e:2x2", "fsdp:4", ""),
    ("llama3_8b_one_h100", "v5p:1x1x1", "data:1", ""),
    ("llama2_13b_one_h200", "v5p:1x1x1", "data:1", ""),
    ("llama3_70b_v5p_2x2x2", "v5p:2x2x2", "fsdp:8", ""),
    ("llama3_8b_v5e_2x2", "v5e:2x2", "fsdp:4", ONE),
    ("llama3_8b_v5e_2x2", "v5e:2x2", "fsdp:4", EIGHT),
]


def line(row: Row, figures: dict[str, Any]) -> str:
    """Return one line of the table: the peak of each kind of program in GiB, and the floors of a
    train step and of a score batch."""
    config, devices, mesh, more = row
    peaks = peaks_of(figures)
    seconds: dict[str, dict[str, float]] = {kind: {} for kind in PROGRAMS}
    for p in figures["programs"]:
        units = seconds[p["kind"]]
        for unit, time in p["floor"].items():
            units[unit] = units.get(unit, 0.0) + time
    if more:
        mesh += f" {more}"
    floors = []
    for kind in ("train", "score"):
        times = seconds[kind].values()
        floors.append(f"{1e3 * max(times):,.0f} ms" if times else "")
    sizes = [f"{peaks[k] / GIB:.1f}" if k in peaks else "" for k in PROGRAMS]
    fits = "yes" if figures["fits"] else "**no**"
    each = f"{figures['memory'] / GIB:.1f}"
    cells = [config, devices, mesh, *sizes, each, fits, *floors]
    return "| " + " | ".join(cells) + " |"


def main(argv) -> None:
    del argv
    header = "config; devices; mesh, flags; train; score; patch; decode; GiB of each; fits"
    columns = [*header.split("; "), "floor of a train step", "of a score batch"]
    print(table(columns, ROWS, pathlib.Path(_FIGURES.value), line))


if __name__ == "__main__":
    app.run(main)
