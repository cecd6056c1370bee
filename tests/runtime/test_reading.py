"""The boundary between what others wrote and this project: one line, whatever is raised."""

import errno

import pytest

from safepatch_jax.runtime import files
from safepatch_jax.runtime.reading import Refused, reading


class Panic(BaseException):
    """As a Rust library raises it."""


@pytest.mark.parametrize(
    "error, why",
    [
        (RecursionError("maximum recursion depth exceeded"), "it is nested too deeply"),
        (OverflowError("int too large"), "OverflowError: int too large"),
        (ZeroDivisionError(), "ZeroDivisionError"),
        (KeyError("vocab"), "KeyError: 'vocab'"),
        (ValueError("line 1.\nline 2"), "line 1"),
        (Panic("index out of bounds"), "Panic: index out of bounds"),
        (MemoryError(), "it needs more memory than there is"),
        (PermissionError(errno.EACCES, "no"), "Permission denied"),
        (ValueError("x" * 1000), "x" * 300),
        (ValueError("403 for url: https://me:open@host/a"), "403 for url: https://***@host/a"),
    ],
)
def test_whatever_a_reader_raises_becomes_one_line(error, why, tmp_path):
    with pytest.raises(ValueError) as caught, reading(tmp_path / "f", "JSON", "Copy it again."):
        raise error
    assert str(caught.value) == f"{tmp_path / 'f'} cannot be read as JSON: {why}. Copy it again."


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), Refused("as it is")])
def test_what_ends_the_process_or_explains_itself_passes(error):
    with pytest.raises(type(error)) as caught, reading("f", "JSON", "Copy it again."):
        raise error
    assert caught.value is error


def test_a_git_lfs_pointer_is_called_so(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 13\n")
    with pytest.raises(ValueError, match="config.json is a Git LFS pointer.*'git lfs pull'"):
        files.read_json(path)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"[" * 100_000, "nested too deeply"),
        (b"\xff\xfe{}", "cannot be read as JSON: .*decode"),
        (b"[1]", "holds list, not an object"),
        (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read as JSON: "),
        (b"", "cannot be read as JSON: Expecting value"),
    ],
)
def test_json_of_any_kind(tmp_path, content, message):
    (tmp_path / "f.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        files.read_json(tmp_path / "f.json")
    assert len(str(caught.value)) < 500


def test_json_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "f.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert files.read_json(tmp_path / "f.json") == {"a": 1}
