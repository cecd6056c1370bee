"""The patch operation piece by piece from files gives the bits and the statistics of the one on a
mesh."""

import numpy as np
import pytest

from safepatch_jax.models.table import Param
from safepatch_jax.patching import PATCH_ROLES
from safepatch_jax.patching.out_of_core import Merger, Source
from safepatch_jax.patching.settings import PatchSettings
from tests.patching.test_merge import SEED, run
from tests.patching.test_options import ODD, as_trees, draw_tensor

ROWS = (
    ODD[0],
    ODD[3],
    Param("wide", ("layers", "mlp", "embed"), (2, 37, 29), "{layer}.wide", 1, "linear"),
)
KINDS = ("equal", "huge", "ties", "plain", "ties")
SAFEPATCHING = [
    dict(),
    dict(granularity="row"),
    dict(granularity="global"),
    dict(importance="weight", combine="union"),
    dict(support="fill", retention=0.6),
    dict(granularity="row", support="fill", retention=0.6, combine="intersection"),
    dict(granularity="global", support="fill", retention=0.5),
    dict(top_rate_se=0.0),
    dict(top_rate_se=1.0, rescale=True),
    dict(importance="random"),
    dict(importance="random", granularity="row"),
    dict(importance="random", granularity="global"),
    dict(importance="magnitude"),
]
BASELINES = [
    dict(merge=m) for m in ("average", "task_arithmetic", "ties", "dare", "dare_ties", "resta")
]
SETTINGS = [
    *SAFEPATCHING,
    *BASELINES,
    dict(merge="ties", granularity="row"),
    dict(merge="ties", granularity="global"),
]


class InMemory:
    """What a tensor of a file offers, over an array."""

    def __init__(self, array):
        self.dtype, self.shape, self._flat = str(array.dtype), array.shape, array.reshape(-1)

    def read(self, out, start):
        out[...] = self._flat[start : start + len(out)]
        return out


def tensors(dtype):
    rng = np.random.default_rng(3)
    names = [(row, name) for row in ROWS for name in row.hf_names]
    found = [
        draw_tensor(kind, row.hf_shape, rng) | {"name": name}
        for (row, name), kind in zip(names, KINDS)
    ]
    return [t | {"theta": t["theta"].astype(dtype)} for t in found]


def merged(own, patch, piece, dtype="keep", rounding="nearest"):
    scored = PATCH_ROLES if patch.needs_sensitivity else ()
    sources = [
        Source(
            t["name"],
            InMemory(t["theta"]),
            {r: InMemory(t[r]) for r in ("se", "osm")},
            {r: InMemory(t["sensitivity_" + r]) for r in scored},
        )
        for t in own
    ]
    merger = Merger(sources, patch, SEED, dtype, rounding, piece=piece)
    return [np.concatenate(list(merger.parts(t["name"]))) for t in own], merger.statistics


def check(own, patch, piece, **cast):
    expected, statistics = run(*as_trees(own, ROWS), patch, rows=ROWS, **cast)
    expected = [matrix for row in ROWS for matrix in row.as_matrices(expected[row.path])]
    ours, found = merged(own, patch, piece, **cast)
    for t, a, b in zip(own, ours, expected):
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), t["name"]
    assert found == statistics


@pytest.mark.parametrize(
    "options", SETTINGS, ids=lambda o: "-".join(f"{v}" for v in o.values()) or "default"
)
def test_bits_and_statistics_are_those_of_the_mesh(options):
    piece = 1 << 18 if not options else 64
    check(
        tensors(np.float32),
        PatchSettings(**{"top_rate_se": 0.3, "top_rate_osm": 0.45, "density": 0.4} | options),
        piece,
    )


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize(
    "stored, dtype", [("bfloat16", "keep"), ("float32", "bfloat16"), ("float32", "float16")]
)
def test_casts_are_those_of_the_mesh(stored, dtype, rounding):
    own = [t for t in tensors(np.float32)]
    if dtype == "float16":  # the other kinds lie beyond its range
        own = [t | {n: np.clip(t[n], -10, 10) for n in ("theta", "se", "osm")} for t in own]
    if stored == "bfloat16":
        import ml_dtypes

        own = [t | {"theta": t["theta"].astype(ml_dtypes.bfloat16)} for t in own]
    check(
        own,
        PatchSettings(top_rate_se=0.5, top_rate_osm=0.5, alpha=0.01),
        64,
        dtype=dtype,
        rounding=rounding,
    )
