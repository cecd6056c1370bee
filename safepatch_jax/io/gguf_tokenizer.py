"""The byte-level BPE tokenizer in GGUF metadata as a Hugging Face tokenizer.json."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from safepatch_jax.runtime import files, libraries
from safepatch_jax.runtime.reading import Refused, reading

_CONTROL, _USER_DEFINED = 3, 4  # token types of the GGUF specification
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS = ("smollm", "llama-bpe", "qwen2")
_KINDS = {"gpt2": "byte-level BPE", "llama": "SentencePiece"}
_COPY = (
    "Give launch.convert --tokenizer=DIR with the tokenizer files of the model's Hugging Face "
    "folder, or use that folder"
)


def write_tokenizer(metadata: Mapping[str, Any], out: pathlib.Path, where: str = "GGUF") -> None:
    """Write tokenizer.json and tokenizer_config.json from the vocabulary, merges and chat template.

    Args:
      metadata: GGUF keys and values.
      out: an existing folder.
      where: names the file in errors.

    Raises:
      ValueError: another kind than byte-level BPE, an unknown pre-tokenizer, or a vocabulary that
        is incomplete or contradicts itself.
    """
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or not isinstance(pre, str) or pre not in _PRE_TOKENIZERS:
        name = _KINDS.get(kind, "unknown") if isinstance(kind, str) else "unknown"
        raise ValueError(
            f"{where}: its tokenizer is {kind!r:.60} ({name}) with pre-tokenizer {pre!r:.60}. "
            f"Expected: 'gpt2' ({_KINDS['gpt2']}) with {', '.join(_PRE_TOKENIZERS)}. {_COPY}."
        )
    with reading(where, "a model with a tokenizer", f"{_COPY}."):
        try:
            fast = _build(metadata, pre)
        except _Damaged as error:
            raise Refused(f"{where}: its tokenizer cannot be built: {error}. {_COPY}.") from None
    fast.save_pretrained(out)
    # transformers 5 writes a class name that 4 does not know; this one loads in both.
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    files.write_json(path, {**settings, "tokenizer_class": "PreTrainedTokenizerFast"})


class _Damaged(ValueError):
    """What is wrong with a vocabulary."""


def _build(metadata: Mapping[str, Any], pre: str):
    """Return a tokenizer of transformers."""
    PreTrainedTokenizerFast = libraries.transformers().PreTrainedTokenizerFast
    tokens, types = _vocabulary(metadata)
    tokenizer = _byte_level(tokens, _merges(metadata, tokens), pre)
    special = {
        "bos_token": _token(metadata, tokens, "bos"),
        "eos_token": _token(metadata, tokens, "eos"),
        "unk_token": _token(metadata, tokens, "unknown"),
        "pad_token": _token(metadata, tokens, "padding"),
    }
    _keep_whole(tokenizer, tokens, types)
    begins = _flag(metadata, "add_bos_token", pre == "llama-bpe")
    ends = _flag(metadata, "add_eos_token", False)
    first = special["bos_token"] if begins else None
    last = special["eos_token"] if ends else None
    _surround(tokenizer, first, last)
    if pre == "smollm":
        special["unk_token"] = special["unk_token"] or tokens[0]
    special["pad_token"] = special["pad_token"] or special["eos_token"]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in special.items() if token is not None},
    )
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        fast.chat_template = template
    return fast


def _byte_level(tokens: list[str], merges: list[tuple[str, str]], pre: str):
    """Return a tokenizer that cuts texts as a pre-tokenizer of `_PRE_TOKENIZERS` does."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    # LLaMA 3 takes a word that is a token as it is, whether merges lead there or not.
    bpe = models.BPE(vocab=_index(tokens), merges=merges, ignore_merges=pre == "llama-bpe")
    tokenizer = Tokenizer(bpe)
    if pre == "smollm":
        split = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    else:
        words = _WORDS.replace("DIGITS", "{1,3}" if pre == "llama-bpe" else "")
        split = [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _keep_whole(tokenizer, tokens: list[str], types: list[int]) -> None:
    """Never cut special and user-defined tokens into pieces."""
    from tokenizers import AddedToken

    special, plain = [], []
    for token, kind in zip(tokens, types):
        if kind == _CONTROL:
            special.append(AddedToken(token, special=True, normalized=False))
        elif kind == _USER_DEFINED:
            plain.append(AddedToken(token, special=False, normalized=False))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)


def _surround(tokenizer, bos: str | None, eos: str | None) -> None:
    """Put a first and a last token around each text."""
    from tokenizers import processors

    ends = [token for token in (bos, eos) if token]
    if not ends:
        return
    one = [f"{part}:0" for part in (bos, "$A", eos) if part]
    two = [f"{part}:1" for part in (bos, "$B", eos) if part]
    numbers = {token: tokenizer.token_to_id(token) for token in ends}
    try:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=one, pair=one + two, special_tokens=list(numbers.items())
        )
    except ValueError as error:
        raise _Damaged(
            f"{bos!r:.60} or {eos!r:.60} cannot begin or end a text ({error})"
        ) from error


def _vocabulary(metadata: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """Return the tokens, and the type of each."""
    tokens, types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not tokens:
        raise _Damaged("tokenizer.ggml.tokens is no list of strings")
    if not isinstance(types, np.ndarray) or types.dtype.kind not in "iu":
        raise _Damaged("tokenizer.ggml.token_type is no list of whole numbers")
    if len(types) != len(tokens):
        raise _Damaged("tokenizer.ggml.token_type is not one number for each token")
    return tokens, types.tolist()


def _merges(metadata: Mapping[str, Any], tokens: list[str]) -> list[tuple[str, str]]:
    merges, known = metadata.get("tokenizer.ggml.merges"), set(tokens)
    if not isinstance(merges, list):
        raise _Damaged("tokenizer.ggml.merges is no list of strings")
    pairs, wrong = [], []
    for merge in merges:
        first, space, second = merge.partition(" ")
        pairs.append((first, second))
        if not space or not {first, second, first + second} <= known:
            wrong.append(merge)
    if wrong:
        raise _Damaged(
            f"{len(wrong)} merges are not of two tokens into a third, as {wrong[0]!r:.60}"
        )
    return pairs


def _index(tokens: list[str]) -> dict[str, int]:
    vocab = {}
    for i, token in enumerate(tokens):
        if token in vocab:
            raise _Damaged(f"the token {token!r:.60} is in the vocabulary twice")
        vocab[token] = i
    return vocab


def _token(metadata: Mapping[str, Any], tokens: list[str], key: str) -> str | None:
    number = metadata.get(f"tokenizer.ggml.{key}_token_id")
    if number is None:
        return None
    if type(number) is not int or not 0 <= number < len(tokens):
        raise _Damaged(
            f"tokenizer.ggml.{key}_token_id = {number!r:.60} is no place in the vocabulary of "
            f"{len(tokens)}"
        )
    return tokens[number]


def _flag(metadata: Mapping[str, Any], key: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{key}", default)
    if type(value) is not bool:
        raise _Damaged(f"tokenizer.ggml.{key} = {value!r:.60} is neither true nor false")
    return value
