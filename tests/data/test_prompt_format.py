"""Prompts in another template than the tokenizer's own: plain headings, Jinja files, system
messages; answer masks, and templates that cannot be used."""

import json
import shutil

import pytest

from safepatch_jax.data.chat import Chat, lengths, training_batch
from safepatch_jax.data.prompt_format import PromptFormat, read_format
from safepatch_jax.data.tokenizer import NoChat
from safepatch_jax.evaluation.prompter import Prompter
from safepatch_jax.models.config import read_hf_config

START, END = "<|im_start|>", "<|im_end|>"
TURNS = (("user", "Who?"), ("assistant", "Ann."))
FILE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}A: {{ m['content'] }}{{ eos_token }}"
    "{% else %}Q: {{ m['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)
# As Gemma's: a system message is refused.
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + FILE


def file_of(folder, text=FILE, name="mine.jinja"):
    (folder / name).write_text(text)
    return str(folder / name)


@pytest.fixture
def copy(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "copy")


def parts_of(chat, *pair):
    """Return the texts of a pair's prompt tokens and of its answer tokens."""
    example = chat.encode(*pair)
    return tuple(chat.tokenizer.decode(ids) for ids in (example.prompt_ids, example.answer_ids))


def test_plain_headings_and_their_answer_mask(tiny):
    chat = Chat(tiny, 264, prompt_format=read_format("plain"))
    assert parts_of(chat, "Größe?", "Zwei\nZeilen.") == (
        "### Question: Größe?\n ### Answer:",
        f" Zwei\nZeilen.{END}",
    )
    assert parts_of(chat, "And?", "Bob.", TURNS) == (
        f"### Question: Who?\n ### Answer: Ann.{END}\n### Question: And?\n ### Answer:",
        f" Bob.{END}",
    )
    assert chat.end_of_turn() == chat.tokenizer.eos_token_id
    example = chat.encode("Hi", "Yes")
    batch = training_batch([example], *lengths([example]))
    weighted = batch["targets"][batch["weights"] > 0]
    assert chat.tokenizer.decode(weighted) == f" Yes{END}"
    assert chat.decode(weighted) == "Yes"


def test_plain_begins_with_the_token_that_the_tokenizer_puts_before_a_text(copy):
    raw = json.loads((copy / "tokenizer.json").read_text())
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": START, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [],
        "special_tokens": {START: {"id": START, "ids": [256], "tokens": [START]}},
    }
    (copy / "tokenizer.json").write_text(json.dumps(raw))
    example = Chat(copy, 264, prompt_format=read_format("plain")).encode("Hi", "Yes")
    assert example.prompt_ids[0] == 256 and 256 not in example.prompt_ids[1:]


def test_a_base_model_is_asked_in_plain_headings(copy):
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(NoChat, match="no chat template.*--data.template=plain"):
        Chat(copy, 264)
    chat = Chat(copy, 264, prompt_format=read_format("plain"))
    assert chat.prompt_text("Hi") == "### Question: Hi\n ### Answer:"


def test_a_template_of_a_file_and_its_answer_mask(tiny, tmp_path):
    prompt_format = read_format(file_of(tmp_path))
    chat = Chat(tiny, 264, prompt_format=prompt_format)
    assert parts_of(chat, "Hi", "Yes") == ("Q: Hi\nA: ", f"Yes{END}")
    file_of(tmp_path, "other")  # what was read stays
    assert chat.prompt_text("Hi") == "Q: Hi\nA: "
    bare = file_of(tmp_path, FILE.replace("{{ eos_token }}", ""), "bare.jinja")
    assert parts_of(Chat(tiny, 264, prompt_format=read_format(bare)), "Hi", "Yes") == (
        "Q: Hi\nA: ",
        f"Yes{END}",
    )


@pytest.mark.parametrize(
    "template, before",
    [
        ("", f"{START}system\nBe kind.{END}\n{START}user\nHi{END}\n{START}assistant\n"),
        ("plain", "Be kind.\n\n### Question: Hi\n ### Answer:"),
        (NO_SYSTEM, "Q: Be kind.\n\nHi\nA: "),
    ],
    ids=["own", "plain", "no place"],
)
def test_a_system_message_stands_before_every_conversation(tiny, tmp_path, template, before):
    if "{" in template:
        template = file_of(tmp_path, template)
    prompter = Prompter(read_hf_config(tiny), tiny, prompt_format=read_format(template, "Be kind."))
    prompt, answer = parts_of(prompter.chat, "Hi", "Yes")
    assert prompt == before and answer.strip() == f"Yes{END}"
    asked = list(prompter.chat.encode("Hi", "Yes").prompt_ids)
    assert prompter.ask("Hi") == prompter.ask_talk("Hi") == asked
    # A conversation's own, and that of a decoding rule, stand after it.
    turns = (("system", "Be brief."), *TURNS)
    both = before.replace("Be kind.", "Be kind.\n\nBe brief.")
    own = prompter.chat.encode("Hi", "Yes", turns).prompt_ids
    assert prompter.tokenizer.decode(own).startswith(both.partition("Hi")[0])
    assert prompter.ask_talk([*turns, ("user", "Hi")]) == list(own)
    assert prompter.tokenizer.decode(prompter.ask("Hi", system="Be brief.")) == both


def test_the_default_is_the_tokenizers_own(tiny):
    assert read_format() == read_format("own") == PromptFormat() and PromptFormat().key() == {}
    assert Chat(tiny, 264, prompt_format=PromptFormat()).encode("Hi", "Yes") == Chat(
        tiny, 264
    ).encode("Hi", "Yes")


def test_a_key_has_the_content_of_a_file_and_not_its_name(tmp_path):
    keys = [
        read_format(file_of(tmp_path, text, name)).key()
        for text, name in ((FILE, "a.jinja"), (FILE, "b.jinja"), (FILE + " ", "a.jinja"))
    ]
    assert keys[0] == keys[1] != keys[2]
    assert read_format("plain", "Be kind.").key() == {"template": "plain", "system": "Be kind."}


@pytest.mark.parametrize(
    "content, message",
    [
        (None, r"There is no template file '.*mine.jinja'. Give another Jinja file, 'plain', or"),
        (b" \n", "mine.jinja: the template is empty. Give another"),
        (b"\xff\xfe{}", "mine.jinja cannot be read as a chat template: .*utf-8.* Give another"),
        (b"x" * 101, "mine.jinja: a template of more than 100 bytes .SAFEPATCH_TEMPLATE_BYTES=N"),
        (b"version https://git-lfs.github.com/spec/v1\n", "mine.jinja is a Git LFS pointer"),
    ],
    ids=["missing", "empty", "encoding", "size", "pointer"],
)
def test_files_that_are_no_template(tmp_path, monkeypatch, content, message):
    monkeypatch.setenv("SAFEPATCH_TEMPLATE_BYTES", "100")
    path = tmp_path / "mine.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_format(str(path))
    assert "\n" not in str(caught.value)


def test_a_name_that_is_no_file():
    with pytest.raises(ValueError, match=r"no template file 'plian' \(did you mean 'plain'\?\)"):
        read_format("plian")


@pytest.mark.parametrize(
    "text, message",
    [
        ("{{ messages | length }}", "does not render a user's message: of its text nothing is in"),
        ("{{ raise_exception('no') }}", "does not render a user's message: .*no. Edit it"),
        ("{% for %}", "does not render a user's message: TemplateSyntaxError"),
        ("{{ messages[0]['content'] }}", "does not render an answer behind its prompt. Edit it"),
        (
            "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
            "cannot tell answer tokens from prompt tokens .*Edit .*mine.jinja so that",
        ),
    ],
)
def test_templates_that_leave_out_what_is_said(tiny, tmp_path, text, message):
    prompt_format = read_format(file_of(tmp_path, text))
    with pytest.raises(ValueError, match=rf"mine.jinja: .*{message}") as caught:
        Chat(tiny, 264, prompt_format=prompt_format)
    assert str(tiny) not in str(caught.value)


def test_a_file_that_takes_too_much_is_named(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("SAFEPATCH_TEMPLATE_CHARACTERS", "1000")
    prompt_format = read_format(file_of(tmp_path, "{{ 'x' * 2000 }}"))
    with pytest.raises(ValueError, match="mine.jinja: .*more than 1,000 characters"):
        Chat(tiny, 264, prompt_format=prompt_format)


def test_a_tokenizer_without_an_end_of_text_is_named(copy):
    path = copy / "tokenizer_config.json"
    raw = json.loads(path.read_text())
    del raw["eos_token"]
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="copy: the tokenizer has no eos_token, with which an"):
        Chat(copy, 264, prompt_format=read_format("plain"))
