"""Opening a file of data: only a file, unpacked and decoded as it is read, never more than the
limits allow."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import os
import pathlib
import stat
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, BinaryIO, TextIO, TypeVar

from safepatch_jax.runtime.limits import limit, too_much
from safepatch_jax.runtime.reading import Refused, refuse_pointer

Row = TypeVar("Row")
PACKED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
_MAGIC = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ\0": lzma.open, b"BZh": bz2.open}
_MARKS = {  # at the beginning of a text; that of UTF-32 begins as that of UTF-16 does
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_BLOCK = 1 << 26  # bytes; nobody has a reason to ask for more at once
_OTHERS = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket"}


def refuse_other_than_file(path: pathlib.Path) -> None:
    """Raise Refused if a path is none, or leads to a folder, a pipe or a device (which might never
    end), or to a Git LFS pointer."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise Refused(f"There is no file '{path}' that can be read: {why}.") from error
    if not stat.S_ISREG(mode):
        kinds = [name for is_kind, name in _OTHERS.items() if is_kind(mode)]
        raise Refused(
            f"{path} is {(kinds or ['a device'])[0]}, where a file is needed. Give the path of one "
            "file; save what a command prints in a file first."
        )
    refuse_pointer(path)


def refuse_more(where: Any, name: str, count: int) -> None:
    """Raise Refused if there are more of something than its limit, see `limits.LIMITS`."""
    if count > limit(name):
        raise Refused(f"{where} has {too_much(name)}.")


def counted(rows: Iterable[Row], where: Any) -> Iterator[Row]:
    """Yield rows. Raises Refused if there are more than the limit."""
    most = limit("DATA_ROWS")
    for number, row in enumerate(rows, 1):
        if number > most:
            refuse_more(where, "DATA_ROWS", number)
        yield row


@contextlib.contextmanager
def opened_text(path: pathlib.Path, what: str, packed: str = "") -> Iterator[TextIO]:
    """Open a file as text, with its line breaks as they are.

    Args:
      path: of the file; a byte order mark tells UTF-16 from UTF-8.
      what: as what it is read, for errors: 'CSV'.
      packed: a key of PACKED, '' for a plain file.

    Raises:
      Refused: not a file, more bytes than the limit (while they are read), another encoding.
    """
    refuse_other_than_file(path)
    with PACKED.get(packed, open)(path, "rb") as file:
        with decoded_text(file, path, what) as text:
            yield text


@contextlib.contextmanager
def decoded_text(file: IO[bytes], where: str | pathlib.Path, what: str) -> Iterator[TextIO]:
    """Give bytes as text; see `opened_text`."""
    counted = io.BufferedReader(_Counted(file, where), 1 << 16)
    head = counted.peek(4)[:4]
    marks = [name for mark, name in _MARKS.items() if head.startswith(mark)]
    if not marks and b"\0" in head:
        raise _not_utf8(where, what, "it has zero bytes, as UTF-16 has", "UTF-16LE")
    text = io.TextIOWrapper(counted, encoding=(marks or ["utf-8"])[0], newline="")
    try:
        yield text
    except UnicodeDecodeError as error:
        byte = f"it is not {error.encoding.upper()} (byte 0x{error.object[error.start]:02x})"
        raise _not_utf8(where, what, byte, "WINDOWS-1252") from error
    finally:
        text.detach()  # or else it closes what is beneath it


def _not_utf8(where: str | pathlib.Path, what: str, why: str, likely: str) -> Refused:
    return Refused(
        f"{where} cannot be read as {what}: {why}. Save it as UTF-8 (in a spreadsheet 'CSV UTF-8'; "
        f"else iconv -f {likely} -t UTF-8 OLD > NEW)."
    )


class _Counted(io.RawIOBase):
    """Bytes of a stream, until there are too many."""

    def __init__(self, file: IO[bytes], where: str | pathlib.Path):
        self._file, self._where, self._left = file, where, limit("DATA_BYTES")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._file.read(len(buffer))
        self._left -= len(block)
        if self._left < 0:
            raise Refused(f"{self._where} has {too_much('DATA_BYTES')}.")
        buffer[: len(block)] = block
        return len(block)


@contextlib.contextmanager
def opened_archive(path: pathlib.Path) -> Iterator[BinaryIO]:
    """Open a TAR file, packed or not, for `tarfile`: nobody gets beyond the limit."""
    refuse_other_than_file(path)
    with open(path, "rb") as file:
        head = file.read(6)
    openers = [opener for magic, opener in _MAGIC.items() if head.startswith(magic)]
    with (openers or [open])[0](path, "rb") as file:
        yield _Bounded(file, path)


class _Bounded:
    """A file in which nobody can read or seek beyond the limit, or ask for very much at once."""

    def __init__(self, file: IO[bytes], path: pathlib.Path):
        self._file, self._path, self._most = file, path, limit("DATA_BYTES")
        self.tell = file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _BLOCK:
            raise Refused(f"{self._path} is damaged: {size:,} bytes in one header. Fetch it again.")
        self._check(self._file.tell() + size)
        return self._file.read(size)

    def seek(self, position: int, whence: int = 0) -> int:
        if whence == 0:
            self._check(position)
        return self._file.seek(position, whence)

    def _check(self, position: int) -> None:
        if position > self._most:
            refuse_more(self._path, "DATA_BYTES", position)
