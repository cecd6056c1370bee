"""Memory that stays with the process between uses (glibc; elsewhere nothing here has an effect).

glibc gives large arrays back to the system as soon as they are freed, so that the next one comes in
new pages, each of which costs a fault and is zeroed first. A choice by the user (MALLOC_...,
GLIBC_TUNABLES) stays.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

# glibc's numbers of its settings (malloc.h), and what it sets or comes to by itself.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8
_LARGEST_MMAP, _MOST_MMAPS = 32 << 20, 65536
_NEVER = -1  # as a size the largest


def one_heap() -> None:
    """Have all threads take memory from one heap; before they start. The others that glibc makes
    for them hold no array of 64 MiB or more, so `kept` would not keep those."""
    if libc := _libc():
        libc.mallopt(_ARENA_MAX, 1)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Have freed memory stay with the process, for work that frees and takes large arrays again and
    again; afterwards it is given back."""
    libc = _libc()
    if libc is None:
        yield
        return
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        # Any setting ends glibc's own adjustment of thresholds, so they get what it ends at.
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_MMAP)
        libc.mallopt(_MMAP_MAX, _MOST_MMAPS)
        libc.malloc_trim(0)


def _libc() -> ctypes.CDLL | None:
    """Return the C library, if it is glibc and the user has not set how it works."""
    chosen = any(name.startswith("MALLOC_") for name in os.environ)
    if chosen or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
