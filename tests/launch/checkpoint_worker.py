"""One of two processes that restore what is left of two checkpoints: python checkpoint_worker.py
PORT INDEX FOLDER."""

import json
import pathlib
import sys

import jax
import numpy as np

from safepatch_jax.mesh import Sharder, make_mesh
from safepatch_jax.runtime import processes
from safepatch_jax.training.checkpoints import Checkpoints

port, index, folder = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
processes.initialize(f"127.0.0.1:{port}", 2, index, timeout=60)


sharding = Sharder(make_mesh("fsdp:8")).sharding(("embed",))
state = {
    "x": jax.make_array_from_callback(
        (8000,), sharding, lambda part: np.arange(8000.0, dtype=np.float32)[part]
    )
}
abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
)
with Checkpoints(folder / "steps", abstract) as checkpoints:
    for step in (2, 4):
        checkpoints.save(step, state, {"step": step})
processes.barrier("saved")
if index == 0:  # what process 1 has written, and it alone reads
    for path in (folder / "steps" / "4" / "state" / "ocdbt.process_1" / "d").iterdir():
        path.write_bytes(path.read_bytes()[:20])
processes.barrier("damaged")
with Checkpoints(folder / "steps", abstract) as checkpoints:
    restored, facts = checkpoints.restore()
(folder / f"{index}.json").write_text(
    json.dumps({"facts": facts, "sum": float(processes.fetch(restored["x"]).sum())})
)
processes.barrier("done")
