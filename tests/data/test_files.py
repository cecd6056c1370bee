"""Files of data as people have them: dialects, encodings, bounds, and files that are broken in any
way, each of which is one line."""

import bz2
import gzip
import io
import json
import lzma
import os
import random
import resource
import subprocess
import sys
import tarfile
import time
import zipfile

import pyarrow
import pyarrow.parquet
import pytest

from safepatch_jax.data.layouts import mmlu_rows
from safepatch_jax.data.records import load_records
from safepatch_jax.data.tables import read_rows
from safepatch_jax.evaluation.suites import load_suite

ROWS = [
    {"prompt": "Tie a knot", "answer": "Take a rope"},
    {"prompt": "ü日", "answer": "Bake, then"},
]
CSV = 'prompt,answer\nTie a knot,Take a rope\nü日,"Bake, then"\n'
QUESTION = "First?,one,two,three,four,B\n"


def put(folder, name, content):
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder / name


def failure(read, *arguments):
    """Return the error of a reader, which is one line of bounded length."""
    with pytest.raises(ValueError) as raised:
        read(*arguments)
    message = str(raised.value)
    assert type(raised.value).__name__ in ("ValueError", "Refused", "UnicodeError"), message
    assert "\n" not in message and len(message) < 1000
    return message


@pytest.mark.parametrize(
    "name, content",
    [
        ("bom.csv", b"\xef\xbb\xbf" + CSV.encode()),
        ("utf16.csv", CSV.encode("utf-16")),
        ("utf32.csv", CSV.encode("utf-32")),
        ("crlf.csv", CSV.replace("\n", "\r\n")),
        ("old_mac.csv", CSV.replace("\n", "\r")),
        ("UPPER.CSV", CSV),
        ("blank.csv", "\n\n" + CSV.replace("\n", "\n\n") + "  \n"),
        ("trailing.csv", CSV.replace("\n", ",,\n")),
        ("more_commas.csv", CSV.replace("rope\n", "rope,, \n")),
        ("spaces.csv", 'prompt, answer\nTie a knot, Take a rope\nü日, "Bake, then"\n'),
        ("semicolon.csv", "prompt;answer\nTie a knot;Take a rope\nü日;Bake, then\n"),
        ("tab.csv", "prompt\tanswer\nTie a knot\tTake a rope\nü日\tBake, then\n"),
        ("index.csv", ',prompt,answer\n0,Tie a knot,Take a rope\n1,ü日,"Bake, then"\n'),
        ("bom.json", b"\xef\xbb\xbf" + json.dumps(ROWS).encode()),
        ("lines.json", "".join(json.dumps(row) + "\n" for row in ROWS)),
        ("indented.jsonl", "\n".join(json.dumps(row, indent=1) for row in ROWS)),
        ("list.jsonl", json.dumps(ROWS, indent=1)),
        ("bom.jsonl", b"\xef\xbb\xbf" + "\r\n".join(json.dumps(row) for row in ROWS).encode()),
        ("utf16.json", json.dumps(ROWS, ensure_ascii=False).encode("utf-16")),
        ("a.json.gz", gzip.compress(json.dumps(ROWS).encode(), mtime=0)),
        (
            "two_parts.csv.gz",
            gzip.compress(CSV[:20].encode(), mtime=0) + gzip.compress(CSV[20:].encode(), mtime=0),
        ),
    ],
)
def test_read_as_any_other(tmp_path, name, content):
    records = load_records("ordinary", str(put(tmp_path, name, content)))
    assert [(r.prompt, r.answer) for r in records] == [tuple(row.values()) for row in ROWS]


def test_another_separator_is_said(tmp_path, capsys):
    path = put(tmp_path, "a.csv", "prompt;answer\na;b\n")
    load_records("ordinary", str(path))
    assert capsys.readouterr().out == f"  {path}: cells are separated by ';'.\n"


@pytest.mark.parametrize(
    "name, content, parts",
    [
        (
            "a.csv",
            "prompt,answer\nx,y\nmend,First tape, then wait\n",
            ("line 3 has 3 cells, the header 2", "must stand in double quotes"),
        ),
        ("a.csv", "prompt,answer,split\nx,y,train\nz\n", ("line 3 has 1 cells, the header 3",)),
        ("a.csv", 'prompt,answer\n"a\nb",c\nd,e,f\n', ("the row at line 4 has 3 cells",)),
        ("a.csv", "prompt,answer,\nmend,First tape, then\n", ("line 2 has 3 cells",)),
        ("a.csv", "prompt,answer,answer \nx,y,z\n", ("names the column 'answer' more than once",)),
        (
            "a.csv",
            'prompt,answer\nx,y\nz,"open\n\n',
            ("the row at line 3: unexpected end of data",),
        ),
        ("a.csv", "prompt;answer\tsplit\n", ("whether semicolon or tab separates the columns",)),
        (
            "a.csv",
            "prompt,answer\nit’s,x\n".encode("cp1252"),
            ("not UTF-8 (byte 0x92)", "iconv -f"),
        ),
        ("a.csv", CSV.encode("utf-16-le"), ("zero bytes, as UTF-16", "iconv -f UTF-16LE -t UTF-8")),
        ("a.json", '{"data": [{"prompt": "x"}]}', ("expected a list of objects", "one object")),
        ("a.json", "[" * 100_000, ("cannot be read as JSON: it is nested too deeply",)),
        ("a.jsonl", '{"a":' * 100_000, ("cannot be read as JSONL: it is nested too deeply",)),
        ("a.json", '[{"prompt": ' + "9" * 5000 + "}]", ("line 1: Exceeds the limit",)),
        (
            "a.json",
            '[{"prompt": "x"},\n{"prompt" "y"}]',
            ("JSON: line 2: Expecting ':' delimiter",),
        ),
        ("a.json", '[{"prompt": "x"}\n{"prompt": "y"}]', ("line 2: expected ',' or ']'",)),
        ("a.json", '[{"prompt": "x"}]\n\n]', ("line 3: more text after the end of the list",)),
        ("a.jsonl", '{"prompt": "x"}\n\n{"prompt": "y"', ("cannot be read as JSONL: line 3",)),
        (
            "a.jsonl",
            '{"prompt": 1, "prompt": 2}',
            ("line 1: an object has the key 'prompt' twice",),
        ),
        ("a.jsonl", "[1]", ("expected a list of objects, one a record; value 1 is of type int",)),
        ("a.csv.gz", gzip.compress(CSV.encode(), mtime=0)[:-9], ("cannot be read as CSV",)),
        ("a.csv.xz", lzma.compress(CSV.encode())[:-9], ("cannot be read as CSV",)),
        ("a.csv.gz", gzip.compress(CSV.encode(), mtime=0) + b"junk", ("cannot be read as CSV",)),
        ("a.parquet.gz", b"", ("'.parquet.gz' is not a known format",)),
        ("a.parquet", b"PAR1" * 20, ("cannot be read as PARQUET",)),
        ("a.csv", b"version https://git-lfs.github.com/spec/v1\noid x\n", ("Git LFS pointer",)),
    ],
)
def test_broken_files(tmp_path, name, content, parts):
    message = failure(load_records, "ordinary", str(put(tmp_path, name, content)))
    for part in (name, *parts):
        assert part in message


def test_a_column_of_parquet_that_is_there_twice(tmp_path):
    table = pyarrow.table([["x"], ["y"]], names=["prompt", "prompt"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    message = failure(load_records, "ordinary", str(tmp_path / "a.parquet"))
    assert "a.parquet: the column 'prompt' is there more than once" in message


@pytest.mark.parametrize("read", [lambda path: load_records("ordinary", str(path)), read_rows])
def test_only_files_are_opened(tmp_path, read):
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "device.csv").symlink_to("/dev/zero")
    assert "pipe.csv is a pipe, where a file is needed" in failure(read, tmp_path / "pipe.csv")
    assert "folder.json is a folder" in failure(read, tmp_path / "folder.json")
    assert "device.csv is a device" in failure(read, tmp_path / "device.csv")
    assert "absent.csv'" in failure(read, tmp_path / "absent.csv")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path):
    path = put(tmp_path, "a.csv", CSV)
    path.chmod(0)
    assert "a.csv cannot be read as CSV: Permission denied" in failure(read_rows, path)


LONG = "x" * 300


@pytest.mark.parametrize(
    "name, content, where",
    [
        ("a.csv", f"prompt,answer\na,b\n{LONG},c\n", "the row at or before line 3"),
        ("a.csv", 'prompt,answer\na,"' + "b\n" * 200, "Is a quote not closed?"),
        ("a.csv", LONG, "line 1"),
        (
            "a.json",
            json.dumps([{"prompt": "a"}, {"prompt": LONG}], indent=0),
            "the value at line 5",
        ),
        ("a.jsonl", json.dumps({"prompt": "a"}) + "\n" + json.dumps({"prompt": LONG}), "at line 2"),
        ("a.json", '{"prompt": "' + LONG * 500, "the value at line 1"),
    ],
)
def test_rows_are_bounded(tmp_path, monkeypatch, name, content, where):
    monkeypatch.setenv("SAFEPATCH_ROW_CHARACTERS", "250")
    message = failure(read_rows, put(tmp_path, name, content))
    assert f"{name}: " in message and where in message
    assert "has more than 250 characters (SAFEPATCH_ROW_CHARACTERS=N allows more)" in message
    if LONG * 2 not in content:
        monkeypatch.setenv("SAFEPATCH_ROW_CHARACTERS", "1000")
        if "answer" not in content or "c\n" in content:
            read_rows(put(tmp_path, name, content))


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.csv", "prompt\na\nb\nc\n"),
        ("a.jsonl", "{}\n" * 3),
        ("a.json", "[{}, {}, {}]"),
    ],
)
def test_numbers_of_rows_are_bounded(tmp_path, monkeypatch, name, content):
    path = put(tmp_path, name, content)
    assert len(read_rows(path)) == 3
    monkeypatch.setenv("SAFEPATCH_DATA_ROWS", "2")
    assert f"{name} has more than 2 rows (SAFEPATCH_DATA_ROWS=N" in failure(read_rows, path)


def test_rows_of_parquet_are_bounded(tmp_path, monkeypatch):
    rows = [{"prompt": "a", "turns": [{"text": "b"}]}, {"prompt": "a", "turns": [{"text": LONG}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet") == rows
    monkeypatch.setenv("SAFEPATCH_ROW_CHARACTERS", "250")
    assert "row 2 has more than 250 characters" in failure(read_rows, tmp_path / "a.parquet")
    texts = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 5), pyarrow.array(["x" * 2000]))
    pyarrow.parquet.write_table(pyarrow.table({"prompt": texts}), tmp_path / "b.parquet")
    assert "a row has more than 250 characters" in failure(read_rows, tmp_path / "b.parquet")


def test_long_cells_are_read(tmp_path):
    text = "many shots " * 20_000
    path = put(tmp_path, "a.csv", CSV + f'"{text}",ok\n')
    assert read_rows(path)[2] == {"prompt": text, "answer": "ok"}


def test_bounds_that_are_no_number(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFEPATCH_ROW_CHARACTERS", "many")
    message = failure(read_rows, put(tmp_path, "a.csv", CSV))
    assert "SAFEPATCH_ROW_CHARACTERS='many' must be a whole number above 0: characters" in message


BOMB = """
import pathlib, resource, sys
from safepatch_jax.data.layouts import mmlu_rows
from safepatch_jax.data.tables import read_rows
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in map(pathlib.Path, sys.argv[1:]):
    try:
        (read_rows if path.suffix in (".gz", ".xz", ".parquet") else mmlu_rows)(path)
    except ValueError as error:
        print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, file=sys.stderr)
"""


def test_bombs_end_while_they_are_read(tmp_path):
    zeros, spaces = bytes(8_000_000), b" " * 999 + b"\n"
    spaces *= 8000
    paths = []
    for name, pack in (("a.csv.gz", gzip.compress), ("a.jsonl.xz", lzma.compress)):
        paths.append(put(tmp_path, name, pack(b"[" + spaces)))
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data/test/a_test.csv", zeros)
    header = tarfile.TarInfo("data/test/a_test.csv")
    header.size = 1 << 40
    for name, pack in (("a.tar", bytes), ("b.tgz", gzip.compress), ("c.tbz", bz2.compress)):
        paths.append(put(tmp_path, name, pack(header.tobuf() + zeros)))
    header = tarfile.TarInfo("pax")
    header.size, header.type = 7_000_000, tarfile.XHDTYPE
    paths += [
        put(tmp_path, "d.tgz", gzip.compress(header.tobuf() + zeros, mtime=0)),
        tmp_path / "a.zip",
    ]
    environment = os.environ | {"SAFEPATCH_DATA_BYTES": "5000000"}
    result = subprocess.run(
        [sys.executable, "-c", BOMB, *map(str, paths)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=100,
    )
    lines = result.stdout.splitlines()
    assert len(lines) == len(paths) and result.returncode == 0, result
    for path, line in zip(paths, lines):
        assert path.name in line and "more than 5,000,000 bytes, unpacked" in line, line
    assert int(result.stderr) < 50_000  # KiB


def archive(kind, members):
    target = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(target, "w") as packed:
            for name, content in members:
                packed.writestr(name, content)
        return target.getvalue()
    with tarfile.open(fileobj=target, mode=f"w:{kind}") as packed:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content.encode())
            packed.addfile(info, io.BytesIO(content.encode()))
    return target.getvalue()


MEMBERS = [(f"data/test/{name}_test.csv", QUESTION * 3) for name in ("b", "a")]


@pytest.mark.parametrize("kind", ["zip", "", "gz", "xz", "bz2"])
def test_archives_are_read_by_name(tmp_path, kind):
    rows = mmlu_rows(put(tmp_path, "mmlu.any", archive(kind, [*MEMBERS, ("x.txt", "")])))
    assert [row["subject"] for row in rows] == ["a"] * 3 + ["b"] * 3
    assert rows[0] == {
        "question": "First?",
        "choices": ["one", "two", "three", "four"],
        "answer": "B",
        "split": "test",
        "subject": "a",
    }


@pytest.mark.parametrize("kind", ["zip", "gz"])
def test_archives_have_bounds(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("SAFEPATCH_ARCHIVE_MEMBERS", "10")
    path = put(tmp_path, "a.any", archive(kind, [(f"n{i}", "") for i in range(11)]))
    assert "a.any has more than 10 members (SAFEPATCH_ARCHIVE_MEMBERS=N" in failure(mmlu_rows, path)


def test_archives_with_a_password(tmp_path):
    content = bytearray(archive("zip", MEMBERS[:1]))
    for place in (6, content.index(b"PK\1\2") + 8):
        content[place] |= 1
    message = failure(mmlu_rows, put(tmp_path, "a.zip", bytes(content)))
    assert "a.zip cannot be read as ZIP or TAR: " in message and "password" in message


@pytest.mark.parametrize(
    "content, part",
    [
        ("First?,one,two,E\n", "has 4 cells and ends with 'E'; expected question, choices, answer"),
        ("First?,one,B\n", "the row at line 1 has 3 cells"),
        (QUESTION + 'First?,"one\n', "the row at line 2: unexpected end of data"),
        (
            "First?,one,two,\0,\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
            "ends with",
        ),
    ],
)
def test_members_that_hold_no_questions(tmp_path, content, part):
    path = put(tmp_path, "a.zip", archive("zip", [("data/dev/a_dev.csv", content)]))
    assert part in failure(mmlu_rows, path)


def parquet(rows):
    target = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), target)
    return target.getvalue()


TALK = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
LINES = "".join(json.dumps(row) + "\n" for row in [TALK, *ROWS, {"prompt": "x", "answer": 1.5}])
MEASURE = {"name": "a", "kind": "harm", "source": "builtin", "limit": 3, "form": "plain"}
SEEDS = {
    "a.csv": CSV.encode(),
    "b.csv": 'prompt;answer\n"a;b";c\n'.encode("utf-16"),
    "a.json": json.dumps([TALK, *ROWS]).encode(),
    "a.jsonl": LINES.encode(),
    "a.parquet": parquet([*ROWS, *ROWS]),
    "b.parquet": parquet([TALK, TALK]),
    "a.csv.gz": gzip.compress(CSV.encode() * 9, mtime=0),
    "a.jsonl.xz": lzma.compress(LINES.encode()),
    "mmlu.zip": archive("zip", MEMBERS),
    "mmlu.tar": archive("", MEMBERS),
    "mmlu.tgz": archive("gz", MEMBERS),
    "suite.json": json.dumps([MEASURE, MEASURE | {"name": "b"}]).encode(),
}
SECONDS = 1.0  # for each kind of file
ATOMS = (b'"', b"'", b",", b"\n", b"[", b"{", b"}", b"null", b"NaN", b"1e999", b"\\ud800", b"\xff")


def damaged(content, rng):
    """Return bytes in which some were flipped, cut out, doubled, or replaced."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(data) + 1)
        end = min(len(data), place + rng.choice((1, 1, 4, 40)))
        way = rng.randrange(5)
        if way == 0 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif way == 1:
            del data[place:end]
        elif way == 2:
            data[place:place] = data[place:end]
        elif way == 3:
            data[place:end] = rng.choice(ATOMS)
        elif rng.random() < 0.2:
            del data[place:]
    return bytes(data)


def read_any(path):
    if path.name.startswith("mmlu"):
        return mmlu_rows(path)
    if path.name == "suite.json":
        return load_suite(str(path))
    read_rows(path)
    return load_records("ordinary", str(path))


@pytest.mark.parametrize("name", SEEDS)
def test_any_damage_is_one_line(tmp_path, monkeypatch, name):
    """No other error than ValueError, whatever the bytes."""
    monkeypatch.setenv("SAFEPATCH_DATA_BYTES", "100000000")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rng, refused, end = random.Random(name), 0, time.monotonic() + SECONDS
    for number in range(1000):
        path = put(tmp_path, name, damaged(SEEDS[name], rng))
        try:
            read_any(path)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 2000, (number, str(error))
        if time.monotonic() > end:
            break
    assert refused > 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB


def test_the_undamaged_are_read(tmp_path):
    for name, content in SEEDS.items():
        assert read_any(put(tmp_path, name, content)), name
