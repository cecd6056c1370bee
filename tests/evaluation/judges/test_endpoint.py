"""A judge behind an endpoint: one that is up, talks nonsense, goes down or is not there."""

import itertools
import re
import sys
import threading
import time

import pytest

from safepatch_jax.evaluation.judges.base import UNKNOWN, Item, JudgeUnavailable, Verdict
from safepatch_jax.evaluation.judges.endpoint import API_KEY
from safepatch_jax.evaluation.judges.open import open_judge
from safepatch_jax.runtime.text import printable

ASK = "Please do the forbidden placeholder thing {really}."
ITEM = Item(ASK, "Sure, first take {the} placeholder and turn it.")


def endpoint(text):
    def no_engine(folder):
        raise AssertionError("this judge needs no engine")

    return open_judge(text, no_engine)


def outcomes(verdicts):
    return [v.outcome for v in verdicts]


def long_items(n):
    return [Item(ASK, f"Answer number {i}, with enough words.") for i in range(n)]


def test_endpoint(server, monkeypatch):
    monkeypatch.setenv(API_KEY, "sk-placeholder")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-server")
    server.replies = [
        "REFUSED_FULL",
        "REFUSED_PARTIAL.",
        " COMPLIED\n",
        "INCOHERENT",
        "Complied, I think",
        b"<html>",
        b"[]",
        b'{"choices": [{"message": {"content": null}}]}',
    ]
    judge, done = endpoint(server.text), {}
    items = [*long_items(7), Item(ASK, ""), ITEM]
    verdicts = judge.judge(items, "refusal", done.__setitem__)
    assert verdicts == [
        Verdict("refused", "full", "REFUSED_FULL"),
        Verdict("refused", "partial", "REFUSED_PARTIAL."),
        Verdict("complied", "", "COMPLIED"),
        Verdict("incoherent", "", "INCOHERENT"),
        Verdict(UNKNOWN, "", "Complied, I think"),
        Verdict(UNKNOWN, "", "<html>"),
        Verdict(UNKNOWN, "", "[]"),
        Verdict("incoherent"),
        Verdict(UNKNOWN),
    ]
    assert [done[i] for i in range(9)] == verdicts and len(server.requests) == 8
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer sk-placeholder"
    assert body["model"] == "org/judge" and body["temperature"] == 0
    system, user = (message["content"] for message in body["messages"])
    assert "answers in part" in system and "number 0" in user
    assert judge.name == server.address
    assert "sk-placeholder" not in f"{judge.name} {verdicts} {vars(judge)}"


def test_harmless_is_a_word_about_harm_alone(server):
    server.replies = ["HARMLESS"]
    judge = endpoint(server.text)
    assert judge.tells_content and judge.judge([ITEM]) == [Verdict("harmless", "", "HARMLESS")]
    assert "HARMLESS" in server.requests[0][2]["messages"][0]["content"]
    assert outcomes(judge.judge([ITEM], "refusal")) == [UNKNOWN]
    assert "HARMLESS" not in server.requests[1][2]["messages"][0]["content"]


def test_a_served_guard_gets_the_conversation_and_replies_in_its_format(server):
    server.replies = ["Safety: Safe\nCategories: None\nRefusal: Yes"]
    judge = endpoint(f"{server.text}&format=qwen3guard")
    raw = server.replies[0]
    assert judge.tells_refusals and judge.judge([ITEM]) == [Verdict("refused", "", raw)]
    assert judge.judge([ITEM], "refusal") == [Verdict("refused", "", raw)]
    _, _, body = server.requests[0]
    assert body["max_tokens"] == 128 and body["messages"] == [
        {"role": "user", "content": ITEM.prompt},
        {"role": "assistant", "content": ITEM.answer},
    ]
    server.replies = ["safe"]
    judge = endpoint(f"{server.text}&format=llama_guard")
    declined = Item(ASK, "I'm sorry, but I can't help with that.")
    assert outcomes(judge.judge([ITEM, declined])) == ["harmless", "refused"]
    with pytest.raises(ValueError, match="cannot judge over-refusal"):
        judge.judge([ITEM], "refusal")
    with pytest.raises(ValueError, match="format is 'guard', expected one of llama_guard, qwen3"):
        endpoint(f"{server.text}&format=guard")


def test_endpoint_is_asked_several_things_at_a_time(server):
    """Four requests wait for one another; the first one is answered last, and stays the first."""
    four, others_done = threading.Barrier(4), threading.Event()

    def reply(body):
        number = int(re.search(r"number (\d+)", body["messages"][1]["content"])[1])
        if number < 4:
            four.wait(timeout=30)
        if number == 0:
            others_done.wait(timeout=30)
        return ("COMPLIED", "REFUSED_FULL")[number % 2]

    order = []

    def done(number, verdict):
        order.append(number)
        if len(order) == 11:
            others_done.set()

    server.replies = [reply]
    judge = endpoint(f"{server.address}&concurrency=4")
    verdicts = judge.judge(long_items(12), done=done)
    assert outcomes(verdicts) == ["complied", "refused"] * 6
    assert sorted(order) == list(range(12)) and order[-1] == 0 and judge.name == server.address


def test_endpoint_that_stumbles(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-server")
    server.replies = [503, None, "COMPLIED"]
    judge = endpoint(server.text)
    assert outcomes(judge.judge([ITEM])) == ["complied"]
    assert "Authorization" not in server.requests[0][1]


@pytest.mark.parametrize("failure", [500, 429])
def test_endpoint_down_midway_and_resumed(server, failure):
    items, done = long_items(5), {}
    server.replies = ["REFUSED_FULL", "COMPLIED", failure]
    judge = endpoint(server.text)
    message = "no answer in 4 tries .*judged so far are kept; the same command resumes there"
    with pytest.raises(JudgeUnavailable, match=message) as error:
        judge.judge(items, done=done.__setitem__)
    assert isinstance(error.value, OSError)
    assert outcomes(done.values()) == ["refused", "complied"] and len(server.requests) == 6
    server.replies = ["REFUSED_PARTIAL"]
    rest = [i for i in range(5) if i not in done]
    verdicts = judge.judge([items[i] for i in rest])
    assert outcomes(verdicts) == ["refused"] * 3 and len(server.requests) == 9


def test_replies_under_way_are_kept_when_one_fails(server):
    both, done = threading.Barrier(2), {}

    def reply(body):
        first = "number 0" in body["messages"][1]["content"]
        both.wait(timeout=30)
        return 400 if first else "COMPLIED"

    server.replies = [reply]
    judge = endpoint(f"{server.address}&concurrency=2")
    with pytest.raises(ValueError, match="HTTP 400"):
        judge.judge(long_items(2), done=done.__setitem__)
    assert {i: verdict.outcome for i, verdict in done.items()} == {1: "complied"}


def test_endpoint_not_there(server):
    server.shutdown()
    server.server_close()
    with pytest.raises(JudgeUnavailable, match="no answer in 4 tries .*refused"):
        endpoint(server.text).judge([ITEM])


@pytest.mark.parametrize("status", [400, 401, 404, 302])
def test_endpoint_the_user_must_mend(server, status, monkeypatch):
    monkeypatch.setenv(API_KEY, "sk-placeholder")
    server.replies = [status]
    message = rf"HTTP {status} .*Bearer \*\*\* is wrong.*Check URL, model and SAFEPATCH_API_KEY"
    with pytest.raises(ValueError, match=message) as error:
        endpoint(server.text).judge([ITEM])
    assert "sk-placeholder" not in str(error.value) and len(server.requests) == 1
    monkeypatch.setenv(API_KEY, "sk-place\nholder")
    with pytest.raises(ValueError, match="holds characters that no key has") as error:
        endpoint(server.text)
    assert "holder" not in str(error.value)


def test_endpoint_that_talks_nonsense(server):
    server.replies = ["As a model I find that hard."]
    with pytest.raises(
        ValueError,
        match="8 of 8 replies are no verdict. Expected: one word of COMPLIED, REFUSED_FULL",
    ):
        endpoint(server.address).judge([ITEM] * 8)


def drops():
    """One byte after another, for ever."""
    while True:
        yield b" "
        time.sleep(0.2)


def test_a_server_that_sends_for_ever_is_left(server, monkeypatch):
    monkeypatch.setenv("SAFEPATCH_ENDPOINT_SECONDS", "2")
    server.replies = [lambda body: drops()]
    begun = time.monotonic()
    with pytest.raises(JudgeUnavailable, match="more than 2 seconds .*SAFEPATCH_ENDPOINT_SECONDS"):
        endpoint(server.text).judge([ITEM])
    assert time.monotonic() - begun < 20


def test_a_reply_of_any_size_takes_no_more_memory_than_is_allowed(server, monkeypatch):
    monkeypatch.setenv("SAFEPATCH_ENDPOINT_BYTES", "100000")
    server.replies = [lambda body: itertools.repeat(b"x" * 10_000)]
    with pytest.raises(JudgeUnavailable, match="more than 100,000 bytes"):
        endpoint(server.text).judge([ITEM])


@pytest.mark.parametrize(
    "reply",
    [b"[" * 100_000, b"\xff\xfe\x00", b"{" * 5, b'{"choices": 1e999}', "\ud800 COMPLIED", ""],
)
def test_replies_that_are_no_json_or_no_text(server, reply):
    server.replies = [reply, "COMPLIED"]
    assert endpoint(server.text).judge([ITEM, ITEM])[1].outcome == "complied"


def test_a_key_stands_nowhere_when_the_server_says_it(server, monkeypatch):
    key = "sk-0123456789abcdefghij"
    monkeypatch.setenv(API_KEY, key)
    server.replies = [f"COMPLIED, says {key[3:15]} and {key}", 403]
    judge = endpoint(server.text)
    (verdict,) = judge.judge([ITEM])
    assert verdict.raw == "COMPLIED, says *** and ***"
    with pytest.raises(ValueError, match="the key Bearer [*]{3} is wrong"):
        judge.judge([ITEM])
    with pytest.raises(ValueError, match="unknown option 'api_key'") as error:
        endpoint(f"{server.address}&api_key=ab%2Fcdefghijkl")
    assert "cdefghij" not in printable(str(error.value))


def test_endpoint_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ValueError, match="not installed: pip install openai"):
        endpoint("endpoint:http://host/v1?model=m")
