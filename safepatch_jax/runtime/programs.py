"""How JAX compiles and runs programs in this process; set before it is used."""

from __future__ import annotations

import ctypes
import os
import pathlib

_VECTORS = "--xla_cpu_prefer_vector_width"
_TRIM, _MAPPED = -1, -3  # glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD
_TUNED = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
_KEPT, _LARGEST = 1 << 28, 1 << 25  # bytes: at the end of a heap; of an array that lies in one


def keep_programs(cache_dir: str | os.PathLike[str]) -> None:
    """Keep compiled programs on disk, in the cache of runs.

    It is JAX's setting for the whole process, so whoever opens a run makes it, not a part of one.
    The variable JAX_COMPILATION_CACHE_DIR takes precedence.
    """
    import jax

    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(cache_dir) / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def shortage(error: BaseException) -> str:
    """Return what an error says of memory that a device or the system lacks; '' for another error.

    It is told by its text: JAX's errors are RuntimeErrors, and some launchers do not import JAX.
    """
    exhausted = isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    if not exhausted and not isinstance(error, MemoryError):
        return ""
    return str(error).partition("\n")[0] or "the system gives no more"


def one_thread_a_program() -> None:
    """Have a call of JAX on CPU return when its program has run, most of it in the thread that
    calls, on vectors as wide as the CPU has: for small programs by which the threads of the caller
    keep the cores busy.

    Before JAX is used. What goes entry by entry, or adds whole numbers, gives the same bits. The
    user's PJRT_NPROC, and vectors in the user's XLA_FLAGS, stay.
    """
    os.environ.setdefault("PJRT_NPROC", "1")
    flags = os.environ.get("XLA_FLAGS", "")
    if _VECTORS not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_VECTORS}=512".strip()
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)


def keep_freed_memory() -> None:
    """Have glibc keep a few hundred megabytes that are freed, for programs whose arrays of a few
    megabytes come and go: each would come in new pages. It does nothing where the user has set
    glibc's thresholds, or memory comes from another allocator."""
    if any(name in os.environ for name in _TUNED):
        return
    adjust = getattr(ctypes.CDLL(None), "mallopt", None)
    if adjust is not None:
        adjust(_TRIM, _KEPT)
        adjust(_MAPPED, _LARGEST)
