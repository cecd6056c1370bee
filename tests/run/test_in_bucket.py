"""A run whose workdir and cache lie in a bucket: the bits of the same run on disk; taken up with
nothing on this machine's disk; what is brought back is what was published."""

import json
import shutil

import pytest

from safepatch_jax.run.inspect_stage import inspect_stage
from safepatch_jax.run.job import SETTINGS, Job
from safepatch_jax.run.pins import pinned
from safepatch_jax.runtime import addresses, mirror, paths
from safepatch_jax.runtime.files import file_sha256
from safepatch_jax.runtime.objects import Objects
from safepatch_jax.settings import Settings
from safepatch_jax.testing import write_tiny_model
from tests import bucket
from tests.hub import files_of
from tests.jobs import FAST, stages_run, write_data

pytestmark = bucket.needed
WORKDIR = "gs://bucket/runs/one"
FILES = ("export/model/model.safetensors", "patch_file/patch.safetensors")


@pytest.fixture(scope="module")
def on_disk(one_device, tmp_path_factory):
    """The run on disk, with its derived models and scores."""
    folder = tmp_path_factory.mktemp("in bucket")
    own = {
        "model.source": str(write_tiny_model(folder / "model", num_hidden_layers=1)),
        "run.cache_dir": str(folder / "cache"),
        "run.keep_scratch": True,
    }
    job = Job(Settings().override(FAST | write_data(folder) | own), folder / "work")
    job.run()
    return job


@pytest.fixture(scope="module")
def in_bucket(on_disk):
    return on_disk.settings.override({"run.cache_dir": "gs://bucket/cache"})


@pytest.fixture(scope="module")
def done(bucket_server, in_bucket):
    """The same run in the bucket."""
    job = Job(in_bucket, WORKDIR)
    job.run()
    return job


def hashes(names):
    found = Objects(f"{WORKDIR}/stages").hashes(names)
    return {name: entry["sha256"] for name, entry in found.items()}


def test_the_bits_are_those_of_the_run_on_disk(done, on_disk):
    stages = on_disk.workdir / "stages"
    assert hashes(FILES) == {name: file_sha256(stages / name) for name in FILES}
    names = Objects(WORKDIR).sizes()
    assert "stages/derive_se/params/_METADATA" in names and "report.md" in names
    assert not [name for name in names if "lease" in name or mirror.PUBLISHING in name]
    # Arrays go past the local disk.
    assert not (done.workdir / "stages" / "derive_se" / "params").exists()


def test_a_machine_with_an_empty_disk_goes_on_from_what_is_there(done, in_bucket, capsys):
    shutil.rmtree(addresses.base())
    objects = Objects(f"{WORKDIR}/stages/patch_file")
    objects.delete(objects.sizes())  # as if killed before it
    Job(in_bucket, WORKDIR).run()
    ran = stages_run(capsys.readouterr().out)
    assert "patch_file" in ran and not {"derive_se", "score_osm", "patch", "export"} & set(ran)
    assert (done.workdir / "stages" / "export" / "model" / "model.safetensors").is_file()


def test_a_machine_with_an_empty_disk_keeps_the_commit_of_a_model_of_the_hub(
    bucket_server, hub, on_disk
):
    contents = files_of(on_disk.settings.model.source)
    first = hub.put("org/tiny", contents)
    named = on_disk.settings.override({"model.source": "org/tiny"})
    begun = named.override({"model.source": f"org/tiny@{first}"})
    Objects("gs://bucket/runs/named").write(SETTINGS, json.dumps(begun.to_dict()).encode())
    hub.put("org/tiny", contents | {"generation_config.json": b"{}"})
    assert pinned(named, paths.resolve("gs://bucket/runs/named") / SETTINGS) == begun


def test_a_stage_that_another_has_changed_runs_again(done, in_bucket, capsys):
    objects = Objects(f"{WORKDIR}/stages/patch_file")
    objects.write("patch.safetensors", b"x" * objects.sizes()["patch.safetensors"])
    Job(in_bucket, WORKDIR).run()  # what leaves the run is compared by hash
    assert "patch_file: patch.safetensors has other bytes in the bucket" in capsys.readouterr().out


def test_the_model_of_a_stage_is_read_by_the_stages_list(done):
    model = f"{WORKDIR}/stages/export/model"
    shutil.rmtree(addresses.base())
    assert (paths.resolve(paths.readable(model)) / "model.safetensors").is_file()
    objects = Objects(f"{WORKDIR}/stages/export")
    listed = objects.read(mirror.STAGE_LIST)
    objects.write(mirror.PUBLISHING, b"")
    objects.delete([mirror.STAGE_LIST])
    try:
        with pytest.raises(ValueError, match="stages/export is half-written"):
            paths.readable(model)
    finally:
        objects.write(mirror.STAGE_LIST, listed)
        objects.delete([mirror.PUBLISHING])
    weights = objects.read("model/model.safetensors")
    objects.write("model/model.safetensors", weights[:-1] + bytes([weights[-1] ^ 1]))
    shutil.rmtree(addresses.base())  # a copy of what was published would do
    try:
        with pytest.raises(ValueError, match="has other bytes than were published"):
            paths.readable(model)
    finally:
        objects.write("model/model.safetensors", weights)


def test_stages_of_a_bucket_and_of_the_disk_are_compared_and_leave_no_copy(done, on_disk, capsys):
    before = sorted(addresses.base().rglob("*"))
    model, other = str(on_disk.state.imported), str(on_disk.workdir)
    assert inspect_stage(WORKDIR, "score_se", other=other, model=model)
    assert "tensors are equal, bit for bit" in capsys.readouterr().out
    assert sorted(addresses.base().rglob("*")) == before
