"""Chat template and answer mask of each family, with its real tokenizer, against goldens with an
outside witness.

The tokenizers come from packages (`tokenizers.py`); what cannot be fetched is skipped.
"""

import json
import pathlib
import shutil

import pytest

from safepatch_jax.data.chat import Chat, lengths, training_batch
from tests.data import tokenizers

GOLDENS = pathlib.Path(__file__).parent / "goldens"
PAIRS = (
    ("How do I boil an egg?", "Sure. Put it in boiling water for eight minutes."),
    ("Was heißt „Größe“ auf Japanisch?", "大きさ (ookisa) 🙂"),  # pieces of one and of many bytes
    (
        "Continue the list: (a) one,",
        "\n  (b) two\n\n(c) three",
    ),  # white space where the answer begins
)
ANSWERS = (
    "Yes",
    " Yes",
    "\nYes",
    "\n\n  Yes",
    "(b) two",
    "] or not",
    ", too",
    "é",
    "🙂",
    "1",
    "<",
    "\tx",
)

VOCAB_SIZES = {
    "llama-2": 32000,
    "llama-3.1": 128256,
    "mistral-v1": 32000,
    "mistral-v3": 32768,
    "gemma": 262208,
    "qwen2.5": 151936,
    "smollm2": 49152,
}
SENTENCEPIECE = ("llama-2", "mistral-v1", "mistral-v3", "gemma")
# Templates that strip what a message begins and ends with.
TRIMMED = (
    "llama-2",
    "llama-3.1",
    "gemma",
)
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
CHATML = (
    "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{{}}<|im_end|>\n<|im_start|>assistant\n",
    "{}<|im_end|>",
)
# What the tokens spell: up to the answer, and from there on. SentencePiece puts a space before
# LLaMA-2's first word.
SPELT = {
    "llama-2": ("<s> [INST] {} [/INST]", " {} </s>"),
    "llama-3.1": (
        f"<|begin_of_text|>{HEADER.format('system')}Cutting Knowledge Date: December 2023\nToday "
        "Date: 26 Jul 2024\n\n"
        f"<|eot_id|>{HEADER.format('user')}{{}}<|eot_id|>{HEADER.format('assistant')}",
        "{}<|eot_id|>",
    ),
    "mistral-v1": ("<s> [INST] {} [/INST]", " {}</s>"),
    "mistral-v3": ("<s>[INST] {}[/INST]", " {}</s>"),
    "gemma": (
        "<bos><start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n",
        "{}<end_of_turn>",
    ),
    "qwen2.5": (
        CHATML[0].format("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
        CHATML[1],
    ),
    "smollm2": (
        CHATML[0].format("You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
        CHATML[1],
    ),
}


@pytest.fixture(scope="module", params=SPELT)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def chat(family):
    return Chat(tokenizers.folder(family), VOCAB_SIZES[family])


def token_bytes(family, chat, token):
    """What one token stands for in the text."""
    piece = chat.tokenizer.convert_ids_to_tokens(token)
    if family not in SENTENCEPIECE:
        values = dict(zip(*reversed(tokenizers.byte_alphabet())))
        return bytes(values[c] for c in piece)
    if len(piece) == 6 and piece.startswith("<0x"):
        return bytes([int(piece[1:-1], 16)])
    return piece.replace("▁", " ").encode()


def spelling(family, chat, ids):
    return b"".join(token_bytes(family, chat, i) for i in ids).decode()


def rendering(family, chat):
    """One token a line: id and text (bytes in hex where they are no whole characters); [[ ]] around
    the answer tokens."""

    def line(token):
        text = token_bytes(family, chat, token)
        try:
            return f"{token:8} {json.dumps(text.decode(), ensure_ascii=False)}"
        except UnicodeDecodeError:
            return f"{token:8} <{text.hex(' ')}>"

    lines = []
    for prompt, answer in PAIRS:
        example = chat.encode(prompt, answer)
        quoted = [json.dumps(t, ensure_ascii=False) for t in (prompt, answer)]
        lines += [
            "",
            f"prompt {quoted[0]}",
            f"answer {quoted[1]}",
            *map(line, example.prompt_ids),
            "[[",
            *map(line, example.answer_ids),
            "]]",
        ]
    return "\n".join(lines) + "\n"


def golden(family):
    lines = (GOLDENS / f"{family}.txt").read_text(encoding="utf-8").split("\n")
    return "\n".join(line for line in lines if not line.startswith("#"))


def test_golden(family, chat):
    assert rendering(family, chat) == golden(family)


def test_tokens_spell_the_template(family, chat):
    """The answer's tokens are its text, the spaces that the template puts beside it, and the end of
    the turn; no more."""
    for prompt, answer in PAIRS:
        example = chat.encode(prompt, answer)
        kept = answer.strip() if family in TRIMMED else answer
        expected = SPELT[family][0].format(prompt), SPELT[family][1].format(kept)
        assert (
            spelling(family, chat, example.prompt_ids),
            spelling(family, chat, example.answer_ids),
        ) == expected
        whole = chat.tokenizer.decode(
            [*example.prompt_ids, *example.answer_ids], clean_up_tokenization_spaces=False
        )
        assert whole == "".join(expected)
        assert chat.decode(example.answer_ids) == answer.strip()


def test_one_bos(family, chat):
    """The template writes the BOS; the tokenizer by itself would add another."""
    bos = chat.tokenizer.bos_token_id
    if family in ("qwen2.5", "smollm2"):  # no BOS in the template, and none is added
        assert chat.tokenizer("Hi")["input_ids"][0] != bos
        return
    assert chat.tokenizer("Hi")["input_ids"][0] == bos
    for prompt, answer in PAIRS:
        example = chat.encode(prompt, answer)
        assert (
            example.prompt_ids[0] == bos
            and (example.prompt_ids + example.answer_ids).count(bos) == 1
        )


def test_loss_sees_the_answer_tokens_alone(chat):
    examples = [chat.encode(*pair) for pair in PAIRS]
    batch = training_batch(examples, *lengths(examples))
    for b, e in enumerate(examples):
        marked = batch["weights"][b] > 0
        fed, targets = batch["tokens"][b][batch["valid"][b]], batch["targets"][b][marked]
        assert (*fed, targets[-1]) == e.prompt_ids + e.answer_ids and tuple(targets) == e.answer_ids
        assert [*batch["predict_at"][b][marked] + 1] == [
            *range(len(e.prompt_ids), len(e.prompt_ids) + len(e.answer_ids))
        ]


def test_prompt_tokens_are_those_of_generation(family, chat):
    """Whatever the answer begins with, no token of it reaches into the prompt."""
    alone = tuple(chat.tokenizer(chat.prompt_text("Hi"), add_special_tokens=False)["input_ids"])
    for answer in ANSWERS:
        example = chat.encode("Hi", answer)
        assert example.prompt_ids == alone, answer
        kept = answer.strip() if family in TRIMMED else answer
        assert spelling(family, chat, example.answer_ids) == SPELT[family][1].format(kept)


def test_mistral_template_without_a_space_before_the_answer(tmp_path):
    """The template first published for v0.1: "](" is one token, yet the prompt ends with "]"."""
    folder = shutil.copytree(tokenizers.folder("mistral-v1"), tmp_path / "copy")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ ' [INST] ' + "
        "m['content'] + ' [/INST]' }}"
        "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    first, now = Chat(folder, 32000), Chat(tokenizers.folder("mistral-v1"), 32000)
    assert first.tokenizer.tokenize("[/INST](b)", add_special_tokens=False)[-3:] == ["](", "b", ")"]
    assert first.encode("Hi", "(b)") == now.encode("Hi", "(b)")


def test_gemma_with_the_end_of_turn_as_eos(tmp_path):
    """Some published copies name <end_of_turn> as the tokenizer's eos, Google's do not: the answer
    ends the same way."""
    folder = shutil.copytree(tokenizers.folder("gemma"), tmp_path / "copy")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "<eos>"
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**config, "eos_token": "<end_of_turn>"})
    )
    assert rendering("gemma", Chat(folder, 262208)) == golden("gemma")


@pytest.mark.parametrize("space", [" ", ""])
def test_tokenizer_json_is_taken_as_it_is(tmp_path, space):
    """AutoTokenizer of transformers 5 drops the normalizer. Without a space, "]H" is one token of
    the whole text."""
    template = tokenizers.INST.replace("USER", "'[' + m['content'] + ']'").replace(
        "ANSWER", f"'{space}' + m['content']"
    )
    vocab = ["<unk>", "<s>", "</s>", "▁", "[", "]", "H", "▁[", "▁H", "]H"]
    tokenizers.write_sentencepiece(
        tmp_path,
        vocab,
        [["▁", "["], ["▁", "H"], ["]", "H"]],
        vocab[:3],
        template,
        normalizer=tokenizers.SPACE_BEFORE_TEXT,
    )
    example = Chat(tmp_path, 10).encode("H", "H")
    assert [vocab[i] for i in example.prompt_ids] == ["<s>", "▁[", "H", "]"]
    assert [vocab[i] for i in example.answer_ids] == ["▁H", "</s>"]


def test_end_of_turn_that_is_not_the_eos(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "copy")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "<|im_end|>"
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "<|pad|>"}))
    assert Chat(folder, 264).encode("Hi", "Yes") == Chat(tiny, 264).encode("Hi", "Yes")
