"""A folder whose patching in place was killed is refused by everything that reads a model, until it
is finished or undone."""

import shlex
import signal

import pytest

from safepatch_jax.evaluation.engine import Engine
from safepatch_jax.io.folder import Checkpoint
from safepatch_jax.patch_file.apply import apply, revert, verify
from safepatch_jax.patch_file.arithmetic import scale
from safepatch_jax.patch_file.create import create
from safepatch_jax.run.convert import convert, inspect_model
from safepatch_jax.run.job import Job, align_model
from safepatch_jax.run.merge_folders import merge_folders
from safepatch_jax.runtime import files, unfinished
from safepatch_jax.settings import Settings
from safepatch_jax.studies.evaluate.options import EvaluationOptions
from safepatch_jax.studies.evaluate.study import evaluate
from tests.calls import call
from tests.patch_file.models import assert_same, copied, patched_copy, python

KILLED = """
import os, signal, sys
from safepatch_jax.patch_file import apply as patch_apply
renamed = 0
def hook(event, args):
    global renamed
    if event == "os.rename" and str(args[0]).endswith(".patching"):
        renamed += 1
        if renamed == int(sys.argv[4]):
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
getattr(patch_apply, sys.argv[1])(*sys.argv[2:4])
"""


def killed(verb, patch, folder, at=2):
    """Patch in place in a process that is killed before it puts the `at`-th weight file in
    place."""
    assert python(KILLED, verb, patch, folder, at).returncode == -signal.SIGKILL


def run_of(folder, tmp_path):
    return Settings().override(
        {"model.source": str(folder), "run.cache_dir": str(tmp_path / "cache")}
    )


def merge(folder, tmp_path):
    patches = {"se": str(folder), "osm": str(folder)}
    settings = Settings().override({"patch.merge": "average"})
    merge_folders(str(folder), patches, {}, tmp_path / "out", settings)


READERS = {
    "inspect": lambda folder, tmp_path: inspect_model(str(folder), "block_linear"),
    "convert": lambda folder, tmp_path: convert(f"hf:{folder}", f"hf:{tmp_path / 'out'}"),
    "evaluate": lambda folder, tmp_path: evaluate(
        str(folder), tmp_path / "out", EvaluationOptions()
    ),
    "safepatch": lambda folder, tmp_path: Job(run_of(folder, tmp_path), tmp_path / "out"),
    "align": lambda folder, tmp_path: align_model(run_of(folder, tmp_path), tmp_path / "out"),
    "merge": merge,
    "create": lambda folder, tmp_path: create(folder, folder, tmp_path / "out"),
    "scale": lambda folder, tmp_path: scale(tmp_path / "x.patch", folder, 0.5, tmp_path / "out"),
    "weights": lambda folder, tmp_path: Checkpoint(folder),
    "engine": lambda folder, tmp_path: Engine.open(str(folder)),
}


@pytest.mark.parametrize("verb", ["apply", "revert"])
def test_every_reader_refuses_it_until_it_is_finished_or_undone(pair, tmp_path, verb):
    base, model, patch = pair
    before, after = (base, model) if verb == "apply" else (model, base)
    folder = copied(before, tmp_path / "a folder")
    killed(verb, patch, folder)
    assert set(verify(patch, folder).values()) == {"before", "after", "same"}
    start = files.folder_hashes(folder)
    where = f"--patch={patch} --model={shlex.quote(str(folder))}"
    other = {"apply": "revert", "revert": "apply"}[verb]
    for name, read in READERS.items():
        with pytest.raises(ValueError) as raised:
            read(folder, tmp_path)
        text = str(raised.value)
        assert f"{folder} is neither the backbone nor the patched model: {verb} in place" in text
        assert f"Finish it: python -m launch.patch {verb} {where}" in text, name
        assert f"undo it: python -m launch.patch {other} {where}" in text and "\n" not in text
    assert files.folder_hashes(folder) == start and not (tmp_path / "out").exists()
    move, undo = (apply, revert) if verb == "apply" else (revert, apply)
    whole = move(patch, folder, tmp_path / "whole").folder  # of what is half patched
    assert_same(whole, after)
    finished = copied(folder, tmp_path / "finished")
    move(patch, finished)
    undo(patch, folder)
    assert_same(finished, after)
    assert_same(folder, before)
    names = {path.name for path in before.iterdir()}
    assert {path.name for path in folder.iterdir()} == names
    inspect_model(str(finished), "block_linear")


def test_killed_before_the_first_file_is_replaced_it_is_marked_and_undone(pair, tmp_path):
    base, _, patch = pair
    start = files.folder_hashes(base)
    killed("apply", patch, base, at=1)
    with pytest.raises(ValueError, match="neither the backbone nor the patched model"):
        Checkpoint(base)
    assert "after" not in verify(patch, base).values()
    revert(patch, base)
    assert files.folder_hashes(base) == start


INTERRUPTED = """
import sys
from safepatch_jax.patch_file.apply import apply
renamed = False
def hook(event, args):
    global renamed
    if event == "os.rename" and str(args[0]).endswith(".patching"):
        renamed = True
    elif renamed and event == "open" and str(args[0]) == sys.argv[2]:
        raise KeyboardInterrupt  # while the folder is brought to the disk
sys.addaudithook(hook)
apply(*sys.argv[1:3])
"""


def test_interrupted_right_after_a_file_is_replaced_it_stays_marked(pair):
    base, _, patch = pair
    start = files.folder_hashes(base)
    assert "KeyboardInterrupt" in python(INTERRUPTED, patch, base).stderr
    assert "after" in verify(patch, base).values()
    with pytest.raises(ValueError, match="neither the backbone nor the patched model"):
        Checkpoint(base)
    revert(patch, base)
    assert files.folder_hashes(base) == start


def test_the_launcher_says_so_in_one_line(pair):
    base, _, patch = pair
    killed("apply", patch, base)
    result = call("launch.inspect", f"--model={base}")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert f"Finish it: python -m launch.patch apply --patch={patch}" in result.stderr


def test_a_failure_before_anything_is_replaced_leaves_no_mark(pair, tmp_path):
    base, _, patch = pair
    taken = base / ".model-00002-of-00004.safetensors.patching"
    assert taken.with_name("model-00002-of-00004.safetensors").is_file()
    taken.write_text("a user's notes")
    start = files.folder_hashes(base)
    with pytest.raises(ValueError, match="is no half-written copy of .* nothing was patched"):
        apply(patch, base)
    assert files.folder_hashes(base) == start
    taken.unlink()
    taken.symlink_to("config.json")
    with pytest.raises(ValueError, match="is no half-written copy"):
        apply(patch, base)
    assert taken.is_symlink() and (base / "config.json").read_bytes()


@pytest.mark.parametrize("name", [".patching", unfinished.MARK])
def test_names_of_a_lock_and_a_mark_that_are_links_or_a_users_files(pair, tmp_path, name):
    base, _, patch = pair
    (tmp_path / "mine").write_text("precious")
    for make in (
        lambda path: path.symlink_to(tmp_path / "mine"),
        lambda path: path.write_text("precious"),
    ):
        make(base / name)
        with pytest.raises(ValueError, match=f"{name} is .*left as it is.* move it away"):
            apply(patch, base)
        assert (base / name).read_text() == (tmp_path / "mine").read_text() == "precious"
        (base / name).unlink()
    assert set(verify(patch, base).values()) == {"before", "same"}
    apply(patch, base)


def test_a_mark_in_unknown_words_still_keeps_readers_out(pair):
    base = pair[0]
    for text in ("", "{", "[]", '{"verb": ["apply"], "patch": 3}', '{"verb": "rm", "patch": "x"}'):
        (base / unfinished.MARK).write_text(text)
        with pytest.raises(ValueError, match="launch.patch apply --patch=FILE --model=") as raised:
            Checkpoint(base)
        assert len(str(raised.value)) < 600


def test_another_patch_is_refused_there(pair, tmp_path):
    base, _, patch = pair
    other = patched_copy(base, tmp_path / "other", seed=1)
    create(base, other, tmp_path / "other.patch")
    killed("apply", patch, base)
    with pytest.raises(ValueError, match="neither as in the backbone"):
        apply(tmp_path / "other.patch", base)
    assert unfinished.is_marked(base)
