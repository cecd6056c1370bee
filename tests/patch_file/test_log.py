"""The patch log on hand-made links, without training: what it records, what it refuses, what
follows from patch files alone."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from safepatch_jax.patch_file import file, stack
from safepatch_jax.patch_file.commands import (
    compare,
    differences,
    history,
    replay,
    revert,
    show,
    verify,
)
from safepatch_jax.patch_file.create import create
from safepatch_jax.patch_file.file import PatchFile
from safepatch_jax.patch_file.growth import sizes
from safepatch_jax.patch_file.log import (
    EXPORT,
    LINKS,
    PATCH,
    PatchLog,
    folder_hash,
    label,
    patch_hash,
)
from safepatch_jax.patch_file.log_lines import LOG, entry_id
from safepatch_jax.patch_file.pruning import keep_models
from safepatch_jax.patch_file.stack import Stack
from safepatch_jax.runtime import locks
from safepatch_jax.testing import write_tiny_model
from tests.patch_file import hand_made

NAME = "model.layers.1.mlp.up_proj.weight"
SIZES = {  # of the chain of `log`
    "weights": 27040,
    "entries": [10, 10, 6],
    "cumulative": [10, 10, 16],
    "overlap": [[1, 5 / 15, 5 / 11], [5 / 15, 1, 5 / 11], [5 / 11, 5 / 11, 1]],
}


def changed_copy(model, out, entries):
    """A copy of a model folder in which some entries of one tensor have another lowest bit."""
    files_of = {p.name: p.read_bytes() for p in model.iterdir() if p.name != "model.safetensors"}
    tensors = load_file(model / "model.safetensors")
    tensors[NAME].reshape(-1).view(np.uint32)[list(entries)] ^= 1
    out.mkdir(parents=True)
    for name, data in files_of.items():
        (out / name).write_bytes(data)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def add_link(log, name, entries):
    """Log a model that differs from the head in some entries as the next link."""
    before = log.folder(log.head)
    folder = log.workdir / LINKS / label(hand_made.next_number(log), name)
    model = changed_copy(before, folder / EXPORT, entries)
    (folder / PATCH).parent.mkdir()
    hand_made.log_link(log, name, create(before, model, folder / PATCH, {}))


def rewrite(log, change):
    """Write a log in which something was changed by one who can make ids."""
    entries, last = json.loads(json.dumps(log.entries)), ""
    change(entries)
    for entry in entries:
        entry["previous"] = last
        last = entry["id"] = entry_id(entry)
    (log.workdir / LOG).write_text("".join(json.dumps(entry) + "\n" for entry in entries))


@pytest.fixture
def log(tmp_path):
    """Three links: 1 changes entries 0-9, 2 entries 5-14, 3 sets 5-9 back as they were before 2 and
    changes 20."""
    start = write_tiny_model(tmp_path / "start")
    log = hand_made.begin(tmp_path / "work", start)
    for name, entries in (("a", range(10)), ("b", range(5, 15)), ("c", [*range(5, 10), 20])):
        add_link(log, name, entries)
    return log


def test_counts_from_patch_files_alone(log, tmp_path):
    assert sizes(log, tmp_path / "notes") == SIZES
    assert compare(log, 1, 3)["total"] == {
        "differ": 6,
        "first": 10,
        "second": 16,
        "both": 10,
        "jaccard": 10 / 16,
    }
    assert compare(log, 0, 2) == {
        "tensors": {NAME: {"differ": 10, "first": 0, "second": 10, "both": 0, "size": 2048}},
        "total": {"differ": 10, "first": 0, "second": 10, "both": 0, "jaccard": 0},
    }
    assert (
        compare(log, 2, 2)["total"]["differ"] == 0 and compare(log, 0, 0)["total"]["jaccard"] == 0
    )
    assert differences(log, 1, 3)[0] == "01-a and 03-c differ in 6 entries of 1 tensors."


def test_long_tensors_are_gone_through_in_pieces(log, tmp_path, monkeypatch):
    for module in (file, stack):
        monkeypatch.setattr(module, "RUN", 4)
    assert sizes(log, tmp_path / "notes") == SIZES
    for number in log.live:
        shutil.rmtree(log.folder(number))
    assert folder_hash(log.model(3)) == log.hash(3)


def test_a_link_is_compared_with_those_before_it_once(log, tmp_path):
    notes = tmp_path / "notes"
    before = sizes(log, notes)
    add_link(log, "d", [20, 21])
    for number in (1, 2):
        log.patch_path(number).rename(tmp_path / str(number))
    with pytest.raises(ValueError, match=r"patch file of link 1 \(a\) is missing"):
        sizes(log, notes)  # the new link is compared with all
    for number in (1, 2):
        (tmp_path / str(number)).rename(log.patch_path(number))
    after = sizes(log, notes)
    assert after["overlap"][3] == [0, 0, 1 / 7, 1] and after["cumulative"] == [10, 10, 16, 16]
    assert [row[:3] for row in after["overlap"][:3]] == before["overlap"]
    for number in log.live:
        log.patch_path(number).unlink()
    assert sizes(log, notes) == after  # nothing was read again


def test_hash_of_a_model_is_that_of_its_patch_file(log):
    for number in log.live:
        patch = PatchFile(log.patch_path(number))
        assert patch_hash(patch, "after") == log.hash(number) and patch_hash(
            patch, "before"
        ) == log.hash(number - 1)


def held(log):
    """The numbers of the links whose models are there."""
    return [number for number in log.links if log.folder(number).exists()]


def test_a_model_that_could_not_be_built_again_is_kept(log, capsys):
    """A patch file on the way from the head is damaged, not its own."""
    revert(log, 2)
    log.patch_path(2).write_bytes(log.patch_path(2).read_bytes()[:-1])
    keep_models(log, 1)
    assert held(log) == [1, 2, 3]
    assert "03-c: its model is kept: The patch file of link 2 (b) was changed" in (
        capsys.readouterr().out
    )


def test_models_that_are_not_kept_are_built_again_with_the_same_bits(log, tmp_path, capsys):
    """From the nearest model that is there and whole, in one pass."""
    bits = {number: load_file(log.folder(number) / "model.safetensors") for number in log.links}
    keep_models(log, 0)
    assert held(log) == [1, 2, 3]
    keep_models(log, 1, among=[2, 3])
    assert held(log) == [1, 3]
    log.patch_path(1).rename(tmp_path / "aside")  # and now it cannot be made from the start
    folder = log.model(2)  # it lies between the two others
    assert "02-b: its model is missing or was changed; it is built again" in capsys.readouterr().out
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert tensor.tobytes() == bits[2][name].tobytes()
    keep_models(log, 1)
    assert "01-a: its model is kept: The patch file of link 1 (a) is missing" in (
        capsys.readouterr().out
    )
    (tmp_path / "aside").rename(log.patch_path(1))
    keep_models(log, 1)
    assert held(log) == [3]
    shutil.rmtree(log.folder(3))
    assert folder_hash(log.model(3)) == log.hash(3)  # three patches on from the start
    assert held(log) == [3]  # those between are not made
    assert revert(log, 2) == log.folder(1) and folder_hash(log.folder(1)) == log.hash(1)


def test_a_model_that_is_not_as_logged_is_not_deleted(log, tmp_path, capsys):
    path = log.folder(1) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    away = log.folder(2).rename(tmp_path / "away")
    log.folder(2).symlink_to(away)
    keep_models(log, 1)
    out = capsys.readouterr().out
    assert "01-a: its model is kept: it was changed since" in out
    assert "02-b: its model is kept: " in out and "is a link to" in out
    assert path.exists() and (away / "model.safetensors").exists()
    # What a killed deletion left is deleted, and what a killed command had half built.
    gone = 1 << 23  # of no process
    names = (".model.deleted", f".model.{locks.process_space()}-{gone}.x.partial")
    left = [log.folder(3).with_name(name) for name in names]
    for path in left:
        path.mkdir()
    keep_models(log, 1)
    assert not any(path.exists() for path in left) and held(log) == [1, 2, 3]


def test_patches_that_are_not_one_after_the_other_are_no_stack(log):
    one, two, three = (log.patch(number) for number in log.live)
    with pytest.raises(ValueError, match="does not go on from the model to which .* lead: " + NAME):
        Stack([(one, True), (three, True)])
    back = Stack([(two, True), (three, True), (three, False), (two, False)])
    assert not back.tensors[NAME].entries
    assert [len(positions) for positions, _ in back.runs(NAME)] == [0]


def test_reverts_are_lines_and_numbers_go_on(log):
    text = (log.workdir / LOG).read_text()
    assert revert(log, 2) == log.folder(
        1
    ) == log.workdir / "links" / "01-a" / EXPORT and log.live == [1]
    add_link(log, "d", [30])
    assert revert(log, 1) == log.folder(1)
    again = PatchLog(log.workdir)
    assert (log.workdir / LOG).read_text().startswith(text) and again.entries == log.entries
    assert again.live == [1] and list(again.links) == [1, 2, 3, 4] and again.path(4) == [1, 4]
    lines = history(again)
    assert [line.split()[0] for line in lines] == ["-", "4", "-", "3", "2", "1", "0"]
    assert (
        "reverted 3, 2; head is 1" in lines[2]
        and lines[3].endswith("(reverted)")
        and not lines[5].endswith("(reverted)")
    )
    assert (
        any(line.startswith(f"  {NAME}") for line in show(again, 4))
        and show(again, 0)[0] == "entry: start"
    )
    assert len(verify(again)) == 5


def test_extra_links_are_refused(log):
    with pytest.raises(
        ValueError,
        match=r"--last=4: the chain has 3 links that can be taken off \(01-a, 02-b, 03-c\)",
    ):
        revert(log, 4)
    with pytest.raises(ValueError, match="--last=0"):
        revert(log, 0)
    with pytest.raises(
        ValueError,
        match=r"no link 7. There are 0 \(the starting model\), 1 \(a\), 2 \(b\), 3 \(c\)",
    ):
        show(log, 7)


def test_no_log(tmp_path):
    with pytest.raises(
        ValueError, match="There is no patch log .*log.jsonl. Give the --workdir of a chain"
    ):
        PatchLog(tmp_path)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            lambda lines: [lines[0], lines[1].replace('"records": 3', '"records": 4'), *lines[2:]],
            "line 2 was changed",
        ),
        (
            lambda lines: [lines[0], *lines[2:]],
            "line 2 was changed, or one before it was taken out",
        ),
        (lambda lines: [*lines[:-1], lines[-1][:50]], "damaged: "),
        (lambda lines: lines[1:], "line 1 was changed"),
        (lambda lines: [], "it does not begin with a start"),
        (lambda lines: ["[]"], "damaged: "),
    ],
)
def test_a_log_that_was_edited_is_refused(spoil, message, log):
    path = log.workdir / LOG
    path.write_text("\n".join(spoil(path.read_text().splitlines())))
    with pytest.raises(ValueError, match=message):
        PatchLog(log.workdir)


def test_a_patch_file_that_was_changed_or_is_missing(log, tmp_path):
    path = log.workdir / "links" / "02-b" / PATCH
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refused = (
        lambda: replay(log, 3, 0, tmp_path / "start", tmp_path / "out"),
        lambda: revert(log, 2),
        lambda: verify(log),
        lambda: compare(log, 1, 3),
    )
    for call in refused:
        with pytest.raises(
            ValueError,
            match=r"patch file of link 2 \(b\) was changed: .*Copy it back from a backup",
        ):
            call()
    path.unlink()
    for call in refused:
        with pytest.raises(ValueError, match=r"patch file of link 2 \(b\) is missing"):
            call()
    assert log.live == [1, 2, 3] and not (tmp_path / "out").exists()
    replay(log, 1, 0, tmp_path / "start", tmp_path / "out")  # it is not needed here


def test_parent_hashes_that_do_not_agree(log):
    rewrite(
        log, lambda entries: entries[3]["parent"].update(model="0" * 64)
    )  # a log that was put together from two
    with pytest.raises(
        ValueError, match=r"Link 3 \(c\): its recorded parent has the hash 0000.* but the log has"
    ):
        verify(PatchLog(log.workdir))


def test_replay_refuses_other_models_and_full_folders(log, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"is not the model of 00-start: its hash is .* Give the folder of that model",
    ):
        replay(log, 3, 0, log.folder(1), tmp_path / "out")
    with pytest.raises(ValueError, match="exists and is not empty"):
        replay(log, 3, 1, log.folder(1), log.folder(2))
    with pytest.raises(ValueError, match="there is nothing to do"):
        replay(log, 1, 1, log.folder(1), tmp_path / "out")
    with pytest.raises(ValueError, match="No model folder"):
        replay(log, 1, 0, tmp_path / "nowhere", tmp_path / "out")
    assert replay(log, 1, 3, log.folder(3), tmp_path / "out") == ["reverted 03-c", "reverted 02-b"]


def test_replay_expands_the_home_folder(log, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    replay(log, 1, 0, "~/start", "~/out")
    assert folder_hash(tmp_path / "out") == log.hash(1)


def test_two_writers_do_not_overwrite_each_other(log):
    other = PatchLog(log.workdir)
    revert(log, 1)
    with pytest.raises(ValueError, match="was changed by another process meanwhile"):
        revert(other, 1)
    assert PatchLog(log.workdir).live == [1, 2]


def test_a_log_without_its_last_line_end_goes_on(log):
    path = log.workdir / LOG
    path.write_text(path.read_text()[:-1])
    revert(PatchLog(log.workdir), 1)
    assert PatchLog(log.workdir).live == [1, 2]


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda e: e[1]["parent"].update(link=1),
            r"line 2: it is link 1 on 1, and 1 on 0 comes next",
        ),  # its own parent
        (
            lambda e: e[2]["parent"].update(link=3),
            r"line 3: it is link 2 on 3, and 2 on 1 comes next",
        ),
        (lambda e: e[2].update(number=1), r"line 3: it is link 1 on 1"),
        (lambda e: e[1].update(number=True), r"line 2: number is True, not int"),
        (lambda e: e[1].pop("parent"), r"line 2: parent is missing"),
        (lambda e: e[1]["patch"].pop("sha256"), r"line 2: patch.sha256 is missing"),
        (lambda e: e[1].update(data=[], model=None), r"line 2: model is None; data is no object"),
        (lambda e: e[1].update(name="../precious"), r"line 2: name is '../precious'"),
        (lambda e: e[1].update(date="\x1b[2J"), r"line 2: date is '\\x1b"),
        (
            lambda e: e[0].update(folder="../start"),
            r"line 1: folder is '../start', neither absolute nor an address nor start-HASH",
        ),
        (lambda e: e[0].update(folder="/\x1b[2J"), r"line 1: folder is '/\\x1b"),
        (
            lambda e: e[1].update(entry="merge"),
            r"line 2: it is no start, link, refused, revert or remove",
        ),
        (lambda e: e.append({**e[0]}), r"line 6: it is no start"),
        (lambda e: e[3].update(entry=[]), r"line 4: it is no start"),
        (
            lambda e: e[4].update(links=[]),
            r"line 5: it takes off \[\], and the links are \[1, 2, 3\]",
        ),
        (lambda e: e[4].update(links=[2]), r"line 5: it takes off \[2\]"),
        (lambda e: e[4].update(links=[3, 2, 1, 0]), r"line 5: it takes off \[3, 2, 1, 0\]"),
        (lambda e: e[4]["head"].update(link=1), r"line 5: its head is not the model of 2"),
    ],
)
def test_lines_that_no_chain_has_are_refused_whoever_wrote_them(change, message, log):
    revert(log, 1)
    rewrite(log, change)
    with pytest.raises(ValueError, match=f"log.jsonl is damaged: {message}"):
        PatchLog(log.workdir)


@pytest.mark.parametrize("change", [lambda e: e[0].pop("format"), lambda e: e[0].update(format=2)])
def test_logs_of_other_formats_are_refused(change, log):
    rewrite(log, change)
    with pytest.raises(
        ValueError, match=r"is of format (None|2), and 1 is known here: another version .* made it"
    ):
        PatchLog(log.workdir)


@pytest.mark.parametrize("absolute", [False, True])
def test_a_log_from_elsewhere_replaces_no_folder(absolute, log, tmp_path):
    """Paths that it names are not taken; a link's folder that leads elsewhere is not replaced."""
    precious = tmp_path / "precious" / "01-a"
    (precious / EXPORT).mkdir(parents=True)
    (precious / EXPORT / "thesis.txt").write_text("mine")
    rewrite(
        log,
        lambda entries: [
            e.update(folder=str(precious) if absolute else "../precious/01-a") for e in entries[1:]
        ],
    )
    forged = PatchLog(log.workdir)
    assert forged.folder(1) == log.workdir / "links" / "01-a" / EXPORT
    shutil.rmtree(log.workdir / "links" / "02-b" / EXPORT)
    assert folder_hash(revert(forged, 1)) == log.hash(2)  # built again, where it belongs
    (log.workdir / "links" / "01-a" / EXPORT).rename(tmp_path / "moved")
    target = precious / EXPORT if absolute else pathlib.Path("../../../../../precious/01-a", EXPORT)
    (log.workdir / "links" / "01-a" / EXPORT).symlink_to(target)
    with pytest.raises(
        ValueError,
        match=r"01-a/stages/export/model is not replaced: it leads out of the chain's folder",
    ):
        revert(forged, 1)
    assert (precious / EXPORT / "thesis.txt").read_text() == "mine" and forged.live == [1, 2]


def content(folder):
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()}


def test_the_starting_model_is_never_written_to(log, tmp_path):
    before = content(tmp_path / "start")
    for number in log.live:
        shutil.rmtree(log.folder(number))
    revert(log, 1)  # builds links 1 and 2 again, from the start
    revert(log, 2)
    assert content(tmp_path / "start") == before
    # Nor where a log says that it lies where a link's model does.
    rewrite(log, lambda entries: entries[0].update(folder=str(log.folder(1))))
    forged = PatchLog(log.workdir)
    with pytest.raises(ValueError, match="is not replaced: .* or is the starting model"):
        forged._refuse_elsewhere(1)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("config.json", lambda p: p.write_text(p.read_text() + " "), "config.json was changed"),
        ("chat_template.jinja", lambda p: p.unlink(), "chat_template.jinja is gone"),
        ("added_tokens.json", lambda p: p.write_text("{}"), "added_tokens.json is new"),
    ],
)
def test_files_beside_the_weights_of_the_start_count(name, change, message, log, tmp_path):
    for about in ("README.md", "certificate.json", ".gitattributes", "more.safetensors"):
        (tmp_path / "start" / about).write_text("about it")
    log.model(0)
    change(tmp_path / "start" / name)
    for call in (lambda: log.model(0), lambda: revert(log, 3), lambda: verify(log)):
        with pytest.raises(
            ValueError, match=f"start is no longer as when the chain began: {message}"
        ):
            call()


def test_texts_of_a_log_do_not_reach_the_terminal_raw(log):
    def change(entries):
        entries[0].update(source="\x1b[2Jx", versions={"\x9b": "\u202e"})
        entries[1]["data"].update(harmful="a\nb", category="\x1b]0;é")

    rewrite(log, change)
    forged = PatchLog(log.workdir)
    lines = history(forged) + show(forged, 0) + show(forged, 1)
    assert all(line.isprintable() for line in lines)
    assert r"start: \x1b[2Jx" in lines[3] and r"a\nb [\x1b]0;é]" in lines[2]
