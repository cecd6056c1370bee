"""A link taken out of the middle of a chain: the bits of the rest, what is refused, what a kill
leaves."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from safepatch_jax.patch_file.commands import history, replay, revert, show, verify
from safepatch_jax.patch_file.file import PatchFile
from safepatch_jax.patch_file.log import LINKS, PATCH, PatchLog, folder_hash
from safepatch_jax.patch_file.log_lines import LOG, entry_id
from safepatch_jax.patch_file.removal import is_begun, remove
from safepatch_jax.studies.continual.links import Link, seeds_of
from tests.patch_file.chains import DOWN, UP, add_link, arrays, assert_bits, begin, changed
from tests.patch_file.models import ROOT

# Entries of each link; b and c are disjoint, d changes entries of a.
LINKS_OF = {
    "a": {UP: {1: 0.5, 2: -0.25}},
    "b": {UP: {10: 1.0, 11: 2.0}, DOWN: {3: -1.0}},
    "c": {UP: {20: 0.125}, DOWN: {4: 0.5}},
    "d": {UP: {2: 0.75, 30: 1.0}},
}


@pytest.fixture
def log(tmp_path):
    log = begin(tmp_path)
    for name, entries in LINKS_OF.items():
        add_link(log, name, entries)
    return log


def without(log, *names):
    """What the chain would be without some links, by NumPy alone."""
    tensors = arrays(log.folder(0))
    for name, entries in LINKS_OF.items():
        if name not in names:
            tensors = changed(tensors, entries)
    return tensors


def test_a_disjoint_link_is_removed_exactly(log, tmp_path):
    before = {number: log.patch_path(number).read_bytes() for number in log.live}
    head = remove(log, 2)
    assert_bits(head, without(log, "b"))
    assert log.live == [1, 5, 6] and head == log.folder(6)
    assert log.label(5) == "05-c" and log.label(6) == "06-d"
    assert verify(log)[-1].startswith("06-d: patch of 2 entries and parent agree, model agrees")
    # The later links' own entries and flips are as they were, and nothing was deleted.
    for old, new in ((3, 5), (4, 6)):
        was, now = log.patch(old), log.patch(new)
        assert was.changed() == now.changed() and now.kind == "rebased"
        for name in was.changed():
            for (places, flips), (others, theirs) in zip(was.runs(name), now.runs(name)):
                np.testing.assert_array_equal(places, others)
                np.testing.assert_array_equal(flips, theirs)
        assert now.tensors[DOWN].before != was.tensors[DOWN].before
    assert before == {number: log.patch_path(number).read_bytes() for number in before}
    replay(log, 4, 6, head, tmp_path / "old")  # back over the removal
    assert_bits(tmp_path / "old", without(log))
    replay(log, 5, 0, log.folder(0), tmp_path / "new")
    start = arrays(log.folder(0))
    assert_bits(tmp_path / "new", changed(changed(start, LINKS_OF["a"]), LINKS_OF["c"]))


def test_the_log_tells_of_a_removal_and_the_chain_goes_on(log):
    remove(log, 2)
    log = PatchLog(log.workdir)
    lines = history(log)
    assert "removed 2; 3 is 5, 4 is 6; head is 6" in lines[0]
    assert [line.split()[0] for line in lines] == ["-", "4", "3", "2", "1", "0"]
    ends = [line.rpartition("  ")[2] for line in lines[1:4]]
    assert ends == ["(now 6)", "(now 5)", "(removed)"]
    assert "of: 3" in show(log, 5) and "name: c" in show(log, 5)
    assert [entry["name"] for entry in log.decided] == ["a", "c", "d"]
    add_link(log, "e", {UP: {40: 1.0}})
    assert log.live == [1, 5, 6, 7] and log.label(7) == "07-e"
    revert(log, 2)
    assert log.live == [1, 5] and [entry["name"] for entry in log.decided] == ["a", "c"]
    remove(log, 1)
    assert log.live == [8] and log.label(8) == "08-c"
    assert_bits(log.folder(8), changed(arrays(log.folder(0)), LINKS_OF["c"]))
    remove(log, 8)
    assert log.live == [] and log.head == 0
    assert PatchLog(log.workdir).entries == log.entries
    verify(log)


def test_new_links_have_seeds_that_none_before_them_has(log):
    links = [Link(name, "", name) for name in "acde"]
    assert seeds_of(None, 7, links) == {"a": 7, "c": 8, "d": 9, "e": 10}
    remove(log, 2)
    # Those of the chain were 1 to 4, and a new one would have got 4 by its place alone.
    assert seeds_of(log, 1, links) == {"a": 1, "c": 3, "d": 4, "e": 5}


def test_an_overlap_is_refused_with_its_entries_tensors_and_links(log):
    text = (log.workdir / LOG).read_text()
    with pytest.raises(ValueError, match="Link 01-a cannot be removed exactly") as info:
        remove(log, 1)
    said = str(info.value)
    assert f"later patches change 1 entries that it changed: 04-d 1 ({UP} 1)" in said
    assert "revert --last=4, then run with the remaining --links" in said and "\n" not in said
    assert (log.workdir / LOG).read_text() == text and log.live == [1, 2, 3, 4]
    assert len(list((log.workdir / LINKS).iterdir())) == 4


def test_an_overlap_that_keeps_the_later_value(log):
    wanted = without(log, "a")
    wanted[UP].reshape(-1)[2] = without(log)[UP].reshape(-1)[2]
    assert_bits(remove(log, 1, "later"), wanted)
    assert log.entries[-1]["entries"] == 1 and "1 overlapping entries by" in history(log)[0]
    verify(log)


def test_an_overlap_that_keeps_the_later_change(log):
    start, all_links = arrays(log.folder(0)), without(log)
    before_d = without(log, "d")
    step = np.float32(all_links[UP].reshape(-1)[2]) - np.float32(before_d[UP].reshape(-1)[2])
    wanted = without(log, "a")
    wanted[UP].reshape(-1)[2] = np.float32(start[UP].reshape(-1)[2]) + step
    assert_bits(remove(log, 1, "change"), wanted)
    assert wanted[UP].reshape(-1)[2] != all_links[UP].reshape(-1)[2]


def test_a_later_link_that_only_takes_the_removed_one_back_is_named(tmp_path):
    log = begin(tmp_path)
    value = float(arrays(log.folder(0))[UP].reshape(-1)[1])
    add_link(log, "a", {UP: {1: 4.0}})
    back = value - float(arrays(log.folder(1))[UP].reshape(-1)[1])
    add_link(log, "b", {UP: {1: back}})
    with pytest.raises(ValueError, match="02-b changes nothing without 01-a"):
        remove(log, 1, "later")
    assert log.live == [1, 2]


def test_numbers_that_cannot_be_removed(log):
    with pytest.raises(ValueError, match="Link 9 cannot .* 01-a, 02-b, 03-c, 04-d"):
        remove(log, 9)
    remove(log, 2)
    with pytest.raises(ValueError, match="Link 3 cannot be removed: it does not lead to the head"):
        remove(log, 3)


def test_a_changed_start_is_refused(log):
    path = log.folder(0) / "config.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(ValueError, match="config.json was changed"):
        remove(log, 2)
    assert log.live == [1, 2, 3, 4]


KILLED = """
import os, signal, sys
from safepatch_jax.patch_file import log as logs, removal
when = sys.argv[2]
class Log(logs.PatchLog):
    def append(self, kind, entry):
        if when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        super().append(kind, entry)
        os.kill(os.getpid(), signal.SIGKILL)
removal.remove(Log(sys.argv[1]), 2)
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_killed_removal_is_finished_by_the_same_command(when, log):
    command = [sys.executable, "-c", KILLED, str(log.workdir), when]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL
    again = PatchLog(log.workdir)
    assert again.live == ([1, 2, 3, 4] if when == "before" else [1, 5, 6])
    begun = log.workdir / LINKS / "05-c"
    assert PatchFile(begun / PATCH).entries() == 2 and is_begun(begun)
    assert_bits(remove(again, 2), without(log, "b"))
    assert again.live == [1, 5, 6] and folder_hash(again.folder(6)) == again.hash(6)
    assert [entry["entry"] for entry in again.entries].count("remove") == 1


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda e: e.update(link=7), "it removes 7, and the links are"),
        (lambda e: e["links"].pop(), r"does not write the links \[3, 4\]"),
        (lambda e: e["links"][1].update(of=3), r"does not write the links \[3, 4\]"),
        (lambda e: e["links"][0].update(number=9), "link 3 does not go on as 5 on 1"),
        (lambda e: e["links"][1]["parent"].update(link=4), "link 4 does not go on as 6 on 5"),
        (lambda e: e["links"][1]["parent"].update(model="0" * 64), "does not go on as 6 on 5"),
        (lambda e: e["links"][0].update(patch=3), "patch is no object"),
        (lambda e: e["links"].insert(0, "x"), "it is no object"),
        (lambda e: e["head"].update(link=1), "its head is not the model of 6"),
    ],
)
def test_removals_that_no_chain_has_are_refused_whoever_wrote_them(change, message, log):
    remove(log, 2)
    entries = json.loads(json.dumps(log.entries))
    change(entries[-1])
    entries[-1]["id"] = entry_id(entries[-1])
    (log.workdir / LOG).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    with pytest.raises(ValueError, match=f"log.jsonl is damaged: line 6: .*{message}"):
        PatchLog(log.workdir)
