"""What is printed and written: escape sequences, forged lines, endless texts, secrets."""

import json

import pytest

from safepatch_jax.runtime import files, text
from safepatch_jax.runtime.objects import refuse_own_endpoint
from safepatch_jax.runtime.text import hide, printable, redacted, without_user

KEY = "sk-live/0123456789abcdef"


@pytest.fixture
def secret(monkeypatch):
    monkeypatch.setattr(text, "_secrets", set())
    hide(KEY)
    return KEY


@pytest.mark.parametrize(
    "raw, shown",
    [
        ("all\nerror: is well", r"all\nerror: is well"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("back\b\r\x9b31m", r"back\x08\r\x9b31m"),
        ("a\u202egpj.exe\u2066\u2028b", r"a\u202egpj.exe\u2066\u2028b"),
        ("half \ud800", r"half \ud800"),
        ("un\u200bseen \ufeff\U000e0041", r"un\u200bseen \ufeff\U000e0041"),
        ("Größe 日本 'quoted'", "Größe 日本 'quoted'"),
    ],
)
def test_a_text_cannot_steer_the_console_or_forge_a_line(raw, shown):
    assert printable(raw) == shown
    shown.encode()


def test_of_a_long_text_the_beginning_and_the_end_are_shown_where_an_error_says_its_fix():
    text = "what" + "x" * 10_000_000 + "fix"
    assert printable(text, 15) == "whatxxxxxxxx ... 9,999,992 more characters ... fix"
    assert printable("x" * 10, 4) == "xxxx ... 6 more characters ... "
    assert len(printable("\x1b" * 10_000)) < 10_000
    assert printable("one\ntwo", line_break="\n  ") == "one\n  two"


@pytest.mark.parametrize(
    "raw, shown",
    [
        (f"the key {KEY}.", "the key ***."),
        (f"{KEY}{KEY}", "***"),
        (f"a part {KEY[5:14]} of it", "a part *** of it"),
        (f"{KEY[-8:]} {KEY[:7]}", f"*** {KEY[:7]}"),
        ("nothing", "nothing"),
    ],
)
def test_a_secret_and_its_parts_are_masked(secret, raw, shown):
    assert redacted(raw) == shown


def test_no_part_of_a_secret_stays_where_a_message_is_cut(secret):
    assert "0123" not in printable("x" * 10 + secret, 22)


def test_a_secret_is_not_written(secret, tmp_path):
    files.write_json(tmp_path / "x.json", {"reply": f"key={secret}"})
    files.write_jsonl(tmp_path / "x.jsonl", [{"reply": secret}])
    assert json.loads((tmp_path / "x.json").read_text()) == {"reply": "key=***"}
    assert (tmp_path / "x.jsonl").read_text() == '{"reply": "***"}\n'


def test_a_short_word_is_no_secret(monkeypatch):
    monkeypatch.setattr(text, "_secrets", set())
    hide("abc")
    hide("")
    assert redacted("xabcx ab") == "xabcx ab"


@pytest.mark.parametrize(
    "url, shown",
    [
        ("at https://me:op@n@host:1/a@b, or", "at https://***@host:1/a@b, or"),
        ("s3://key@host http://host/?x=a@b", "s3://***@host http://host/?x=a@b"),
        ("org/name@main", "org/name@main"),
    ],
)
def test_user_and_password_of_a_url_are_masked(url, shown):
    assert without_user(url) == shown


def test_the_password_of_an_endpoint_is_not_told(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://me:open@store")
    with pytest.raises(ValueError, match=r"AWS_ENDPOINT_URL is https://\*\*\*@store\)"):
        refuse_own_endpoint("s3://bucket/work")
