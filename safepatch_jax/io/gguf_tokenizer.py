"""The tokenizer in GGUF metadata as a Hugging Face tokenizer.json: byte-level BPE, and
SentencePiece's BPE with scores."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from safepatch_jax.runtime import files

_CONTROL, _USER_DEFINED = 3, 4  # token types of the GGUF specification
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_BYTE_LEVEL = ("smollm", "llama-bpe", "qwen2")
# characters of a token; known vocabularies stay below 300, and all cuts of a token are tried
_LONGEST = 1024
_COPY = "Give --tokenizer=DIR with the tokenizer files of the model's Hugging Face folder"


def write_tokenizer(metadata: Mapping[str, Any], out: pathlib.Path, where: str = "GGUF") -> None:
    """Write tokenizer.json and tokenizer_config.json from the vocabulary, merges or scores, and
    chat template.

    Args:
      metadata: GGUF keys and values.
      out: an existing folder.
      where: names the file in errors.

    Raises:
      ValueError: a kind that we do not build, or a vocabulary that is incomplete or contradicts
        itself.
    """
    from transformers import PreTrainedTokenizerFast

    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind not in ("gpt2", "llama") or kind == "gpt2" and pre not in _BYTE_LEVEL:
        raise ValueError(
            f"{where}: GGUF tokenizer {kind!r:.60} with pre-tokenizer {pre!r:.60} is not "
            "supported (supported: "
            f"llama, and gpt2 with {', '.join(_BYTE_LEVEL)}). {_COPY}."
        )
    try:
        tokens, types = _vocabulary(metadata)
        if kind == "gpt2":
            tokenizer = _byte_level(tokens, _merges(metadata, tokens), pre)
        else:
            gemma = str(metadata.get("general.architecture", "")).startswith("gemma")
            tokenizer = (
                _gemma(tokens, types, metadata) if gemma else _sentencepiece(tokens, metadata)
            )
        special = {
            name: _token(metadata, tokens, key)
            for name, key in (
                ("bos_token", "bos"),
                ("eos_token", "eos"),
                ("unk_token", "unknown"),
                ("pad_token", "padding"),
            )
        }
        _keep_whole(tokenizer, tokens, types)
        begins = _flag(metadata, "add_bos_token", kind == "llama" or pre == "llama-bpe")
        ends = _flag(metadata, "add_eos_token", False)
        _surround(
            tokenizer,
            special["bos_token"] if begins else None,
            special["eos_token"] if ends else None,
        )
    except _Damaged as error:
        raise ValueError(f"{where}: its tokenizer cannot be built: {error}. {_COPY}.") from None
    if pre == "smollm":
        special["unk_token"] = special["unk_token"] or tokens[0]
    special["pad_token"] = special["pad_token"] or special["eos_token"]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        **{k: v for k, v in special.items() if v is not None},
    )
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        fast.chat_template = template
    fast.save_pretrained(out)
    # transformers 5 writes a class name that 4 does not know; this one loads in both.
    saved = json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
    files.write_json(
        out / "tokenizer_config.json", {**saved, "tokenizer_class": "PreTrainedTokenizerFast"}
    )


class _Damaged(ValueError):
    """What is wrong with a vocabulary."""


def _byte_level(tokens: list[str], merges: list[tuple[str, str]], pre: str):
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    # LLaMA 3 takes a word that is a token as it is, whether merges lead there or not.
    tokenizer = Tokenizer(
        models.BPE(vocab=_index(tokens), merges=merges, ignore_merges=pre == "llama-bpe")
    )
    if pre == "smollm":
        split = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    else:
        words = Regex(_WORDS.replace("DIGITS", "{1,3}" if pre == "llama-bpe" else ""))
        split = [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(tokens: list[str], metadata: Mapping[str, Any]):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or scores.dtype.kind != "f" or len(scores) != len(tokens):
        raise _Damaged("tokenizer.ggml.scores is not one number a token")
    vocab = _index(tokens)
    order = dict(zip(tokens, scores.tolist()))
    prefix = _flag(metadata, "add_space_prefix", True)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_pairs(vocab, order),
            unk_token=_token(metadata, tokens, "unknown"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme="first" if prefix else "never", split=False
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(content=" ", left=1)] if prefix else []),
        ]
    )
    return tokenizer


def _gemma(tokens: list[str], types: list[int], metadata: Mapping[str, Any]):
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    # GGUF writes runs of spaces as such, and scores that say nothing. Runs come first, long ones
    # before short ones; then the order of the vocabulary is that of the merges.
    vocab = _index(["▁" * len(t) if t and not t.strip(" ") else t for t in tokens])
    order = {t: 1 if types[i] == _USER_DEFINED else -i for t, i in vocab.items()}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_pairs(vocab, order),
            unk_token=_token(metadata, tokens, "unknown"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def _keep_whole(tokenizer, tokens: list[str], types: list[int]) -> None:
    """Never cut special and user-defined tokens into pieces."""
    from tokenizers import AddedToken

    vocab = tokenizer.get_vocab()
    typed = [(t, k) for t, k in zip(tokens, types) if t in vocab]
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t, k in typed if k == _CONTROL]
    )
    tokenizer.add_tokens(
        [AddedToken(t, special=False, normalized=False) for t, k in typed if k == _USER_DEFINED]
    )


def _surround(tokenizer, bos: str | None, eos: str | None) -> None:
    """Put a first and a last token around each text."""
    from tokenizers import processors

    if bos or eos:
        one, two = (
            [f"{t}:{i}" for t in (bos, side, eos) if t] for i, side in enumerate(("$A", "$B"))
        )
        try:
            tokenizer.post_processor = processors.TemplateProcessing(
                single=one,
                pair=one + two,
                special_tokens=[(t, tokenizer.token_to_id(t)) for t in {bos, eos} - {None}],
            )
        except ValueError as error:
            raise _Damaged(
                f"{bos!r:.60} or {eos!r:.60} cannot begin or end a text ({error})"
            ) from error


def _pairs(vocab: Mapping[str, int], order: Mapping[str, float]) -> list[tuple[str, str]]:
    """Return all pairs that make up a token, best token first; longer left parts first."""
    found = []
    for token in vocab:
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        found += sorted(
            ((a, b, order[token]) for a, b in cuts if a in vocab and b in vocab),
            key=lambda pair: (vocab[pair[0]], vocab[pair[1]]),
        )
    found.sort(key=lambda pair: (pair[2], len(pair[0]), len(pair[1])), reverse=True)
    return [(a, b) for a, b, _ in found]


def _vocabulary(metadata: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    tokens, types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not tokens:
        raise _Damaged("tokenizer.ggml.tokens is no list of strings")
    if max(map(len, tokens)) > _LONGEST:
        raise _Damaged(f"a token has more than {_LONGEST} characters")
    if (
        not isinstance(types, np.ndarray)
        or types.dtype.kind not in "iu"
        or len(types) != len(tokens)
    ):
        raise _Damaged("tokenizer.ggml.token_type is not one whole number a token")
    return tokens, types.tolist()


def _merges(metadata: Mapping[str, Any], tokens: list[str]) -> list[tuple[str, str]]:
    merges, known = metadata.get("tokenizer.ggml.merges"), set(tokens)
    if not isinstance(merges, list):
        raise _Damaged("tokenizer.ggml.merges is no list of strings")
    pairs = [tuple(m.split(" ", 1)) for m in merges]
    wrong = [m for m, p in zip(merges, pairs) if len(p) != 2 or not {*p, "".join(p)} <= known]
    if wrong:
        raise _Damaged(
            f"{len(wrong)} merges are not of two tokens into a third, as {wrong[0]!r:.60}"
        )
    return pairs


def _index(tokens: list[str]) -> dict[str, int]:
    vocab = {t: i for i, t in enumerate(tokens)}
    if len(vocab) < len(tokens):
        double = next(t for i, t in enumerate(tokens) if vocab[t] != i)
        raise _Damaged(f"the token {double!r:.60} is in the vocabulary twice")
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
