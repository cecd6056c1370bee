"""torch's zip files (`.bin`, `.pth`; torch.save since 1.6): where their tensors lie, without torch.

Such a file is a zip archive with a pickle that lists tensors, and one uncompressed entry of raw
bytes a storage. A pickle is a program, so it is given to no unpickler: a small stack machine reads
the few opcodes and names that a state dict needs. Names become inert text; nothing is imported,
called or built but dictionaries, tuples and tensor descriptions.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import pickletools
import zipfile
from typing import Any

from safepatch_jax.io.stored import Stored
from safepatch_jax.runtime.console import some

_SIZES = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float64": 8,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
    "complex64": 8,
    "complex128": 16,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
}
_STORAGES = {
    "Float": "float32",
    "BFloat16": "bfloat16",
    "Half": "float16",
    "Double": "float64",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
}
_DTYPE_OF = {f"torch.{name}Storage": dtype for name, dtype in _STORAGES.items()}
_DTYPE_OF |= {f"torch.{dtype}": dtype for dtype in _SIZES} | {
    "torch.storage.UntypedStorage": "uint8"
}
_BUILDERS = (
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
)
_PLAIN = (
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "LONG4",
    "BINFLOAT",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
)
_MOST_PICKLE_BYTES = 4 << 20  # a list of a thousand tensors takes about 150 kB
_TRUST = "only tensors are read. Convert the file to safetensors with a tool that you trust."


_MARK = object()


class _Refused(ValueError):
    """What a pickle does that reading tensors does not need."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Name:
    """A module's attribute that the pickle names."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str
    key: str
    count: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Tensor:
    storage: _Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    flags: bool  # conjugated or negated when it is used


def list_tensors(path: str | pathlib.Path) -> dict[str, Stored]:
    """Return where each tensor of a torch zip file lies. Nothing in the file is executed.

    Raises:
      ValueError: not a zip file, truncated, compressed or big-endian; its pickle asks for anything
        but tensors; a value that is not a tensor, not contiguous (row-major), or reaches beyond its
        storage. Problems of tensors are raised together.
    """
    path = pathlib.Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(4)
            if start != b"PK\x03\x04":
                raise ValueError(
                    f"{path} is no zip file: it is torch's format from before 1.6, or no file of "
                    "torch. In a sandbox, or "
                    "for a file that you trust, rewrite it: torch.save(torch.load(path, "
                    "weights_only=True), path)."
                )
            with zipfile.ZipFile(file) as archive:
                return _list(path, file, archive)
    except (
        zipfile.BadZipFile,
        UnicodeDecodeError,
        NotImplementedError,
        EOFError,
        OSError,
    ) as error:
        raise ValueError(
            f"{path} cannot be read as a zip file ({error}): it is truncated or damaged "
            f"({path.stat().st_size if path.is_file() else 0:,} bytes). Copy or download it again."
        ) from error


def _list(path: pathlib.Path, file, archive: zipfile.ZipFile) -> dict[str, Stored]:
    entries = {entry.filename: entry for entry in archive.infolist()}
    if len(entries) < len(archive.infolist()):
        raise ValueError(
            f"{path}: two entries of the zip file have one name. Copy or download it again."
        )
    pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise ValueError(
            f"{path}: {len(pickles)} entries '*/data.pkl' where torch writes one: it is no file "
            "of torch.save."
        )
    root = pickles[0].removesuffix("data.pkl")
    small = [entries[name] for name in (pickles[0], root + "byteorder") if name in entries]
    for entry in small:
        _position(path, file, entry)
        if entry.file_size > _MOST_PICKLE_BYTES:
            raise ValueError(
                f"refusing to load {path}: '{entry.filename}' has {entry.file_size:,} bytes, far "
                "more than a "
                f"list of tensors; {_TRUST}"
            )
    if len(small) == 2 and (order := archive.read(small[1])) != b"little":
        raise ValueError(
            f"{path}: its byte order is {order[:20]!r}, only b'little' is read. Convert it to "
            "safetensors."
        )
    tree = _read_pickle(archive.read(small[0]), path)
    if not isinstance(tree, dict):
        raise ValueError(
            f"refusing to load {path}: it holds {_kind(tree)}, no dictionary; {_TRUST}"
        )
    problems, found, places = [], {}, {}
    for name, x in tree.items():
        if not isinstance(x, _Tensor):
            problems.append(f"{name!r:.100} is {_kind(x)}, not a tensor")
            continue
        entry = entries.get(f"{root}data/{x.storage.key}")
        if problem := _problem(x, entry):
            problems.append(f"{name!r:.100} {problem}")
            continue
        if x.storage.key not in places:
            places[x.storage.key] = _position(path, file, entry)
        size = _SIZES[x.dtype]
        found[name] = Stored(
            path,
            places[x.storage.key] + x.offset * size,
            x.shape,
            x.dtype,
            math.prod(x.shape) * size,
        )
    if problems:
        raise ValueError(
            f"{path}: {some(problems)}. Save a plain dictionary of contiguous tensors, or "
            "convert the file to safetensors."
        )
    return found


def _problem(x: _Tensor, entry: zipfile.ZipInfo | None) -> str | None:
    """Say why a tensor cannot be read as contiguous bytes of its storage."""
    dense = 1
    for size, stride in zip(reversed(x.shape), reversed(x.strides)):
        if size != 1 and stride != dense and 0 not in x.shape:
            return f"is not contiguous (shape {x.shape}, strides {x.strides})"
        dense *= size
    if x.flags:
        return "is conjugated or negated when used"
    if entry is None:
        return f"has its values in storage {x.storage.key!r:.100}, which the file lacks"
    if entry.file_size != x.storage.count * _SIZES[x.storage.dtype]:
        return (
            f"has a storage of {x.storage.count:,} x {x.storage.dtype} in {entry.file_size:,} bytes"
        )
    if (x.offset + math.prod(x.shape)) * _SIZES[x.dtype] > entry.file_size:
        return f"reaches beyond its storage (shape {x.shape} from element {x.offset:,}, {entry.file_size:,} bytes)"
    return None


def _position(path: pathlib.Path, file, entry: zipfile.ZipInfo) -> int:
    """Return where an entry's bytes begin: its local header is padded, and tells by how much."""
    if (
        entry.compress_type != zipfile.ZIP_STORED
        or entry.compress_size != entry.file_size
        or entry.flag_bits & 1
    ):
        raise ValueError(
            f"{path}: the entry '{entry.filename}' is compressed or encrypted; torch.save stores "
            "bytes as they "
            "are. Unpack the archive and zip it again without compression (zip -0)."
        )
    file.seek(max(entry.header_offset, 0))
    header = file.read(30)
    start = (
        entry.header_offset
        + 30
        + int.from_bytes(header[26:28], "little")
        + int.from_bytes(header[28:30], "little")
    )
    if len(header) < 30 or header[:4] != b"PK\x03\x04" or start + entry.file_size > file.seek(0, 2):
        raise zipfile.BadZipFile(f"the entry '{entry.filename}' is not where the directory says")
    return start


def _read_pickle(data: bytes, path: pathlib.Path) -> Any:
    """Return what a pickle describes: dictionaries, tuples, lists, plain values, `_Name`,
    `_Storage` and `_Tensor`."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name != "STOP":
                _step(opcode.name, argument, stack, memo)
        return stack.pop()
    except _Refused as error:
        raise ValueError(f"refusing to load {path}: its pickle {error}; {_TRUST}") from None
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(
            f"refusing to load {path}: its pickle is damaged ({error!r:.200}); {_TRUST}"
        ) from error


def _step(opcode: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    """Carry out one opcode; those not listed are refused, among them all that build an object of a
    class."""
    match opcode:
        case "PROTO" | "FRAME":
            pass
        case "MARK":
            stack.append(_MARK)
        case "NONE" | "NEWTRUE" | "NEWFALSE":
            stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode])
        case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
            stack.append({} if opcode == "EMPTY_DICT" else [] if opcode == "EMPTY_LIST" else ())
        case "TUPLE":
            stack.append(tuple(_above_mark(stack)))
        case "TUPLE1" | "TUPLE2" | "TUPLE3":
            stack.append(tuple([stack.pop() for _ in range(int(opcode[-1]))][::-1]))
        case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
            memo[len(memo) if opcode == "MEMOIZE" else argument] = stack[-1]
        case "BINGET" | "LONG_BINGET":
            stack.append(memo[argument])
        case "SETITEM" | "SETITEMS":
            items = [stack.pop(), stack.pop()][::-1] if opcode == "SETITEM" else _above_mark(stack)
            _set_items(stack[-1], items)
        case "APPEND" | "APPENDS":
            items = [stack.pop()] if opcode == "APPEND" else _above_mark(stack)
            if not isinstance(stack[-1], list):
                raise _Refused(f"appends to {_kind(stack[-1])}")
            stack[-1].extend(items)
        case "GLOBAL" | "INST":  # INST also builds an object, but no class gets past this
            stack.append(_name(argument.replace(" ", ".", 1), opcode))
        case "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            stack.append(
                _name(
                    f"{module}.{name}"
                    if isinstance(module, str) and isinstance(name, str)
                    else "?",
                    opcode,
                )
            )
        case "BINPERSID":
            stack.append(_storage(stack.pop()))
        case "REDUCE":
            arguments, builder = stack.pop(), stack.pop()
            stack.append(_build(builder, arguments))
        case "BUILD":  # a state dict carries the versions of its modules as an attribute
            stack.pop()
            if not isinstance(stack[-1], dict):
                raise _Refused(f"sets attributes of {_kind(stack[-1])}")
        case _ if opcode in _PLAIN:
            stack.append(argument)
        case _:
            raise _Refused(f"uses the opcode {opcode}")


def _above_mark(stack: list[Any]) -> list[Any]:
    items = []
    while (item := stack.pop()) is not _MARK:
        items.append(item)
    return items[::-1]


def _set_items(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict) or len(items) % 2:
        raise _Refused(f"sets items of {_kind(target)}")
    for key, value in zip(items[::2], items[1::2]):
        if not isinstance(key, str):
            raise _Refused(f"has a dictionary with {_kind(key)} as a key")
        if key in target:
            raise _Refused(f"has the key {key!r:.100} twice")
        target[key] = value


def _name(text: str, opcode: str) -> _Name:
    if opcode == "INST" or text not in _DTYPE_OF and text not in _BUILDERS:
        raise _Refused(f"asks for {text!r:.100} ({opcode}), which no list of tensors needs")
    return _Name(text)


def _storage(pid: Any) -> _Storage:
    """Read a persistent id: ('storage', kind, key of the entry, device, number of elements)."""
    match pid:
        case ("storage", _Name(kind), str(key), str(), int(count)) if kind in _DTYPE_OF and _sizes(
            (count,)
        ):
            return _Storage(_DTYPE_OF[kind], key, count)
    raise _Refused("has a persistent id that is no storage")


def _build(builder: Any, arguments: Any) -> Any:
    """Describe what calling a builder would make."""
    match builder, arguments:
        case _Name("collections.OrderedDict"), ():
            return {}
        case _Name("torch._utils._rebuild_parameter"), (_Tensor() as tensor, bool(), dict()):
            return tensor
        case _Name("torch._utils._rebuild_tensor_v2"), (
            _Storage() as x,
            offset,
            shape,
            strides,
            bool(),
            dict(),
            *flags,
        ):
            dtype = x.dtype
        case (
            _Name("torch._utils._rebuild_tensor_v3"),
            (_Storage() as x, offset, shape, strides, bool(), dict(), _Name(kind), *flags),
        ) if kind in _DTYPE_OF:
            dtype = _DTYPE_OF[kind]
        case _:
            raise _Refused(f"builds {_kind(builder)} from arguments that are not those of a tensor")
    if (
        not _sizes((offset,))
        or not _sizes(shape)
        or not _sizes(strides)
        or len(shape) != len(strides)
    ):
        raise _Refused(
            "has a tensor whose offset, shape or strides are not whole numbers from 0 on"
        )
    return _Tensor(x, dtype, offset, shape, strides, any(flags))


def _sizes(x: Any) -> bool:
    return (
        isinstance(x, tuple)
        and len(x) <= 64
        and all(type(i) is int and 0 <= i < 1 << 63 for i in x)
    )


def _kind(x: Any) -> str:
    return (
        f"'{x.text}'" if isinstance(x, _Name) else f"a value of type {type(x).__name__.strip('_')}"
    )
