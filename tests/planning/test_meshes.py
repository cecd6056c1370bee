"""The meshes that a search for settings tries."""

import dataclasses

import pytest

from safepatch_jax.models.config import config_from_hf
from safepatch_jax.planning.chips import present
from safepatch_jax.planning.compile import Figures
from safepatch_jax.planning.programs import programs
from safepatch_jax.planning.search import Planner, ladder, meshes
from safepatch_jax.settings import Settings
from safepatch_jax.testing import tiny_config
from tests.conftest import sharder_of

CONFIG = config_from_hf(tiny_config(num_attention_heads=8, num_key_value_heads=4))
FOUR, TWO, ONE = "data:1,fsdp:4,tensor:1", "data:1,fsdp:2,tensor:2", "data:1,fsdp:1,tensor:4"
SETTINGS = Settings().override(
    {
        "mesh.shape": TWO,
        "model.remat": "none",
        "data.max_prompt_tokens": 8,
        "data.max_answer_tokens": 8,
        "derive.batch_size": 4,
    }
)
CUT = SETTINGS.override({"derive.accumulate": 2})


def test_meshes_divide_the_model():
    config = config_from_hf(tiny_config(num_attention_heads=8, num_key_value_heads=2))
    shapes = list(meshes(Settings(), config, present(sharder_of(8))))
    assert shapes == ["data:1,fsdp:8,tensor:1", "data:1,fsdp:4,tensor:2"]


@pytest.mark.parametrize(
    "changes, shapes",
    [
        ({}, [FOUR, TWO, ONE]),
        ({"derive.accumulate": 2}, [TWO, ONE]),
        ({"derive.accumulate": 4}, [ONE]),
        # A batch that is whole need not be cut evenly; alignment counts where there is one.
        ({"derive.batch_size": 3}, [FOUR, TWO, ONE]),
        ({"derive.accumulate": 2, "align.batch_size": 2}, [TWO, ONE]),
        ({"derive.accumulate": 2, "align.batch_size": 2, "align.enabled": True}, [ONE]),
    ],
)
def test_meshes_divide_the_micro_batches(changes, shapes):
    found = meshes(SETTINGS.override(changes), CONFIG, present(sharder_of(4)))
    assert list(found) == shapes


def test_micro_batches_of_a_ladder_divide_alignments_steps_too():
    settings = SETTINGS.override({"derive.batch_size": 16, "align.batch_size": 8})
    for enabled, most in ((False, 8), (True, 4)):
        changed = settings.override({"align.enabled": enabled})
        parts = [changes.get("derive.accumulate", 1) for changes in ladder("train", changed, 2)]
        assert max(parts) == most


class _Traced(Planner):
    """A planner that makes the programs and compiles none: they are all too large."""

    def _measure(self, settings, kind):
        parts = programs(settings, CONFIG, target_of_four().sharder(settings.mesh.shape), [kind])
        return tuple(Figures(p.title, kind, 2**40, 0.1, 1, 0, peak=2**41) for p in parts)


def target_of_four():
    return dataclasses.replace(present(sharder_of(4)), memory=2**40)


def test_a_search_leaves_out_meshes_that_do_not_divide_micro_batches():
    planner = _Traced(CONFIG, target_of_four(), ("train",))
    compiled, _ = planner.suggest(CUT)
    assert {changes["mesh.shape"] for changes, _ in compiled} == {TWO, ONE}
    assert planner.remedy(CUT) is None
