"""A registry in a bucket: added, read elsewhere, removed; writers that come between."""

import json
import os
import subprocess
import sys

import pytest

from safepatch_jax.registry.changes import add, remove
from safepatch_jax.registry.commands import apply, listed, pull, show, verify
from safepatch_jax.registry.store import INDEX, MANIFEST, PATCH, PATCHES, Store
from safepatch_jax.runtime import addresses, files, lease, mirror
from safepatch_jax.runtime.holding import leased
from safepatch_jax.runtime.objects import Objects
from tests import bucket as buckets
from tests.patch_file.chains import assert_bits
from tests.patch_file.models import ROOT
from tests.registry.lines import without
from tests.registry.test_registry import ADDS

pytestmark = buckets.needed


@pytest.fixture
def place(bucket_server, request):
    return f"gs://bucket/{request.node.name.replace('[', '-').replace(']', '')}"


def test_a_registry_in_a_bucket(bucket_either, line, tmp_path, monkeypatch):
    store = Store(bucket_either)
    with pytest.raises(ValueError, match=f"There is no registry at {bucket_either}"):
        listed(store)
    for name in "abc":
        add(store, str(line / f"{name}.patch"), name)
    # Another machine has no copies of it.
    monkeypatch.setenv(addresses.BASE, str(tmp_path / "elsewhere"))
    store = Store(bucket_either)
    assert len(verify(store)) == 3
    apply(store, "c", line / "start", tmp_path / "out")
    assert_bits(tmp_path / "out", without(line, "d"))
    remove(store, "b", line / "start")
    pull(store, "c", tmp_path / "pulled")
    digest = files.file_sha256(tmp_path / "pulled" / PATCH)
    assert digest == store.read().find("c").hash and len(verify(store)) == 4
    assert lease.NAME not in Objects(bucket_either).sizes()


def test_a_patch_file_that_was_changed_in_the_bucket_is_refused(place, line, tmp_path):
    store = Store(place)
    add(store, str(line / "a.patch"), "a")
    there = Objects(f"{place}/{PATCHES}/{files.file_sha256(line / 'a.patch')}")
    there.write(PATCH, (line / "a.patch").read_bytes()[:-1] + b"x")
    store.folder.rename(tmp_path / "copies")  # on another machine
    with pytest.raises(ValueError, match="other bytes than were published"):
        apply(store, "a", line / "start", tmp_path / "out")
    there.write(PATCH, b"x" * (1 << 20))
    with pytest.raises(ValueError, match="has 1,048,576 bytes, and .* were added"):
        pull(store, "a", tmp_path / "out")


def test_adding_again_puts_back_what_is_damaged_or_missing_in_the_bucket(bucket_either, line):
    store = Store(bucket_either)
    add(store, str(line / "a.patch"), "a")
    there = Objects(f"{bucket_either}/{PATCHES}/{files.file_sha256(line / 'a.patch')}")
    content = there.read(PATCH)
    for spoil in (
        lambda: there.write(PATCH, content[:-1] + b"x"),
        lambda: there.delete([PATCH]),
        lambda: there.delete(list(there.sizes())),
    ):
        spoil()
        add(store, str(line / "a.patch"), "a")
        assert there.read(PATCH) == content and len(verify(store)) == 1


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("other", b"x" * 5000, "other is none of the files that were added"),
        ("card.md", b"x" * 5000, "card.md has 5,000 bytes, and 3 were added"),
        (MANIFEST, b"x" * 5000, "patch.json has more than 4,000 bytes .SAFEPATCH_INDEX_BYTES"),
        (mirror.LIST, b"x" * 5000, "published.json has more than 4,000 bytes"),
    ],
    ids=["other", "card", "manifest", "list"],
)
def test_nothing_larger_than_what_was_added_is_brought(
    name, content, message, place, line, tmp_path, monkeypatch
):
    store = Store(place)
    (tmp_path / "card.md").write_text("abc")
    add(store, str(line / "a.patch"), "a", card=str(tmp_path / "card.md"))
    folder = f"{PATCHES}/{files.file_sha256(line / 'a.patch')}"
    Objects(f"{place}/{folder}").write(name, content)
    store.folder.rename(tmp_path / "copies")  # on another machine
    monkeypatch.setenv("SAFEPATCH_INDEX_BYTES", "4000")
    with pytest.raises(ValueError, match=message):
        show(store, "a")
    assert not (store.folder / folder).exists()


def test_of_writers_at_once_none_loses_an_entry(bucket_either, line, tmp_path):
    running = []
    for i, names in enumerate(("abcd", "dcba")):
        env = os.environ | {"PYTHONPATH": str(ROOT), addresses.BASE: str(tmp_path / f"host {i}")}
        command = [sys.executable, "-c", ADDS, bucket_either, str(line), *names]
        running.append(subprocess.Popen(command, cwd=ROOT, env=env))
    assert [process.wait(100) for process in running] == [0, 0]
    assert sorted(x.name for x in Store(bucket_either).read().live.values()) == list("abcd")


def test_a_writer_whose_lease_had_expired_takes_no_entry_away(bucket_either, line, tmp_path):
    """Another one wrote the index between its reading and its writing: both entries are there."""
    store, other = Store(bucket_either), Store(str(tmp_path / "other"))
    add(store, str(line / "a.patch"), "a")
    add(other, str(line / "d.patch"), "d")
    theirs = json.loads((other.folder / INDEX).read_text())["patches"]
    calls = []
    change = store.change

    def interrupted(edit):
        def twice(index):
            calls.append(sorted(x.name for x in index.entries.values()))
            result = edit(index)
            if len(calls) == 1:
                content = json.loads(Objects(bucket_either).read(INDEX))
                content["patches"] |= theirs
                Objects(bucket_either).write(INDEX, json.dumps(content).encode())
            return result

        change(twice)

    store.change = interrupted
    add(store, str(line / "b.patch"), "b")
    assert calls == [["a"], ["a", "d"]]
    assert sorted(x.name for x in store.read().live.values()) == ["a", "b", "d"]


def test_a_writer_that_has_lost_its_lease_deletes_nothing(place, line, monkeypatch):
    store = Store(place)
    add(store, str(line / "a.patch"), "a")
    entry = store.read().find("a")
    there = Objects(f"{place}/{PATCHES}/{entry.hash}")
    sizes = there.sizes()
    with leased(place):
        Objects(place).write(lease.NAME, b"{}")  # another holder took it
        monkeypatch.setattr(lease, "SECONDS", 0.0)
        with pytest.raises(lease.Lost):
            store.fill(entry, lambda folder: None)
    assert there.sizes() == sizes


def test_no_permission_is_told_in_one_line(place, bucket_server, line):
    with bucket_server.faults(denied=True):
        with pytest.raises(ValueError, match="no permission|Cannot lock") as info:
            add(Store(place), str(line / "a.patch"), "a")
    assert "\n" not in str(info.value)
