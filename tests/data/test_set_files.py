"""Files of public sets that were changed by hand: cells of another kind are named by row."""

import gzip
import json

import pytest

from safepatch_jax.data.builders import load_set
from safepatch_jax.data.records import load_records

BEAVER = {"prompt": "Mend a kite", "response": "Tape", "is_safe": False, "category": {"a": True}}
TURNS = {"question_id": 1, "category": "math", "turns": ["One?", "Two?"]}


def failure(tmp_path, name, split, file, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if file.endswith(".json"):
        text = json.dumps(rows)
    content = text.encode()
    (tmp_path / file).write_bytes(gzip.compress(content) if file.endswith(".gz") else content)
    with pytest.raises(ValueError) as raised:
        load_set(name, split, str(tmp_path), tmp_path / "data")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 1000
    assert not list((tmp_path / "data").glob("*/safety_sets/*/*"))  # nothing half-written
    return str(raised.value)


@pytest.mark.parametrize(
    "name, split, file, rows, part",
    [
        (
            "beavertails",
            "30k_test",
            "beavertails_30k_test.jsonl.gz",
            [BEAVER, BEAVER | {"category": 3.5, "is_safe": "no"}],
            "row 2 is not one of set:beavertails: 'is_safe' is 'no', where true or false is needed",
        ),
        (
            "beavertails",
            "30k_test",
            "beavertails_30k_test.jsonl.gz",
            [BEAVER | {"category": {"a": "yes"}}],
            "row 1 is not one of set:beavertails: it holds an object whose values are not true",
        ),
        (
            "beavertails",
            "30k_test",
            "beavertails_30k_test.jsonl.gz",
            [BEAVER, BEAVER | {"response": ["a", "b"]}],
            "row 2, column 'response': it holds a list, where a text is needed",
        ),
        (
            "mt_bench",
            "test",
            "mt_bench_question.jsonl",
            [TURNS, TURNS | {"turns": {"first": "One?"}}],
            "row 2 is not one of set:mt_bench: 'turns' is {'first': 'One?'}, where a list of texts",
        ),
        (
            "mt_bench",
            "test",
            "mt_bench_question.jsonl",
            [TURNS | {"turns": [["One?"]]}],
            "row 1, column 'prompt': it holds a list, where a text is needed",
        ),
        (
            "alpaca",
            "train",
            "alpaca_data.json",
            [{"instruction": "Add.", "input": ["1", "2"], "output": "3"}],
            "row 1 is not one of set:alpaca: it holds a list, where a text is needed",
        ),
        (
            "gsm8k",
            "test",
            "gsm8k_test.jsonl",
            [{"question": "One?", "answer": {"final": 1}}],
            "row 1 is not one of set:gsm8k: it holds an object, where a text is needed",
        ),
        (
            "gsm8k",
            "test",
            "gsm8k_test.jsonl",
            [{"question": "One?", "answer": "#### 1", "note": "\ud83d"}],
            "row 1 cannot be read as a record: it holds '\\ud83d', half of a character",
        ),
    ],
)
def test_cells_of_another_kind(tmp_path, name, split, file, rows, part):
    message = failure(tmp_path, name, split, file, rows)
    assert file in message and part in message


def test_a_folder_or_a_pipe_in_place_of_a_file(tmp_path):
    (tmp_path / "gsm8k_test.jsonl").mkdir()
    with pytest.raises(ValueError, match="gsm8k_test.jsonl is a folder, where a file is needed"):
        load_set("gsm8k", "test", str(tmp_path), tmp_path / "data")


@pytest.fixture
def prepared(tmp_path):
    """What loads a set that is prepared."""
    rows = [f"Tie knot number {i}" for i in range(200)]
    (tmp_path / "OKTest.csv").write_text("prompt\n" + "\n".join(rows) + "\n")

    def load():
        return load_records("lookalike", "set:oktest", str(tmp_path), tmp_path / "data")

    assert len(load()) == 200
    return load


@pytest.mark.parametrize("name", ["dataset_info.json", "*.array_record*", "checksums.json"])
def test_damaged_prepared_sets(prepared, tmp_path, name):
    load = prepared
    (path,) = (tmp_path / "data").rglob(name)
    content = path.read_bytes()
    for damaged in (
        content[: len(content) // 2],
        b"",
        b"\xff" + content,
        b"[" * 99_999,
        content[:-9] + b"damaged..",
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError) as raised:
            load()
        message = str(raised.value)
        assert str(path) in message and "\n" not in message and len(message) < 1000
        assert f"Delete {tmp_path / 'data'}" in message and "; it is made again" in message
    path.write_bytes(content)
    assert len(load()) == 200
