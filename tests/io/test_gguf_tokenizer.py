"""Tokenizers built from GGUF metadata, against transformers."""

import json

import numpy as np
import pytest

from safepatch_jax.data.chat import Chat
from safepatch_jax.io.gguf import convert_gguf, read_gguf
from safepatch_jax.io.gguf_tokenizer import write_tokenizer
from tests.io.gguf_files import (
    PROMPTS,
    STRINGS,
    D,
    assert_loads,
    trained,
    write_tiny,
    write_tokenizer_file,
)

MORE_STRINGS = (
    *STRINGS,
    *PROMPTS,
    "hello  world",
    "   hello",
    "hello<|turn|> world",
    "</s><s>",
    "a<tool>b",
    "▁x",
    "I'LL 12345 abc's",
    "\t\n \n",
    "x" * 40 + "  y",
    "Привет, мир 9876",
    "don't\r\n\r\nstop  ",
)


@pytest.mark.parametrize(
    "arch, pre, more",
    [
        ("llama", "smollm", {}),
        ("llama", "llama-bpe", {"add_bos_token": True}),
        ("qwen2", "qwen2", {}),
        ("qwen2", "qwen2", {"add_bos_token": True, "add_eos_token": True}),
    ],
)
def test_tokenizers_equal_those_of_transformers(tmp_path, arch, pre, more):
    pytest.importorskip(
        "torch", reason="transformers reads GGUF with torch alone: pip install torch"
    )
    from transformers import AutoTokenizer

    write_tokenizer_file(tmp_path / "x.gguf", arch, "gpt2", pre, more, **trained())
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
    write_tokenizer(read_gguf(tmp_path / "x.gguf")[0], tmp_path)
    ours = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert ours.get_vocab() == theirs.get_vocab()
    for text in MORE_STRINGS:
        if pre == "smollm" and any(c.isdigit() for c in text):
            continue  # transformers leaves out that digits stand alone
        for special in (True, False):
            ids = ours(text, add_special_tokens=special)["input_ids"]
            assert ids == theirs(text, add_special_tokens=special)["input_ids"], text
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(
            ids, skip_special_tokens=False
        ), text
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(
            ids, skip_special_tokens=True
        ), text
        if pre != "qwen2" and "▁" not in text:
            assert ours.decode(ids, skip_special_tokens=False) == text
    assert ours("a", "b")["input_ids"] == theirs("a", "b")["input_ids"]
    assert (ours.bos_token, ours.eos_token, ours.unk_token) == (
        theirs.bos_token,
        theirs.eos_token,
        theirs.unk_token,
    )


def test_what_transformers_leaves_out_of_tokenizers(tmp_path):
    """Qwen2 normalises to NFC, LLaMA 3 takes words that are tokens as they are: so say their own
    tokenizer files."""
    from transformers import AutoTokenizer, Qwen2Tokenizer

    parts = trained()
    write_tokenizer_file(tmp_path / "x.gguf", "qwen2", "gpt2", "qwen2", **parts)
    write_tokenizer(read_gguf(tmp_path / "x.gguf")[0], tmp_path)
    ours = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    vocab = {t: i for i, t in enumerate(parts["tokens"])}
    theirs = Qwen2Tokenizer(vocab=vocab, merges=[tuple(m.split()) for m in parts["merges"]])
    for text in ("cafe\u0301", "e\u0301 A\u030a", *STRINGS[:9]):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours("cafe\u0301")["input_ids"] == ours("café")["input_ids"]

    parts = trained()
    parts["tokens"].append("zebra")  # no merge leads there
    parts["token_type"].append(1)
    for pre, alone in (("llama-bpe", True), ("qwen2", False)):
        write_tokenizer_file(tmp_path / "x.gguf", "llama", "gpt2", pre, **parts)
        write_tokenizer(read_gguf(tmp_path / "x.gguf")[0], tmp_path)
        ids = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)(
            "zebra", add_special_tokens=False
        )["input_ids"]
        assert (ids == [parts["tokens"].index("zebra")]) == alone


def test_a_chat_template_is_not_needed_here(tmp_path):
    write_tokenizer_file(tmp_path / "x.gguf", "qwen2", "gpt2", "qwen2", **trained())
    write_tokenizer(read_gguf(tmp_path / "x.gguf")[0], tmp_path)
    with pytest.raises(ValueError, match="no chat template"):
        Chat(tmp_path, 1000)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model": "bert"}, r"tokenizer is 'bert' \(unknown\) with pre-tokenizer 'qwen2'"),
        (
            {"model": "llama", "pre": "default"},
            r"tokenizer is 'llama' \(SentencePiece\) with .*Expected: 'gpt2' \(byte-level BPE\)",
        ),
        ({"pre": "tekken"}, "'tekken'. Expected: .*with smollm, llama-bpe, qwen2"),
        ({"pre": None}, "pre-tokenizer None"),
        ({"merges": ["a b c", "x"]}, "merges are not of two tokens into a third, as 'a b c'"),
        ({"merges": ["nothing here"]}, "1 merges are not of two tokens"),
        ({"merges": [1, 2]}, "merges is no list of strings"),
        ({"token_type": [1]}, "token_type is not one number for each token"),
        ({"tokens": [1, 2]}, "tokens is no list of strings"),
        ({"more": {"bos_token_id": 10_000}}, "bos_token_id = 10000 is no place in the vocabulary"),
        ({"more": {"eos_token_id": "x"}}, "eos_token_id = 'x' is no place"),
        ({"more": {"add_bos_token": 3}}, "add_bos_token = 3 is neither true nor false"),
        ({"double": True}, "the token '!' is in the vocabulary twice"),
    ],
)
def test_tokenizers_that_cannot_be_built_name_the_flag(tmp_path, change, message):
    settings = {"arch": "qwen2", "model": "gpt2", "pre": "qwen2"} | trained() | change
    if settings.pop("double", False):
        settings["tokens"][5] = settings["tokens"][0]
    if settings["tokens"] == [1, 2]:
        settings["more"] = {"bos_token_id": 0}
    write_tokenizer_file(tmp_path / "x.gguf", **settings)
    with pytest.raises(ValueError, match=rf"x\.gguf: .*{message}.*--tokenizer=DIR"):
        write_tokenizer(read_gguf(tmp_path / "x.gguf")[0], tmp_path, str(tmp_path / "x.gguf"))


def test_tokenizer_of_another_folder(tmp_path, tiny):
    """As for a SentencePiece tokenizer, which is not built here."""
    write_tiny(tmp_path / "x.gguf", tokens=False, meta={"tokenizer.ggml.model": "llama"})
    with pytest.raises(ValueError, match=r"x\.gguf: .*SentencePiece.*--tokenizer=DIR"):
        convert_gguf(tmp_path / "x.gguf", tmp_path / "out")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((tiny / name).read_bytes())
    for name in ("config.json", "tokenizer.py", "secret.txt", "generation_config.json"):
        (source / name).write_text("{}")
    convert_gguf(tmp_path / "x.gguf", tmp_path / "out", tokenizer=source)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        tiny / "tokenizer.json"
    ).read_bytes()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["hidden_size"] == D and config["eos_token_id"] is None
    assert_loads(tmp_path / "out", "llama")
    with pytest.raises(ValueError, match="The folder '.*nowhere' holds no tokenizer file"):
        convert_gguf(tmp_path / "x.gguf", tmp_path / "out2", tokenizer=tmp_path / "nowhere")


@pytest.mark.parametrize("family, pre", [("llama-3.1", "llama-bpe"), ("qwen2.5", "qwen2")])
def test_tokenizers_equal_the_models_own(tmp_path, family, pre):
    """A model's own tokenizer.json, taken apart into what GGUF keeps of it, comes back as the same
    tokenizer."""
    from transformers import AutoTokenizer

    from tests.data.tokenizers import folder

    source = folder(family)
    theirs = AutoTokenizer.from_pretrained(source, local_files_only=True)
    raw = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    added = {t["id"]: t for t in raw["added_tokens"]}
    vocab = raw["model"]["vocab"] | {t["content"]: i for i, t in added.items()}
    tokens = [f"[PAD{i}]" for i in range(max(vocab.values()) + 1)]
    for token, i in vocab.items():
        tokens[i] = token
    types = np.ones(len(tokens), np.int32)
    for i, token in added.items():
        types[i] = 3 if token["special"] else 4
    metadata = {
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": [
            m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]
        ],
    }
    for key, number in (
        ("bos", theirs.bos_token_id),
        ("eos", theirs.eos_token_id),
        ("unknown", theirs.unk_token_id),
    ):
        if number is not None:
            metadata[f"tokenizer.ggml.{key}_token_id"] = number
    write_tokenizer(metadata, tmp_path)
    ours = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for text in (
        *STRINGS,
        *PROMPTS,
        "cafe\u0301",
        *("a" + " " * n + "b" for n in range(1, 40)),
        "\n" * 9 + "\t" * 9,
        *(open(__file__, encoding="utf-8").read().split("\n\n")),
    ):
        ids = ours(text, add_special_tokens=False)["input_ids"]
        assert ids == theirs(text, add_special_tokens=False)["input_ids"], text
        assert ours.decode(ids) == theirs.decode(ids), text
