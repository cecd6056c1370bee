"""Chat templates: the day they are given, thoughts they open, and what they may take."""

import shutil
import time

import pytest

from safepatch_jax.data.chat import Chat
from safepatch_jax.data.rendering import DATE, render
from safepatch_jax.runtime.limits import limit

TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}"
    "{% endfor %}"
)
OPENING = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Größe?\n\u2028 {{ 1 + 1 }}"},
    {"role": "assistant", "content": "日本"},
]


@pytest.fixture
def folder(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "copy")


def chat_of(folder, template, **keywords):
    (folder / "chat_template.jinja").write_text(template)
    return Chat(folder, 264, **keywords)


@pytest.mark.parametrize(
    "options, theirs",
    [
        ({}, {}),
        ({"generate": True}, {"add_generation_prompt": True}),
        ({"resume": True}, {"continue_final_message": True}),
    ],
)
def test_a_template_is_rendered_as_transformers_does(tiny, options, theirs):
    tokenizer = Chat(tiny, 264).tokenizer
    expected = tokenizer.apply_chat_template(TALK, tokenize=False, **theirs)
    assert render(tokenizer, TALK, **options) == expected


def test_a_template_that_writes_the_date_is_given_one_day(folder):
    dated = "{{ strftime_now('%d %b %Y') }}" + TURNS + OPENING
    assert chat_of(folder, dated).prompt_text("Hi").startswith("26 Jul 2024<")
    assert chat_of(folder, dated, date="2025-02-03").prompt_text("Hi").startswith("03 Feb 2025<")
    assert DATE == "2024-07-26"  # another default would make every stored run another one


@pytest.mark.parametrize(
    "written",
    ["{{ m['content'].split('</think>')[-1] }}", "<think>\n\n</think>\n\n{{ m['content'] }}"],
    ids=["thoughts are left out", "an empty thought is written"],
)
def test_a_thought_that_a_template_opens_is_ended(folder, written):
    """As the templates of DeepSeek R1's distillations and of Qwen do it."""
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}User: {{ m['content'] }}{% else %}"
        f"Assistant: {written}<|im_end|>{{% endif %}}{{% endfor %}}"
        "{% if add_generation_prompt %}{{ 'Assistant: <think>\n' }}{% endif %}"
    )
    chat = chat_of(folder, template)
    example = chat.encode("Hi", "Yes")
    text = "User: HiAssistant: <think>\n\n</think>\n\n"
    assert chat.prompt_text("Hi") == text
    assert chat.tokenizer.decode(example.prompt_ids) == text
    assert chat.tokenizer.decode(example.answer_ids) == "Yes<|im_end|>"


HOSTILE = {
    "SECONDS": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "SECONDS of one operation": "{{ 10 ** (10 ** 9) }}",
    "MEGABYTES": "{% set ns = namespace(x='x' * 1000) %}{% for i in range(30) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "CHARACTERS": "{% for i in range(2000) %}{{ 'x' * 1000 }}{% endfor %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_that_takes_too_much_is_refused(folder, monkeypatch, name):
    bound = f"SAFEPATCH_TEMPLATE_{name.split()[0]}"
    monkeypatch.setenv(bound, {"MEGABYTES": "64", "CHARACTERS": "1000"}.get(name.split()[0], "1"))
    begun = time.monotonic()
    with pytest.raises(ValueError, match=f"more than .*{bound}=N allows more") as caught:
        chat_of(folder, HOSTILE[name])
    assert str(folder) in str(caught.value) and len(str(caught.value)) < 600
    assert time.monotonic() - begun < 60
    # The next one is rendered as if nothing had been.
    monkeypatch.delenv(bound)
    assert chat_of(folder, TURNS + OPENING).prompt_text("Hi").endswith("assistant\n")


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many", ""])
def test_a_bound_that_is_no_number_is_refused(monkeypatch, value):
    monkeypatch.setenv("SAFEPATCH_TEMPLATE_SECONDS", value)
    with pytest.raises(ValueError, match="SAFEPATCH_TEMPLATE_SECONDS.*whole number above 0"):
        limit("TEMPLATE_SECONDS")
