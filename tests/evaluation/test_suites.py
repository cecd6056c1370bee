"""Suites; what is wrong with one is in tests/launch/test_evaluate.py."""

import json
import os

import pytest

from safepatch_jax.data.sets import SETS
from safepatch_jax.evaluation.suites import GENERATED, SUITES, load_suite
from safepatch_jax.settings import EvaluateSettings


def test_answers_of_the_quick_suite_are_as_long_as_those_of_a_run():
    lengths = {measure.max_new for measure in load_suite("quick") if measure.kind in GENERATED}
    assert lengths == {EvaluateSettings().max_new_tokens}


def test_answers_whose_content_is_judged_are_long():
    """The suite is that of the paper's harm and over-refusal, and goes together with it."""
    short = {m.source: m for m in load_suite("paper") if m.kind in ("harm", "refusal")}
    for measure in load_suite("content"):
        assert measure.max_new == 128 > short[measure.source].max_new
        assert (measure.kind, measure.split) == (
            short[measure.source].kind,
            short[measure.source].split,
        )
        del short[measure.source]
    assert not short and load_suite("paper+content")


ROLES = {"harm": "harmful", "refusal": "lookalike", "text": "ordinary"}


@pytest.mark.parametrize("name", SUITES)
def test_the_sets_of_named_suites_are_fetched_and_beavertails_is_a_test_split(name):
    for measure in load_suite(name):
        if not measure.source.startswith("set:"):
            continue
        entry, _, split = measure.source.removeprefix("set:").partition("@")
        split = split or SETS[entry].first_split(ROLES[measure.kind])
        assert SETS[entry].splits[split].role == ROLES.get(measure.kind, "utility")
        assert SETS[entry].splits[split].file.sha256, f"{measure.source} is fetched by hand"
        assert entry != "beavertails" or split.endswith("_test")


MEASURE = {"name": "a", "kind": "harm", "source": "builtin"}


def failure(path, content):
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(ValueError) as raised:
        load_suite(str(path))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 700
    return str(raised.value)


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + json.dumps([MEASURE, MEASURE | {"name": "b"}]).encode(),
        json.dumps([MEASURE, MEASURE | {"name": "b"}]).encode("utf-16"),
        "\n".join(json.dumps(MEASURE | {"name": name}) for name in "ab").encode(),
    ],
)
def test_suites_are_read_as_other_files(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    assert [measure.name for measure in load_suite(str(tmp_path / "a.json"))] == ["a", "b"]


@pytest.mark.parametrize(
    "content, part",
    [
        (b"", "must hold a list of objects, one for each measure, with form, kind, limit"),
        (b"[]", "must hold a list of objects"),
        (b"{}", "expected a list of objects"),
        (b"[1]", "expected a list of objects, one a record; value 1 is of type int"),
        (b"[" * 99_999, "cannot be read as a suite: it is nested too deeply. It must hold a list"),
        (b"\xff[", "cannot be read as JSON: it is not UTF-8 (byte 0xff)"),
        (b'[{"name": ' + b"1" * 5000, "cannot be read as a suite: line 1: Exceeds the limit"),
        (b'[{"name": "a", "name": "b"}]', "an object has the key 'name' twice"),
        ([MEASURE | {"name": ["a"]}], "measure ['a']: name and source must be texts"),
        (
            [MEASURE | {"name": "a\nerror: all is well"}],
            "'a\\nerror: all is well': name and source",
        ),
        ([MEASURE | {"name": "\ud800"}], "name and source must be texts"),
        ([MEASURE | {"name": "a|b"}], "a name has no '|'"),
        ([MEASURE | {"name": "x" * 99_999}], "name and source must be texts"),
        ([MEASURE | {"source": None}], "name and source must be texts"),
        ([MEASURE | {"kind": {"a": 1}}], "kind '{'a': 1}' is not one of harm, refusal"),
        ([MEASURE | {"form": "x" * 99_999}], "is not one of plain"),
        ([MEASURE | {"limit": True}], "limit must be a whole number, 1 at least"),
        ([MEASURE | {"limit": 1.5}], "limit must be a whole number, 1 at least"),
        ([MEASURE | {"max_new": 10**30}], "max_new must be a whole number, 1 at least and 1,000,"),
        ([MEASURE | {"x" * 9999: 1}], "unknown attribute 'xxx"),
        ([{"name": "a" * 999}], "a measure lacks 'kind'"),
        ([MEASURE, MEASURE], "two measures are named 'a'"),
    ],
)
def test_broken_suites_are_one_line(tmp_path, content, part):
    assert part in failure(tmp_path / "mine.json", content)


def test_a_suite_is_a_file(tmp_path):
    (tmp_path / "folder.json").mkdir()
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match="folder.json is a folder, where a file is needed"):
        load_suite(str(tmp_path / "folder.json"))
    with pytest.raises(ValueError, match="pipe.json is a pipe, where a file is needed"):
        load_suite(f"quick+{tmp_path / 'pipe.json'}")
