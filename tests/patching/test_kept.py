"""A selection that is weighed several times gives the bits of whole merges."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from safepatch_jax.patching.kept import keep_entries, selection, weigh_entries
from safepatch_jax.patching.settings import PatchSettings
from tests.patching.cases import FEW, SEED, inputs, run

WEIGHTS = ((1.0, 1.0), (0.5, 2.5), (0.0, 1.0), (1.7, 0.0))


def on_device(tree):
    return {path: jnp.asarray(x) for path, x in tree.items()}


def by_role(trees):
    return {role: on_device(tree) for role, tree in trees.items()}


@pytest.mark.parametrize(
    "patch, dtype, rounding",
    [
        (PatchSettings(), np.float32, "nearest"),
        (PatchSettings(combine="union", retention=0.5, rescale=True), jnp.bfloat16, "stochastic"),
        (PatchSettings(support="fill", granularity="row"), np.float32, "nearest"),
        (PatchSettings(merge="dare"), np.float16, "nearest"),
        (PatchSettings(merge="average"), np.float32, "nearest"),
    ],
    ids=["default", "union-stochastic", "fill-by-row", "dare", "average"],
)
def test_weighed_entries_have_the_bits_of_a_merge(patch, dtype, rounding):
    theta, derived, sensitivity = inputs(dtype, step=3e-3, rows=FEW)
    models, scores = by_role(derived), by_role(sensitivity)
    kept = keep_entries(on_device(theta), models, scores, FEW, patch, SEED, "test")
    assert 0 < kept.size < sum(x.size for x in theta.values())  # a bit an entry and patch
    for alpha, beta in WEIGHTS:
        weighed = dataclasses.replace(patch, alpha=alpha, beta=beta)
        assert selection(weighed, SEED) == selection(patch, SEED) != selection(patch, SEED + 1)
        merged = weigh_entries(
            kept, on_device(theta), models, FEW, weighed, "test", rounding=rounding
        )
        expected, _ = run(theta, derived, sensitivity, weighed, rounding=rounding, rows=FEW)
        for path in expected:
            assert np.asarray(merged[path]).tobytes() == expected[path].tobytes(), path


def test_what_depends_on_the_weights_or_the_whole_scope_has_no_selection_of_its_own():
    for patch in (PatchSettings(merge="ties"), PatchSettings(granularity="global")):
        assert selection(patch, SEED) is None


def test_a_broken_result_or_none_at_all_is_left_to_the_whole_merge():
    theta, derived, sensitivity = inputs(step=100, rows=FEW)
    patch, models = PatchSettings(), by_role(derived)
    kept = keep_entries(on_device(theta), models, by_role(sensitivity), FEW, patch, SEED, "test")
    for alpha, beta in ((1e38, 1e38), (0.0, 0.0)):
        weighed = dataclasses.replace(patch, alpha=alpha, beta=beta)
        assert weigh_entries(kept, on_device(theta), models, FEW, weighed, "test") is None
    derived["se"][FEW[0].path].flat[0] = np.inf
    for bad in (by_role(derived), {"se": on_device(theta), "osm": models["osm"]}):
        scores = by_role(sensitivity)
        assert keep_entries(on_device(theta), bad, scores, FEW, patch, SEED, "test") is None
