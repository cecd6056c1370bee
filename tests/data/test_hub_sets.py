"""Data sets of the Hugging Face Hub: which files are read for a configuration and a split."""

import json

import pytest

from safepatch_jax.data.records import load_records
from tests.hub import use

NAME = "org/pairs"


def rows(start, count=3):
    """Return a CSV of pairs that differ."""
    words = ("tea", "rope", "moss", "lamp", "road", "salt", "corn", "ice", "fern")
    lines = ["prompt,answer"]
    for word in words[start : start + count]:
        lines.append(f"how is {word} made at home in {word} season,like this: {word}")
    return "\n".join(lines).encode()


def prompts(source):
    return [record.prompt.split()[2] for record in load_records("harmful", source)]


def card(**front):
    return f"---\n{json.dumps(front)}\n---\n# A set\n".encode()


def test_splits_by_the_names_of_files(hub, capsys):
    commit = hub.put(
        NAME,
        {
            "data/train-00000-of-00002.csv": rows(0, 2),
            "data/train-00001-of-00002.csv": rows(2, 1),
            "data/test-00000-of-00001.csv": rows(3),
            "pairs.py": b"raise SystemExit",
            ".gitattributes": b"",
        },
        kind="datasets",
    )
    assert prompts(f"hf:{NAME}") == ["tea", "rope", "moss"]
    assert prompts(f"hf:{NAME}@test") == ["lamp", "road", "salt"]
    assert f"Hub: data set {NAME} at main, commit {commit}: 2 files" in capsys.readouterr().out
    assert not [asked for asked in hub.asked if asked.endswith(".py")]
    with pytest.raises(ValueError, match="no split 'dev'; there are test, train"):
        prompts(f"hf:{NAME}@dev")


def test_configurations_of_the_card(hub):
    configs = [
        {"config_name": "plain", "data_files": "a/*.csv", "default": True},
        {
            "config_name": "hard",
            "data_files": [
                {"split": "train", "path": ["b/**.csv"]},
                {"split": "test", "path": "c.csv"},
            ],
        },
    ]
    contents = {
        "README.md": card(configs=configs),
        "a/x.csv": rows(0),
        "b/deep/y.csv": rows(3),
        "c.csv": rows(6),
    }
    hub.put(NAME, contents, kind="datasets")
    assert prompts(f"hf:{NAME}")[0] == "tea"
    assert prompts(f"hf:{NAME}:hard@train")[0] == "lamp"
    assert prompts(f"hf:{NAME}:hard@test")[0] == "corn"
    with pytest.raises(ValueError, match="no configuration 'easy'; there are plain, hard"):
        prompts(f"hf:{NAME}:easy")


def test_cards_without_front_matter_and_classes_in_patterns(hub):
    readme = b"# A set\n\n| a | b |\n|---|---\nkey: [\n---\nmore: {\n"
    hub.put(NAME, {"README.md": readme, "train.csv": rows(0)}, kind="datasets")
    assert prompts(f"hf:{NAME}")[0] == "tea"
    globs = [
        {"split": "train", "path": "x_[ab].csv"},
        {"split": "test", "path": "x_[!ab].csv"},
        {"split": "odd", "path": ["x_[z-a].csv", "*[", "y[1"]},
    ]
    names = ("x_a.csv", "x_b.csv", "x_c.csv", "x_[z-a].csv")
    contents = {name: rows(2 * i, 2) for i, name in enumerate(names)}
    contents["README.md"] = card(configs=[{"data_files": globs}])
    hub.put("org/classes", contents, kind="datasets")
    assert prompts("hf:org/classes") == ["tea", "rope", "moss", "lamp"]
    assert prompts("hf:org/classes@test") == ["road", "salt"]
    assert prompts("hf:org/classes@odd") == ["corn", "ice"]


def test_columns_and_a_revision_may_be_named(hub):
    text = rows(0).replace(b"prompt,answer", b"ask,say")
    old = hub.put(NAME, {"train.csv": text}, kind="datasets")
    hub.put(NAME, {"train.csv": rows(3)}, kind="datasets")
    assert prompts(f"hf:{NAME}?revision={old}&prompt=ask&answer=say")[0] == "tea"
    assert prompts(f"hf:{NAME}@train")[0] == "lamp"


def test_the_conversion_of_the_hub_takes_the_place_of_a_script(hub, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    table = pyarrow.table({"prompt": ["how is tea made"], "answer": ["so"]})
    parquet.write_table(table, tmp_path / "x.parquet")
    hub.put(NAME, {"pairs.py": b"raise SystemExit"}, kind="datasets")
    with pytest.raises(ValueError, match="scripts of data sets are never run"):
        prompts(f"hf:{NAME}")
    content = (tmp_path / "x.parquet").read_bytes()
    converted = {"one/train/0000.parquet": content, "two/partial-train/0000.parquet": content}
    hub.put(NAME, converted, "refs/convert/parquet", kind="datasets")
    assert prompts(f"hf:{NAME}:one") == ["tea"]
    with pytest.raises(ValueError, match="several configurations.*one, two"):
        prompts(f"hf:{NAME}")
    with pytest.raises(ValueError, match="no split 'train'; there are partial-train|a part of"):
        prompts(f"hf:{NAME}:two")


def test_what_was_fetched_is_read_offline_and_gaps_are_refused(hub, monkeypatch):
    contents = {f"train-0000{i}-of-00002.csv": rows(3 * i) for i in range(2)}
    hub.put(NAME, contents, kind="datasets")
    online = prompts(f"hf:{NAME}")
    use(monkeypatch, hub.cache, offline=True)
    hub.asked.clear()
    assert prompts(f"hf:{NAME}") == online and hub.asked == []
    next(hub.cache.rglob("snapshots/*/train-00001*")).unlink()
    with pytest.raises(ValueError, match="1 of 2 parts"):
        prompts(f"hf:{NAME}")
    with pytest.raises(ValueError, match="hf download org/none --repo-type=dataset"):
        prompts("hf:org/none")


def test_other_formats_of_the_same_rows_are_left_aside(hub, capsys):
    line = json.dumps({"prompt": "how is tea made", "answer": "so"}).encode()
    contents = {"train-a.jsonl": line, "train-b.jsonl": b"", "train.csv": rows(3)}
    hub.put(NAME, contents, kind="datasets")
    assert prompts(f"hf:{NAME}") == ["tea"]
    assert "read as json; left aside: train.csv" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["hf:name", "hf:org/name@", "hf:org/name:", "hf:../x/y"])
def test_other_shapes_are_refused(text):
    with pytest.raises(ValueError, match="is not hf:org/name"):
        load_records("harmful", text)


def test_gated_and_absent_sets(hub):
    hub.put(NAME, {"train.csv": rows(0)}, kind="datasets")
    hub.gated.add(NAME)
    with pytest.raises(ValueError, match=f"licence at {hub.address}/datasets/{NAME}"):
        prompts(f"hf:{NAME}")
