"""A chain whose workdir lies in a bucket: the models of the same chain on disk; extended, read and
reverted on other machines, with nothing on their disks."""

import shutil

import pytest

from safepatch_jax.patch_file.commands import history, replay, revert, verify
from safepatch_jax.patch_file.log import PatchLog
from safepatch_jax.patch_file.removal import remove
from safepatch_jax.runtime import addresses, paths
from safepatch_jax.runtime.objects import Objects
from safepatch_jax.studies.continual.links import parse_links
from safepatch_jax.studies.continual.study import run
from tests import bucket
from tests.jobs import stages_run
from tests.studies.test_continual import STAGES, settings, tensors  # noqa: F401  (a fixture)

pytestmark = bucket.needed
WORKDIR = "gs://bucket/chain"
ONE = STAGES.partition(";")[0]


@pytest.fixture(scope="module")
def on_disk(one_device, settings, tmp_path_factory):  # noqa: F811
    work = tmp_path_factory.mktemp("run") / "work"
    run(settings, work, parse_links(STAGES))
    return PatchLog(work)


@pytest.fixture(scope="module")
def in_bucket(bucket_server, settings):  # noqa: F811
    return settings.override({"run.cache_dir": "gs://bucket/cache"})


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Another machine: it has nothing of the bucket."""
    monkeypatch.setenv(addresses.BASE, str(tmp_path / "buckets"))


@pytest.fixture(scope="module")
def made(in_bucket, on_disk, tmp_path_factory):
    """The chain in the bucket, its second link by another machine than its first."""
    run(in_bucket, WORKDIR, parse_links(ONE))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(addresses.BASE, str(tmp_path_factory.mktemp("other")))
        run(in_bucket, WORKDIR, parse_links(STAGES))


def facts(log):
    kept = []
    for number in log.live:
        link = log.links[number]
        kept.append((link["name"], link["model"], link["patch"]["sha256"], link["seed"]))
    return log.start["model"], kept


def test_models_and_patches_are_those_of_the_chain_on_disk(made, on_disk, machine):
    log = PatchLog(WORKDIR)
    assert facts(log) == facts(on_disk)
    assert log.start["folder"] == on_disk.start["folder"]
    for line in verify(log):
        assert "agree" in line
    assert tensors(log.model(2)) == tensors(on_disk.model(2))
    names = Objects(WORKDIR).sizes()
    assert {"log.jsonl", "continual.md", "continual.png"} <= names.keys()
    assert not [name for name in names if "lease" in name or "derive_se/params" in name]


def test_a_finished_chain_is_not_made_again_by_another_machine(made, in_bucket, machine, capsys):
    """What an abandoned link has left, its mark gone already, is deleted to the end."""
    left = Objects(f"{WORKDIR}/links/03-left")
    left.write("stages/derive_osm/params/x", b"x")
    run(in_bucket, WORKDIR, parse_links(STAGES))
    assert not stages_run(capsys.readouterr().out) and not left.sizes()


def test_a_link_is_taken_out_of_the_middle(made, on_disk, machine, tmp_path):
    """The bits of the same removal on disk; in a copy of the chain."""
    chain = Objects(WORKDIR)
    for name in chain.sizes():
        Objects("gs://bucket/copy").write(name, chain.read(name))
    copied = shutil.copytree(on_disk.workdir, tmp_path / "copy")
    folders = [remove(PatchLog(place), 1, "later") for place in (copied, "gs://bucket/copy")]
    assert tensors(folders[0]) == tensors(folders[1])
    logs = [PatchLog(copied), PatchLog("gs://bucket/copy")]
    assert logs[0].live == logs[1].live == [3] and facts(logs[0]) == facts(logs[1])
    assert (
        "links/03-hate/stages/patch_file/patch.safetensors" in Objects("gs://bucket/copy").sizes()
    )


def test_it_is_read_and_replayed_without_a_run(made, on_disk, machine, tmp_path):
    log = PatchLog(WORKDIR)
    assert "hate: on 1" in "\n".join(history(log))
    start = paths.readable(f"{WORKDIR}/{log.start['folder']}")
    replay(log, 2, 0, start, tmp_path / "two")
    assert tensors(tmp_path / "two") == tensors(on_disk.model(2))


def test_a_link_is_taken_off_and_a_lost_model_is_built_again(made, on_disk, machine):
    lost = Objects(f"{WORKDIR}/links/01-fraud/stages/export/model")
    lost.delete(lost.sizes())
    log = PatchLog(WORKDIR)
    folder = revert(log, 1)
    assert tensors(folder) == tensors(on_disk.model(1))
    assert PatchLog(WORKDIR).live == [1] and "model agrees" in verify(PatchLog(WORKDIR))[1]
    there = Objects(addresses.address_of(folder))
    assert there.sizes()["model.safetensors"]
    there.delete(there.sizes())  # a copy of it is here: it is put there again all the same
    assert tensors(PatchLog(WORKDIR).model(1)) == tensors(on_disk.model(1))
    assert there.sizes()["model.safetensors"]


def test_a_workdir_without_a_log_is_told_in_one_line(bucket_server):
    with pytest.raises(ValueError, match="There is no patch log") as info:
        PatchLog("gs://bucket/nothing")
    assert "\n" not in str(info.value)
