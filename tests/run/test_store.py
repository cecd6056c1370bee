"""Runs that keep half as much on disk: derived models as bfloat16 differences, scores as bfloat16;
and what a run says that it needs."""

import math
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from safepatch_jax.io.checkpoint import load_tree
from safepatch_jax.models.config import read_hf_config
from safepatch_jax.models.table import nest, param_table, unnest
from safepatch_jax.patching import PATCH_ROLES
from safepatch_jax.run import manifests, models, scratch
from safepatch_jax.run.job import Job
from safepatch_jax.run.merge_folders import merge_folders
from safepatch_jax.run.room import disk_bytes, free_bytes, missing, refuse_small_disk
from tests.jobs import interrupted_at, machine_of

SCOPE = {"derive.train": "scope", "run.keep_scratch": True, "run.certify": "hashes"}
HALF = {"derive.store": "bfloat16", "score.store": "bfloat16"}
FEW = {"align.enabled": False, "mesh.shape": "fsdp:2"}


@pytest.fixture(scope="module")
def jobs(settings, tmp_path_factory):
    """Finished runs of one backbone, by what they keep; the one in bfloat16 was cut and resumed."""
    result, folder = {}, tmp_path_factory.mktemp("store")
    with machine_of(2):
        for name, own in (("whole", {}), ("half", HALF)):
            job = Job(settings.override(SCOPE | FEW | own), folder / name)
            if name == "half":
                with interrupted_at("score_osm: running"):
                    job.run()
                job = Job(job.settings, folder / name)
                job.run()
            job.runner.need("export")
            result[name] = job
    return result


def _arrays(job, stage, name, dtype):
    """Read what a stage keeps, as NumPy's float32, in the dtype in which it should lie there."""
    table = param_table(read_hf_config(job.state.backbone))
    abstract = unnest(table.abstract(job.state.context.sharder, jnp.dtype(dtype)))
    scope = {row.path: abstract[row.path] for row in table.scope("block_linear")}
    stored = unnest(load_tree(job.runner.folder(stage) / name, nest(scope)))
    return {path: np.asarray(x).astype(np.float32) for path, x in stored.items()}


def test_a_derived_model_is_the_backbone_plus_its_rounded_difference(jobs):
    whole, half = jobs["whole"], jobs["half"]
    backbone = unnest(half.state.context.load(half.state.backbone)[1])
    for role in PATCH_ROLES:
        assert [p.name for p in half.runner.folder(f"derive_{role}").iterdir() if p.is_dir()] == [
            "differences"
        ]
        trained = _arrays(whole, f"derive_{role}", "params", "float32")
        model = scratch.derived(half.state, role)
        assert model.keys() == backbone.keys()
        for path, x in model.items():
            theta = np.asarray(backbone[path]).astype(np.float32)
            expected = theta
            if path in trained:
                difference = (trained[path] - theta).astype(jnp.bfloat16).astype(np.float32)
                expected = theta + difference
                assert np.any(expected != trained[path]) and np.any(expected != theta)
            np.testing.assert_array_equal(np.asarray(x), expected)
        assert all(
            x.dtype == jnp.bfloat16 for x in scratch.derived(half.state, role, "bfloat16").values()
        )


def test_half_the_bytes_and_nearly_the_same_patch(jobs):
    sizes = {}
    for name, job in jobs.items():
        files = []
        for stage in ("derive_se", "derive_osm", "score_se", "score_osm"):
            files += job.runner.folder(stage).rglob("d/*")
        sizes[name] = sum(path.stat().st_size for path in files)
    table = param_table(read_hf_config(job.state.backbone))
    scope = sum(math.prod(row.shape) for row in table.scope("block_linear"))
    # Of arrays so small much is what describes them; and they are compressed.
    assert sizes["whole"] - sizes["half"] == pytest.approx(4 * 2 * scope, rel=0.25)
    kept = {}
    for name, job in jobs.items():
        backbone = unnest(job.state.context.load(job.state.backbone)[1])
        exported = unnest(job.state.context.load(job.state.folder("export"))[1])
        kept[name] = set()
        for path, x in exported.items():
            changed = np.flatnonzero(np.asarray(x) != np.asarray(backbone[path]))
            kept[name].update((path, int(i)) for i in changed)
    ours, theirs = kept["half"], kept["whole"]
    assert len(ours & theirs) > 0.95 * len(ours | theirs) > 100


def test_scores_are_rounded_to_nearest(jobs):
    # Of other derived models, so other sums; but each lies on bfloat16's grid, and none is lost.
    for role in PATCH_ROLES:
        whole = _arrays(jobs["whole"], f"score_{role}", "sensitivity", "float32")
        half = _arrays(jobs["half"], f"score_{role}", "sensitivity", "float32")
        for path, x in half.items():
            np.testing.assert_array_equal(x, x.astype(jnp.bfloat16).astype(np.float32))
            assert np.any(whole[path] != whole[path].astype(jnp.bfloat16).astype(np.float32))
            np.testing.assert_allclose(x, whole[path], rtol=0.1, atol=0.02 * whole[path].max())


def test_out_of_core_merge_reads_them_with_the_bits_of_the_mesh(jobs, tmp_path):
    job = jobs["half"]
    stages = {kind: {} for kind in ("derive", "score")}
    for kind, folders in stages.items():
        for role in PATCH_ROLES:
            folders[role] = str(job.runner.folder(f"{kind}_{role}"))
    merge_folders(
        str(job.state.backbone),
        stages["derive"],
        stages["score"],
        str(tmp_path / "out"),
        job.settings,
    )
    exported = unnest(job.state.context.load(job.state.folder("export"))[1])
    merged = unnest(job.state.context.load(tmp_path / "out")[1])
    for path, x in merged.items():
        np.testing.assert_array_equal(np.asarray(x), np.asarray(exported[path]))
    flat = models.patched(job.state, job.settings.patch)
    for path, x in flat.items():
        np.testing.assert_array_equal(np.asarray(x), np.asarray(exported[path]))


def test_keys_change_with_what_is_kept_and_by_default_not(jobs, kept):
    changed = {
        name
        for name in jobs["whole"].runner.stages
        if jobs["whole"].runner.key(name) != jobs["half"].runner.key(name)
    }
    assert {"derive_se", "score_se", "patch", "export"} <= changed
    assert not changed & {"import", "certify_import", "evaluate_backbone"}
    for job, names in ((jobs["whole"], ()), (kept, ()), (jobs["half"], ("derive_se", "score_se"))):
        for name, stage in job.runner.stages.items():
            assert ("store" in stage.settings) == (name.replace("osm", "se") in names)
    assert not {name for name in kept.runner.stages["report"].settings if "store" in name}


def test_differences_need_the_scope(settings, tmp_path):
    with pytest.raises(ValueError, match="derive.store=bfloat16.*Add --derive.train=scope"):
        Job(settings.override({"derive.store": "bfloat16"}), tmp_path / "work")


def test_the_exported_files_lie_on_the_disk_once(jobs):
    for job in jobs.values():
        ours, theirs = job.runner.folder("export") / "model", job.runner.folder("patch") / "model"
        for path in theirs.iterdir():
            assert path.samefile(ours / path.name)


@pytest.mark.parametrize("other", ["smaller files", "the weights alone were kept"])
def test_an_export_of_another_cut_or_of_an_earlier_version_has_the_same_weights(
    jobs, tmp_path, other
):
    done = jobs["half"]
    work = shutil.copytree(done.workdir, tmp_path / "work")
    shutil.rmtree(work / "stages" / "export")
    changes = {"export.shard_bytes": 20_000}
    if other != "smaller files":
        changes, patch = {}, work / "stages" / "patch"
        shutil.rmtree(patch / "model")
        _, manifest = manifests.read(patch)
        del manifest["result"]["shard_bytes"]
        manifests.write(patch, manifest | {"outputs": {}})
    with machine_of(2):
        job = Job(done.settings.override(changes), work, update=True)
        job.runner.need("export")
    files = list((work / "stages" / "export" / "model").glob("*.safetensors"))
    assert (len(files) > 1) == bool(changes)
    exported = unnest(done.state.context.load(done.state.folder("export"))[1])
    for path, x in unnest(job.state.context.load(job.state.folder("export"))[1]).items():
        np.testing.assert_array_equal(np.asarray(x), np.asarray(exported[path]))


def test_what_a_run_will_need_is_what_it_then_adds(jobs, settings, tmp_path):
    done = jobs["half"]
    disk = disk_bytes(done.settings, read_hf_config(done.state.backbone))
    assert missing(done.runner, disk, done.runner.waiting()) == {}
    with machine_of(2):
        job = Job(done.settings, tmp_path / "work")
        waiting = job.runner.waiting()
        assert {"derive_se", "patch", "report"} <= set(waiting) and "import" not in waiting
        (most,) = missing(job.runner, disk, waiting).values()
        assert most == disk.most == disk.derived + disk.checkpoints  # while OSM is trained
        shutil.copytree(done.runner.folder("derive_se"), job.runner.folder("derive_se"))
        (less,) = missing(job.runner, disk, job.runner.waiting()).values()
        assert less == most - disk.derived // 2
    text = "\n".join(job.plan())
    assert "scratch on disk: derived models 0.0 GiB" in text and "GiB there at once, free" in text


def test_a_disk_with_less_is_refused_with_the_ways_out(settings, tmp_path):
    needed = {tmp_path: 30 * 10**9}
    refuse_small_disk(needed, {tmp_path: 30 * 10**9}, settings)
    refuse_small_disk(needed, {tmp_path: None}, settings)
    with pytest.raises(ValueError, match=r"up to 30.0 GB.*29.9 GB are free") as caught:
        refuse_small_disk(needed, {tmp_path: 299 * 10**8}, settings)
    text = str(caught.value)
    assert str(tmp_path) in text and "\n" not in text and "another --workdir" in text
    for way in ("--run.checkpoint_minutes=0 ", "--derive.train=scope ", "--score.store=bfloat16."):
        assert way in text
    small = settings.override(SCOPE | HALF | {"run.checkpoint_minutes": 0.0})
    with pytest.raises(ValueError, match="a smaller --patch.scope"):
        refuse_small_disk(needed, {tmp_path: 0}, small)
    assert free_bytes(tmp_path / "not" / "there") > 0
