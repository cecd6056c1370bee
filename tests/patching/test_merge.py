"""The whole patch operation: bits against the oracle, on 1 and 8 devices, and its refusals."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from safepatch_jax.patching.settings import PatchSettings
from safepatch_jax.patching.statistics import one_sided, refuse_no_op, totals
from tests.patching import oracle
from tests.patching.cases import FEW, ROWS, SEED, as_list, inputs, matrices
from tests.patching.cases import run as run_rows


def few(*args, **options):
    """Inputs of two weights: programs are compiled for each."""
    return inputs(*args, rows=FEW, **options)


def run(*args, **options):
    return run_rows(*args, rows=FEW, **options)


@pytest.mark.parametrize(
    "patch",
    [
        PatchSettings(),
        PatchSettings(
            importance="weight",
            top_rate_se=0.4,
            top_rate_osm=0.3,
            combine="intersection",
            retention=0.7,
        ),
        PatchSettings(combine="union", retention=0.5, rescale=True, alpha=0.5, beta=2.0),
        PatchSettings(alpha=1.7, beta=0.3, top_rate_se=0.9, retention=1.0),
    ],
    ids=["default", "weight-intersection", "union-rescale", "odd-factors"],
)
@pytest.mark.parametrize(
    "dtype, rounding",
    [
        (np.float32, "nearest"),
        (jnp.bfloat16, "nearest"),
        (jnp.bfloat16, "stochastic"),
        (np.float16, "stochastic"),
    ],
)
def test_bits_equal_the_oracle(patch, dtype, rounding):
    trees = few(dtype, step=3e-3)
    merged, statistics = run(*trees, patch, rounding=rounding)
    tensors = as_list(*trees, FEW)
    expected, kept = oracle.safepatched(tensors, patch, SEED, rounding)
    for tensor, ours, theirs in zip(tensors, matrices(merged, FEW), expected):
        assert ours.tobytes() == theirs.tobytes(), tensor["name"]
    assert totals(statistics)["kept"] == sum((se | osm).sum() for se, osm in kept)


@pytest.mark.parametrize(
    "devices, dtype, rounding, rows",
    [
        (2, jnp.bfloat16, "stochastic", FEW),
        (4, jnp.bfloat16, "stochastic", FEW),
        (8, jnp.bfloat16, "stochastic", ROWS),
        (8, np.float32, "nearest", FEW),
    ],
)
def test_same_bits_on_several_devices(devices, dtype, rounding, rows):
    patch = PatchSettings(top_rate_se=0.3, top_rate_osm=0.2, alpha=1.3)
    trees, options = inputs(dtype, rows=rows), {"rounding": rounding, "rows": rows}
    one, statistics_one = run_rows(*trees, patch, **options)
    many, statistics_many = run_rows(*trees, patch, devices=devices, **options)
    assert statistics_one == statistics_many
    for path in one:
        assert one[path].tobytes() == many[path].tobytes(), path


def test_counts_and_untouched_bits():
    theta, derived, sensitivity = inputs()
    patch = PatchSettings(top_rate_se=0.1, top_rate_osm=0.2, retention=1.0)
    merged, statistics = run_rows(theta, derived, sensitivity, patch)
    for name, s in statistics.items():
        assert s["top_se"] == int(0.1 * s["size"]) and s["top_osm"] == int(0.2 * s["size"]), name
        assert s["kept_se"] == s["top_se"] - s["top_both"]
        assert s["kept"] == s["kept_se"] + s["kept_osm"]
    changed = sum((merged[path] != theta[path]).sum() for path in merged)
    assert changed == totals(statistics)["survived"] <= totals(statistics)["kept"]


def test_bfloat16_swallows_small_updates_and_says_so():
    def survival(dtype, rounding="nearest"):
        trees = few(dtype, step=1e-5)
        return totals(run(*trees, PatchSettings(), rounding=rounding)[1])["survival"]

    nearest = survival(jnp.bfloat16)
    assert nearest < 0.5 and survival(jnp.bfloat16, "stochastic") > nearest
    assert survival(np.float32) > 0.9


def test_equal_rankings_give_an_empty_difference_which_is_refused():
    theta, derived, sensitivity = few()
    derived["osm"], sensitivity["osm"] = derived["se"], sensitivity["se"]
    with pytest.raises(ValueError, match="No entry is kept.*Raise patch.top_rate_se"):
        refuse_no_op(run(theta, derived, sensitivity, PatchSettings())[1], PatchSettings())


def test_a_top_set_within_the_other_leaves_one_patch_which_is_refused():
    trees = few()
    for path, stored in trees[0].items():  # no entry is left out of a top set of all
        for derived, sensitivity in zip(trees[1].values(), trees[2].values()):
            derived[path] = np.where(derived[path] == stored, stored + 1e-2, derived[path])
            sensitivity[path] = np.abs(sensitivity[path]) + 1
    for patch, role in (
        (PatchSettings(top_rate_osm=1.0), "SE"),
        (PatchSettings(top_rate_se=1.0), "OSM"),
    ):
        statistics = run(*trees, patch)[1]
        assert totals(statistics)["survived"]
        with pytest.raises(ValueError, match=f"No entry of the {role} patch is kept.*in both"):
            refuse_no_op(statistics, patch)
    unwanted = dataclasses.replace(patch, beta=0.0)
    refuse_no_op(run(*trees, unwanted)[1], unwanted)
    few_se = dataclasses.replace(patch, top_rate_se=0.002, top_rate_osm=0.9)
    statistics = run(*trees, few_se)[1]
    refuse_no_op(statistics, few_se)
    assert "so the result is nearly the OSM patch alone" in one_sided(totals(statistics), few_se)
    assert one_sided(totals(statistics), dataclasses.replace(few_se, alpha=0.0)) == ""
    assert one_sided(totals(run(*trees, PatchSettings())[1]), PatchSettings()) == ""


def test_one_cast_at_the_end_when_the_storage_dtype_changes():
    """Deltas are against the stored backbone, not against its image in the new dtype."""
    theta, derived, sensitivity = few(np.float32, step=3e-3)
    patch = PatchSettings(retention=1.0)
    same, statistics = run(theta, derived, sensitivity, patch)
    cast, cast_statistics = run(theta, derived, sensitivity, patch, dtype="bfloat16")
    for path in same:
        assert cast[path].tobytes() == same[path].astype(jnp.bfloat16).tobytes(), path
    for name, numbers in statistics.items():
        assert numbers | {"survived": 0} == cast_statistics[name] | {"survived": 0}


def test_zero_patch_is_refused():
    theta, derived, sensitivity = few()
    derived["osm"] = {path: x.astype(np.float32) for path, x in theta.items()}
    with pytest.raises(ValueError, match="OSM patch is zero everywhere.*derive.osm_steps"):
        refuse_no_op(run(theta, derived, sensitivity, PatchSettings())[1], PatchSettings())


@pytest.mark.parametrize("granularity", ["matrix", "global"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_sensitivities_name_the_tensor(bad, granularity):
    theta, derived, sensitivity = few()
    patch = PatchSettings(granularity=granularity)
    sensitivity["se"][FEW[1].path][1, 3, 4] = bad
    with pytest.raises(
        ValueError, match="1 tensors is NaN or infinite, first model.layers.1.mlp.down_proj.weight"
    ):
        run(theta, derived, sensitivity, patch)
