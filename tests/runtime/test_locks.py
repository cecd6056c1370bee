"""What lies under a lock's name and is no lock is left as it is, links above all."""

import errno
import fcntl
import os
import subprocess

import pytest

from safepatch_jax.runtime import files, locks


def link(path):
    path.symlink_to("mine")


def dangling(path):
    path.symlink_to("nowhere")


def hard_link(path):
    path.write_text("")
    os.link(path, path.with_name("other name"))


STRANGERS = {
    "a link to a file": (link, "is a link to mine"),
    "a dangling link": (dangling, "is a link to nowhere"),
    "a folder": (lambda path: path.mkdir(), "is a folder"),
    "a file with content": (lambda path: path.write_text("mine"), "with another content"),
    "a long file": (lambda path: path.write_text("process 1 on x" * 99), "with another content"),
    "a file of two names": (hard_link, "has other names too"),
    "a pipe": (os.mkfifo, "is no plain file"),
}


def state(folder):
    """All names below a folder with what is there."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[path.name] = os.readlink(path)
        else:
            found[path.name] = path.read_text() if path.is_file() else path.stat().st_mode
    return found


@pytest.mark.parametrize("make, message", STRANGERS.values(), ids=STRANGERS)
def test_what_is_no_lock_is_refused_by_name_and_left(tmp_path, make, message):
    (tmp_path / "mine").write_text("precious")
    make(tmp_path / files.LOCK)
    before = state(tmp_path)
    for hold in (lambda: files.claimed(tmp_path), lambda: files.locked(tmp_path / files.LOCK)):
        with pytest.raises(ValueError, match=rf"/\.lock .*{message}.* move it away") as raised:
            with hold():
                raise AssertionError("not reached")
        assert "\n" not in str(raised.value)
    assert state(tmp_path) == before


@pytest.mark.parametrize("make", [link, dangling, hard_link, os.mkfifo, lambda path: path.mkdir()])
def test_lines_are_added_to_a_file_of_ours_alone(tmp_path, make):
    (tmp_path / "mine").write_text("precious")
    make(tmp_path / "lines")
    before = state(tmp_path)
    with pytest.raises(ValueError, match="move it away"):
        files.appended(tmp_path / "lines")
    assert state(tmp_path) == before


def test_a_lock_that_a_dead_process_left_is_taken_over(tmp_path):
    (tmp_path / files.LOCK).write_text("process 1 on elsewhere")
    with files.claimed(tmp_path):
        assert (tmp_path / files.LOCK).read_text().startswith(f"process {os.getpid()} on ")
        with pytest.raises(ValueError, match=rf"at work in .* \(process {os.getpid()} on "):
            with files.claimed(tmp_path):
                raise AssertionError("not reached")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_one_line_and_nothing_is_left(tmp_path, monkeypatch, number):
    def flock(handle, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    for hold in (files.claimed, lambda folder: files.locked(folder / ".x.lock")):
        with pytest.raises(ValueError, match="has no file locks.* Give a folder on another disk"):
            with hold(tmp_path):
                raise AssertionError("not reached")
    assert not list(tmp_path.iterdir())


def test_text_is_written_and_copied_beside_a_link_of_the_temporary_name(tmp_path):
    (tmp_path / "mine").write_text("precious")
    temporary = f".a.{locks.process_space()}-{os.getpid()}.partial"
    for write in (
        lambda: files.write_text(tmp_path / "a", "new"),
        lambda: files.copy(tmp_path / "mine", tmp_path / "a"),
    ):
        (tmp_path / temporary).symlink_to("mine")
        write()
        assert (tmp_path / "mine").read_text() == "precious"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "mine"]


def test_a_folder_is_not_replaced_through_a_link(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "x").write_text("precious")
    (tmp_path / "out").symlink_to("theirs")
    with pytest.raises(ValueError, match="out is a link to theirs, whose content is neither"):
        with files.new_folder(tmp_path / "out", replace=True):
            raise AssertionError("not reached")
    assert (tmp_path / "out" / "x").read_text() == "precious"


@pytest.mark.parametrize(
    "name, ours",
    [
        (".a.txt.0123abcd-77.partial", True),
        (".stages.0123abcd-77.x_1abcde.partial", True),
        (".stages.1.partial", True),
        (".stages.0123abcd-77.x_1abcde.old", True),
        (".shared.a1b2c3d_.partial", True),
        (".notes.partial", False),
        (".my.download.partial", False),
        ("a.1.partial", False),
        (".notes.2024.old", False),
    ],
)
def test_half_written_is_what_has_a_name_of_ours(name, ours):
    assert files.half_written(name) == ours


def test_a_process_of_this_machine_that_has_ended_is_known():
    with subprocess.Popen(["true"]) as process:
        process.wait()
    space = locks.process_space()
    assert locks.is_gone(space, process.pid)
    assert not locks.is_gone(space, os.getpid()) and not locks.is_gone(space, 1)
    assert not locks.is_gone("another", process.pid) and not locks.is_gone(None, process.pid)


def test_held_says_by_whom(tmp_path):
    with locks.held(tmp_path / "x", wait=False):
        with pytest.raises(locks.Held) as raised, locks.held(tmp_path / "x", wait=False):
            raise AssertionError("not reached")
    assert raised.value.holder == ""
