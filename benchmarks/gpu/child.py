"""One part in this process, started by `driver`: writes its record, and ends when its starter has
ended."""

from __future__ import annotations

import importlib
import os
import pathlib
import threading

from benchmarks.gpu.parts import PARTS, SIZES
from benchmarks.gpu.records import Record, read
from benchmarks.gpu.skip import Skip


def run(name: str, out: pathlib.Path, shapes: str, platform: str, limit: float) -> None:
    """Run a part.

    Args:
      name: of PARTS.
      out: the folder of the whole.
      shapes: of SIZES.
      platform: of JAX's device.
      limit: seconds after which the starter ends this process.
    """
    threading.Thread(target=_end_with_starter, daemon=True).start()
    part, sizes = PARTS[name], SIZES[shapes]
    record = Record(out / "parts" / f"{name}.json", shapes, limit)
    module = importlib.import_module(f"benchmarks.gpu.{part.module}")
    try:
        if name == "decode_hf":  # without JAX, which would take the device's memory
            ours = read(out / "parts" / "decode.json").get("figures", {})
            module.run(sizes, record, platform, ours.get("layers", sizes.layers))
        else:
            from benchmarks.gpu.bench import Bench

            module.run(Bench(sizes, record, out / "scratch"), *part.arguments)
    except Skip as reason:
        record.end("skipped", str(reason))
    else:
        record.end("done")


def _end_with_starter() -> None:
    """Wait for the end of standard input, whose other end the starter holds as long as it lives."""
    os.read(0, 1)  # not sys.stdin, whose lock this thread would hold when the interpreter ends
    os._exit(1)
