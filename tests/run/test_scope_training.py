"""A run that trains the patch scope alone, with either backward pass, and what it keeps on disk."""

import pathlib

import numpy as np
import pytest

from safepatch_jax.io.checkpoint import load_tree
from safepatch_jax.models.config import config_from_hf, read_hf_config
from safepatch_jax.models.table import nest, param_table, unnest
from safepatch_jax.outcome import settings_differences
from safepatch_jax.planning.programs import architecture
from safepatch_jax.run import models, scratch
from safepatch_jax.run.job import Job
from safepatch_jax.run.room import disk_bytes
from safepatch_jax.settings import load_config
from tests.models.families import tiny_raw

SCOPE = {"derive.train": "scope", "run.keep_scratch": True, "run.certify": "hashes"}


@pytest.fixture(scope="module")
def jobs(kept, settings, tmp_path_factory):
    """Runs of one backbone, whole but for their report, by the backward pass."""
    result = {}
    for backward in ("whole", "layerwise"):
        chosen = settings.override(SCOPE | {"derive.backward": backward})
        job = Job(chosen, tmp_path_factory.mktemp("scope") / backward)
        for stage in ("patch", "evaluate_se"):
            job.runner.need(stage)
        result[backward] = job
    return result


def test_both_passes_make_one_patch_but_for_rounding(jobs):
    whole, layerwise = jobs["whole"], jobs["layerwise"]
    changes = settings_differences(whole.settings.to_dict(), layerwise.settings.to_dict())
    assert changes == ['derive.backward: "whole" -> "layerwise"']
    # Their checkpoints differ, so a run that was cut is not resumed by the other pass.
    assert whole.runner.key("derive_se") != layerwise.runner.key("derive_se")
    for role in ("se", "osm"):
        first = whole.runner.result(f"derive_{role}")["nll"]
        second = layerwise.runner.result(f"derive_{role}")["nll"]
        np.testing.assert_allclose(second, first, rtol=1e-4)
    ours, theirs = _kept(layerwise), _kept(whole)
    assert len(ours & theirs) > 0.95 * len(ours | theirs) > 100


def _kept(job):
    """Where the merged weights are not the backbone's."""
    backbone = unnest(job.state.context.load(job.state.backbone)[1])
    merged = models.patched(job.state, job.settings.patch)
    places = set()
    for path, x in merged.items():
        changed = np.asarray(x) != np.asarray(backbone[path])
        places.update((path, int(i)) for i in np.flatnonzero(changed))
    return places


def test_the_stage_holds_the_scope_and_the_rest_is_the_backbones(jobs):
    job = jobs["layerwise"]
    table = param_table(read_hf_config(job.state.backbone))
    scope = {row.path for row in table.scope("block_linear")}
    abstract = unnest(table.abstract(job.state.context.sharder))
    folder = job.runner.folder("derive_se") / "params"
    with pytest.raises(ValueError, match="structures do not match"):
        load_tree(folder, nest(abstract))
    stored = unnest(load_tree(folder, nest({path: abstract[path] for path in scope})))
    backbone = unnest(job.state.context.load(job.state.backbone)[1])
    derived = scratch.derived(job.state, "se")
    assert derived.keys() == backbone.keys() and stored.keys() == scope
    for path, x in derived.items():
        other = stored[path] if path in scope else backbone[path]
        np.testing.assert_array_equal(np.asarray(x), np.asarray(other, np.float32))
        assert (path in scope) == bool(np.any(np.asarray(x) != np.asarray(backbone[path])))


def test_another_training_is_another_key_and_the_default_none(kept, jobs):
    changed = set()
    for name in kept.runner.stages:
        if kept.runner.key(name) != jobs["whole"].runner.key(name):
            changed.add(name)
    assert {"derive_se", "derive_osm", "patch"} <= changed
    assert not changed & {"import", "align", "evaluate_backbone"}
    assert jobs["whole"].runner.stages["derive_se"].settings["train"] == "block_linear"
    assert "train" not in kept.runner.stages["derive_se"].settings


def test_the_layerwise_pass_needs_the_scope(settings, tmp_path):
    with pytest.raises(ValueError, match="derive.backward=layerwise.*--derive.train=scope"):
        Job(settings.override({"derive.backward": "layerwise"}), tmp_path / "work")
    everything = SCOPE | {"derive.backward": "layerwise", "patch.scope": "all"}
    with pytest.raises(ValueError, match="--patch.scope=all has others.*backward=whole"):
        Job(settings.override(everything), tmp_path / "work")


def test_the_plan_says_what_is_trained(jobs, kept):
    for name, job in (("all", kept), ("scope", jobs["layerwise"])):
        text = "\n".join(job.plan())
        assert ("train scope, backward layerwise" in text) == (name == "scope")


def test_bytes_on_disk_are_those_of_what_is_trained_and_scored():
    settings = load_config(pathlib.Path(__file__).parents[2] / "configs/llama3_8b_one_h100.py")
    config = architecture(settings)
    scope, size = 6_979_321_856, 8_030_261_248
    disk, model = disk_bytes(settings, config), 2 * size
    assert disk.derived == disk.scores == disk.checkpoints == 4 * scope and disk.aligning == 0
    assert disk.derived + disk.scores < 60e9
    assert disk.model == model and disk.patch_file < 0.1 * model
    assert disk.most == disk.derived + disk.scores + model + disk.patch_file < 75e9
    aligned = disk_bytes(settings.override({"align.enabled": True}), config)
    assert aligned._replace(aligning=0) == disk and aligned.aligning == 4 * size
    whole = {
        "derive.train": "all",
        "derive.store": "float32",
        "derive.optimizer": "adamw",
        "run.checkpoint_minutes": 1.0,
    }
    disk = disk_bytes(settings.override(whole), config)
    assert (disk.derived, disk.scores, disk.checkpoints) == (8 * size, 4 * scope, 3 * 12 * size)
    assert disk.most == 8 * size + 3 * 12 * size  # while OSM is trained


def test_a_tensor_that_is_too_large_to_rank_is_refused_at_the_start(settings):
    raw = tiny_raw("llama", vocab_size=2**27, hidden_size=16, tie_word_embeddings=False)
    config = config_from_hf(raw)
    disk_bytes(settings, config)  # the head is not in the scope
    wider = settings.override({"patch.scope": "all_linear"})
    with pytest.raises(ValueError, match=r"lm_head.weight has 2,147,483,648 entries.*block_linear"):
        disk_bytes(wider, config)
