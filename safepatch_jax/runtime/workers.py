"""Threads that read, hash and wait for the disk beside the main thread."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from safepatch_jax.runtime import stopping


class Workers(ThreadPoolExecutor):
    """Threads that the main thread hands work to.

    SIGTERM raises an exception in the main thread wherever that is. Raised while it holds a lock of
    the pool or of a future, the threads would wait for the lock, and the pool's end for the
    threads; so SIGTERM waits that long. After an exception what has not begun is not done.
    """

    def submit(self, function: Callable[..., Any], /, *args: Any) -> Future:
        with stopping.deferred():
            return super().submit(function, *args)

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> bool:
        with stopping.deferred():
            self.shutdown(wait=False, cancel_futures=kind is not None)
        self.shutdown(wait=True)
        return False

    def map(self, function: Callable[..., Any], *columns: Iterable[Any]) -> Iterator[Any]:
        """Yield what the function returns for the elements of the columns, in their order; all are
        begun at once."""
        futures = [self.submit(function, *args) for args in zip(*columns)]
        return map(wait, futures)


def wait(future: Future) -> Any:
    """Return what a future of `Workers` returns, or raise what it raises."""
    with stopping.deferred():
        return future.result()
