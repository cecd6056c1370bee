"""The whole patch operation: bits against the oracle, on 1 and 8 devices, and its refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safepatch_jax.models.config import config_from_hf
from safepatch_jax.models.table import param_table
from safepatch_jax.numerics import tensor_keys
from safepatch_jax.patching.merge import apply_patching
from safepatch_jax.patching.settings import PatchSettings
from safepatch_jax.patching.statistics import refuse_no_op, totals
from safepatch_jax.testing import tiny_config
from tests.conftest import sharder_of
from tests.patching import oracle

TABLE = param_table(config_from_hf(tiny_config()))
ROWS = TABLE.scope("block_linear")
SEED = 5


def inputs(dtype=np.float32, step=1e-3, rows=ROWS):
    """Random backbone, derived models and sensitivities with ties and zeros, as NumPy."""
    rng = np.random.default_rng(0)
    theta, derived, sensitivity = {}, {"se": {}, "osm": {}}, {"se": {}, "osm": {}}
    for row in rows:
        theta[row.path] = (0.05 * rng.standard_normal(row.shape)).astype(dtype)
        for role in derived:
            patch = step * rng.standard_normal(row.shape) * (rng.random(row.shape) < 0.9)
            derived[role][row.path] = (theta[row.path].astype(np.float32) + patch).astype(
                np.float32
            )
            sensitivity[role][row.path] = np.round(rng.random(row.shape), 1).astype(np.float32)
    return theta, derived, sensitivity


def place(tree, sharder, rows=ROWS):
    return {
        row.path: jax.device_put(tree[row.path], sharder.sharding(row.axes, row.shape))
        for row in rows
    }


def run(theta, derived, sensitivity, patch, devices=1, dtype="keep", rounding="nearest", rows=ROWS):
    sharder = sharder_of(devices)
    merged, statistics = apply_patching(
        place(theta, sharder, rows),
        {r: place(t, sharder, rows) for r, t in derived.items()},
        {r: place(t, sharder, rows) for r, t in sensitivity.items()},
        rows,
        patch,
        SEED,
        sharder,
        "test",
        dtype,
        rounding,
    )
    return {path: np.asarray(x) for path, x in merged.items()}, statistics


def expected(theta, derived, sensitivity, patch, rounding="nearest"):
    result, kept_total = {}, 0
    scale = 1 / patch.retention if patch.rescale else 1.0
    for row in ROWS:
        result[row.path] = theta[row.path].copy()
        for layer, name in enumerate(row.hf_names):
            hf = lambda tree: row.to_hf(tree[row.path][layer])
            base = hf(theta).astype(np.float32)
            top = {}
            for role, rate in (("se", patch.top_rate_se), ("osm", patch.top_rate_osm)):
                chosen = (
                    hf(derived[role]) - base if patch.importance == "delta" else hf(derived[role])
                )
                top[role] = oracle.top_set(np.abs(chosen) * hf(sensitivity[role]), rate)
            sets = dict(zip(("se", "osm"), oracle.candidates(top["se"], top["osm"], patch.combine)))
            kept = {
                role: sets[role]
                & oracle.retained(
                    tensor_keys(SEED, role, (name,))[0], row.hf_shape, patch.retention
                )
                for role in sets
            }
            merged, touched = oracle.merge(
                hf(theta),
                hf(derived["se"]),
                hf(derived["osm"]),
                kept["se"],
                kept["osm"],
                patch.alpha * scale,
                patch.beta * scale,
                tensor_keys(SEED, "rounding", (name,))[0] if rounding == "stochastic" else None,
            )
            kept_total += touched.sum()
            result[row.path][layer] = merged.reshape(row.layer_shape)
    return result, kept_total


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
    theta, derived, sensitivity = inputs(dtype, step=3e-3)
    merged, statistics = run(theta, derived, sensitivity, patch, rounding=rounding)
    reference, kept = expected(theta, derived, sensitivity, patch, rounding)
    for path in merged:
        assert merged[path].tobytes() == reference[path].tobytes(), path
    assert totals(statistics)["kept"] == kept


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("dtype, rounding", [(np.float32, "nearest"), (jnp.bfloat16, "stochastic")])
def test_same_bits_on_several_devices(devices, dtype, rounding):
    patch = PatchSettings(top_rate_se=0.3, top_rate_osm=0.2, alpha=1.3)
    one, statistics_one = run(*inputs(dtype), patch, rounding=rounding)
    many, statistics_many = run(*inputs(dtype), patch, devices=devices, rounding=rounding)
    assert statistics_one == statistics_many
    for path in one:
        assert one[path].tobytes() == many[path].tobytes(), path


def test_counts_and_untouched_bits():
    theta, derived, sensitivity = inputs()
    merged, statistics = run(
        theta, derived, sensitivity, PatchSettings(top_rate_se=0.1, top_rate_osm=0.2, retention=1.0)
    )
    for name, s in statistics.items():
        assert s["top_se"] == int(0.1 * s["size"]) and s["top_osm"] == int(0.2 * s["size"]), name
        assert (
            s["kept_se"] == s["top_se"] - s["top_both"]
            and s["kept"] == s["kept_se"] + s["kept_osm"]
        )
    changed = sum((merged[p] != theta[p]).sum() for p in merged)
    assert changed == totals(statistics)["survived"] <= totals(statistics)["kept"]


def test_bfloat16_swallows_small_updates_and_says_so():
    theta, derived, sensitivity = inputs(jnp.bfloat16, step=1e-5)
    nearest = totals(run(theta, derived, sensitivity, PatchSettings())[1])["survival"]
    stochastic = totals(
        run(theta, derived, sensitivity, PatchSettings(), rounding="stochastic")[1]
    )["survival"]
    assert nearest < 0.5 and stochastic > nearest
    theta, derived, sensitivity = inputs(np.float32, step=1e-5)
    assert totals(run(theta, derived, sensitivity, PatchSettings())[1])["survival"] > 0.9


def test_equal_rankings_give_an_empty_difference_which_is_refused():
    theta, derived, sensitivity = inputs()
    derived["osm"], sensitivity["osm"] = derived["se"], sensitivity["se"]
    with pytest.raises(ValueError, match="No entry is kept.*Raise patch.top_rate_se"):
        refuse_no_op(run(theta, derived, sensitivity, PatchSettings())[1], PatchSettings())


def test_one_cast_at_the_end_when_the_storage_dtype_changes():
    """Deltas are taken against the stored backbone, not against its image in the new dtype."""
    theta, derived, sensitivity = inputs(np.float32, step=3e-3)
    patch = PatchSettings(retention=1.0)
    same, statistics = run(theta, derived, sensitivity, patch)
    cast, cast_statistics = run(theta, derived, sensitivity, patch, dtype="bfloat16")
    for path in same:
        assert cast[path].tobytes() == same[path].astype(jnp.bfloat16).tobytes(), path
    for name, s in statistics.items():
        assert {k: v for k, v in s.items() if k != "survived"} == {
            k: v for k, v in cast_statistics[name].items() if k != "survived"
        }


def test_zero_patch_is_refused():
    theta, derived, sensitivity = inputs()
    derived["osm"] = {path: x.astype(np.float32) for path, x in theta.items()}
    with pytest.raises(ValueError, match="OSM patch is zero everywhere.*derive.osm_steps"):
        refuse_no_op(run(theta, derived, sensitivity, PatchSettings())[1], PatchSettings())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_scores_name_the_tensor(bad):
    theta, derived, sensitivity = inputs()
    sensitivity["se"]["layers/mlp/up"][1, 3, 4] = bad
    with pytest.raises(
        ValueError, match="1 tensors is NaN or infinite, first model.layers.1.mlp.up_proj.weight"
    ):
        run(theta, derived, sensitivity, PatchSettings())
