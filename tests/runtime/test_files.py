"""Files appear whole or not at all, and text is read back as it was written."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from safepatch_jax.runtime import files
from tests.calls import ROOT


def test_jsonl_with_line_breaks_that_are_no_newlines(tmp_path):
    rows = [{"answer": "one\u2028two\x85three\x0cfour\nfive"}, {"answer": ""}]
    files.write_jsonl(tmp_path / "a.jsonl", rows)
    assert files.read_jsonl(tmp_path / "a.jsonl") == rows


def test_folder_is_filled_aside_and_failure_leaves_the_old_one(tmp_path):
    with files.new_folder(tmp_path / "out") as out:
        (out / "x").write_text("old")
        assert not (tmp_path / "out").exists()
    (tmp_path / "out.partial").mkdir()  # a user's folder of a similar name is not ours to remove
    with pytest.raises(RuntimeError), files.new_folder(tmp_path / "out", replace=True) as out:
        (out / "x").write_text("new")
        raise RuntimeError
    assert (tmp_path / "out" / "x").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.partial"]
    with files.new_folder(tmp_path / "out", replace=True) as out:
        (out / "y").write_text("new")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["y"]


def test_full_folder_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not empty"), files.new_folder(tmp_path):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a\\b", "C:x", "a\0b", 3, None])
def test_names_that_could_leave_their_folder(name):
    with pytest.raises(ValueError, match="refusing the file name"):
        files.plain_name(name, "index")


def test_what_a_killed_process_left_half_filled_is_deleted_by_the_next(tmp_path):
    script = """
import os, signal, sys
from safepatch_jax.runtime import files
with files.new_folder(sys.argv[1]) as out:
    (out / "x").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", script, tmp_path / "folder"], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    [half] = tmp_path.iterdir()
    assert half.name.startswith(".folder.") and (half / "x").read_text() == "half"
    with files.new_folder(tmp_path / "other"), files.new_folder(tmp_path / "folder.b"):
        assert half.exists()  # it is another folder's
    with files.new_folder(tmp_path / "folder") as first:
        with pytest.raises(RuntimeError), files.new_folder(tmp_path / "folder") as second:
            assert not half.exists()
            assert first.exists() and second.exists()  # living processes keep theirs
            raise RuntimeError
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "folder.b", "other"]


def test_a_replaced_folder_that_a_killed_process_left_is_deleted_by_the_next(tmp_path):
    script = """
import os, signal, sys
from safepatch_jax.runtime import files
def hook(event, args):
    if event == "shutil.rmtree":
        os.kill(os.getpid(), signal.SIGKILL)
with files.new_folder(sys.argv[1], replace=True) as out:
    sys.addaudithook(hook)
    (out / "x").write_text("new")
"""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "x").write_text("old")
    killed = subprocess.run([sys.executable, "-c", script, folder], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL and (folder / "x").read_text() == "new"
    [old] = {*tmp_path.iterdir()} - {folder}
    assert (old / "x").read_text() == "old"
    with files.new_folder(folder, replace=True):
        assert not old.exists()
    assert list(tmp_path.iterdir()) == [folder]


def test_what_someone_else_writes_meanwhile_is_not_lost(tmp_path):
    with pytest.raises(ValueError, match="was made or filled by someone else meanwhile"):
        with files.new_folder(tmp_path / "folder") as out:
            (out / "x").write_text("ours")
            (tmp_path / "folder").mkdir()
            (tmp_path / "folder" / "precious").write_text("theirs")
    assert [p.name for p in tmp_path.rglob("*")] == ["folder", "precious"]


def test_targets_that_are_links_or_cannot_be_replaced(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("disk")
    (tmp_path / "dangling").symlink_to("made")
    for link, target in (("link", "disk"), ("dangling", "made")):
        with files.new_folder(tmp_path / link) as out:
            (out / "x").write_text("whole")
        assert (tmp_path / link).is_symlink() and (tmp_path / target / "x").read_text() == "whole"
    assert (tmp_path / "disk").stat().st_mode & 0o777 == 0o700
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(
        ValueError,
        match="is a mount point or the current folder.* Give the name of a new folder inside it",
    ):
        with files.new_folder("."):
            raise AssertionError("not reached")


def test_an_old_folder_stays_when_the_new_one_fails(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("old")
    with pytest.raises(RuntimeError), files.new_folder(tmp_path / "folder", replace=True):
        raise RuntimeError
    assert [p.name for p in tmp_path.rglob("*")] == ["folder", "old"]


def test_what_has_changed_is_read_again_for_its_hash(tmp_path, monkeypatch):
    path, read = tmp_path / "weights", []
    path.write_bytes(b"one")
    os.utime(path, (2e9, 2e9))  # as copied from a host whose clock is ahead
    settled(path)
    assert files.known_sha256(path) is None
    digest = files.file_sha256(path)
    assert files.known_sha256(path) == digest == hashlib.sha256(b"one").hexdigest()
    real = files.file_sha256
    monkeypatch.setattr(files, "file_sha256", lambda path: read.append(path.name) or real(path))
    assert files.folder_hashes(tmp_path) == {"weights": {"bytes": 3, "sha256": digest}}
    assert read == []
    path.write_bytes(b"two")  # as large, and as old
    os.utime(path, (2e9, 2e9))
    shutil.copy2(path, tmp_path / "copy")
    two = hashlib.sha256(b"two").hexdigest()
    assert {x["sha256"] for x in files.folder_hashes(tmp_path).values()} == {two}
    assert read == ["copy", "weights"]


def test_the_hash_of_a_file_that_may_still_change_is_not_kept(tmp_path, monkeypatch):
    """It may be written to again within the same step of the clock."""
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    written = path.stat().st_ctime_ns
    for milliseconds, kept in ((1, False), (15, False), (50, True)):
        monkeypatch.setattr(files.time, "time_ns", lambda now=written + milliseconds * 10**6: now)
        digest = files.file_sha256(path)
        assert digest == hashlib.sha256(b"one").hexdigest()
        assert files.known_sha256(path) == (digest if kept else None)


def settled(path):
    """Wait until what is written from now on has other times."""
    while time.time_ns() - path.stat().st_ctime_ns < 1e8:
        time.sleep(0.02)
