"""What is recorded of a patch, against what lies there and what is given; a writer that waits."""

import json
import os
import pathlib
import shutil
import threading

import pytest

from safepatch_jax.patch_file.create import create
from safepatch_jax.registry.changes import add, remove
from safepatch_jax.registry.commands import apply, pull, show, verify
from safepatch_jax.registry.index import Entry, Index, load
from safepatch_jax.registry.store import INDEX, MANIFEST, PATCHES, Store
from safepatch_jax.runtime import files


def rewritten(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("field", ["after", "entries"])
def test_a_patch_that_does_something_else_than_is_recorded_is_refused(field, line, store, tmp_path):
    digest = store.read().find("d").hash

    def change(entry):
        manifest = entry["manifest"]
        if field == "after":
            manifest["after"] = "0" * 64
        else:
            manifest["patch"]["entries"] += 1

    rewritten(store.folder / INDEX, lambda content: change(content["patches"][digest]))
    rewritten(store.folder / PATCHES / digest / MANIFEST, change)
    for call in (
        lambda: verify(store),
        lambda: pull(store, "d", tmp_path / "out"),
        lambda: apply(store, "d", line / "c", tmp_path / "out"),
    ):
        with pytest.raises(ValueError, match="d@.* from and to other models than its manifest"):
            call()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry["manifest"].update(name="better"),
        lambda entry: entry["manifest"]["patch"].update(entries=1),
    ],
    ids=["name", "entries"],
)
def test_a_manifest_beside_the_patch_says_what_the_index_says(change, store, tmp_path):
    path = store.folder / PATCHES / store.read().find("b").hash / MANIFEST
    rewritten(path, change)
    for call in (lambda: verify(store), lambda: pull(store, "b", tmp_path / "out")):
        with pytest.raises(ValueError, match="patch.json says something else than index.json"):
            call()


def test_the_folder_of_a_patch_is_no_link(line, store, tmp_path):
    folder = store.folder / PATCHES / store.read().find("b").hash
    shutil.move(folder, tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    for call in (lambda: verify(store), lambda: add(store, str(line / "b.patch"), "b")):
        with pytest.raises(ValueError, match="is a link to .*elsewhere"):
            call()


def test_a_writer_waits_for_the_one_before_it(line, store):
    """Else it would write the index without what the other one adds."""
    again = Store(str(store.folder)), str(line / "a.patch"), "a"
    other = threading.Thread(target=add, args=again)

    def edit(index):
        other.start()
        other.join(0.5)
        assert other.is_alive()

    store.change(edit)
    other.join(60)
    assert not other.is_alive()


def test_an_index_that_could_not_be_read_again_is_not_written(store):
    before = (store.folder / INDEX).read_bytes()

    def edit(index):
        entry = index.find("d")
        wrong = Entry(entry.hash, entry.manifest | {"name": "../d"})
        return Index(index.entries | {entry.hash: wrong}, index.removed)

    with pytest.raises(ValueError, match="registry was not changed, .*name is '../d'"):
        store.change(edit)
    assert (store.folder / INDEX).read_bytes() == before


class Meanwhile(Store):
    """A registry whose next patch file is changed once it was hashed."""

    patch_file = None

    def fill(self, entry, fill):
        self.patch_file.write_bytes(self.patch_file.read_bytes()[:-1] + b"x")
        super().fill(entry, fill)


def test_a_patch_file_that_is_changed_meanwhile_is_not_added(line, tmp_path):
    store = Meanwhile(str(tmp_path / "registry"))
    store.patch_file = pathlib.Path(shutil.copy(line / "a.patch", tmp_path))
    with pytest.raises(ValueError, match="a.patch was changed meanwhile. Nothing was added"):
        add(store, str(store.patch_file), "a")
    assert not (store.folder / INDEX).exists() and not os.listdir(store.folder / PATCHES)


def test_a_parent_is_given_where_several_leave_the_model(line, tmp_path):
    create(line / "start", line / "b", tmp_path / "both.patch")
    store = Store(str(tmp_path / "registry"))
    for path in (line / "a.patch", line / "b.patch", tmp_path / "both.patch"):
        add(store, str(path), path.stem)
    with pytest.raises(ValueError, match="Several patches leave .*: b@.*, both@.* with --parent"):
        add(store, str(line / "c.patch"), "c")
    add(store, str(line / "c.patch"), "c", "both")
    index = store.read()
    assert [x.name for x in index.line(index.find("c").hash)] == ["both", "c"]
    with pytest.raises(ValueError, match="there already, as c@.*, with another parent"):
        add(store, str(line / "c.patch"), "c", "b")


def test_what_was_removed_is_no_parent(line, store):
    remove(store, "d")
    remove(store, "c")
    with pytest.raises(ValueError, match="d@.* was removed, and is no parent of others"):
        add(store, str(line / "d.patch"), "d", f"@{files.file_sha256(line / 'd.patch')}")


def test_cards_and_evaluations_that_are_not_added(line, store, tmp_path):
    card, large = tmp_path / "card.md", tmp_path / "large.json"
    card.write_text("a card")
    large.touch()
    os.truncate(large, 100_000_001)
    for problem, values in (
        ("there already, as b@.*, with files beside it: none; given now: ", {"card": str(card)}),
        ("has more than 100,000,000 bytes", {"evaluations": [str(large)]}),
        ("21 evaluations are given; at most 20", {"evaluations": [str(card)] * 21}),
    ):
        with pytest.raises(ValueError, match=problem):
            add(store, str(line / "b.patch"), "b", **values)


def test_what_is_written_anew_keeps_its_card_and_no_evaluation(line, tmp_path):
    """An evaluation was of a model that had the removed patch."""
    (tmp_path / "card.md").write_text("a card")
    store = Store(str(tmp_path / "registry"))
    given = str(tmp_path / "card.md")
    for name in "ab":
        add(store, str(line / f"{name}.patch"), name, card=given, evaluations=[given])
    remove(store, "a", line / "start")
    beside = store.beside(store.read().find("b"))
    assert sorted(beside) == ["card.md", MANIFEST] and beside["card.md"].read_text() == "a card"


def test_of_a_long_card_the_beginning_is_shown(line, tmp_path):
    (tmp_path / "card.md").write_text("a line\n" * 300)
    store = Store(str(tmp_path / "registry"))
    add(store, str(line / "a.patch"), "a", card=str(tmp_path / "card.md"))
    text = show(store, "a")
    assert text.count("  a line") == 200 and "  ..." in text


@pytest.fixture(scope="module")
def with_removed(line, tmp_path_factory):
    """The index of a registry from which b was removed, so that c and d were written anew."""
    store = Store(str(tmp_path_factory.mktemp("removed") / "registry"))
    for name in "abcd":
        add(store, str(line / f"{name}.patch"), name)
    remove(store, "b", line / "start")
    return (store.folder / INDEX).read_bytes()


def last(content):
    return list(content["patches"].values())[-1]["manifest"]


def removal_of(content, name):
    for digest, removal in content["removed"].items():
        if content["patches"][digest]["manifest"]["name"] == name:
            return removal


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: removal_of(c, "c").update(without="0" * 64), "was removed, and never there"),
        (lambda c: removal_of(c, "c").update(now="0" * 64), "has a successor that is not there"),
        (lambda c: last(c).update(after=last(c)["before"]), "goes onto the model that it leaves"),
        (lambda c: last(c).update(format=2), "its format is 2"),
        (lambda c: last(c)["patch"].update(tensors=9, entries=8), "changes 8 entries of 9 tensors"),
        (lambda c: last(c)["patch"].update(tensors=0), "entries of 0 tensors"),
        (lambda c: last(c)["patch"].update(entries=1 << 60), "entries of . tensors"),
        (lambda c: last(c)["rebased"].update(of="x"), "rebased.of is 'x'"),
        (lambda c: last(c)["rebased"].pop("overlap"), "rebased.overlap is missing"),
    ],
)
def test_what_cannot_be_is_refused(change, message, with_removed):
    content = json.loads(with_removed)
    change(content)
    assert len(load(with_removed, "index.json").entries) == 6
    with pytest.raises(ValueError, match=f"index.json is damaged: .*{message}"):
        load(json.dumps(content).encode(), "index.json")
