"""Both top sets of a pair of score matrices and their exact difference: counting against a sort and
against torch.

  python -m benchmarks.selection                     # 4096 x 11008 float32 at 10 %; a minute
  python -m benchmarks.selection --rows=1024 --repeats=9

The sides: ours (`top_mask` of both matrices and `combine_sets`, one program); `jax.lax.top_k` of
both, marks scattered, and the difference; torch.topk of both and the difference, where torch is
installed. All give the same sets, which is checked (the scores have no ties). They take turns; each
is warm. The floor is reading both matrices once, at the speed of a copy.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.common import take_turns
from safepatch_jax.patching.methods import combine_sets
from safepatch_jax.patching.selection import top_count, top_mask

_ROWS = flags.DEFINE_integer("rows", 4096, "Rows of each matrix.", lower_bound=1)
_COLUMNS = flags.DEFINE_integer("columns", 11008, "Columns of each matrix.", lower_bound=1)
_RATE = flags.DEFINE_float(
    "rate", 0.1, "Share of entries in each top set.", lower_bound=0, upper_bound=1
)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Times each figure is taken.", lower_bound=1)


@jax.jit
def counting(a, b, k):
    return combine_sets(top_mask(a, k), top_mask(b, k), "difference")


def sorting(a, b, k):
    def mask(x):
        _, largest = jax.lax.top_k(x.reshape(-1), k)
        return jnp.zeros(x.size, bool).at[largest].set(True).reshape(x.shape)

    return combine_sets(mask(a), mask(b), "difference")


def torch_side(a, b, k):
    """Return a call of torch.topk and set operations on the same numbers."""
    import torch

    tensors = [torch.from_numpy(np.array(x)) for x in (a, b)]

    def call():
        masks = []
        for x in tensors:
            largest = torch.topk(x.view(-1), k, sorted=False).indices
            masks.append(torch.zeros(x.numel(), dtype=torch.bool).index_fill_(0, largest, True))
        first, second = masks
        return [(first & ~second).view(a.shape), (second & ~first).view(a.shape)]

    return call


def main(argv) -> None:
    del argv
    shape, size = (_ROWS.value, _COLUMNS.value), _ROWS.value * _COLUMNS.value
    # A shuffled ladder of distinct positive floats, spread as the sizes of normal numbers are.
    rng = np.random.default_rng(0)
    scores = []
    for _ in range(2):
        ladder = np.sort(np.abs(rng.standard_normal(size, np.float32))).view(np.int32)
        number = np.arange(size, dtype=np.int32)
        ladder = np.maximum.accumulate(ladder - number) + number + 1
        scores.append(jnp.asarray(rng.permutation(ladder).view(np.float32).reshape(shape)))
    a, b = scores
    k = top_count(_RATE.value, size)
    compiled = jax.jit(sorting, static_argnums=2)
    sides = {
        "ours": lambda: jax.block_until_ready(counting(a, b, jnp.int32(k))),
        "lax.top_k": lambda: jax.block_until_ready(compiled(a, b, k)),
    }
    if importlib.util.find_spec("torch"):
        sides["torch.topk"] = torch_side(a, b, k)
    expected = [np.asarray(x) for x in sides["ours"]()]
    for name, side in sides.items():
        if not all(np.array_equal(np.asarray(x), y) for x, y in zip(side(), expected)):
            sys.exit(f"{name} gives other sets.")
    copy = jax.jit(lambda a, b: (a + 1, b + 1))
    jax.block_until_ready(copy(a, b))
    floor = {"copy of both": lambda: jax.block_until_ready(copy(a, b))}
    times = take_turns(sides | floor, _REPEATS.value)
    median = {name: statistics.median(x) for name, x in times.items()}
    memory = counting.lower(a, b, jnp.int32(k)).compile().memory_analysis().temp_size_in_bytes
    print(
        f"two {shape[0]} x {shape[1]} float32 matrices, top {_RATE.value:.0%}, {os.cpu_count()} "
        "cores; median of "
        f"{_REPEATS.value}; our temporaries are {memory / 4 / size:.2f} matrices\n"
    )
    print("| | seconds | least - most | times ours |\n|---|---|---|---|")
    for name, seconds in median.items():
        print(
            f"| {name} | {seconds:.3f} | {min(times[name]):.3f} - {max(times[name]):.3f} | "
            f"{seconds / median['ours']:.2f} |"
        )


if __name__ == "__main__":
    app.run(main)
