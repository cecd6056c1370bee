"""Every option of the patch operation and every baseline, on odd shapes and values, against the
NumPy oracle."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safepatch_jax.models.table import Param
from safepatch_jax.patching.merge import apply_patching
from safepatch_jax.patching.settings import PatchSettings
from safepatch_jax.patching.statistics import refuse_no_op, totals
from tests.conftest import sharder_of
from tests.patching import oracle
from tests.patching.test_merge import ROWS, SEED, inputs, place, run

ODD = (
    Param("one_row", ("layers", "mlp", "embed"), (2, 1, 13), "{layer}.one_row", 1, "linear"),
    Param("one_column", ("layers", "mlp", "embed"), (2, 13, 1), "{layer}.one_column", 1, "linear"),
    Param(
        "heads",
        ("layers", "heads", "head_dim", "embed"),
        (3, 2, 3, 5),
        "{layer}.heads",
        2,
        "linear",
    ),
    Param("vector", ("embed",), (7,), "vector", 1, "norm"),
)
FEW = (ROWS[0], ROWS[-1])
OPTIONS = [
    dict(),
    dict(granularity="row"),
    dict(granularity="global", importance="weight"),
    dict(support="fill", combine="union"),
    dict(granularity="row", combine="intersection", support="fill"),
    dict(granularity="global", support="fill"),
]
ABLATIONS = [
    dict(importance="random"),
    dict(importance="random", granularity="row", support="fill"),
    dict(importance="random", granularity="global"),
    dict(importance="magnitude", granularity="global"),
]
KINDS = ("plain", "ties", "zeros", "equal", "denormal", "huge")
rates = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1).map(lambda r: round(r, 3)))


def draw_tensor(kind, shape, rng):
    """Backbone, derived models and sensitivities of one kind of values."""
    random = lambda: rng.standard_normal(shape)
    ties = lambda: rng.integers(0, 3, shape) / 2
    values = {
        "plain": lambda: (random(), random(), random(), rng.random(shape), rng.random(shape)),
        "ties": lambda: (ties(), ties(), ties(), ties(), ties()),
        "zeros": lambda: (
            np.zeros(shape),
            np.zeros(shape),
            random(),
            random() * 0,
            rng.random(shape),
        ),
        "equal": lambda: (
            np.ones(shape),
            1.5 * np.ones(shape),
            0.5 * np.ones(shape),
            np.ones(shape),
            np.ones(shape),
        ),
        "denormal": lambda: (
            1e-38 * random(),
            1e-38 * random(),
            1e-30 * random(),
            1e-8 * rng.random(shape),
            1e-9 * rng.random(shape),
        ),
        "huge": lambda: (
            random(),
            *(random() * 10.0 ** rng.integers(-44, 37, shape) for _ in range(2)),
            ties(),
            ties(),
        ),
    }[kind]()
    names = ("theta", "se", "osm", "sensitivity_se", "sensitivity_osm")
    with np.errstate(under="ignore"):
        return {n: np.asarray(v, np.float32) for n, v in zip(names, values)} | {"kind": kind}


def draw(seed, kinds):
    """One tensor of a given kind for each HF tensor of the odd rows, in table order."""
    rng = np.random.default_rng(seed)
    names = [(row, name) for row in ODD for name in row.hf_names]
    return [
        draw_tensor(kind, row.hf_shape, rng) | {"name": name}
        for (row, name), kind in zip(names, kinds)
    ]


def as_trees(tensors, rows):
    """Turn a list of HF tensors into the trees that the patch operation takes."""
    left = iter(tensors)
    by_row = {row: [next(left) for _ in row.hf_names] for row in rows}
    tree = lambda name: {
        row.path: np.stack([t[name] for t in own]).reshape(row.shape) for row, own in by_row.items()
    }
    return (
        tree("theta"),
        {r: tree(r) for r in ("se", "osm")},
        {r: tree("sensitivity_" + r) for r in ("se", "osm")},
    )


def as_list(theta, derived, sensitivity, rows):
    """Inverse of `as_trees`."""
    return [
        {"name": name, "theta": row.to_hf(row.as_matrices(theta[row.path])[i])}
        | {r: row.as_matrices(derived[r][row.path])[i] for r in derived}
        | {"sensitivity_" + r: row.as_matrices(sensitivity[r][row.path])[i] for r in derived}
        for row in rows
        for i, name in enumerate(row.hf_names)
    ]


def results(merged, rows):
    return [matrix for row in rows for matrix in row.as_matrices(merged[row.path])]


def check(tensors, patch, rows, devices=1):
    """Compare merged bits, kept sets and statistics with the oracle's."""
    merged, statistics = run(*as_trees(tensors, rows), patch, devices=devices, rows=rows)
    expected, kept = oracle.safepatched(tensors, patch, SEED)
    for t, ours, theirs, sets in zip(tensors, results(merged, rows), expected, kept):
        assert ours.tobytes() == theirs.tobytes(), (t["name"], t.get("kind"))
        s = statistics[t["name"]]
        assert (s["kept_se"], s["kept_osm"], s["kept"]) == (
            *(k.sum() for k in sets),
            (sets[0] | sets[1]).sum(),
        )
        assert 0 <= s["overlap"] <= 1
        for role, mask in zip(("se", "osm"), sets):
            magnitudes = np.abs(
                oracle.patch_and_score(t["theta"], t[role], t["sensitivity_" + role], "delta")[0][
                    mask
                ]
            )
            assert (s[f"low_{role}"], s[f"high_{role}"]) == (
                (magnitudes.min(), magnitudes.max()) if mask.any() else (0, 0)
            )
    return statistics, kept


@pytest.mark.parametrize(
    "options", OPTIONS + ABLATIONS, ids=lambda o: "-".join(o.values()) or "default"
)
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
    check(draw(seed, kinds), patch, ODD)


@pytest.mark.parametrize("granularity", ["matrix", "row", "global"])
def test_sizes_and_thresholds_of_the_top_sets(granularity):
    tensors = draw(1, ["plain"] * 8)
    patch = PatchSettings(
        granularity=granularity, top_rate_se=0.35, top_rate_osm=0.2, retention=1.0
    )
    statistics, _ = check(tensors, patch, ODD)
    sizes = [t["theta"].shape for t in tensors]
    expected = {
        "matrix": [math.prod(s) * 35 // 100 for s in sizes],
        "row": [math.prod(s[:-1]) * (s[-1] * 35 // 100) for s in sizes],
    }
    found = [statistics[t["name"]]["top_se"] for t in tensors]
    if granularity == "global":
        assert sum(found) == sum(map(math.prod, sizes)) * 35 // 100 and found != expected["matrix"]
        cut = min(s["threshold_se"] for s in statistics.values())
        scores = [
            oracle.patch_and_score(t["theta"], t["se"], t["sensitivity_se"], "delta")[1]
            for t in tensors
        ]
        assert found == [(s >= cut).sum() for s in scores]
    else:
        assert found == expected[granularity]


def test_global_ties_go_to_the_earlier_tensor():
    tensors = draw(0, ["equal"] * 8)
    patch = PatchSettings(granularity="global", top_rate_se=0.4, top_rate_osm=0.0, retention=1.0)
    statistics, _ = check(tensors, patch, ODD)
    assert [statistics[t["name"]]["top_se"] for t in tensors] == [
        13,
        13,
        13,
        13,
        7,
        0,
        0,
        0,
    ]  # 59 of 149


def test_random_top_sets_are_exact_and_independent():
    patch = PatchSettings(
        importance="random", combine="union", top_rate_se=0.3, top_rate_osm=0.2, retention=0.5
    )
    theta, derived, sensitivity = inputs(rows=FEW)
    statistics, _ = check(as_list(theta, derived, sensitivity, FEW), patch, FEW)
    for name, s in statistics.items():
        assert s["top_se"] == s["size"] * 3 // 10 and s["top_osm"] == s["size"] // 5, name
    total = totals(statistics)
    within = lambda found, n, p: abs(found - n * p) < 5 * math.sqrt(n * p * (1 - p))
    assert within(total["top_both"], total["top_se"], 0.2)
    for role in ("se", "osm"):
        assert within(
            total[f"kept_{role}"], total[f"top_{role}"], 0.5
        )  # the draw of the retention is another one


@pytest.mark.parametrize("combine", ["difference", "intersection", "union"])
def test_fill_is_exact_and_disjoint(combine):
    theta, derived, sensitivity = inputs(rows=FEW)
    patch = PatchSettings(
        support="fill", combine=combine, retention=0.3, top_rate_se=0.1, top_rate_osm=0.05
    )
    tensors = as_list(theta, derived, sensitivity, FEW)
    statistics, kept = check(tensors, patch, FEW)
    for t, (se, osm) in zip(tensors, kept):
        assert (
            se.sum() == osm.sum() == statistics[t["name"]]["kept_se"] == oracle.count(0.3, se.size)
        )
        assert combine != "difference" or not (se & osm).any()


@pytest.mark.parametrize(
    "merge", ["average", "task_arithmetic", "ties", "dare", "dare_ties", "resta"]
)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_baselines_equal_their_formulas(merge, dtype):
    theta, derived, sensitivity = inputs(dtype, step=3e-3, rows=FEW)
    patch = PatchSettings(merge=merge, alpha=0.75, beta=1.25, retention=0.4, density=0.3)
    merged, statistics = run(theta, derived, sensitivity, patch, rows=FEW)
    refuse_no_op(statistics, patch)
    for t, ours in zip(as_list(theta, derived, sensitivity, FEW), results(merged, FEW)):
        terms = oracle.baseline(t, patch, SEED)
        theirs, touched = oracle.add_terms(t, terms)
        assert ours.tobytes() == theirs.tobytes(), t["name"]
        assert statistics[t["name"]]["kept"] == touched.sum() < touched.size
        formula = t["theta"].astype(np.float64) + sum(terms)
        np.testing.assert_allclose(
            ours.astype(np.float64), formula, rtol=3 * float(jnp.finfo(dtype).eps), atol=2e-8
        )


@pytest.mark.parametrize(
    "options",
    [
        *OPTIONS[1:],
        ABLATIONS[2],
        dict(merge="ties"),
        dict(merge="ties", granularity="global"),
        dict(merge="dare_ties"),
        dict(merge="resta"),
    ],
    ids=lambda o: "-".join(o.values()),
)
@pytest.mark.parametrize("devices", [2, 4, 8])
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
        dict(granularity="global"),
        dict(granularity="row"),
        dict(importance="random"),
        dict(merge="ties"),
    ],
    ids=lambda o: "-".join(o.values()),
)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_scores_name_the_tensor(options, bad):
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
    ids=lambda o: "-".join(o.values()),
)
def test_what_ranks_without_scores_asks_for_none(options):
    patch, (theta, derived, sensitivity), sharder = (
        PatchSettings(**options),
        inputs(rows=FEW),
        sharder_of(1),
    )
    merged, _ = apply_patching(
        place(theta, sharder, FEW),
        {r: place(t, sharder, FEW) for r, t in derived.items()},
        {},
        FEW,
        patch,
        SEED,
        sharder,
        "test",
    )
    with_scores, _ = run(theta, derived, sensitivity, patch, rows=FEW)
    assert all(np.asarray(merged[path]).tobytes() == x.tobytes() for path, x in with_scores.items())
