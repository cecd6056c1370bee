"""Public data sets: small files in each one's published format, and every way in which a file can
be wrong."""

import csv
import dataclasses
import gzip
import hashlib
import io
import json
import lzma
import pathlib
import re
import sys
import tarfile
import types
import zipfile

import pytest

from safepatch_jax.data import sets, tfds_sets
from safepatch_jax.data.builders import FIELDS, fetch, load_set
from safepatch_jax.data.records import load_records
from safepatch_jax.data.sets import SETS, File, Split

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "data.md"


def table(*rows):
    """Return rows as CSV, quoted where needed."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def beavertails(**changes):
    row = {
        "prompt": "How do I mend a kite?",
        "response": "Use tape.",
        "is_safe": False,
        "category": {
            "animal_abuse": False,
            "drug_abuse,weapons,banned_substance": True,
            "privacy_violation": True,
        },
    }
    return row | changes


def mmlu(pack):
    """Return an archive of two subjects as Berkeley's: data/SPLIT/SUBJECT_SPLIT.csv without a
    header."""
    rows = {
        "data/README.txt": b"text",
        "data/auxiliary_train/arc_easy.csv": table(["other", "1", "2", "3", "4", "A"]),
    }
    for split in ("dev", "val", "test"):
        for subject in ("anatomy", "us_history"):
            question = table([f"{subject} {split}, first?", "1", "2", "3", "4", "B"])
            rows[f"data/{split}/{subject}_{split}.csv"] = question
    target = io.BytesIO()
    if pack == "zip":
        with zipfile.ZipFile(target, "w") as archive:
            for name, content in rows.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(fileobj=target, mode="w") as archive:
            for name, content in rows.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return target.getvalue()


XSTEST = table(
    ["id", "prompt", "type", "label", "focus", "note"],
    [1, "How can I stop a Python process?", "homonyms", "safe", "stop", "violence"],
    [2, "How can I stop a friend?", "contrast_homonyms", "unsafe", "stop", ""],
)
JAILBREAKBENCH = table(
    ["Index", "Goal", "Target", "Behavior", "Category", "Source"],
    [
        0,
        "Write a tutorial on knots",
        "Here is a tutorial on knots",
        "Knots",
        "Expert advice",
        "Original",
    ],
)
ONE = {"id": "0", "answer": "", "category": "", "type": "", "label": "", "extra": {}}
# Set, split: file in manual_dir, its content, and what differs from ONE in the only or last record.
PUBLISHED = {
    ("advbench", "train"): (
        "advbench_harmful_behaviors.csv",
        table(
            ["goal", "target"],
            ["Write a tutorial on knots", 'Sure, here is a tutorial, with "quotes"'],
        ),
        {
            "prompt": "Write a tutorial on knots",
            "answer": 'Sure, here is a tutorial, with "quotes"',
            "label": "unsafe",
        },
    ),
    ("beavertails", "30k_train"): (
        "beavertails_30k_train.jsonl.gz",
        gzip.compress(lines(beavertails()), mtime=0),
        {
            "prompt": "How do I mend a kite?",
            "answer": "Use tape.",
            "label": "unsafe",
            "category": "drug_abuse,weapons,banned_substance; privacy_violation",
        },
    ),
    ("beavertails", "330k_test"): (
        "beavertails/test.jsonl.xz",
        lzma.compress(lines(beavertails(is_safe=True, category={}))),
        {"prompt": "How do I mend a kite?", "answer": "Use tape.", "label": "safe"},
    ),
    ("harmbench", "val"): (
        "harmbench_behaviors_text_val.csv",
        table(
            [
                "Behavior",
                "FunctionalCategory",
                "SemanticCategory",
                "Tags",
                "ContextString",
                "BehaviorID",
            ],
            ["Describe a knot", "standard", "illegal", "", "", "knot"],
            [
                "Describe this knot",
                "contextual",
                "illegal",
                "context, hash_check",
                "A loop.\nAn end.",
                "this_knot",
            ],
        ),
        {
            "id": "this_knot",
            "prompt": "A loop.\nAn end.\n\n---\n\nDescribe this knot",
            "category": "illegal",
            "type": "contextual",
            "label": "unsafe",
            "extra": {"Tags": "context, hash_check"},
        },
    ),
    ("strongreject", "test"): (
        "strongreject_dataset.csv",
        table(
            ["category", "source", "forbidden_prompt"],
            ["Disinformation and deception", "custom", "Write a rumour"],
        ),
        {
            "prompt": "Write a rumour",
            "category": "Disinformation and deception",
            "type": "custom",
            "label": "unsafe",
        },
    ),
    ("jailbreakbench", "harmful"): (
        "jailbreakbench_harmful-behaviors.csv",
        JAILBREAKBENCH,
        {
            "prompt": "Write a tutorial on knots",
            "answer": "Here is a tutorial on knots",
            "category": "Expert advice",
            "type": "Knots",
            "label": "unsafe",
            "extra": {"Source": "Original"},
        },
    ),
    ("jailbreakbench", "benign"): (
        "jailbreakbench/benign-behaviors.csv",
        JAILBREAKBENCH,
        {
            "prompt": "Write a tutorial on knots",
            "answer": "Here is a tutorial on knots",
            "category": "Expert advice",
            "type": "Knots",
            "label": "safe",
            "extra": {"Source": "Original"},
        },
    ),
    ("do_not_answer", "test"): (
        "do_not_answer_en.csv",
        table(
            ["id", "risk_area", "types_of_harm", "specific_harms", "question"],
            [
                7,
                "Malicious Uses",
                "Assisting illegal activities",
                "Theft",
                "How do I borrow a book for ever?",
            ],
        ),
        {
            "id": "7",
            "prompt": "How do I borrow a book for ever?",
            "category": "Malicious Uses",
            "type": "Assisting illegal activities",
            "label": "unsafe",
            "extra": {"specific_harms": "Theft"},
        },
    ),
    ("xstest", "safe"): (
        "xstest_prompts.csv",
        XSTEST,
        {
            "id": "1",
            "prompt": "How can I stop a Python process?",
            "category": "homonyms",
            "label": "safe",
            "extra": {"focus": "stop", "note": "violence"},
        },
    ),
    ("xstest", "unsafe"): (
        "xstest_prompts.csv",
        XSTEST,
        {
            "id": "2",
            "prompt": "How can I stop a friend?",
            "category": "contrast_homonyms",
            "label": "unsafe",
            "extra": {"focus": "stop"},
        },
    ),
    ("oktest", "test"): (
        "OKTest.csv",
        table(["prompt"], ["What is a 'bomb'\ncyclone?\n"]),
        {"prompt": "What is a 'bomb'\ncyclone?", "label": "safe"},
    ),
    ("or_bench", "80k"): (
        "or-bench-80k.csv",
        table(["prompt", "category"], ["How do locks work?", "illegal"]),
        {"prompt": "How do locks work?", "category": "illegal", "label": "safe"},
    ),
    ("or_bench", "toxic"): (
        "or-bench-toxic.csv",
        table(["prompt", "category"], ["Write a rumour", "deception"]),
        {"prompt": "Write a rumour", "category": "deception", "label": "unsafe"},
    ),
    ("alpaca", "train"): (
        "alpaca_data.json",
        json.dumps(
            [
                {"instruction": "Add.", "input": "1 and 2", "output": "3"},
                {"instruction": "Greet.", "input": "", "output": "Hi \u00fc"},
            ]
        ).encode(),
        {"id": "1", "prompt": "Greet.", "answer": "Hi \u00fc", "label": "safe"},
    ),
    ("mmlu", "test"): (
        "mmlu.zip",
        mmlu("zip"),
        {
            "id": "3",
            "prompt": "us_history test, first?",
            "answer": "B",
            "category": "us_history",
            "extra": {"choices": ["1", "2", "3", "4"]},
        },
    ),
    ("mmlu", "dev"): (
        "mmlu/data.tar",
        mmlu("tar"),
        {
            "id": "1",
            "prompt": "us_history dev, first?",
            "answer": "B",
            "category": "us_history",
            "extra": {"choices": ["1", "2", "3", "4"]},
        },
    ),
    ("gsm8k", "test"): (
        "gsm8k_test.jsonl",
        lines({"question": "1 and 2?", "answer": "1 + 2 = <<1+2=3>>3\n#### 3"}),
        {"prompt": "1 and 2?", "answer": "1 + 2 = <<1+2=3>>3\n#### 3", "extra": {"final": "3"}},
    ),
    ("mt_bench", "test"): (
        "mt_bench_question.jsonl",
        lines(
            {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]},
            {
                "question_id": 82,
                "category": "math",
                "turns": ["Add 1 and 2.", "And 3."],
                "reference": ["3", "6"],
            },
        ),
        {
            "id": "82",
            "prompt": "Add 1 and 2.",
            "category": "math",
            "extra": {"turns": ["Add 1 and 2.", "And 3."], "reference": ["3", "6"]},
        },
    ),
}


def put(folder, name, content):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


def failure(tmp_path, name, split, manual="manual"):
    with pytest.raises(ValueError) as raised:
        load_set(name, split, str(tmp_path / manual) if manual else "", tmp_path / "data")
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("name, split", PUBLISHED)
def test_published_formats_prepared_and_without_tfds(tmp_path, monkeypatch, name, split):
    file, content, expected = PUBLISHED[name, split]
    put(tmp_path / "manual", file, content)
    records = load_set(name, split, str(tmp_path / "manual"), tmp_path / "data")
    assert records[-1] == ONE | expected and set(records[-1]) == set(FIELDS)
    assert "tensorflow" not in sys.modules
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "array_record", None)  # as if it were not installed
        unprepared = load_set(name, split, str(tmp_path / "manual"), tmp_path / "other")
    assert unprepared == records
    assert not list((tmp_path / "other").glob("*/safety_sets"))


def test_every_set_is_tested_and_described():
    assert {name for name, _ in PUBLISHED} == set(SETS) and len(SETS) == 13
    for name, entry in SETS.items():
        assert entry.name == name and entry.description and entry.citation and entry.licence
        assert entry.homepage.startswith("https://")
        for split in entry.splits.values():
            assert split.role in ("harmful", "lookalike", "ordinary", "utility") and split.rows > 0
            assert split.file.url.startswith("https://") and len(split.file.sha256) in (0, 64)


def test_prepared_once_in_file_order_and_anew_for_another_file(tmp_path, capsys):
    rows = [
        ["goal", "target"],
        *([f"Write a tutorial on knot number {i}", f"Sure {i}"] for i in range(300)),
    ]
    path = put(tmp_path / "manual", "harmful_behaviors.csv", table(*rows))
    first = load_set("advbench", "train", str(tmp_path / "manual"), tmp_path / "data")
    assert [r["answer"] for r in first] == [f"Sure {i}" for i in range(300)]
    out = capsys.readouterr().out
    assert (
        out.count("\n") == 1
        and "train 300 records; not byte for byte the published file. Licence: MIT." in out
    )
    assert load_set("advbench", "train", str(tmp_path / "manual"), tmp_path / "data") == first
    assert capsys.readouterr().out == ""
    path.write_bytes(table(*rows[:3]))
    assert load_set("advbench", "train", str(tmp_path / "manual"), tmp_path / "data") == first[:2]


def test_several_splits_and_the_folder_within_data_dir(tmp_path):
    put(tmp_path / "data" / "manual", "xstest_prompts.csv", XSTEST)
    records = load_set("xstest", "unsafe+safe", "", tmp_path / "data")
    assert [r["label"] for r in records] == ["unsafe", "safe"]


def test_killed_while_preparing(tmp_path, monkeypatch):
    put(tmp_path / "manual", "OKTest.csv", table(["prompt"], ["one"], ["two"]))

    def die(self, records):
        yield 0, records[0]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tfds_sets.SafetySets, "_generate_examples", die)
        load_set("oktest", "test", str(tmp_path / "manual"), tmp_path / "data")
    assert not list((tmp_path / "data").glob("*/safety_sets/oktest/1.0.1"))
    assert len(load_set("oktest", "test", str(tmp_path / "manual"), tmp_path / "data")) == 2


def downloadable(monkeypatch, tmp_path, sha256):
    """Declare a set whose file lies at a file:// address."""
    path = put(tmp_path / "server", "rows.csv", table(["prompt"], ["Tie a knot"]))
    file = File(
        path.as_uri(), sha256 or hashlib.sha256(path.read_bytes()).hexdigest(), ("tiny_rows.csv",)
    )
    entry = dataclasses.replace(SETS["oktest"], splits={"test": Split("lookalike", 1, file)})
    monkeypatch.setitem(SETS, "oktest", entry)
    return path


def test_download(tmp_path, monkeypatch, capsys):
    path = downloadable(monkeypatch, tmp_path, "")
    assert load_set("oktest", "test", "", tmp_path / "data")[0]["prompt"] == "Tie a knot"
    out = capsys.readouterr().out
    assert f"Downloading {path.as_uri()}" in out and "not byte for byte" not in out
    path.unlink()  # what was downloaded is kept
    assert load_set("oktest", "test", "", tmp_path / "data")[0]["prompt"] == "Tie a knot"


def test_wrong_checksum(tmp_path, monkeypatch):
    path = downloadable(monkeypatch, tmp_path, "0" * 64)
    message = failure(tmp_path, "oktest", "test", None)
    assert (
        f"{path.as_uri()} has SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()}, expected "
        f"{'0' * 64}" in message
    )
    assert "Nothing was kept" in message and "data.manual_dir" in message
    assert not any(p.is_file() for p in (tmp_path / "data" / "downloads").iterdir())
    with pytest.raises(ValueError, match="expected"):
        fetch(path.as_uri(), "0" * 64, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_download_that_fails(tmp_path, monkeypatch):
    path = downloadable(monkeypatch, tmp_path, "")
    path.unlink()
    message = failure(tmp_path, "oktest", "test", None)
    assert f"{path.as_uri()} cannot be downloaded" in message
    assert f"put it into {tmp_path / 'data' / 'manual'} as tiny_rows.csv" in message


def test_missing_manual_file(tmp_path):
    (tmp_path / "manual").mkdir()
    message = failure(tmp_path, "beavertails", "30k_train")
    assert (
        "set:beavertails needs a file that is not fetched automatically. Fetch "
        "https://huggingface.co/" in message
    )
    assert "round0/30k/train.jsonl.gz by hand" in message
    assert (
        f"put it into {tmp_path / 'manual'} as beavertails_30k_train.jsonl.gz" in message
        and "data.manual_dir" in message
    )
    assert "is not a folder" in failure(tmp_path, "beavertails", "30k_train", "nowhere")


def test_unknown_set_and_split(tmp_path):
    assert "No data set 'set:xtest' (did you mean 'set:xstest'?); there are advbench, " in failure(
        tmp_path, "xtest", "test", None
    )
    message = failure(tmp_path, "xstest", "train", None)
    assert "set:xstest has no split 'train'; its splits are safe, unsafe." in message


@pytest.mark.parametrize(
    "name, split, file, content, part",
    [
        (
            "advbench",
            "train",
            "harmful_behaviors.csv",
            table(["goal", "target"], ["Tie a knot", ""], ["Tie two", " "]),
            "every answer (column 'target') is empty. Fetch the file again: https://",
        ),
        (
            "advbench",
            "train",
            "harmful_behaviors.csv",
            table(["goal", "reply"], ["Tie a knot", "Sure"]),
            "is not the file of set:advbench: no column 'target'; found goal, reply. A table of "
            "your own is given by its path",
        ),
        (
            "beavertails",
            "30k_test",
            "beavertails_30k_test.jsonl.gz",
            gzip.compress(lines({"prompt": "a", "category": {}}), mtime=0),
            "no column 'is_safe'",
        ),
        (
            "mt_bench",
            "test",
            "mt_bench_question.jsonl",
            lines({"question_id": 1, "category": "x", "prompt": "a"}),
            "no column 'turns'",
        ),
        (
            "oktest",
            "test",
            "OKTest.csv",
            table(["prompt"], [" "]),
            "no row with a prompt; set:oktest was not prepared",
        ),
        ("oktest", "test", "OKTest.csv", b"", "no row with a prompt"),
        (
            "xstest",
            "safe",
            "xstest_prompts.csv",
            XSTEST.replace(b",unsafe,", b",both,"),
            "row 2 has 'both' as label; expected safe or unsafe",
        ),
        (
            "xstest",
            "unsafe",
            "xstest_prompts.csv",
            XSTEST.rpartition(b"2,")[0],
            "has no rows of set:xstest@unsafe. Fetch the whole file",
        ),
        ("mmlu", "test", "mmlu.zip", b"not an archive", "cannot be read as ZIP or TAR"),
        (
            "beavertails",
            "30k_test",
            "beavertails_30k_test.jsonl.gz",
            gzip.compress(lines(beavertails()), mtime=0)[:-9],
            "cannot be read as JSONL",
        ),
    ],
)
def test_files_that_are_not_the_sets(tmp_path, name, split, file, content, part):
    put(tmp_path / "manual", file, content)
    message = failure(tmp_path, name, split)
    assert file in message and part in message


def test_the_documented_set_is_one_row(tmp_path, monkeypatch):
    """The row of docs/data.md, put into sets.py, names a set that can be loaded."""
    text = DOCS.read_text().partition("## Adding a data set")[2]
    (row,) = re.findall(r"```python\n(.*?)```", text, re.S)
    end, module = "\n)\nSETS = ", types.ModuleType("safepatch_jax.data.sets")
    source = pathlib.Path(sets.__file__).read_text()
    assert source.count(end) == 1 and len(text.splitlines()) <= 20
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source.replace(end, f"\n{row}{end}"), "sets.py", "exec"), module.__dict__)
    assert module.SETS.keys() - SETS.keys() == {"kites"}
    monkeypatch.setitem(SETS, "kites", module.SETS["kites"])
    put(tmp_path / "manual", "kites.csv", table(["question", "topic"], ["Can a kite kill?", "a"]))
    manual, data = str(tmp_path / "manual"), tmp_path / "data"
    (record,) = load_records("lookalike", "set:kites", manual, data)
    assert record.prompt == "Can a kite kill?" and record.category == "a"
    with pytest.raises(ValueError, match="this set has no answers"):
        load_records("lookalike", "set:kites", manual, data, answers=True)
