"""How the two patches stand to each other: against NumPy in float64, and on every mesh the same."""

import itertools

import numpy as np
import pytest

from safepatch_jax.models.table import Param
from safepatch_jax.patching.agreement import describe_agreement
from safepatch_jax.patching.settings import PatchSettings
from safepatch_jax.patching.statistics import totals
from tests.patching import oracle
from tests.patching.cases import FEW, KINDS, ROWS, as_list, as_trees, draw, inputs, run

PATCH = PatchSettings(merge="average")  # compiles in no time
FIGURES = ("cosine", "nonzero_both", "same_sign", "sign_agreement", "norm_se", "norm_osm")


def check(numbers, theta, se, osm):
    """Compare the figures of one tensor, or of all, with the oracle's."""
    cosine, counts, norms = oracle.compared(theta, se, osm)
    assert numbers["cosine"] == pytest.approx(cosine, abs=1e-6)
    assert (numbers["nonzero_both"], numbers["same_sign"]) == counts
    assert numbers["sign_agreement"] == counts[1] / max(1, counts[0])
    assert [numbers["norm_se"], numbers["norm_osm"]] == pytest.approx(norms, rel=1e-6)
    ratio = norms[0] / norms[1] if norms[1] else 0.0
    assert numbers["norm_ratio"] == pytest.approx(ratio, rel=1e-6)


def whole(tensors, name):
    return np.concatenate([tensor[name].ravel() for tensor in tensors])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_figures_are_those_of_numpy_by_tensor_and_in_total(dtype):
    trees = inputs(dtype, rows=FEW)
    statistics = run(*trees, PATCH, rows=FEW)[1]
    tensors = as_list(*trees, FEW)
    for tensor in tensors:
        check(statistics[tensor["name"]], tensor["theta"], tensor["se"], tensor["osm"])
    check(totals(statistics), *(whole(tensors, name) for name in ("theta", "se", "osm")))


def test_every_kind_of_values_and_the_same_on_eight_devices():
    tensors = draw(np.random.default_rng(7), itertools.cycle(KINDS), ROWS)
    assert {tensor["kind"] for tensor in tensors} == set(KINDS)
    trees = as_trees(tensors, ROWS)
    one, many = (run(*trees, PATCH, devices=n)[1] for n in (1, 8))
    for tensor in tensors:
        numbers = one[tensor["name"]]
        check(numbers, tensor["theta"], tensor["se"], tensor["osm"])
        for figure in FIGURES:
            assert many[tensor["name"]][figure] == numbers[figure], (tensor["kind"], figure)


@pytest.mark.parametrize("devices", [1, 8])
def test_a_large_tensor_is_summed_by_rows_without_overflow(devices):
    axes, shape = ("layers", "mlp", "embed"), (1, 640, 1024)  # more entries than SUMMED
    rows = [Param("large", axes, shape, "large", 1, "linear")]
    theta, derived, sensitivity = inputs(rows=rows)
    for role, low, high in (("se", 1.9, 1.99), ("osm", -1.99, 1.9)):  # limbs that are nearly full
        patch = np.random.default_rng(3).uniform(low, high, shape).astype(np.float32)
        derived[role]["large"] = theta["large"] + patch
    numbers = run(theta, derived, sensitivity, PATCH, devices, rows=rows)[1]["large"]
    check(numbers, theta["large"], derived["se"]["large"], derived["osm"]["large"])


@pytest.mark.parametrize("factor", [-1.0, 0.5])
def test_opposite_and_parallel_patches(factor):
    theta, derived, sensitivity = inputs(rows=FEW)
    for path, backbone in theta.items():
        # Whole sixteenths, so that no difference is rounded.
        theta[path] = np.round(backbone * 16) / np.float32(16)
        patch = np.round((derived["se"][path] - backbone) * 4096) / np.float32(16)
        derived["se"][path] = theta[path] + patch
        derived["osm"][path] = theta[path] + np.float32(factor) * patch
    total = totals(run(theta, derived, sensitivity, PATCH, rows=FEW)[1])
    assert total["cosine"] == pytest.approx(np.sign(factor), abs=1e-6)
    assert total["sign_agreement"] == (factor > 0) and total["nonzero_both"] > 100
    assert total["norm_ratio"] == pytest.approx(1 / abs(factor))
    assert f"cosine {np.sign(factor):.3f}" in describe_agreement(total)


def test_a_zero_patch_has_no_direction():
    theta, derived, sensitivity = inputs(rows=FEW)
    derived["osm"] = dict(theta)
    total = totals(run(theta, derived, sensitivity, PATCH, rows=FEW)[1])
    assert total["norm_se"] > 0 and total["norm_osm"] == 0
    assert (total["cosine"], total["norm_ratio"], total["nonzero_both"]) == (0, 0, 0)
