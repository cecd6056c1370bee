"""What was removed: it leads nowhere, is not written anew, needs no files and no trusted key."""

import shutil

import pytest

from safepatch_jax.registry import signing
from safepatch_jax.registry.changes import add, remove
from safepatch_jax.registry.commands import apply, listed, verify
from safepatch_jax.registry.store import PATCHES, Store
from tests.patch_file.chains import assert_bits
from tests.registry.lines import without
from tests.registry.test_signing import key_pair


def test_what_was_removed_is_not_written_anew_with_others(line, store, tmp_path):
    remove(store, "d")
    assert len(remove(store, "b", line / "start")) == 2  # b, and c written anew
    index = store.read()
    assert [x.name for x in index.live.values()] == ["a", "c"]
    apply(store, "c", line / "start", tmp_path / "out")
    assert_bits(tmp_path / "out", without(line, "b", "d"))


def test_what_was_removed_is_no_parent_of_what_is_added_later(line, tmp_path):
    store = Store(str(tmp_path / "registry"))
    for name in "ab":
        add(store, str(line / f"{name}.patch"), name)
    remove(store, "b")
    add(store, str(line / "c.patch"), "c")
    index = store.read()
    assert [x.name for x in index.line(index.find("c").hash)] == ["c"]
    assert " on model " in listed(store)[1]


def test_files_of_removed_patches_may_be_deleted(line, store):
    digest = store.read().find("b").hash
    remove(store, "b", line / "start")
    assert len(verify(store)) == 6
    shutil.rmtree(store.folder / PATCHES / digest)
    assert len(verify(store)) == 5


def test_removed_patches_need_not_be_signed(line, tmp_path):
    pytest.importorskip("cryptography")
    private, public = key_pair(tmp_path, "ours")
    key, trust = signing.private_key(private), signing.public_key(str(public))
    store = Store(str(tmp_path / "registry"))
    add(store, str(line / "a.patch"), "a", key=key)
    add(store, str(line / "b.patch"), "b")
    with pytest.raises(ValueError, match="b@.* is not signed"):
        verify(store, trust=trust)
    remove(store, "b")
    assert [x.rpartition(", ")[2] for x in verify(store, trust=trust)] == [
        f"signed by {trust[:16]}...",
        "not signed",
    ]
