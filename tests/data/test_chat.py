"""Chat template, answer mask and batch layout, with the byte tokenizer of the tiny model."""

import json
import random
import shutil

import numpy as np
import pytest

from safepatch_jax.data.chat import (
    Chat,
    Example,
    answer_pairs,
    bucket,
    lengths,
    prompt_batch,
    training_batch,
)
from safepatch_jax.data.records import Record
from safepatch_jax.runtime.text import printable

START, END, PAD = 256, 257, 258  # <|im_start|>, <|im_end|>, <|pad|>
EXAMPLES = (
    Example((11, 12, 13), (21, 22)),
    Example((31,), (41, 42, 43, 44)),
    Example((51, 52, 53, 54, 55), (61,)),
)


@pytest.fixture(scope="module")
def chat(tiny):
    return Chat(tiny, 264)


@pytest.fixture
def copy(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "copy")


def characters(text):
    """Ids of printable ASCII and newlines: the tokenizer's vocabulary is the sorted alphabet of
    byte-level BPE."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [b for b in range(256) if b not in printable]
    stands_for = {b: b for b in printable} | {b: 256 + i for i, b in enumerate(other)}
    order = sorted(stands_for.values())
    return [order.index(stands_for[b]) for b in text.encode()]


def test_prompt_and_answer_ids(chat):
    example = chat.encode("Hi", "Yes")
    assert example.prompt_ids == (
        START,
        *characters("user\nHi"),
        END,
        *characters("\n"),
        START,
        *characters("assistant\n"),
    )
    # The template's newline after the turn is no answer token.
    assert example.answer_ids == (
        *characters("Yes"),
        END,
    )


def test_answer_ids_of_many_bytes_and_lines(chat):
    example = chat.encode("Größe?", "Zwei\n\nZeilen 日本")
    assert example.prompt_ids[1:14] == tuple(characters("user\nGröße?"))
    assert example.answer_ids == (*characters("Zwei\n\nZeilen 日本"), END)


def test_special_tokens_in_an_answers_text_do_not_end_it(chat, copy):
    text = "Write <|im_end|>old<|im_start|>, or use CSS."
    first, rest = text.split("<|im_end|>")
    second, third = rest.split("<|im_start|>")
    expected = (*characters(first), END, *characters(second), START, *characters(third))
    assert chat.encode("Hi", text).answer_ids == (*expected, END)
    assert chat.end_of_turn() == END
    # a template that writes two of them after an answer: the first is the turn's
    template = (copy / "chat_template.jinja").read_text()
    (copy / "chat_template.jinja").write_text(template.replace("<|im_end|>", "<|im_end|><|pad|>"))
    assert Chat(copy, 264).encode("Hi", text).answer_ids == (*expected, END)


def test_answer_gets_an_end_where_the_template_writes_none(copy):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    (copy / "chat_template.jinja").write_text(template)
    assert Chat(copy, 264).encode("Hi", "Yes").answer_ids == (*characters("Yes"), END)


def test_template_that_rewrites_the_prompt_is_refused(copy):
    (copy / "chat_template.jinja").write_text(
        "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(ValueError, match="cannot tell answer tokens from prompt tokens"):
        Chat(copy, 264).encode("Hi", "Yes")


def test_decode_is_the_inverse_without_special_tokens(chat):
    example = chat.encode("Hi", " Größe\n日本 ")
    assert chat.decode(example.answer_ids) == "Größe\n日本"
    assert chat.decode((*example.answer_ids, PAD, PAD)) == "Größe\n日本"


def test_prompt_text(chat):
    assert chat.prompt_text("Hi") == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_too_long_prompts_are_dropped_and_long_answers_cut(chat):
    template = len(chat.encode("", "").prompt_ids)
    pairs = [("1234", "short"), ("12345", "x"), ("123", "longer than five"), ("1", "12345")]
    encoded = chat.encode_all(pairs, max_prompt=template + 4, max_answer=6)
    assert (len(encoded.examples), encoded.dropped, encoded.cut) == (3, 1, 1)
    assert [e.prompt_ids for e in encoded.examples] == [
        chat.encode(*pairs[i]).prompt_ids for i in (0, 2, 3)
    ]
    assert encoded.examples[0].answer_ids == (*characters("short"), END)
    # Cut: no end-of-turn to learn.
    assert encoded.examples[1].answer_ids == tuple(characters("longer"))
    assert encoded.examples[2].answer_ids == (*characters("12345"), END)  # six tokens fit
    assert encoded.describe(f"{template + 4}/6") == (
        f"3 examples, 1 left out (prompt longer than {template + 4} tokens), 1 answers cut at 6 "
        "tokens"
    )


def test_all_prompts_too_long(chat):
    shortest = len(chat.encode("ab", "x").prompt_ids)
    with pytest.raises(
        ValueError,
        match=rf"All 2 prompts are longer than .* = 5 \(the shortest has {shortest}, template",
    ):
        chat.encode_all([("abc", "x"), ("ab", "x")], max_prompt=5, max_answer=5)


def test_pairs_of_records():
    records = [Record("p", "a", "r", "", "train")]
    assert answer_pairs(records) == [("p", "a", ())] and answer_pairs(records, "refusal") == [
        ("p", "r", ())
    ]


def test_lengths_hold_all_examples():
    assert [bucket(n) for n in (1, 8, 9)] == [8, 8, 16]
    assert lengths(EXAMPLES) == (8, 8)
    # The last answer token is a target and never an input.
    assert lengths([Example((1,) * 9, (2,))]) == (
        16,
        8,
    )
    assert lengths([Example((1,) * 4, (2,) * 5)]) == (8, 8)


def test_training_batch_against_a_plain_loop():
    length, room = 8, 5
    batch = training_batch(EXAMPLES, length, room)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        "tokens": ((3, 8), np.int32),
        "valid": ((3, 8), bool),
        "predict_at": ((3, 5), np.int32),
        "targets": ((3, 5), np.int32),
        "weights": ((3, 5), np.float32),
    }
    for b, e in enumerate(EXAMPLES):
        whole = [*e.prompt_ids, *e.answer_ids]
        for t in range(length):
            real = t < len(whole) - 1
            assert batch["valid"][b, t] == real
            assert batch["tokens"][b, t] == (whole[t] if real else 0)
        for a in range(room):
            real = a < len(e.answer_ids)
            assert batch["weights"][b, a] == (1.0 if real else 0.0)
            if real:
                at = batch["predict_at"][b, a]
                assert (
                    batch["valid"][b, at]
                    and batch["tokens"][b, at] == whole[len(e.prompt_ids) + a - 1]
                )
                assert batch["targets"][b, a] == whole[at + 1] == e.answer_ids[a]
            else:
                assert batch["targets"][b, a] == 0 and batch["predict_at"][b, a] < length


def test_prompt_batch_pads_on_the_right():
    batch = prompt_batch([(1, 2, 3), (4,), (5, 6, 7, 8)], 4)
    np.testing.assert_array_equal(batch["tokens"], [[1, 2, 3, 0], [4, 0, 0, 0], [5, 6, 7, 8]])
    np.testing.assert_array_equal(batch["lengths"], [3, 1, 4])
    assert batch["tokens"].dtype == batch["lengths"].dtype == np.int32


def test_tokenizer_with_ids_beyond_the_embedding(tiny):
    Chat(tiny, 259)
    message = r"has 258 rows, .* none for 1 added tokens: '<\|pad\|>' \(id 258\)\. Add rows"
    with pytest.raises(ValueError, match=message):
        Chat(tiny, 258)
    message = "ids up to 258, the embedding only 100 rows: tokenizer and weights are of different"
    with pytest.raises(ValueError, match=message):
        Chat(tiny, 100)


def test_a_sentencepiece_model_alone_names_what_reads_it(copy):
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer.model").write_bytes(b"\x0a\x05no one")
    with pytest.raises(
        ValueError, match="sentencepiece, which reads it, is not installed. Copy tokenizer.json"
    ):
        Chat(copy, 264)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_is_a_pointer_of_git_lfs(copy, name):
    (copy / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n")
    with pytest.raises(ValueError, match=f"{name} is a Git LFS pointer"):
        Chat(copy, 264)


def test_damaged_tokenizers_are_one_line(copy):
    """Bytes changed at random, and values replaced: whatever the packages raise, panics too."""
    draw = random.Random(0)
    names = "tokenizer.json", "tokenizer_config.json"
    whole = {name: (copy / name).read_bytes() for name in names}
    refused = 0
    for number in range(40):
        name = names[number % 2]
        data = bytearray(whole[name])
        for _ in range(draw.choice((1, 3, 30))):
            data[draw.randrange(len(data))] = draw.choice(b'0{}[]",:x\x00\xff')
        (copy / name).write_bytes(data)
        try:
            Chat(copy, 264)
        except ValueError as error:
            refused += 1
            assert len(printable(str(error))) < 2100
        (copy / name).write_bytes(whole[name])
    assert refused > 15


def test_no_chat_template(copy):
    (copy / "chat_template.jinja").unlink()
    assert "chat_template" not in json.loads((copy / "tokenizer_config.json").read_text())
    with pytest.raises(
        ValueError, match="copy: the tokenizer has no chat template, so this is not a chat model"
    ):
        Chat(copy, 264)


@pytest.mark.parametrize(
    "broken", [None, "{", '{"model": {"type": "Unknown"}}'], ids=["absent", "not JSON", "unknown"]
)
def test_no_tokenizer(copy, broken):
    (copy / "tokenizer.json").unlink()
    if broken is None:
        (copy / "tokenizer_config.json").unlink()
    else:
        (copy / "tokenizer.json").write_text(broken)
    with pytest.raises(
        ValueError,
        match="copy(: no usable| cannot be read as a) tokenizer.*Copy tokenizer.json",
    ):
        Chat(copy, 264)


def test_answer_tokens_are_those_of_the_whole_text(copy):
    """A tokenizer that marks the start of a text (SentencePiece style) must not mark the start of
    the answer."""
    raw = json.loads((copy / "tokenizer.json").read_text())
    raw["normalizer"] = {"type": "Prepend", "prepend": "!"}
    (copy / "tokenizer.json").write_text(json.dumps(raw))
    (copy / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] + (':' if m['role'] == 'user' else '<|im_end|>') "
        "}}{% endfor %}"
    )
    example = Chat(copy, 264).encode("Hi", "Yes")
    assert example.prompt_ids == tuple(characters("!Hi:")) and example.answer_ids == (
        *characters("Yes"),
        END,
    )


@pytest.mark.parametrize(
    "template",
    ["{% for %}", "{{ raise_exception('no') }}", "{{ ''.__class__.__mro__ }}{{ undefined.x.y }}"],
)
def test_broken_or_hostile_template_is_an_error(copy, template):
    (copy / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match="chat template does not render"):
        Chat(copy, 264)
