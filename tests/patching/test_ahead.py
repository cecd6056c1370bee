"""The programs of the patch operation, compiled ahead of the weights that they are for."""

import jax
import numpy as np
import pytest

from safepatch_jax.models.table import Param
from safepatch_jax.patching import merge
from safepatch_jax.patching.settings import PatchSettings
from tests.conftest import sharder_of
from tests.patching.cases import SEED, inputs, place, run

AXES = ("layers", "mlp", "embed")
ALIKE = [Param(name, AXES, (2, 24, 88), "{layer}." + name, 1, "linear") for name in "ab"]
COMPILED = "/jax/core/compile/backend_compile_duration"
ours = ("patch_matrices", "compare_patches")


@pytest.fixture
def compiled():
    """The names of the patch programs compiled since it was cleared."""
    names = []

    def listen(event, duration, fun_name="", **_):
        if event == COMPILED:
            names.extend(name for name in ours if name in fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("devices", [1, 8])
def test_weights_and_settings_that_are_alike_share_programs(compiled, devices):
    arrays = inputs(rows=ALIKE)

    def patch(**options):
        compiled.clear()
        run(*arrays, PatchSettings(**options), devices, rows=ALIKE)
        return sorted(compiled)

    assert patch() == sorted(ours)
    for combine in ("intersection", "union"):
        assert patch(combine=combine, alpha=2.0, retention=0.5, top_rate_se=0.2) == []
    assert patch(granularity="global") == []
    assert patch(merge="dare") == ["patch_matrices"]
    assert patch(merge="dare", combine="union", support="fill", granularity="row") == []


def test_weights_one_at_a_time_or_two_give_the_same(monkeypatch):
    arrays = inputs(rows=ALIKE)
    merged, statistics = run(*arrays, PatchSettings(), rows=ALIKE)
    monkeypatch.setattr(merge, "SMALL", 0)  # bytes: no weight is read while another runs
    alone, of_alone = run(*arrays, PatchSettings(), rows=ALIKE)
    jax.tree.map(np.testing.assert_array_equal, merged, alone)
    assert statistics == of_alone and len(statistics) == 4


def test_an_array_for_which_nothing_was_compiled_is_refused():
    theta, derived, sensitivity = inputs(rows=ALIKE)
    derived["se"]["b"] = derived["se"]["b"].astype(np.float16)
    with pytest.raises(TypeError, match="float16"):
        run(theta, derived, sensitivity, PatchSettings(), rows=ALIKE)


@pytest.mark.parametrize("devices, programs", [(1, 1), (8, 2)])
def test_one_cpu_device_shares_programs_between_weights_with_as_many_entries(
    compiled, devices, programs
):
    axes = "layers", "embed", "heads", "head_dim"
    rows = [
        Param("wide", AXES, (2, 28, 88), "{layer}.wide", 1, "linear"),
        Param("tall", axes, (2, 88, 4, 7), "{layer}.tall", 1, "linear"),
    ]
    arrays = inputs(rows=rows)
    compiled.clear()
    run(*arrays, PatchSettings(), devices, rows=rows)
    assert sorted(compiled) == sorted(programs * ours)


@pytest.mark.parametrize("granularity", ["matrix", "row"])
def test_merged_weights_lie_as_the_table_says(granularity):
    axes = "embed", "vocab"
    rows = [*ALIKE, Param("whole", axes, (24, 32), "whole", 1, "linear")]
    sharder, arrays = sharder_of(1), inputs(rows=rows)
    theta, *others = arrays
    theta = place(theta, sharder, rows)
    others = [{role: place(x, sharder, rows) for role, x in trees.items()} for trees in others]
    patch = PatchSettings(granularity=granularity)
    merged, _ = merge.apply_patching(theta, *others, rows, patch, SEED, sharder, "test")
    for row in rows:
        assert merged[row.path].shape == row.shape
        assert merged[row.path].sharding == sharder.sharding(row.axes, row.shape)
        assert theta[row.path].is_deleted()  # its buffer holds the result
