"""Templates of models that think: what they are given, the answer mask, and skipped thoughts."""

import json
import pathlib
import shutil

import pytest

from safepatch_jax.data.chat import Chat, lengths, training_batch
from safepatch_jax.data.prompt_format import read_format, template_variables

GOLDENS = pathlib.Path(__file__).parent / "goldens"
NAMES = ("thinks_in_the_answer", "thinks_by_system")
EMPTY = "<think>\n\n</think>\n\n"
TURNS = (("user", "Who?"), ("assistant", "<think>\nHm.\n</think>\n\nAnn."))
KWARGS = ("", "enable_thinking=true", "enable_thinking=false")


@pytest.fixture(params=NAMES)
def folder(request, tiny, tmp_path):
    copy = shutil.copytree(tiny, tmp_path / "copy")
    shutil.copy(GOLDENS / f"{request.param}.jinja", copy / "chat_template.jinja")
    return copy


def chat_of(folder, kwargs="", thinking="as_is"):
    return Chat(folder, 264, prompt_format=read_format("", "", kwargs, thinking))


def parts_of(chat, *pair):
    example = chat.encode(*pair)
    parts = (example.prompt_ids, example.answer_ids, example.asked_ids)
    return tuple(chat.tokenizer.decode(ids) for ids in parts)


@pytest.mark.parametrize("kwargs", KWARGS)
@pytest.mark.parametrize("answer", ["Yes.", "  Yes.", "a < b"])
def test_prompts_are_those_of_transformers_and_answers_carry_no_empty_thought(
    folder, kwargs, answer
):
    chat = chat_of(folder, kwargs)
    given = json.loads(template_variables(kwargs) or "{}")
    talk = [{"role": role, "content": text} for role, text in (*TURNS, ("user", "And?"))]
    theirs = chat.tokenizer.apply_chat_template(
        talk, tokenize=False, add_generation_prompt=True, **given
    )
    whole = chat.tokenizer.apply_chat_template(
        [*talk, {"role": "assistant", "content": answer}], tokenize=False, **given
    )
    prompt, answered, asked = parts_of(chat, "And?", answer, TURNS)
    assert asked == theirs and "Hm." not in asked
    assert whole.startswith(prompt + answered)
    assert answered in (f"{answer}<|im_end|>", f"{answer.lstrip()}<|im_end|>")
    example = chat.encode("And?", answer)
    batch = training_batch([example], *lengths([example]))
    assert "think" not in chat.tokenizer.decode(batch["targets"][batch["weights"] > 0])


@pytest.mark.parametrize("kwargs", KWARGS)
def test_golden(folder, request, kwargs):
    name = request.node.callspec.params["folder"]
    prompt, answered, asked = parts_of(chat_of(folder, kwargs), "Hi", "Yes.")
    written = json.loads((GOLDENS / f"{name}.json").read_text())[kwargs]
    assert [prompt, answered, asked] == written


def test_thoughts_of_the_data_are_trained_on_or_refused(folder):
    answer = "<think>\nA guess.\n</think>\n\nYes."
    if (folder / "chat_template.jinja").read_text().count("split"):
        assert parts_of(chat_of(folder), "Hi", answer)[1].endswith("Yes.<|im_end|>")
    assert "<think>\nA" not in parts_of(chat_of(folder), "Hi", "Yes.")[1]


@pytest.mark.parametrize("kwargs", KWARGS)
def test_skipped_thoughts_leave_training_as_it_is(folder, kwargs):
    prompt, answered, asked = parts_of(chat_of(folder, kwargs, "skip"), "Hi", "Yes.")
    assert (prompt, answered) == parts_of(chat_of(folder, kwargs), "Hi", "Yes.")[:2]
    assert asked.count("<think>") == 1 and asked.endswith(EMPTY)
    off = chat_of(folder, "enable_thinking=false")
    assert asked == off.prompt_text("Hi")  # the template's own switch


def test_thoughts_are_skipped_without_a_switch(tiny):
    as_is = chat_of(tiny).prompt_text("Hi")
    assert chat_of(tiny, "", "skip").prompt_text("Hi") == as_is + EMPTY
    assert parts_of(chat_of(tiny, "", "skip"), "Hi", "Yes")[0] == as_is


def test_a_thought_of_the_template_carries_no_loss(tiny, tmp_path):
    copy = shutil.copytree(tiny, tmp_path / "copy")
    (copy / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] + ':' }}"
        "{% if m['role'] == 'assistant' %}{{ '<think>\nOf kites.\n</think>\n\n' }}{% endif %}"
        "{{ m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    prompt, answered, asked = parts_of(chat_of(copy), "Hi", "  Yes")
    assert answered == "  Yes<|im_end|>" and asked.endswith("assistant:")
    assert prompt.endswith("assistant:<think>\nOf kites.\n</think>\n\n")


def test_an_answer_that_thinks_behind_an_ended_thought_is_refused(tiny, tmp_path):
    copy = shutil.copytree(tiny, tmp_path / "copy")
    (copy / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:<think>\n' }}{% endif %}"
    )
    assert parts_of(chat_of(copy), "Hi", "Yes")[1] == "Yes<|im_end|>"
    with pytest.raises(ValueError, match="ends the thought.*thoughts out of the data"):
        chat_of(copy).encode("Hi", "<think>Hm.</think>Yes")


def test_a_name_that_the_template_never_reads_is_refused(folder):
    with pytest.raises(ValueError, match="never reads 'enable_think'.*mean 'enable_thinking'"):
        chat_of(folder, "enable_think=false")


def test_what_jinja_has_of_its_own_is_no_variable_of_a_template(tiny, tmp_path):
    copy = shutil.copytree(tiny, tmp_path / "copy")
    (copy / "chat_template.jinja").write_text(
        "{% set ns = namespace(last=0) %}{% if messages is none %}{{ raise_exception('x') }}"
        "{% endif %}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
        "{% if reasoning_effort %}{{ strftime_now('%Y') }}{{ range(3) | list }}{% endif %}"
    )
    with pytest.raises(ValueError, match="It reads reasoning_effort. Correct"):
        chat_of(copy, "effort=1")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", ""),
        ("b=x, a=false", '{"a": false, "b": "x"}'),
        ('{"b": "x", "a": false}', '{"a": false, "b": "x"}'),
        ("n=3", '{"n": 3}'),
    ],
)
def test_variables_are_read(text, expected):
    assert template_variables(text) == expected
    assert template_variables(template_variables(text)) == expected


@pytest.mark.parametrize(
    "text", ["x", "x=1,x=2", "{", "1a=2", "messages=1", "bos_token=x", "add_generation_prompt=1"]
)
def test_variables_that_cannot_be_given_are_refused(text):
    with pytest.raises(ValueError, match="template_kwargs"):
        template_variables(text)
