"""One of two processes that try what `safepatch_jax.runtime.processes` promises: python worker.py
PORT INDEX FOLDER."""

import json
import pathlib
import sys

import jax
import numpy as np

from safepatch_jax.mesh import Sharder, make_mesh
from safepatch_jax.runtime import processes

port, index, folder = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
processes.initialize(f"127.0.0.1:{port}", 2, index, timeout=60)


def error_of(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except (ValueError, OSError) as error:
        return [type(error).__name__, str(error)]
    return None


def fails():
    raise OSError("no room on process 0")


def nested():
    assert not processes.several()
    processes.barrier("nobody waits here")
    with processes.new_folder(folder / "inner") as inner:
        (inner / "x").write_text("x")
    return processes.broadcast(7)


def fill_and_fail(path):
    with processes.new_folder(path) as out:
        (out / f"part {index}").write_text("x")
        processes.barrier("both have written")
        raise ValueError("in both")


def fill(path):
    with processes.new_folder(path) as out:
        (out / f"part {index}").write_text(str(out))
    return sorted(p.read_text() for p in path.iterdir())


seen = []
x = jax.make_array_from_callback(
    (8, 3),
    Sharder(make_mesh("fsdp:8")).sharding(("embed", "layers")),
    lambda i: np.arange(24.0).reshape(8, 3)[i],
)
asked = processes.on_first(
    lambda ask: [float(ask(i).sum()) for i in range(3)],
    together=lambda i: seen.append(i) or processes.fetch(x[i]),
)
result = {
    "count": processes.count(),
    "first": processes.first(),
    "broadcast": processes.broadcast({"a": [index]}),
    "on_first": processes.on_first(lambda: index),
    "raised": error_of(processes.on_first, fails),
    "nested": processes.on_first(nested),
    "asked": asked,
    "seen": seen,
    "whole": processes.fetch(x).tolist(),
    "agree": error_of(processes.agree, {"same": 1}, "Fix."),
    "differ": error_of(
        processes.agree, {"a": 1, "b": index, "c": [0.5 + index]}, "Give both the same."
    ),
    "shared": error_of(processes.shared, folder),
    "filled": len(set(fill(folder / "out"))),
    "full": error_of(fill, folder / "out"),
    "failed": error_of(fill_and_fail, folder / "failed"),
}
if index == 1:
    processes._SIGHT = 0.5
    pathlib.Path.exists = lambda self, **_: (
        not self.name.startswith(".shared")
    )  # as on a disk of its own
result["unshared"] = error_of(processes.shared, folder)
(folder / f"{index}.json").write_text(json.dumps(result))
processes.barrier("both are done")
if index == 1:
    processes.fail("only here", 3)
jax.block_until_ready(jax.jit(lambda x: x.sum())(x))  # waits for a process that does not come
