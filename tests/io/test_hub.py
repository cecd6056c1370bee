"""Models of the Hugging Face Hub by name: which files come, from where, and what is said where none
can be had."""

import json

import pytest

from safepatch_jax.io import hub as names
from safepatch_jax.io import hub_access
from safepatch_jax.io.folder import Checkpoint
from safepatch_jax.models.config import read_hf_config
from tests.hub import commit_of, files_of, lay_out, use

NAME = "org/tiny"


@pytest.fixture
def contents(tiny):
    return files_of(tiny) | {
        "README.md": b"---\nlicense: mit\n---\n",
        "modeling_tiny.py": b"raise SystemExit",
        "consolidated.safetensors": b"the same again",
        "original/model.pth": b"pickle",
        "additional_chat_templates/rag.jinja": b"{{ messages }}",
    }


@pytest.mark.parametrize(
    "text, parts",
    [
        ("org/name", ("org/name", "")),
        ("org/na-me_1.5@v1.0", ("org/na-me_1.5", "v1.0")),
        ("org/name@refs/pr/1", ("org/name", "refs/pr/1")),
        ("name", None),
        ("/org/name", None),
        ("./org/name", None),
        ("../name", None),
        ("a/b/c", None),
        ("org/name@", None),
        ("org/name@../x", None),
        ("org/file.gguf", None),
        ("org/na--me", None),
    ],
)
def test_what_is_a_name(text, parts):
    assert names.split(text) == parts


def test_the_needed_files_come_and_nothing_else(hub, contents, tiny, capsys):
    commit = hub.put(NAME, contents)
    found = names.snapshot(NAME, check=read_hf_config)
    assert (found.commit, found.origin) == (commit, f"{NAME}@{commit}")
    there = files_of(found.folder)
    left = {"modeling_tiny.py", "consolidated.safetensors", "original/model.pth"}
    assert there.keys() == contents.keys() - left
    assert {file: contents[file] for file in there} == there
    said = capsys.readouterr().out
    assert f"Hub: {NAME} at main, commit {commit}: {len(there)} files" in said
    assert f"{sum(map(len, there.values())):,} bytes, fetched" in said
    assert Checkpoint(found.folder).tensors.keys() == Checkpoint(tiny).tensors.keys()
    assert names.origin_of(found.folder) == found.origin and names.origin_of(tiny) == ""


def test_a_commit_in_the_cache_needs_no_network(hub, contents, monkeypatch, tmp_path):
    commit = hub.put(NAME, contents)
    names.snapshot(NAME)
    names._obtained.cache_clear()
    hub.asked.clear()
    assert names.snapshot(NAME, commit).commit == commit
    assert names.pinned(f"hf:{NAME}@{commit}") == f"{NAME}@{commit}" and hub.asked == []
    # Offline a branch is what it was when it was fetched.
    use(monkeypatch, hub.cache, offline=True)
    assert names.pinned(NAME) == f"{NAME}@{commit}" and hub.asked == []


@pytest.mark.parametrize("file", ["chat_template.jinja", "generation_config.json"])
def test_a_commit_fetched_in_part_is_completed_or_said_to_be_one(
    hub, contents, file, monkeypatch, capsys
):
    commit = hub.put(NAME, contents)
    part = {name: content for name, content in contents.items() if name != file}
    folder = lay_out(hub.cache, NAME, part)
    folder = folder.rename(folder.with_name(commit))
    with monkeypatch.context() as patch:
        use(patch, hub.cache, offline=True)
        assert names.snapshot(NAME, commit).folder == folder and not (folder / file).exists()
        said = f"commit {commit}, which may lack {file} of the repository"
        assert said in capsys.readouterr().out
    names._obtained.cache_clear()
    assert names.snapshot(NAME, commit).folder == folder and (folder / file).is_file()


def test_what_a_repository_does_not_have_is_asked_for_once(hub, contents, capsys):
    contents.pop("generation_config.json")
    commit = hub.put(NAME, contents)
    lay_out(hub.cache, NAME, contents)
    names.snapshot(NAME, commit)
    assert hub.asked
    hub.asked.clear()
    names._obtained.cache_clear()
    assert names.snapshot(NAME, commit).commit == commit and hub.asked == []


def test_a_branch_that_moved_is_fetched_again_and_old_files_stay(hub, contents, capsys):
    first = names.snapshot(NAME) if hub.put(NAME, contents) else None
    moved = hub.put(NAME, contents | {"README.md": b"other"})
    names._obtained.cache_clear()
    second = names.snapshot(NAME)
    assert second.commit == moved != first.commit and first.folder.is_dir()
    assert f"bytes, {len(b'other')} of them fetched" in capsys.readouterr().out


def test_a_laid_out_cache_is_used_offline(contents, monkeypatch, tmp_path, capsys):
    folder = lay_out(tmp_path, NAME, contents)
    use(monkeypatch, tmp_path, offline=True)
    assert names.at_hand(NAME) and not names.at_hand("org/other")
    assert names.folder_of(NAME) == str(folder)
    assert f"as in the cache, commit {folder.name}" in capsys.readouterr().out
    assert {"kind": "model", "repository": NAME, "revision": "main", "commit": folder.name} in (
        hub_access.taken()
    )
    # Of a file that is not whole there is no model.
    (folder / "model.safetensors").unlink()
    names._obtained.cache_clear()
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE forbids .* hf download org/tiny"):
        names.folder_of(NAME)


def test_a_path_goes_first(hub, tiny, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "tiny").symlink_to(tiny)
    assert names.folder_of(NAME) == NAME and hub.asked == []


def test_shards_come_as_the_index_names_them(hub, contents):
    weights = contents.pop("model.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    contents["model-1.safetensors"] = contents["model-2.safetensors"] = weights
    contents["model.safetensors.index.json"] = json.dumps(index).encode()
    hub.put(NAME, contents)
    there = files_of(names.snapshot(NAME).folder)
    assert {"model-1.safetensors", "model-2.safetensors"} <= there.keys()
    light = names.snapshot(NAME, weights=False)
    assert light.folder.is_dir()


def test_torch_files_come_only_where_there_are_no_others(hub, contents):
    contents["pytorch_model.bin"] = b"pickle"
    hub.put(NAME, contents)
    assert "pytorch_model.bin" not in files_of(names.snapshot(NAME).folder)
    del contents["model.safetensors"]
    hub.put("org/old", contents)
    assert "pytorch_model.bin" in files_of(names.snapshot("org/old").folder)


@pytest.mark.parametrize("shard", ["../../evil.safetensors", "/tmp/evil", "sub/evil.safetensors"])
def test_names_that_leave_the_folder_are_refused(hub, contents, shard):
    del contents["model.safetensors"]
    index = {"weight_map": {"a": shard}}
    contents |= {"model.safetensors.index.json": json.dumps(index).encode(), shard: b"x"}
    hub.put(NAME, contents)
    with pytest.raises(ValueError, match="refusing the file name"):
        names.snapshot(NAME)
    assert not list(hub.cache.parent.rglob("*evil*"))


def test_an_unknown_architecture_is_refused_before_its_weights_are_fetched(hub, contents):
    config = json.loads(contents["config.json"]) | {"model_type": "mamba"}
    contents["config.json"] = json.dumps(config).encode()
    hub.put(NAME, contents)
    with pytest.raises(ValueError, match="mamba"):
        names.folder_of(NAME)
    assert not [asked for asked in hub.asked if "safetensors" in asked]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"gated": {NAME}}, "gated. Accept its licence at http://127.*hf auth login.*hf download"),
        ({"repositories": {}}, "no such file or folder here, and the Hugging Face Hub has no such"),
        ({"status": 503}, r"answers 503: .*hf download org/tiny\."),
    ],
)
def test_what_cannot_be_had_is_one_line(hub, contents, change, message):
    hub.put(NAME, contents)
    for name, value in change.items():
        setattr(hub, name, value)
    with pytest.raises(ValueError, match=message) as error:
        names.snapshot(NAME)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change", [{"gated": {NAME}}, {"repositories": {}}, {"status": 503}, {"address": "127.0.0.1:9"}]
)
def test_the_password_of_a_mirror_is_not_told(hub, contents, change, monkeypatch):
    hub.put(NAME, contents)
    place = change.get("address", hub.address.removeprefix("http://"))
    use(monkeypatch, hub.cache, f"http://me:sesame@{place}")
    for name, value in change.items():
        setattr(hub, name, value)
    with pytest.raises(ValueError, match=rf"http://\*\*\*@{place}") as error:
        names.snapshot(NAME)
    assert "sesame" not in str(error.value)


def test_a_revision_that_is_not_there(hub, contents):
    hub.put(NAME, contents)
    with pytest.raises(ValueError, match="has no revision 'v2'.*--revision=v2"):
        names.snapshot(NAME, "v2")


def test_no_network(monkeypatch, tmp_path):
    use(monkeypatch, tmp_path, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(ValueError, match=r"cannot be reached .* hf download org/tiny\."):
        names.snapshot(NAME)


@pytest.mark.parametrize(
    "contents, message",
    [
        ({"a.gguf": b""}, r"GGUF files \(a.gguf\)"),
        ({"adapter_config.json": b""}, "an adapter"),
        ({"model.ckpt": b""}, "no model of transformers"),
    ],
)
def test_repositories_of_other_things(hub, contents, message):
    hub.put(NAME, contents)
    with pytest.raises(ValueError, match=message):
        names.snapshot(NAME)


def test_a_hash_is_a_commit():
    assert names.is_commit(commit_of({})) and not names.is_commit("main")
