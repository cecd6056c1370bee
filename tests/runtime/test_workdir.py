"""The folder of a command: refused if it is not its own, claimed by one run, cleared of what a
killed run left."""

import pytest

from safepatch_jax.runtime.workdir import Workdir


def open_workdir(path, **options):
    return Workdir(path, "a run", "settings.json", ("stages", "sweep*"), **options)


def test_a_folder_with_strangers_is_refused_and_left_alone(tmp_path):
    for name in ("stages", "sweep.jsonl", ".x.1.partial", ".lock", "notes.txt"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=r"not of a run \(notes.txt\); .* folder for --workdir"):
        with open_workdir(tmp_path).claimed():
            raise AssertionError("not reached")
    assert (tmp_path / ".x.1.partial").exists()
    (tmp_path / "settings.json").write_text("{}")  # the mark: the folder is one of this kind
    open_workdir(tmp_path).check()


def test_what_a_killed_run_left_half_written_is_cleared(tmp_path):
    (tmp_path / "work" / ".stages.1.partial").mkdir(parents=True)
    (tmp_path / "work" / ".report.md.2.partial").write_text("half")
    with open_workdir(tmp_path / "work").claimed():
        assert [path.name for path in (tmp_path / "work").iterdir()] == [".lock"]


def test_a_folder_is_used_by_one_run_at_a_time(tmp_path):
    with open_workdir(tmp_path).claimed():
        with pytest.raises(ValueError, match="Another run is at work"):
            with open_workdir(tmp_path).claimed():
                raise AssertionError("not reached")
    with open_workdir(tmp_path).claimed():
        pass


def test_what_a_command_refuses_is_looked_at_again_under_the_lock(tmp_path):
    locked = []

    def refuse():
        locked.append((tmp_path / "work").is_dir())
        if locked == [False, True]:
            raise ValueError("another run was at work meanwhile")

    with pytest.raises(ValueError, match="another run was at work meanwhile"):
        with open_workdir(tmp_path / "work", refuse=refuse).claimed():
            raise AssertionError("not reached")
    assert locked == [False, True]
