"""The patch operation piece by piece from files gives the bits and the statistics of the one on a
mesh."""

import threading

import ml_dtypes
import numpy as np
import pytest

from safepatch_jax.models.table import Param
from safepatch_jax.patching import PATCH_ROLES
from safepatch_jax.patching.methods import MERGE_METHODS
from safepatch_jax.patching.out_of_core import Merger
from safepatch_jax.patching.settings import PatchSettings
from safepatch_jax.patching.source import Source
from tests.patching.cases import ODD, SEED, as_trees, draw, label, matrices, run

ROWS = (
    ODD[0],
    ODD[3],
    Param("wide", ("layers", "mlp", "embed"), (2, 37, 29), "{layer}.wide", 1, "linear"),
)
KINDS = ("equal", "huge", "ties", "plain", "ties")
SAFEPATCHING = [
    {},
    {"granularity": "row"},
    {"granularity": "global"},
    {"importance": "weight", "combine": "union"},
    {"support": "fill", "retention": 0.6},
    {"granularity": "row", "support": "fill", "retention": 0.6, "combine": "intersection"},
    {"granularity": "global", "support": "fill", "retention": 0.5},
    {"top_rate_se": 0.0},
    {"top_rate_se": 1.0, "rescale": True},
    {"importance": "random"},
    {"importance": "random", "granularity": "row"},
    {"importance": "random", "granularity": "global"},
    {"importance": "magnitude"},
]
SETTINGS = [
    *SAFEPATCHING,
    *({"merge": name} for name in MERGE_METHODS if name != "safepatching"),
    {"merge": "ties", "granularity": "row"},
    {"merge": "ties", "granularity": "global"},
]


class InMemory:
    """What a tensor of a stage offers, over an array; it notes which threads read."""

    readers = set()

    def __init__(self, array):
        self.dtype, self.shape, self._flat = str(array.dtype), array.shape, array.reshape(-1)

    def read(self, out, start):
        self.readers.add(threading.get_ident())
        out[...] = self._flat[start : start + len(out)]
        return out


def sources(tensors, patch):
    roles = PATCH_ROLES if patch.needs_sensitivity else ()
    result = []
    for tensor in tensors:
        derived = {role: InMemory(tensor[role]) for role in PATCH_ROLES}
        sensitivity = {role: InMemory(tensor[f"sensitivity_{role}"]) for role in roles}
        result.append(Source(tensor["name"], InMemory(tensor["theta"]), derived, sensitivity))
    return result


def check(tensors, patch, size, dtype="keep", rounding="nearest"):
    merged, statistics = run(
        *as_trees(tensors, ROWS), patch, rows=ROWS, dtype=dtype, rounding=rounding
    )
    merger = Merger(sources(tensors, patch), patch, SEED, dtype, rounding, size=size)
    for tensor, expected in zip(tensors, matrices(merged, ROWS)):
        ours = np.concatenate(list(merger.parts(tensor["name"])))
        assert ours.dtype == expected.dtype and ours.tobytes() == expected.tobytes()
    for name, numbers in merger.statistics.items():
        # Pieces are summed at scales of their own, so the last digits may differ.
        for figure in ("cosine", "norm_se", "norm_osm", "norm_ratio"):
            expected = statistics[name].pop(figure)
            assert numbers.pop(figure) == pytest.approx(expected, rel=1e-5, abs=1e-6), name
    assert merger.statistics == statistics


@pytest.mark.parametrize("options", SETTINGS, ids=label)
def test_bits_and_statistics_are_those_of_the_mesh(options):
    size = 64 if options else 1 << 18
    defaults = {"top_rate_se": 0.3, "top_rate_osm": 0.45, "density": 0.4}
    tensors = draw(np.random.default_rng(3), KINDS, ROWS)
    check(tensors, PatchSettings(**defaults | options), size)


@pytest.mark.parametrize(
    "stored, dtype, rounding",
    [
        ("bfloat16", "keep", "stochastic"),
        ("float32", "bfloat16", "nearest"),
        ("float32", "bfloat16", "stochastic"),
        ("float32", "float16", "stochastic"),
    ],
)
def test_casts_are_those_of_the_mesh(stored, dtype, rounding):
    tensors = draw(np.random.default_rng(3), KINDS, ROWS)
    for tensor in tensors:
        if dtype == "float16":  # the other kinds lie beyond its range
            for name in ("theta", *PATCH_ROLES):
                tensor[name] = np.clip(tensor[name], -10, 10)
        tensor["theta"] = tensor["theta"].astype(
            ml_dtypes.bfloat16 if stored == "bfloat16" else stored
        )
    patch = PatchSettings(top_rate_se=0.5, top_rate_osm=0.5, alpha=0.01)
    check(tensors, patch, 64, dtype, rounding)


@pytest.mark.parametrize(
    "options",
    [{}, {"granularity": "global"}, {"support": "fill"}, {"merge": "dare"}],
    ids=label,
)
def test_neither_bits_nor_counts_depend_on_threads_and_pieces(options):
    """Ties at the threshold are many, and lie in several pieces, which are computed at once."""
    tensors = draw(np.random.default_rng(5), ("ties", "equal", "ties", "plain", "ties"), ROWS)
    patch = PatchSettings(**{"top_rate_se": 0.3, "top_rate_osm": 0.45, "retention": 0.6} | options)
    results = []
    for size, threads in ((1 << 18, 1), (50, 4), (333, 3)):
        merger = Merger(sources(tensors, patch), patch, SEED, size=size, threads=threads)
        bits = {t["name"]: b"".join(x.tobytes() for x in merger.parts(t["name"])) for t in tensors}
        counts = {}
        for name, numbers in merger.statistics.items():
            counts[name] = {k: x for k, x in numbers.items() if isinstance(x, (int, list))}
        results.append((bits, counts))
    assert all(result == results[0] for result in results)


def test_norms_of_many_large_entries():
    """A piece of the default size, of squares whose lower limbs are near 2^13: 2^19 of them would
    overflow a sum, parts of 2^18 do not."""
    near_two = np.linspace(1.9, 2, 4096, dtype=np.float32, endpoint=False)
    limbs = (near_two * near_two).astype(np.float64) * 2**24 % 2**13
    patch = np.full((2, 300, 1024), near_two[np.argmax(limbs)])
    backbone = InMemory(np.zeros_like(patch))
    source = Source("w", backbone, {"se": InMemory(patch), "osm": InMemory(-patch)}, {})
    with Merger([source], PatchSettings(merge="average"), SEED) as merger:
        assert sum(map(len, merger.parts("w"))) == patch.size
    norm = np.linalg.norm(patch.astype(np.float64))
    numbers = merger.statistics["w"]
    assert [numbers["norm_se"], numbers["norm_osm"]] == pytest.approx([norm, norm], rel=1e-6)
    assert numbers["cosine"] == pytest.approx(-1, abs=1e-6)


@pytest.mark.parametrize("options", [{"merge": "dare"}, {}, {"support": "fill"}], ids=label)
def test_tensors_may_be_asked_for_in_any_order_and_left_half_read(options):
    patch = PatchSettings(top_rate_se=0.3, **options)
    tensors = draw(np.random.default_rng(3), KINDS, ROWS)

    def merged(order, left=()):
        InMemory.readers.clear()
        with Merger(sources(tensors, patch), patch, SEED, size=50) as merger:
            for name in left:
                next(merger.parts(name))
            bits = {name: np.concatenate(list(merger.parts(name))).tobytes() for name in order}
        assert len(InMemory.readers) == 1, "one thread reads"
        return bits, merger.statistics

    names = [tensor["name"] for tensor in tensors]
    expected = merged(names)
    assert merged(names[::-1]) == expected
    assert merged(names, left=names[:2]) == expected
