"""A registry in a folder: what is added, found, verified, applied and removed; hostile indices;
two writers."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from safepatch_jax.patch_file import apply as patch_apply
from safepatch_jax.patch_file.create import Change, create, write_patch
from safepatch_jax.registry.changes import add, remove
from safepatch_jax.registry.commands import apply, compare, listed, pull, show, verify
from safepatch_jax.registry.store import INDEX, MANIFEST, PATCH, PATCHES, Store
from safepatch_jax.runtime import files
from tests.patch_file.chains import DOWN, UP, arrays, assert_bits, changed, write_model
from tests.patch_file.models import ROOT
from tests.registry.lines import ENTRIES, without


def digest_of(line, name):
    return files.file_sha256(line / f"{name}.patch")


def test_what_was_added_is_listed_shown_and_verified(line, store, tmp_path):
    (tmp_path / "card.md").write_text("# What it is\nmade \x1b[2J for tests")
    (tmp_path / "gate.json").write_text('{"verdict": "pass"}')
    files.copy(line / "a.patch", tmp_path / "copy")
    other = Store(str(tmp_path / "other"))
    label = add(
        other,
        str(tmp_path / "copy"),
        "first",
        card=str(tmp_path / "card.md"),
        evaluations=[str(tmp_path / "gate.json")],
    )
    assert label == f"first@{digest_of(line, 'a')[:8]}"
    text = show(other, "first")
    assert "  # What it is" in text and '  {"verdict": "pass"}' in text
    assert any("changes 2 of" in x for x in text) and "signature: none" in text
    assert ", 1 evaluation" in listed(other)[0]
    assert "card.md, evaluation-1.json agree" in verify(other)[0]
    rows = listed(store)
    assert [row.partition("@")[0] for row in rows] == list("abcd")
    assert " on model " in rows[0] and f" on a@{digest_of(line, 'a')[:8]}" in rows[1]
    assert len(verify(store)) == 4


def test_adding_again_changes_nothing_and_records_do_not_change(line, store, tmp_path):
    before = (store.folder / INDEX).read_bytes()
    assert add(store, str(line / "b.patch"), "b").startswith("b@")
    with pytest.raises(ValueError, match="is there already, as b@.*, with another name"):
        add(store, str(line / "b.patch"), "other")
    (tmp_path / "x.exe").write_text("")
    for problem, values in (
        ("cannot be the name of a patch", {"name": "../b"}),
        ("an evaluation is a .json", {"name": "b", "evaluations": [str(tmp_path / "x.exe")]}),
        ("There is no file", {"name": "b", "card": str(tmp_path / "nothing.md")}),
        ("c@.* leaves the model .* and the patch goes onto", {"name": "b", "parent": "c"}),
    ):
        with pytest.raises(ValueError, match=problem):
            add(store, str(line / "b.patch"), **values)
    assert (store.folder / INDEX).read_bytes() == before


@pytest.mark.parametrize("name", [PATCH, MANIFEST])
def test_adding_again_puts_back_what_is_damaged_or_missing(name, line, store):
    path = store.folder / PATCHES / digest_of(line, "b") / name
    index = (store.folder / INDEX).read_bytes()
    for spoil in (lambda: path.write_bytes(b"{}"), path.unlink, lambda: shutil.rmtree(path.parent)):
        spoil()
        with pytest.raises(ValueError, match="b@"):
            verify(store)
        add(store, str(line / "b.patch"), "b")
        assert len(verify(store)) == 4
    assert (store.folder / INDEX).read_bytes() == index


def test_hashes_are_shortened_as_far_as_they_are_unique(line, store):
    index = store.read()
    digest = digest_of(line, "b")
    for reference in ("b", f"b@{digest[:4]}", f"@{digest[:9]}", f"b@{digest}"):
        assert index.find(reference).hash == digest
    for reference in ("b@12", "b@XYZW", "a/b", "@", "", "b@../x", "\x1b[2J"):
        with pytest.raises(ValueError, match="is no patch of a registry") as info:
            index.find(reference)
        assert str(info.value).isprintable()
    with pytest.raises(ValueError, match=r"no patch bb in the registry \(did you mean 'b'"):
        index.find("bb")
    other = digest[:20] + "0" * 44
    content = json.loads((store.folder / INDEX).read_text())
    content["patches"][other] = json.loads(json.dumps(content["patches"][digest]))
    content["patches"][other]["manifest"]["patch"]["sha256"] = other
    (store.folder / INDEX).write_text(json.dumps(content))
    index = store.read()
    for reference in ("b", f"b@{digest[:8]}"):
        with pytest.raises(ValueError, match=f"ambiguous: b@{digest[:21]} .*, b@{other[:21]} "):
            index.find(reference)
    assert len(show(store, "b")) == 2
    assert index.short(digest) == digest[:21] and index.find(f"@{digest[:21]}").hash == digest


def test_a_patch_is_pulled_whole(line, store, tmp_path):
    pull(store, "b", tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == [MANIFEST, PATCH]
    assert (tmp_path / "out" / PATCH).read_bytes() == (line / "b.patch").read_bytes()
    with pytest.raises(ValueError, match="exists and is not empty"):
        pull(store, "b", tmp_path / "out")


def test_a_model_is_brought_to_the_end_of_a_line_from_any_place_on_it(line, store, tmp_path):
    assert len(apply(store, "d", line / "start", tmp_path / "d")) == 4
    assert_bits(tmp_path / "d", without(line))
    assert len(apply(store, "d", line / "b", tmp_path / "from b")) == 2
    assert_bits(tmp_path / "from b", without(line))
    with pytest.raises(ValueError, match="lacks 2 patches of the line: a@.*, b@.* --out"):
        apply(store, "b", line / "start")
    with pytest.raises(ValueError, match="neither as in the backbone"):
        apply(store, "b", line / "d", tmp_path / "none")
    shutil.copytree(line / "a", tmp_path / "place")
    assert apply(store, "b", tmp_path / "place") == [f"applied b@{digest_of(line, 'b')[:8]}"]
    assert_bits(tmp_path / "place", without(line, "c", "d"))
    assert "already" in apply(store, "b", tmp_path / "place")[0]


@pytest.mark.parametrize("order", ["dcba", "badc"])
def test_a_line_is_one_in_whatever_order_its_patches_were_added(order, line, tmp_path):
    store = Store(str(tmp_path / "registry"))
    for name in order:
        add(store, str(line / f"{name}.patch"), name)
    assert any(f"c@{digest_of(line, 'c')[:8]}" in x for x in listed(store) if x[0] == "d")
    assert [x.name for x in store.read().after(digest_of(line, "a"))] == list("bcd")
    for parent in ("", "b"):
        add(store, str(line / "c.patch"), "c", parent)
    assert len(apply(store, "d", line / "a", tmp_path / "d")) == 3
    remove(store, "b", line / "start")
    apply(store, "d", line / "start", tmp_path / "out")
    assert_bits(tmp_path / "out", without(line, "b"))


def test_patches_that_go_round_in_a_circle_are_a_line_that_ends(line, tmp_path):
    """One leads back to where another one begins."""
    create(line / "b", line / "start", tmp_path / "back.patch")
    store = Store(str(tmp_path / "registry"))
    for name in ("a", "b"):
        add(store, str(line / f"{name}.patch"), name)
    add(store, str(tmp_path / "back.patch"), "back")
    index = store.read()
    assert [x.name for x in index.line(index.find("back").hash)] == ["a", "b", "back"]
    assert [x.name for x in index.after(digest_of(line, "a"))] == ["b", "back"]
    apply(store, "back", line / "a", tmp_path / "out")
    assert_bits(tmp_path / "out", arrays(line / "start"))
    assert "already" in apply(store, "back", line / "start", tmp_path / "again")[0]


def test_of_several_that_leave_a_model_none_is_guessed(line, tmp_path):
    store = Store(str(tmp_path / "registry"))
    create(line / "start", line / "b", tmp_path / "both.patch")
    for path in (line / "c.patch", line / "b.patch", tmp_path / "both.patch"):
        add(store, str(path), path.stem)
    index = store.read()
    assert [x.name for x in index.line(digest_of(line, "c"))] == ["c"]


@pytest.fixture
def buffered(line, tmp_path):
    """The models start and a, and one after b, with a buffer that exports leave out."""
    buffer = {"model.rotary_emb.inv_freq": np.ones(4, np.float32)}
    for name in ("start", "a", "b"):
        write_model(arrays(line / name) | buffer, line / name, tmp_path / "buffered" / name)
    return tmp_path / "buffered"


def test_a_model_with_a_buffer_that_exports_leave_out(line, buffered, tmp_path):
    """Its patches list the buffer as one that may be missing."""
    store, wanted = Store(str(tmp_path / "registry")), without(line, "c", "d")
    for name, before in (("a", "start"), ("b", "a"), ("c", "b")):
        create(buffered / before, line / name, tmp_path / f"{name}.patch")
        add(store, str(tmp_path / f"{name}.patch"), name)
    assert len(apply(store, "b", buffered / "start", tmp_path / "out")) == 2
    assert_bits(tmp_path / "out", arrays(buffered / "b"))
    assert "already" in apply(store, "b", buffered / "b", tmp_path / "again")[0]
    assert len(apply(store, "b", line / "start", tmp_path / "plain")) == 2
    assert_bits(tmp_path / "plain", wanted)
    remove(store, "b", buffered / "start")
    apply(store, "c", line / "start", tmp_path / "c")
    assert_bits(tmp_path / "c", without(line, "b", "d"))


def test_a_buffer_that_a_later_patch_does_not_know_is_named(line, buffered, tmp_path):
    store = Store(str(tmp_path / "registry"))
    create(buffered / "start", line / "a", tmp_path / "a.patch")
    add(store, str(tmp_path / "a.patch"), "a")
    add(store, str(line / "b.patch"), "b")
    with pytest.raises(ValueError, match=r"start has tensors that b@.* not list.*: model\.rotary"):
        apply(store, "b", buffered / "start", tmp_path / "out")
    with pytest.raises(ValueError, match="inv_freq is not in the patch"):
        apply(store, "b", buffered / "a", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="do not list the same tensors: model.rotary"):
        remove(store, "a", buffered / "start")


@pytest.mark.parametrize("name", [PATCH, MANIFEST])
def test_files_that_were_changed_or_are_missing_are_named(name, line, store, tmp_path):
    path = store.folder / PATCHES / digest_of(line, "b") / name
    data = path.read_bytes()
    path.write_bytes(data.replace(b"a", b"b", 1))
    for call in (
        lambda: verify(store),
        lambda: pull(store, "b", tmp_path / "out"),
        lambda: show(store, "b"),
    ):
        with pytest.raises(ValueError, match="b@|is damaged|is not the file"):
            call()
    path.unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        pull(store, "b", tmp_path / "out")
    if name == PATCH:
        path.symlink_to(line / "a.patch")
        with pytest.raises(ValueError, match="is not the file that was added"):
            apply(store, "b", line / "a", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_patch_in_the_middle_is_removed_exactly(line, store, tmp_path):
    with pytest.raises(ValueError, match="c@.*, d@.* were made on b@.* give --model"):
        remove(store, "b")
    with pytest.raises(ValueError, match="no model of the line of b@"):
        remove(store, "b", shutil.copytree(line / "start", tmp_path / "x") / "..")
    text = remove(store, "b", line / "c")
    index = store.read()
    assert [entry.name for entry in index.live.values()] == ["a", "c", "d"]
    assert "b@" in text[0] and " is now c@" in text[1] and " is now d@" in text[2]
    apply(store, "d", line / "start", tmp_path / "out")
    assert_bits(tmp_path / "out", without(line, "b"))
    assert index.live[index.find("d").hash].manifest["rebased"]["of"] == digest_of(line, "d")
    old = f"d@{digest_of(line, 'd')[:12]}"
    with pytest.raises(ValueError, match="d@.* was removed on .*: now d@.*, without b@"):
        apply(store, old, line / "start", tmp_path / "old")
    pull(store, old, tmp_path / "old")  # so that a model that has it can be reverted
    patch_apply.revert(tmp_path / "old" / PATCH, line / "d", tmp_path / "reverted")
    assert_bits(tmp_path / "reverted", without(line, "d"))
    with pytest.raises(ValueError, match="was removed on .* and is not added again"):
        add(store, str(line / "b.patch"), "b")
    assert len(verify(store)) == 6 and len(listed(store)) == 6
    assert "was removed on" in remove(store, f"@{digest_of(line, 'b')}")[0]


def test_a_model_that_has_removed_patches_is_told_the_way(line, store, tmp_path):
    remove(store, "b", line / "start")
    labels = [f"{name}@{digest_of(line, name)[:8]}" for name in "cb"]
    with pytest.raises(ValueError, match=f"Take off, in this order, {', '.join(labels)} "):
        apply(store, "d", line / "c", tmp_path / "out")
    model = line / "c"
    for label in labels:
        pull(store, label, tmp_path / label)
        patch_apply.revert(tmp_path / label / PATCH, model, tmp_path / f"without {label}")
        model = tmp_path / f"without {label}"
    assert len(apply(store, "d", model, tmp_path / "out")) == 2
    assert_bits(tmp_path / "out", without(line, "b"))


@pytest.mark.parametrize("model", ["start", "a", "d"])
def test_any_model_of_the_line_will_do(model, line, store, tmp_path):
    remove(store, "b", line / model)
    apply(store, "d", line / "start", tmp_path / "out")
    assert_bits(tmp_path / "out", without(line, "b"))


def test_branches_are_written_anew_too(line, store, tmp_path):
    shutil.copytree(line / "b", tmp_path / "other")
    model = write_model(
        changed(arrays(line / "b"), {DOWN: {50: 1.0}}), line / "b", tmp_path / "branch"
    )
    create(line / "b", model, tmp_path / "e.patch")
    add(store, str(tmp_path / "e.patch"), "e")
    remove(store, "b", line / "start")
    index = store.read()
    assert index.find("e").parent == index.find("a").hash == index.find("c").parent
    apply(store, "e", line / "start", tmp_path / "out")
    assert_bits(
        tmp_path / "out", changed(changed(arrays(line / "start"), ENTRIES["a"]), {DOWN: {50: 1.0}})
    )


def test_an_overlap_is_refused_or_kept_as_asked(line, store, tmp_path):
    before = (store.folder / INDEX).read_bytes()
    with pytest.raises(
        ValueError, match=f"a@.* cannot be removed exactly.* d@.* 1 .{UP} 1"
    ) as info:
        remove(store, "a", line / "start")
    assert "\n" not in str(info.value) and (store.folder / INDEX).read_bytes() == before
    remove(store, "a", line / "start", "later")
    wanted = without(line, "a")
    wanted[UP].reshape(-1)[2] = without(line)[UP].reshape(-1)[2]
    apply(store, "d", line / "start", tmp_path / "out")
    assert_bits(tmp_path / "out", wanted)


def test_the_end_of_a_line_is_removed_without_a_model(store):
    assert len(remove(store, "d")) == 1
    assert "d" not in [entry.name for entry in store.read().live.values()]
    with pytest.raises(ValueError, match="There is no patch d in the registry"):
        remove(store, "d")


HASH = "0" * 64


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.update(format=2), "is of format 2, and 1 is known here"),
        (lambda c: c.pop("patches"), "patches is missing"),
        (lambda c: c["patches"].update({"../../x": first(c)}), "is the hash of another patch"),
        (lambda c: first(c)["manifest"].update(name="../x"), "name is '../x'"),
        (lambda c: first(c)["manifest"].update(name="x\n"), "name is 'x"),
        (lambda c: first(c)["manifest"]["patch"].update(bytes=-1), "patch has -1 bytes"),
        (lambda c: first(c)["manifest"]["patch"].update(bytes=1 << 60), "patch has 115"),
        (lambda c: first(c)["manifest"]["patch"].update(bytes=True), "bytes is True, not int"),
        (lambda c: first(c)["manifest"]["patch"].update(entries=0), "it changes 0 entries"),
        (lambda c: files_of(c).update({"../card.md": FILE}), "a file has the name '../card.md'"),
        (lambda c: files_of(c).update({"evaluation-1.sh": FILE}), "has the name 'evaluation-1.sh'"),
        (lambda c: first(c)["manifest"].update(kind="x, signed by y"), "kind is 'x, signed"),
        (lambda c: files_of(c).update({"patch": FILE}), "a file has the name 'patch'"),
        (lambda c: hide_bytes(c), "patch has -1 bytes"),
        (lambda c: first(c)["manifest"].update(parent="x"), "parent is 'x'"),
        (lambda c: first(c)["manifest"].update(parent=HASH), "comes before its parent 0000"),
        (lambda c: circle(c), "comes before its parent"),
        (lambda c: last(c)["manifest"].update(before=HASH), "does not go onto what its parent"),
        (lambda c: last(c).update(signature={"key": "x"}), "signature.key is 'x'"),
        (lambda c: c["removed"].update({HASH: removal(HASH)}), "was removed, and never there"),
        (
            lambda c: c["removed"].update({key(c): removal(key(c))}),
            "goes onto .* which was removed",
        ),
    ],
)
def test_hostile_indices_are_refused(change, message, store):
    path = store.folder / INDEX
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as info:
        listed(store)
    assert str(info.value).isprintable() and len(str(info.value)) < 700


def test_fields_that_are_not_known_are_not_shown(line, store):
    path = store.folder / INDEX
    content = json.loads(path.read_text())
    entry = content["patches"][digest_of(line, "a")]
    entry["manifest"]["signature"] = entry["manifest"]["patch"]["more"] = "of the key forged"
    path.write_text(json.dumps(content))
    path = store.folder / PATCHES / digest_of(line, "a") / MANIFEST
    path.write_text(json.dumps(entry))
    text = show(store, "a")
    assert "kind: difference" in text and not any("forged" in x for x in text)
    assert [x for x in text if x.startswith("signature:")] == ["signature: none"]


FILE = {"sha256": HASH, "bytes": 1}


def first(content):
    return next(iter(content["patches"].values()))


def key(content):
    return next(iter(content["patches"]))


def last(content):
    return list(content["patches"].values())[-1]


def files_of(content):
    return first(content)["manifest"]["files"]


def hide_bytes(content):
    first(content)["manifest"]["patch"].update(bytes=-1)
    files_of(content).update({"patch": FILE})


def circle(content):
    one, two = list(content["patches"].values())[:2]
    one["manifest"].update(parent=two["manifest"]["patch"]["sha256"])


def removal(digest):
    return {"date": "2026-01-01T00:00:00+00:00", "now": "", "without": digest}


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"[" * 100_000, b'{"patches": 1}', b"\xff"])
def test_what_is_no_index_is_refused(content, store):
    (store.folder / INDEX).write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as the index|is damaged") as info:
        store.read()
    assert str(info.value).isprintable()


def test_nothing_is_added_that_makes_the_registry_unreadable(line, store, tmp_path, monkeypatch):
    buffer = "model.rotary_emb.inv_freq"
    tensors = {name: x.view(np.uint16) for name, x in arrays(line / "start").items()}
    changes = {}
    for name, x in tensors.items():
        changes[name] = Change("bfloat16", x.shape, [(x.reshape(-1), x.reshape(-1))])
    bits = np.zeros(4, np.uint32), np.ones(4, np.uint32)
    changes[buffer] = Change("float32", (4,), [bits], optional=True)
    write_patch(tmp_path / "buffer.patch", "difference", {}, changes)
    index = (store.folder / INDEX).read_bytes()
    with pytest.raises(ValueError, match=f"only tensors that exports leave out .{buffer}"):
        add(store, str(tmp_path / "buffer.patch"), "e")
    create(line / "start", line / "b", tmp_path / "e.patch")
    monkeypatch.setenv("SAFEPATCH_INDEX_BYTES", str(len(index) + 100))
    with pytest.raises(ValueError, match="was not changed, .* more than .* bytes"):
        add(store, str(tmp_path / "e.patch"), "e")
    assert (store.folder / INDEX).read_bytes() == index and len(verify(store)) == 4


def test_an_index_may_not_be_too_large(store, monkeypatch):
    monkeypatch.setenv("SAFEPATCH_INDEX_BYTES", "100")
    with pytest.raises(ValueError, match=r"more than 100 bytes \(SAFEPATCH_INDEX_BYTES"):
        store.read()


def test_no_registry_is_made_by_reading(tmp_path):
    with pytest.raises(ValueError, match="There is no registry at"):
        listed(Store(str(tmp_path / "nothing")))
    with pytest.raises(ValueError, match="There is no registry at"):
        remove(Store(str(tmp_path / "nothing")), "a")
    assert not (tmp_path / "nothing").exists()


ADDS = """
import sys
from safepatch_jax.registry import changes, store
for name in sys.argv[3:]:
    changes.add(store.Store(sys.argv[1]), f"{sys.argv[2]}/{name}.patch", name)
"""
KILLED = """
import os, signal, sys
from safepatch_jax.registry import changes, store
class Store(store.Store):
    def _written(self, content, version):
        if sys.argv[3] == "after":
            super()._written(content, version)
        os.kill(os.getpid(), signal.SIGKILL)
call = {"add": lambda x: changes.add(x, f"{sys.argv[2]}/a.patch", "a"),
        "remove": lambda x: changes.remove(x, "b", f"{sys.argv[2]}/start")}
call[sys.argv[4]](Store(sys.argv[1]))
"""


def started(code, *words):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, words)], cwd=ROOT, env=env)


def test_of_writers_at_once_none_loses_an_entry(line, tmp_path):
    place = tmp_path / "registry"
    for process in [started(ADDS, place, line, *names) for names in ("abcd", "dcba", "bd")]:
        assert process.wait(60) == 0
    names = [entry.name for entry in Store(str(place)).read().live.values()]
    assert sorted(names) == list("abcd") and len(verify(Store(str(place)))) == 4


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_killed_command_is_finished_by_the_same_one(when, line, store, tmp_path):
    place = tmp_path / "new"
    assert started(KILLED, place, line, when, "add").wait(60) == -signal.SIGKILL
    assert (place / INDEX).exists() == (when == "after")
    add(Store(str(place)), str(line / "a.patch"), "a")
    assert len(verify(Store(str(place)))) == 1
    assert started(KILLED, store.folder, line, when, "remove").wait(60) == -signal.SIGKILL
    assert len(store.read().removed) == (0 if when == "before" else 3)
    remove(store, f"@{digest_of(line, 'b')}", line / "start")
    assert len(store.read().removed) == 3 and len(store.read().live) == 3
    apply(store, "d", line / "start", tmp_path / "out")
    assert_bits(tmp_path / "out", without(line, "b"))


def test_patches_are_compared_by_reference_or_path(line, store):
    """Of a registry the patches between the two are known."""
    for folder in ("start", "b", "d"):
        text = compare(store, "a", "d", line / folder)
        assert "one comes after the other; 1 entries are changed by both" in text[0]
        assert text[1].split() == [UP, "1", "of", "2", "and", "2"]
        assert text[2].startswith("They do not commute") and "0 of 1 shared" in text[3]
    text = compare(None, str(line / "a.patch"), str(line / "d.patch"))
    assert "different backbones; 1 entries" in text[0]
    assert text[-1].startswith("Cosine and signs need")
    with pytest.raises(ValueError, match="no model from which the values before both"):
        compare(None, str(line / "a.patch"), str(line / "d.patch"), line / "start")
