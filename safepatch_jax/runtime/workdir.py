"""The folder of a command: shared by its processes, used by one run at a time, resumable.

Every command that works in a folder for long (a run, a sweep, a comparison, a chain, an evaluation)
takes these steps in the same order: refuse a folder that is not its own, see that all processes
share it, lock it, clear what a killed run left half-written. They are here once. Where the command
fails before anything is done, it leaves nothing that a corrected command would stumble over.
"""

from __future__ import annotations

import contextlib
import fnmatch
import pathlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

from safepatch_jax.runtime import addresses, files, processes
from safepatch_jax.runtime.console import some
from safepatch_jax.runtime.objects import refuse_own_endpoint
from safepatch_jax.runtime.paths import resolve
from safepatch_jax.runtime.workspace import Workspace

_MOST = 4  # names in an error


class Workdir:
    """A folder in which one command works.

    Args:
      path: as the user gave it.
      kind: what the folder is of, in errors: 'a run', 'a sweep'.
      mark: the file that tells that a folder is such a one; where it is, other files may lie too.
      names: patterns of the files and folders that the command puts there.
      flag: with which the folder is given, in errors.
      refuse: raises ValueError for what else makes the folder unusable; called on process 0.
      declared: names of files that only say what the folder is for. Where nothing else has come
        into a folder that was new or empty when the command fails, they are deleted with it.
      apart: see `Workspace`, of a folder of a bucket.

    Attributes:
      path: absolute.
    """

    def __init__(
        self,
        path: str | pathlib.Path,
        kind: str,
        mark: str,
        names: Collection[str],
        flag: str = "--workdir",
        refuse: Callable[[], Any] | None = None,
        declared: Collection[str] = (),
        apart: Collection[str] = ("stages",),
    ):
        self.path = resolve(path)
        self._declared = (*declared, files.LOCK)
        self._kind, self._mark, self._flag, self._refuse = kind, mark, flag, refuse
        self._names, self._apart = (*names, files.LOCK), apart

    def check(self) -> None:
        """Raise ValueError, in all processes, if the folder is none of this kind and not empty, or
        for what `refuse` raises."""
        if address := addresses.address_of(self.path):
            refuse_own_endpoint(address)
            processes.on_first(self._look)
        processes.on_first(self._check)

    def _look(self) -> None:
        """Bring the files of the bucket here, unless a run of this machine is at work with them."""
        with files.claimed(self.path):
            Workspace(self.path, self._apart).pull()

    def _check(self) -> None:
        if self._refuse is not None:
            self._refuse()
        if (self.path / self._mark).is_file() or not self.path.is_dir():
            return
        strangers = [path.name for path in sorted(self.path.iterdir()) if self._is_stranger(path)]
        if strangers:
            raise ValueError(
                f"{self.path} holds files that are not of {self._kind} "
                f"({some(strangers, ', ', _MOST)}); use a new or empty folder for {self._flag}."
            )

    def _is_stranger(self, path: pathlib.Path) -> bool:
        known = any(fnmatch.fnmatchcase(path.name, pattern) for pattern in self._names)
        return not known and not files.half_written(path.name)

    @contextlib.contextmanager
    def claimed(self, *others: pathlib.Path) -> Iterator[None]:
        """Be the only run at work in the folder while the block runs.

        Args:
          others: folders that all processes must share too, such as the cache.

        Raises:
          ValueError: as `check`; another run at work; processes that do not share a folder.
        """
        self.check()  # before the folder is made, or anything is written to it
        made = not self.path.is_dir()
        new = made or all(path.name == files.LOCK for path in self.path.iterdir())
        try:
            for folder in (self.path, *others):
                processes.shared(folder)
            with processes.claimed(self.path), self._leased():
                processes.on_first(self._check)  # another run may have been at work meanwhile
                processes.on_first(self._clear_half_written)
                try:
                    yield
                except BaseException:
                    if new and processes.first():
                        self._clear_declared()
                    raise
        except BaseException:
            if made and processes.first():
                with contextlib.suppress(OSError):
                    self.path.rmdir()
            raise

    @contextlib.contextmanager
    def _leased(self) -> Iterator[None]:
        """Hold the lease of a folder of a bucket, by process 0 for all."""
        with contextlib.ExitStack() as stack:
            if addresses.address_of(self.path):
                workspace = Workspace(self.path, self._apart)
                processes.on_first(stack.enter_context, workspace.claimed())
            yield

    def _clear_half_written(self) -> None:
        for path in self.path.iterdir():
            if files.half_written(path.name):
                files.delete(path)

    def _clear_declared(self) -> None:
        """Delete what declares the folder, where nothing but that, locks and empty folders is in
        it."""
        folders, held = [], []
        for path in sorted(self.path.rglob("*")):
            is_lock = path.name.startswith(".") and path.name.endswith(files.LOCK)
            if path.is_dir() and not path.is_symlink():
                folders.append(path)
            elif path.name in self._declared or is_lock:
                held.append(path)
            else:
                return
        with contextlib.suppress(OSError):
            for path in held:
                path.unlink()
            for path in reversed(folders):
                path.rmdir()
