"""The patch log on hand-made links, without training: what it records, what it refuses, what follows from patch files alone."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from safepatch_jax import files
from safepatch_jax.patching.patch_file import PatchFile, create
from safepatch_jax.pipeline.continual_commands import compare, differences, history, replay, revert, show, sizes, verify
from safepatch_jax.pipeline.continual_log import LOG, PatchLog, entry_id, folder_hash, label, patch_hash
from safepatch_jax.testing import write_tiny_model

NAME = "model.layers.1.mlp.up_proj.weight"


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


def add_link(log, name, model, parent=None):
    """Log a model that was made elsewhere as the next link."""
    number, parent = max(log.links, default=0) + 1, log.head if parent is None else parent
    folder = log.workdir / "links" / label(number, name)
    patch = create(log.folder(parent), model, folder / "patch.safetensors", {})
    log.append("link", {
        "number": number, "name": name, "parent": {"link": parent, "model": log.hash(parent)}, "model": folder_hash(model),
        "folder": str(model), "data": {"harmful": "x.csv", "category": name, "hash": "0", "records": 3},
        "patch": {"file": str(patch.path.relative_to(log.workdir)), "sha256": files.file_sha256(patch.path),
                  "entries": patch.entries(), "bytes": patch.path.stat().st_size}})


@pytest.fixture
def log(tmp_path):
    """Three links: 1 changes entries 0-9, 2 entries 5-14, 3 sets 5-9 back as they were before 2 and changes 20."""
    start = write_tiny_model(tmp_path / "start")
    log = PatchLog.begin(tmp_path / "work", {"source": "x", "aligned": False, "folder": str(start), "model": folder_hash(start)})
    model = start
    for name, entries in (("a", range(10)), ("b", range(5, 15)), ("c", [*range(5, 10), 20])):
        model = changed_copy(model, tmp_path / name, entries)
        add_link(log, name, model)
    return log


def test_counts_from_patch_files_alone(log):
    assert sizes([log.patch(n) for n in log.live]) == {
        "weights": 27040, "entries": [10, 10, 6], "cumulative": [10, 10, 16],
        "overlap": [[1, 5 / 15, 5 / 11], [5 / 15, 1, 5 / 11], [5 / 11, 5 / 11, 1]]}
    assert sizes([])["entries"] == []
    assert compare(log, 1, 3)["total"] == {"differ": 6, "first": 10, "second": 16, "both": 10, "jaccard": 10 / 16}
    assert compare(log, 0, 2) == {
        "tensors": {NAME: {"differ": 10, "first": 0, "second": 10, "both": 0, "size": 2048}},
        "total": {"differ": 10, "first": 0, "second": 10, "both": 0, "jaccard": 0}}
    assert compare(log, 2, 2)["total"]["differ"] == 0 and compare(log, 0, 0)["total"]["jaccard"] == 0
    assert differences(log, 1, 3)[0] == "01-a and 03-c differ in 6 entries of 1 tensors."


def test_hash_of_a_model_is_that_of_its_patch_file(log):
    for number in log.live:
        patch = PatchFile(log.workdir / log.links[number]["patch"]["file"])
        assert patch_hash(patch, "after") == log.hash(number) and patch_hash(patch, "before") == log.hash(number - 1)


def test_reverts_are_lines_and_numbers_go_on(log, tmp_path):
    text = (log.workdir / LOG).read_text()
    assert revert(log, 2) == tmp_path / "a" and log.live == [1]
    add_link(log, "d", changed_copy(tmp_path / "a", tmp_path / "d", [30]))
    assert revert(log, 1) == tmp_path / "a"
    again = PatchLog(log.workdir)
    assert (log.workdir / LOG).read_text().startswith(text) and again.entries == log.entries
    assert again.live == [1] and list(again.links) == [1, 2, 3, 4] and again.path(4) == [1, 4]
    lines = history(again)
    assert [line.split()[0] for line in lines] == ["-", "4", "-", "3", "2", "1", "0"]
    assert "reverted 3, 2; head is 1" in lines[2] and lines[3].endswith("(reverted)") and not lines[5].endswith("(reverted)")
    assert any(line.startswith(f"  {NAME}") for line in show(again, 4)) and show(again, 0)[0] == "entry: start"
    assert len(verify(again)) == 5


def test_extra_links_are_refused(log):
    with pytest.raises(ValueError, match=r"--last=4: the chain has 3 links that can be taken off \(01-a, 02-b, 03-c\)"):
        revert(log, 4)
    with pytest.raises(ValueError, match="--last=0"):
        revert(log, 0)
    with pytest.raises(ValueError, match=r"no link 7. There are 0 \(the starting model\), 1 \(a\), 2 \(b\), 3 \(c\)"):
        show(log, 7)


def test_no_log(tmp_path):
    with pytest.raises(ValueError, match="There is no patch log .*log.jsonl. Give the --workdir of a chain"):
        PatchLog(tmp_path)


@pytest.mark.parametrize("spoil, message", [
    (lambda lines: [lines[0], lines[1].replace('"records": 3', '"records": 4'), *lines[2:]], "line 2 was changed"),
    (lambda lines: [lines[0], *lines[2:]], "line 2 was changed, or one before it was taken out"),
    (lambda lines: [*lines[:-1], lines[-1][:50]], "damaged: "), (lambda lines: lines[1:], "line 1 was changed"),
    (lambda lines: [], "it does not begin with a start"), (lambda lines: ["[]"], "damaged: "),
])
def test_a_log_that_was_edited_is_refused(spoil, message, log):
    path = log.workdir / LOG
    path.write_text("\n".join(spoil(path.read_text().splitlines())))
    with pytest.raises(ValueError, match=message):
        PatchLog(log.workdir)


def test_a_patch_file_that_was_changed_or_is_missing(log, tmp_path):
    path = log.workdir / "links" / "02-b" / "patch.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refused = (lambda: replay(log, 3, 0, tmp_path / "start", tmp_path / "out"), lambda: revert(log, 2), lambda: verify(log),
               lambda: compare(log, 1, 3))
    for call in refused:
        with pytest.raises(ValueError, match=r"patch file of link 2 \(b\) was changed: .*Copy it back from a backup"):
            call()
    path.unlink()
    for call in refused:
        with pytest.raises(ValueError, match=r"patch file of link 2 \(b\) is missing"):
            call()
    assert log.live == [1, 2, 3] and not (tmp_path / "out").exists()
    replay(log, 1, 0, tmp_path / "start", tmp_path / "out")  # it is not needed here


def test_parent_hashes_that_do_not_agree(log, tmp_path):
    add_link(log, "d", changed_copy(tmp_path / "c", tmp_path / "d", [1]))
    log.entries[-1]["parent"]["link"] = 2  # a log that was put together from two
    log.entries[-1]["id"] = entry_id(log.entries[-1])
    (log.workdir / LOG).write_text("".join(json.dumps(entry) + "\n" for entry in log.entries))
    with pytest.raises(ValueError, match=r"Link 4 \(d\): its parent has the hash .* but the log has"):
        verify(PatchLog(log.workdir))


def test_replay_refuses_other_models_and_full_folders(log, tmp_path):
    with pytest.raises(ValueError, match=r"is not the model of 00-start: its hash is .* Give the folder of that model"):
        replay(log, 3, 0, tmp_path / "a", tmp_path / "out")
    with pytest.raises(ValueError, match="exists and is not empty"):
        replay(log, 3, 1, tmp_path / "a", tmp_path / "b")
    with pytest.raises(ValueError, match="there is nothing to do"):
        replay(log, 1, 1, tmp_path / "a", tmp_path / "out")
    with pytest.raises(ValueError, match="holds no weights"):
        replay(log, 1, 0, tmp_path / "nowhere", tmp_path / "out")
    assert replay(log, 1, 3, tmp_path / "c", tmp_path / "out") == ["reverted 03-c", "reverted 02-b"]


def test_two_writers_do_not_overwrite_each_other(log):
    other = PatchLog(log.workdir)
    revert(log, 1)
    with pytest.raises(ValueError, match="was changed by another process meanwhile"):
        revert(other, 1)
    assert PatchLog(log.workdir).live == [1, 2]
