"""Every option of the patch operation and every baseline, on odd shapes and values, against the
NumPy oracle."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safepatch_jax.patching.merge import apply_patching
from safepatch_jax.patching.methods import MERGE_METHODS
from safepatch_jax.patching.settings import PatchSettings
from safepatch_jax.patching.statistics import refuse_no_op, totals
from tests.conftest import sharder_of
from tests.patching import oracle
from tests.patching.cases import (
    FEW,
    KINDS,
    ODD,
    SEED,
    as_list,
    as_trees,
    draw,
    inputs,
    label,
    matrices,
    place,
    run,
)

OPTIONS = [
    {},
    {"granularity": "row"},
    {"granularity": "global", "importance": "weight"},
    {"support": "fill", "combine": "union"},
    {"granularity": "row", "combine": "intersection", "support": "fill"},
    {"granularity": "global", "support": "fill"},
]
ABLATIONS = [
    {"importance": "random"},
    {"importance": "random", "granularity": "row", "support": "fill"},
    {"importance": "random", "granularity": "global"},
    {"importance": "magnitude", "granularity": "global"},
]
rates = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1).map(lambda r: round(r, 3)))


def check(tensors, patch, rows, devices=1):
    """Compare merged bits, kept sets and statistics with the oracle's."""
    merged, statistics = run(*as_trees(tensors, rows), patch, devices=devices, rows=rows)
    expected, kept = oracle.safepatched(tensors, patch, SEED)
    for tensor, ours, theirs, sets in zip(tensors, matrices(merged, rows), expected, kept):
        assert ours.tobytes() == theirs.tobytes(), (tensor["name"], tensor.get("kind"))
        numbers = statistics[tensor["name"]]
        assert numbers["kept"] == (sets[0] | sets[1]).sum()
        assert 0 <= numbers["overlap"] <= 1
        for role, mask in zip(("se", "osm"), sets):
            assert numbers[f"kept_{role}"] == mask.sum()
            sizes = np.abs(importances(tensor, role, "delta")[0][mask])
            least, most = (sizes.min(), sizes.max()) if mask.any() else (0, 0)
            assert (numbers[f"low_{role}"], numbers[f"high_{role}"]) == (least, most)
    return statistics, kept


def importances(tensor, role, kind):
    """The oracle's patch and importance."""
    return oracle.patch_and_importance(
        tensor["theta"], tensor[role], tensor[f"sensitivity_{role}"], kind
    )


@pytest.mark.parametrize("options", OPTIONS + ABLATIONS, ids=label)
@settings(deadline=None, max_examples=12)
@given(
    seed=st.integers(0, 2**20),
    kinds=st.lists(st.sampled_from(KINDS), min_size=8, max_size=8),
    a=rates,
    b=rates,
    p=st.sampled_from([0.3, 0.55, 1.0, 0.013]),
    rescale=st.booleans(),
    alpha=st.sampled_from([1.0, 0.7]),
)
def test_bits_equal_the_oracle(options, seed, kinds, a, b, p, rescale, alpha):
    patch = PatchSettings(
        **options, top_rate_se=a, top_rate_osm=b, retention=p, rescale=rescale, alpha=alpha
    )
    check(draw(np.random.default_rng(seed), kinds), patch, ODD)


@pytest.mark.parametrize("granularity", ["matrix", "row", "global"])
def test_sizes_and_thresholds_of_the_top_sets(granularity):
    tensors = draw(np.random.default_rng(1), ["plain"] * 8)
    patch = PatchSettings(
        granularity=granularity, top_rate_se=0.35, top_rate_osm=0.2, retention=1.0
    )
    statistics, _ = check(tensors, patch, ODD)
    shapes = [tensor["theta"].shape for tensor in tensors]
    by_matrix = [math.prod(shape) * 35 // 100 for shape in shapes]
    sizes = [statistics[tensor["name"]]["top_se"] for tensor in tensors]
    if granularity == "matrix":
        assert sizes == by_matrix
    elif granularity == "row":
        assert sizes == [math.prod(shape[:-1]) * (shape[-1] * 35 // 100) for shape in shapes]
    else:
        assert sum(sizes) == sum(map(math.prod, shapes)) * 35 // 100 and sizes != by_matrix
        cut = min(numbers["threshold_se"] for numbers in statistics.values())
        assert sizes == [(importances(t, "se", "delta")[1] >= cut).sum() for t in tensors]


def test_global_ties_go_to_the_earlier_tensor():
    tensors = draw(np.random.default_rng(0), ["equal"] * 8)
    patch = PatchSettings(granularity="global", top_rate_se=0.4, top_rate_osm=0.0, retention=1.0)
    statistics, _ = check(tensors, patch, ODD)
    sizes = [statistics[tensor["name"]]["top_se"] for tensor in tensors]
    assert sizes == [13, 13, 13, 13, 7, 0, 0, 0]  # 59 of 149


def test_random_top_sets_are_exact_and_independent():
    patch = PatchSettings(
        importance="random", combine="union", top_rate_se=0.3, top_rate_osm=0.2, retention=0.5
    )
    theta, derived, sensitivity = inputs(rows=FEW)
    statistics, _ = check(as_list(theta, derived, sensitivity, FEW), patch, FEW)
    for name, s in statistics.items():
        assert s["top_se"] == s["size"] * 3 // 10 and s["top_osm"] == s["size"] // 5, name
    total = totals(statistics)
    assert is_binomial(total["top_both"], total["top_se"], 0.2)
    for role in ("se", "osm"):  # the draw of the retention is another one
        assert is_binomial(total[f"kept_{role}"], total[f"top_{role}"], 0.5)


def is_binomial(count, n, p):
    return abs(count - n * p) < 5 * math.sqrt(n * p * (1 - p))


@pytest.mark.parametrize("combine", ["difference", "intersection", "union"])
def test_fill_is_exact_and_disjoint(combine):
    theta, derived, sensitivity = inputs(rows=FEW)
    patch = PatchSettings(
        support="fill", combine=combine, retention=0.3, top_rate_se=0.1, top_rate_osm=0.05
    )
    tensors = as_list(theta, derived, sensitivity, FEW)
    statistics, kept = check(tensors, patch, FEW)
    for tensor, (se, osm) in zip(tensors, kept):
        assert statistics[tensor["name"]]["kept_se"] == oracle.count(0.3, se.size)
        assert se.sum() == osm.sum() == oracle.count(0.3, se.size)
        assert combine != "difference" or not (se & osm).any()


@pytest.mark.parametrize("merge", [name for name in MERGE_METHODS if name != "safepatching"])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_baselines_equal_their_formulas(merge, dtype):
    theta, derived, sensitivity = inputs(dtype, step=3e-3, rows=FEW)
    patch = PatchSettings(merge=merge, alpha=0.75, beta=1.25, retention=0.4, density=0.3)
    merged, statistics = run(theta, derived, sensitivity, patch, rows=FEW)
    refuse_no_op(statistics, patch)
    tensors = as_list(theta, derived, sensitivity, FEW)
    for tensor, ours in zip(tensors, matrices(merged, FEW)):
        terms = oracle.baseline(tensor, patch, SEED)
        theirs, touched = oracle.add_terms(tensor, terms)
        assert ours.tobytes() == theirs.tobytes(), tensor["name"]
        assert statistics[tensor["name"]]["kept"] == touched.sum() < touched.size
        formula = tensor["theta"].astype(np.float64) + sum(terms)
        np.testing.assert_allclose(
            ours.astype(np.float64), formula, rtol=3 * float(jnp.finfo(dtype).eps), atol=2e-8
        )


@pytest.mark.parametrize(
    "options, devices",
    [
        *((options, 8) for options in OPTIONS[1:]),
        ({"granularity": "row", "combine": "intersection", "support": "fill"}, 2),
        ({"granularity": "row", "combine": "intersection", "support": "fill"}, 4),
        ({"importance": "random", "granularity": "global"}, 4),
        ({"merge": "ties"}, 2),
        ({"merge": "ties", "granularity": "global"}, 8),
        ({"merge": "dare_ties"}, 8),
        ({"merge": "resta"}, 4),
    ],
    ids=lambda x: label(x) if isinstance(x, dict) else str(x),
)
def test_same_bits_on_several_devices(options, devices):
    patch = PatchSettings(**options, top_rate_se=0.3, top_rate_osm=0.2, alpha=1.3)
    one, statistics_one = run(*inputs(jnp.bfloat16, rows=FEW), patch, rows=FEW)
    many, statistics_many = run(*inputs(jnp.bfloat16, rows=FEW), patch, devices=devices, rows=FEW)
    assert statistics_one == statistics_many and totals(statistics_one)["kept"] > 0
    for path in one:
        assert one[path].tobytes() == many[path].tobytes(), path


@pytest.mark.parametrize(
    "options",
    [
        {"granularity": "global"},
        {"granularity": "row"},
        {"importance": "random"},
        {"merge": "ties"},
    ],
    ids=label,
)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_patches_name_the_tensor(options, bad):
    theta, derived, sensitivity = inputs(rows=FEW)
    derived["osm"][FEW[1].path][1, 3, 4] = bad
    with pytest.raises(
        ValueError, match="1 tensors is NaN or infinite, first model.layers.1.mlp.down_proj.weight"
    ):
        run(theta, derived, sensitivity, PatchSettings(**options), rows=FEW)


@pytest.mark.parametrize(
    "options",
    [
        {"merge": "ties"},
        {"merge": "ties", "granularity": "global"},
        {"merge": "dare"},
        {"importance": "magnitude"},
        {"importance": "random", "granularity": "global"},
    ],
    ids=label,
)
def test_what_ranks_without_sensitivities_asks_for_none(options):
    patch, sharder = PatchSettings(**options), sharder_of(1)
    theta, derived, sensitivity = inputs(rows=FEW)
    merged, _ = apply_patching(
        place(theta, sharder, FEW),
        {role: place(tree, sharder, FEW) for role, tree in derived.items()},
        {},
        FEW,
        patch,
        SEED,
        sharder,
        "test",
    )
    with_sensitivities, _ = run(theta, derived, sensitivity, patch, rows=FEW)
    for path, x in with_sensitivities.items():
        assert np.asarray(merged[path]).tobytes() == x.tobytes()
