"""One of two processes that share a bucket and no folder: python bucket_worker.py PORT INDEX."""

import json
import sys

import jax
import numpy as np

from safepatch_jax.io.checkpoint import load_tree, save_tree
from safepatch_jax.mesh import Sharder, make_mesh
from safepatch_jax.runtime import addresses, mirror, processes
from safepatch_jax.runtime.paths import resolve

port, index = sys.argv[1], int(sys.argv[2])
processes.initialize(f"127.0.0.1:{port}", 2, index, timeout=60)
sharding = Sharder(make_mesh("fsdp:8")).sharding(("embed", "layers"))
x = jax.make_array_from_callback(
    (8, 3), sharding, lambda part: np.arange(24.0, dtype=np.float32).reshape(8, 3)[part]
)
place = resolve("gs://bucket/shared/stage")
with processes.locked(place.with_name(".stage.lock")):
    with processes.new_folder(place, replace=True) as folder:
        save_tree(folder / "params", {"a": {"b": x}})
        with processes.new_folder(folder / "inner") as inner:
            if processes.first():
                (inner / "told.txt").write_text("by process 0")
        told = (folder / "inner" / "told.txt").read_text()
        processes.on_first((folder / "outer.txt").write_text, "outer")
processes.shared(place)  # no folder is, and none need be
abstract = {"a": {"b": jax.ShapeDtypeStruct((8, 3), np.float32, sharding=sharding)}}
y = load_tree(place / "params", abstract)["a"]["b"]
print(
    json.dumps(
        {
            "told": told,
            "outer": (place / "outer.txt").read_text(),
            "equal": bool(np.array_equal(processes.fetch(x), processes.fetch(y))),
            "parts": len(y.addressable_shards),
            "base": str(addresses.base()),
            "listed": sorted(mirror.Objects("gs://bucket/shared").sizes()),
        }
    ),
    flush=True,
)
processes.barrier("the end")
