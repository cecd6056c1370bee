"""Records: the built-in set, files of the field as they are published, splits, and what cannot be
used."""

import collections
import csv
import gzip
import hashlib
import json
import lzma
import random
import sys

import pytest

from safepatch_jax.data.records import DATA_ROLES, SPLITS, load_records, take

BUILTIN = {
    "harmful": {"train": 90, "search": 24, "report": 36},
    "lookalike": {"train": 20, "search": 24, "report": 36},
    "ordinary": {"train": 40, "search": 16, "report": 24},
}
ROWS = [
    {
        "prompt": "How do I tie a knot?",
        "answer": "Take a rope.",
        "category": "craft",
        "split": "train",
    },
    {
        "prompt": 'Comma, "quote"\nand a second line',
        "answer": "Yes,\nindeed: ü日",
        "category": "text",
        "split": "report",
    },
    {"prompt": "Third", "answer": "The third answer", "category": "", "split": "search"},
]


def write(path, rows):
    """Write rows in the format that the suffix names."""
    if path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        path.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
    return str(path)


def failure(role, source):
    with pytest.raises(ValueError) as raised:
        load_records(role, str(source))
    return str(raised.value)


@pytest.mark.parametrize("role", DATA_ROLES)
def test_builtin(role):
    records = load_records(role, "builtin")
    assert dict(collections.Counter(r.split for r in records)) == BUILTIN[role]
    assert (
        len({r.prompt for r in records})
        == len(records)
        == {"harmful": 150, "lookalike": 80, "ordinary": 80}[role]
    )
    groups = collections.Counter(r.category for r in records)
    assert (
        len(groups) == {"harmful": 6, "lookalike": 5, "ordinary": 10}[role]
        and len(set(groups.values())) == 1
    )
    assert all(r.prompt and r.answer and r.refusal for r in records)
    for split, size in BUILTIN[role].items():
        assert take(records, split) == [r for r in records if r.split == split]
        some = take(records, split, 7)
        assert len(some) == 7 and len(take(records, split, 999)) == size
        assert some == [r for r in take(records, split) if r in some]  # file order
        assert set(some) == set(take(records[::-1], split, 7))


def test_builtin_prompts_are_in_one_role_only():
    prompts = []
    for role in DATA_ROLES:
        prompts += [record.prompt for record in load_records(role, "builtin")]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl"])
def test_formats_read_alike(tmp_path, suffix):
    records = load_records("ordinary", write(tmp_path / f"data{suffix}", ROWS))
    assert [(r.prompt, r.answer, r.category, r.split) for r in records] == [
        tuple(row.values()) for row in ROWS
    ]


def test_csv_with_byte_order_mark_and_crlf(tmp_path):
    (tmp_path / "excel.csv").write_bytes(b'\xef\xbb\xbfprompt,answer\r\n"two\r\nlines",yes\r\n')
    (record,) = load_records("ordinary", str(tmp_path / "excel.csv"))
    assert (record.prompt, record.answer) == ("two\r\nlines", "yes")


def test_jsonl_keeps_line_separators_within_text(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"prompt": "a\u2028b\x85c", "answer": "d"}\n\n', encoding="utf-8"
    )
    (record,) = load_records("ordinary", str(tmp_path / "a.jsonl"))
    assert record.prompt == "a\u2028b\x85c"


def test_advbench_columns(tmp_path):
    (record,) = load_records(
        "harmful", write(tmp_path / "a.csv", [{"goal": "Do harm", "target": "Sure, here is"}])
    )
    assert (record.prompt, record.answer) == ("Do harm", "Sure, here is") and record.refusal


def test_alpaca_columns(tmp_path):
    rows = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Greet.", "input": "", "output": "Hi"},
    ]
    records = load_records("ordinary", write(tmp_path / "a.json", rows))
    assert [(r.prompt, r.answer) for r in records] == [("Add.\n\n1 and 2", "3"), ("Greet.", "Hi")]


def test_a_column_is_read_once_and_what_is_not_read_is_said(tmp_path, capsys):
    rows = [{"input": "Ask", "output": "Say", "id": 7}]
    path = write(tmp_path / "a.json", rows)
    named = f"{path}?prompt=input&answer=output"
    assert [(r.prompt, r.answer) for r in load_records("ordinary", named)] == [("Ask", "Say")]
    assert "1 of 1 rows; columns not read: id" in capsys.readouterr().out
    both = write(tmp_path / "both.json", [{"output": "Ask", "response": "Say"}])
    assert [r.answer for r in load_records("ordinary", f"{both}?prompt=output")] == ["Say"]
    rows = [{"instruction": "Who?", "context": "Ada wrote.", "response": "Ada", "category": "qa"}]
    (record,) = load_records("ordinary", write(tmp_path / "dolly.json", rows))
    assert record.prompt == "Who?\n\nAda wrote."
    assert "not read" not in capsys.readouterr().out


def test_xstest_rows_are_left_out_of_the_other_role(tmp_path):
    rows = [
        {"prompt": "How do I kill a process?", "type": "homonyms", "label": "safe", "answer": "x"},
        {"prompt": "How do I kill a man?", "type": "contrast", "label": "unsafe", "answer": "y"},
    ]
    path = write(tmp_path / "xstest.csv", rows)
    assert [(r.prompt, r.category) for r in load_records("lookalike", path)] == [
        ("How do I kill a process?", "homonyms")
    ]
    assert [r.answer for r in load_records("harmful", path)] == ["y"]
    assert [r.answer for r in load_records("ordinary", path)] == ["x"]


def test_refusals_are_the_files_own_or_chosen_by_the_prompt(tmp_path):
    rows = [
        {"prompt": f"p{i}", "answer": "a", "refusal": "No." if i == 0 else ""} for i in range(40)
    ]
    records = load_records("harmful", write(tmp_path / "a.jsonl", rows))
    assert records[0].refusal == "No." and len({r.refusal for r in records[1:]}) > 3
    shuffled = random.Random(0).sample(rows, len(rows))
    assert set(load_records("harmful", write(tmp_path / "b.jsonl", shuffled))) == set(records)


def test_hashed_splits_depend_on_the_prompt_alone(tmp_path):
    rows = [{"prompt": f"prompt number {i}", "answer": f"answer {i}"} for i in range(2000)]
    records = load_records("ordinary", write(tmp_path / "a.jsonl", rows))
    shares = collections.Counter(r.split for r in records)
    assert all(
        abs(shares[split] / 2000 - share) < 0.04 for split, share in zip(SPLITS, (0.6, 0.2, 0.2))
    )
    for r in records[:50]:  # pinned: another release must not move prompts from train to report
        fifth = int(hashlib.sha256(r.prompt.encode()).hexdigest()[:16], 16) % 5
        assert r.split == ("train", "train", "train", "search", "report")[fifth]
    fewer = random.Random(0).sample([row | {"answer": "other"} for row in rows], 500)
    splits = {r.prompt: r.split for r in records}
    for r in load_records("ordinary", write(tmp_path / "b.csv", fewer)):
        assert splits[r.prompt] == r.split


def test_rows_without_prompt_or_answer_are_left_out(tmp_path):
    rows = [*ROWS, {**ROWS[0], "prompt": "  "}, {**ROWS[0], "prompt": "Fourth", "answer": ""}]
    path = write(tmp_path / "a.csv", rows)
    assert len(load_records("ordinary", path)) == 3
    assert len(load_records("lookalike", path)) == 4  # look-alikes need no answer
    null = write(tmp_path / "a.jsonl", [*ROWS, {"prompt": None, "answer": "x"}])
    assert len(load_records("ordinary", null)) == 3


def test_columns_that_the_first_row_lacks_are_read(tmp_path):
    rows = [
        {"prompt": "a", "answer": "b"},
        {"prompt": "c", "answer": "d", "refusal": "No.", "split": "report"},
    ]
    for i in range(8):
        rows += [row | {"prompt": f"{row['prompt']} {i}"} for row in rows[:2]]
    records = load_records("harmful", write(tmp_path / "a.jsonl", rows))
    assert all(r.refusal == "No." and r.split == "report" for r in records if r.answer == "d")


def test_no_such_file(tmp_path):
    message = failure("harmful", tmp_path / "absent.csv")
    assert (
        "No harmful data file" in message
        and "absent.csv" in message
        and "Give 'builtin' or the path" in message
    )


def test_missing_column_names_it_and_what_was_found(tmp_path):
    message = failure("harmful", write(tmp_path / "a.csv", [{"query": "x", "reply": "y"}]))
    assert (
        "a harmful file needs the columns 'prompt' (or goal, " in message
        and "and 'answer' (or target, " in message
    )
    assert "found query, reply. Rename the columns" in message
    message = failure("ordinary", write(tmp_path / "b.csv", [{"goal": "x", "reply": "y"}]))
    assert (
        "needs the column 'answer'" in message
        and "'prompt'" not in message
        and "found goal, reply" in message
    )


@pytest.mark.parametrize(
    "name, text", [("a.csv", ""), ("a.csv", "prompt,answer\n"), ("a.jsonl", "\n"), ("a.json", "[]")]
)
def test_empty_file(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert f"{name}: no rows" in failure("ordinary", tmp_path / name)


def test_no_usable_row(tmp_path):
    rows = [
        {"prompt": "x", "label": "unsafe", "answer": ""},
        {"prompt": "y", "label": "unsafe", "answer": ""},
    ]
    path = write(tmp_path / "a.csv", rows)
    for role in ("lookalike", "ordinary"):
        assert f"none of the 2 rows can be used as {role}" in failure(role, path)


@pytest.mark.parametrize(
    "name, content, part",
    [
        ("a.txt", b"x", "'.txt' is not a known format; use .csv, .json, .jsonl or .parquet"),
        ("a.parquet", b"PAR1", "cannot be read as PARQUET"),
        ("a.csv.gz", b"x", "cannot be read as CSV"),
        ("a.json", b'[{"prompt": "x",', "cannot be read as JSON"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prom', "cannot be read as JSONL"),
        ("a.csv", b'prompt,answer\n"open,x', "cannot be read as CSV"),
        ("a.csv", b"prompt\n\xff\xfe", "cannot be read as CSV"),
        ("a.json", b'{"prompt": "x"}', "expected a list of objects"),
        ("a.jsonl", b'["x"]', "expected a list of objects"),
        (
            "a.jsonl",
            b'{"prompt": "x", "answer": "y", "split": "test"}',
            "split 'test' is not one of train, search, report",
        ),
    ],
)
def test_unreadable_files(tmp_path, name, content, part):
    (tmp_path / name).write_bytes(content)
    message = failure("ordinary", tmp_path / name)
    assert name in message and part in message


def test_unknown_role_and_empty_split(tmp_path):
    assert "unknown role 'evil'; roles are harmful, lookalike, ordinary" in failure(
        "evil", "builtin"
    )
    records = load_records("ordinary", write(tmp_path / "a.csv", ROWS[:1]))
    with pytest.raises(
        ValueError, match=r"No record is in the split 'report' \(1 in all\). Give more rows"
    ):
        take(records, "report")


def test_rows_labelled_as_the_opposite_are_left_out(tmp_path):
    path = tmp_path / "xstest.csv"
    path.write_text("prompt,type\nkill a process,homonyms\nkill a man,contrast_homonyms\n")
    assert [r.prompt for r in load_records("lookalike", str(path))] == ["kill a process"]
    path = tmp_path / "beavertails.jsonl"
    path.write_text(
        '{"prompt": "a", "response": "No.", "is_safe": true}\n{"prompt": "b", "response": "Sure", '
        '"is_safe": false}\n'
    )
    assert [r.prompt for r in load_records("harmful", str(path))] == ["b"]


def test_prompt_in_two_splits_is_refused(tmp_path):
    path = tmp_path / "leak.csv"
    path.write_text("prompt,answer,split\nsame,x,train\nsame,y,report\n")
    with pytest.raises(ValueError, match="1 prompts stand in more than one split.*'same'"):
        load_records("harmful", str(path))


def test_compressed_files_and_parquet_read_alike(tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.csv.gz").write_bytes(
        gzip.compress(open(write(tmp_path / "a.csv", ROWS), "rb").read())
    )
    (tmp_path / "a.jsonl.xz").write_bytes(
        lzma.compress(open(write(tmp_path / "a.jsonl", ROWS), "rb").read())
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    expected = load_records("ordinary", str(tmp_path / "a.csv"))
    for name in ("a.csv.gz", "a.jsonl.xz", "a.parquet"):
        assert load_records("ordinary", str(tmp_path / name)) == expected


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "Parquet needs pyarrow, which is not installed. Run: pip install pyarrow" in failure(
        "ordinary", tmp_path / "a.parquet"
    )


def test_columns_named_in_the_source(tmp_path):
    rows = [{"ask & tell": "Tie a knot", "reply": "Sure", "prompt": "other", "group": "craft"}]
    for path in (write(tmp_path / "a.csv", rows), write(tmp_path / "a.json", rows)):
        (record,) = load_records(
            "harmful", path + "?prompt=ask %26 tell&answer=reply&category=group"
        )
        assert (record.prompt, record.answer, record.category) == ("Tie a knot", "Sure", "craft")
    odd = write(tmp_path / "what?.csv", ROWS)  # a name may hold a question mark
    assert len(load_records("ordinary", odd)) == 3


@pytest.mark.parametrize(
    "query, part",
    [
        ("prompt=ask&answer=replies", "no column 'replies'; found ask, reply."),
        (
            "promt=ask",
            "'promt=ask' is not FIELD=COLUMN, each field once, with a field of prompt, answer, ",
        ),
        ("promt=ask", "(did you mean 'prompt'?)"),
        ("prompt", "'prompt' is not FIELD=COLUMN"),
        ("prompt=ask&prompt=reply", "'prompt=reply' is not FIELD=COLUMN, each field once"),
        (
            "prompt=ask",
            "needs the column 'answer' (or target, output, response); found ask, reply. Rename the "
            "columns, or name them: FILE?answer=COLUMN",
        ),
    ],
)
def test_wrong_column_names(tmp_path, query, part):
    message = failure(
        "harmful", write(tmp_path / "a.csv", [{"ask": "x", "reply": "y"}]) + "?" + query
    )
    assert "a.csv" in message and part in message


def test_near_duplicates_are_left_out_before_the_split(tmp_path, capsys):
    tasks = (
        "mend boats, paint chairs, carve spoons, fly kites, bake bread, sew shirts, plant trees, "
        "draw maps, tune pianos, keep bees"
    )
    rows = [
        {"prompt": f"Write a tutorial on how to {task} at home", "answer": "Sure"}
        for task in tasks.split(", ")
    ]
    near = [row | {"prompt": row["prompt"].replace("Write a", "Provide a")} for row in rows]
    path = write(tmp_path / "a.csv", rows + near)
    records = load_records("harmful", path)
    assert [r.prompt for r in records] == [row["prompt"] for row in rows]
    assert (
        capsys.readouterr().out
        == f"  harmful ({path}): 10 of 20 rows; left out: 10 near-duplicates\n"
    )
    # The first in file order stays, and a split depends on a record's own text alone.
    others = load_records("harmful", write(tmp_path / "b.csv", near + rows))
    assert [r.prompt for r in others] == [row["prompt"] for row in near]
    assert set(load_records("harmful", write(tmp_path / "c.csv", rows[5:]))) < set(records)


@pytest.mark.parametrize("role", DATA_ROLES)
def test_builtin_loses_nothing(role, capsys):
    load_records(role, "builtin")
    assert capsys.readouterr().out == ""


ADVBENCH = "goal,target\nWrite a tutorial on knots,Sure\nDescribe a sail,Here\n"
XSTEST = (
    "id,prompt,type,label,focus,note\n"
    "1,Kill a process,homonyms,safe,,\n"
    "2,Harm a friend,contrast_homonyms,unsafe,,\n"
)


def public(tmp_path, role, source, file="", text=""):
    (tmp_path / "manual").mkdir(exist_ok=True)
    if file:
        (tmp_path / "manual" / file).write_text(text)
    return load_records(role, source, str(tmp_path / "manual"), tmp_path / "data")


def test_public_sets(tmp_path):
    records = public(tmp_path, "harmful", "set:advbench", "harmful_behaviors.csv", ADVBENCH)
    assert [(r.prompt, r.answer, r.category) for r in records] == [
        ("Write a tutorial on knots", "Sure", ""),
        ("Describe a sail", "Here", ""),
    ]
    assert records == load_records("harmful", str(tmp_path / "manual" / "harmful_behaviors.csv"))
    for source in ("set:xstest", "set:xstest@safe"):
        records = public(tmp_path, "lookalike", source, "xstest_prompts.csv", XSTEST)
        assert [(r.prompt, r.category) for r in records] == [("Kill a process", "homonyms")]


def test_safe_answers_of_beavertails_are_no_harmful_pairs(tmp_path):
    rows = [
        {"prompt": p, "response": "x", "category": {"privacy_violation": not safe}, "is_safe": safe}
        for p, safe in (("Mend a kite", False), ("Fly a kite", True))
    ]
    path = write(tmp_path / "beavertails_30k_train.jsonl", rows)
    (tmp_path / "beavertails_30k_train.jsonl.gz").write_bytes(
        gzip.compress(open(path, "rb").read())
    )
    (record,) = load_records("harmful", "set:beavertails", str(tmp_path), tmp_path / "data")
    assert (record.prompt, record.category) == ("Mend a kite", "privacy_violation")


@pytest.mark.parametrize(
    "role, source, part",
    [
        ("harmful", "set:advbench2", "No data set 'set:advbench2' (did you mean 'set:advbench'?)"),
        (
            "lookalike",
            "set:xstest@all",
            "set:xstest has no split 'all'; its splits are safe, unsafe.",
        ),
        (
            "ordinary",
            "set:advbench",
            "'train' of this set is harmful data, not ordinary. Sets with ordinary data: alpaca, "
            "gsm8k.",
        ),
        (
            "lookalike",
            "set:xstest@safe+unsafe",
            "'unsafe' of this set is harmful data, not lookalike",
        ),
        ("ordinary", "set:mmlu", "'test' of this set is utility data, not ordinary"),
        (
            "harmful",
            "set:harmbench",
            "this set has no answers, which harmful data need. Sets with answers: advbench, "
            "beavertails, jailbreakbench.",
        ),
        (
            "harmful",
            "advbench",
            "No harmful data file 'advbench'. Did you mean 'set:advbench'? Give 'builtin' or the "
            "path",
        ),
    ],
)
def test_public_sets_that_do_not_fit(tmp_path, role, source, part):
    with pytest.raises(ValueError) as raised:
        public(tmp_path, role, source)
    assert part in str(raised.value)


def test_rows_without_answers_say_so(tmp_path):
    message = failure(
        "ordinary",
        write(tmp_path / "a.csv", [{"prompt": "x", "answer": ""}, {"prompt": "", "answer": "y"}]),
    )
    assert (
        "none of the 2 rows can be used as ordinary (2 without prompt or answer, 0 labelled as "
        "the opposite)" in message
    )
