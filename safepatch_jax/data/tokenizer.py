"""Tokenizers of model folders."""

from __future__ import annotations

import functools
import importlib.util
import pathlib
from collections.abc import Sequence
from typing import Any

from safepatch_jax.io.companions import TOKENIZER, VOCABULARY
from safepatch_jax.runtime import files, libraries
from safepatch_jax.runtime.console import some
from safepatch_jax.runtime.reading import Refused, reading, refuse_pointer
from safepatch_jax.runtime.text import printable

TAGS = ("<think>", "</think>")  # of a thought
_COPY = "Copy tokenizer.json and tokenizer_config.json of the model into the folder."
# Files of a tokenizer that hold one JSON object and are small.
_OBJECTS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
)


class NoChat(ValueError):
    """A model folder without tokenizer or chat template, usable as weights only."""


def load_tokenizer(folder: str | pathlib.Path, vocab_size: int) -> Any:
    """Return the Hugging Face tokenizer of a model folder.

    Raises:
      NoChat: there is none.
      ValueError: it is damaged, what reads it is not installed, or it has tokens that are no rows
        of the embedding.
    """
    folder = pathlib.Path(folder)
    there = [name for name in TOKENIZER if (folder / name).is_file()]
    if not any(name in VOCABULARY for name in there):
        raise NoChat(
            f"{folder}: no usable tokenizer (none of {', '.join(VOCABULARY)} is there). {_COPY}"
        )
    for name in there:
        refuse_pointer(folder / name)
        if name in _OBJECTS:
            files.read_json(folder / name)  # names the file where the library does not
    _refuse_unreadable_vocabulary(folder, there)
    transformers = libraries.transformers()  # here: only text needs it
    loader = None
    if "tokenizer.json" in there:
        # AutoTokenizer of transformers 5 keeps only the vocabulary of some files: LLaMA-2's
        # "▁[INST]" becomes "[INST]"; and it imports torch.
        loader = getattr(transformers, "TokenizersBackend", None)
    loader = loader or transformers.AutoTokenizer
    with reading(folder, "a tokenizer", _COPY):
        tokenizer = loader.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
        _refuse_missing_rows(tokenizer, vocab_size, folder)
        return tokenizer


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return the text of token ids without special tokens. The tags of a thought stay where they
    are special tokens too: what stands between them is no answer."""
    left_out = _beside_tags(tokenizer)
    if left_out is None:
        return tokenizer.decode(ids, skip_special_tokens=True)
    ids = [i for i in ids if i not in left_out]
    return tokenizer.decode(ids, skip_special_tokens=False)


@functools.lru_cache(maxsize=8)
def _beside_tags(tokenizer: Any) -> frozenset[int] | None:
    """Return the ids of the special tokens but for tags of a thought; None where no tag is one."""
    added = tokenizer.added_tokens_decoder
    special = {i: str(token) for i, token in added.items() if token.special}
    if not set(TAGS) & set(special.values()):
        return None
    return frozenset(i for i, text in special.items() if text not in TAGS)


def _refuse_unreadable_vocabulary(folder: pathlib.Path, there: Sequence[str]) -> None:
    """Raise ValueError if a SentencePiece vocabulary is alone there, and what reads it is not
    installed."""
    if "tokenizer.model" not in there or {"tokenizer.json", "vocab.json"} & set(there):
        return
    with open(folder / "tokenizer.model", "rb") as file:
        # A SentencePiece file begins with this tag, a tiktoken file with base64.
        package = "sentencepiece" if file.read(1) == b"\n" else "tiktoken"
    if importlib.util.find_spec(package) is None:
        raise Refused(
            f"{folder}: of the tokenizer only tokenizer.model is there, and {package}, which reads "
            "it, is not installed. Copy tokenizer.json of the model into the folder, or install "
            f"it: pip install {package}."
        )


def _refuse_missing_rows(tokenizer: Any, vocab_size: int, folder: pathlib.Path) -> None:
    """Raise ValueError for tokens whose ids are no rows of the embedding."""
    vocabulary = tokenizer.get_vocab()
    beyond = {i: token for token, i in vocabulary.items() if i >= vocab_size}
    if not beyond:
        return
    added = tokenizer.added_tokens_decoder.keys()
    if beyond.keys() <= added:
        names = [f"{printable(beyond[i], 40)!r} (id {i})" for i in sorted(beyond)]
        raise Refused(
            f"{folder}: the embedding has {vocab_size} rows, ids 0 to {vocab_size - 1}, and none "
            f"for {len(beyond)} added tokens: {some(names, ', ', 3)}. Add rows "
            "(model.resize_token_embeddings(len(tokenizer)) of transformers, then "
            "save_pretrained), or delete the tokens from the tokenizer's files."
        )
    raise Refused(
        f"{folder}: the tokenizer has ids up to {max(beyond)}, the embedding only {vocab_size} "
        "rows: tokenizer and weights are of different models. Copy the tokenizer files that belong "
        "to the weights."
    )
