"""The histogram of patch entries in bfloat16 steps, against NumPy, and the totals."""

import ml_dtypes
import numpy as np

from safepatch_jax.patching.settings import PatchSettings
from safepatch_jax.patching.statistics import STEPS, combine_statistics, totals
from tests.patching.cases import ROWS, inputs, run

ROW = ROWS[0]


def test_steps_are_those_of_the_backbones_bfloat16_numbers():
    theta, derived, sensitivity = inputs(ml_dtypes.bfloat16, step=3e-4, rows=ROWS[:1])
    patch = PatchSettings(merge="average")  # keeps every entry that is not 0
    _, statistics = run(theta, derived, sensitivity, patch, rows=ROWS[:1])
    for layer, name in enumerate(ROW.hf_names):
        weight = theta[ROW.path][layer].astype(np.float64)
        step = 2.0 ** (np.floor(np.log2(np.abs(weight))) - 7)
        above = np.nextafter(
            np.abs(weight).astype(ml_dtypes.bfloat16), ml_dtypes.bfloat16(np.inf)
        ).astype(np.float64)
        np.testing.assert_array_equal(
            above - np.abs(weight), step
        )  # the distance to the next number is such a step
        for role in ("se", "osm"):
            size = np.abs(derived[role][ROW.path][layer].astype(np.float64) - weight)
            expected = [int(np.sum((size >= 2.0**k * step) & (size > 0))) for k in STEPS]
            assert statistics[name][f"steps_{role}"] == expected
            assert len(set(expected)) > 5


def test_totals_add_up_the_histograms():
    _, statistics = run(*inputs(), PatchSettings(top_rate_se=0.3, top_rate_osm=0.3))
    total = totals(statistics)
    for role in ("se", "osm"):
        summed = np.sum([s[f"steps_{role}"] for s in statistics.values()], axis=0)
        assert total[f"steps_{role}"] == summed.tolist()
        assert total[f"kept_{role}"] >= total[f"steps_{role}"][0] >= total[f"steps_{role}"][-1]


def test_parts_combine_to_the_whole_whatever_is_empty():
    empty = {
        "kept": 0,
        "kept_se": 0,
        "top_se": 0,
        "low_se": 0.0,
        "high_se": 0.0,
        "threshold_se": 0.0,
        "finite": True,
        "steps_se": [0, 0],
    }
    some = {
        "kept": 2,
        "kept_se": 2,
        "top_se": 3,
        "low_se": 0.5,
        "high_se": 2.0,
        "threshold_se": 0.25,
        "finite": True,
        "steps_se": [2, 1],
    }
    zero = some | {"low_se": 0.0, "finite": False}  # a kept entry of 0 is no empty set
    assert combine_statistics([empty, some]) == some
    assert combine_statistics([some, empty, zero]) == some | {
        "kept": 4,
        "kept_se": 4,
        "top_se": 6,
        "low_se": 0.0,
        "finite": False,
        "steps_se": [4, 2],
    }
