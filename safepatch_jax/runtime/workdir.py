"""The folder of a command: shared by its processes, used by one run at a time, resumable.

Every command that works in a folder for long (a run, a sweep, a comparison, a chain, an evaluation)
takes these steps in the same order: refuse a folder that is not its own, see that all processes
share it, lock it, clear what a killed run left half-written. They are here once.
"""

from __future__ import annotations

import contextlib
import fnmatch
import pathlib
import shutil
from collections.abc import Callable, Collection, Iterator
from typing import Any

from safepatch_jax.runtime import files, processes
from safepatch_jax.runtime.console import some

_MOST = 4  # names in an error


def resolve(path: str | pathlib.Path) -> pathlib.Path:
    """Return the absolute path of a folder that a user named; '~' is the home folder."""
    return pathlib.Path(path).expanduser().absolute()


class Workdir:
    """A folder in which one command works.

    Args:
      path: as the user gave it.
      kind: what the folder is of, in errors: 'a run', 'a sweep'.
      mark: the file that tells that a folder is such a one; where it is, other files may lie too.
      names: patterns of the files and folders that the command puts there.
      flag: with which the folder is given, in errors.

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
    ):
        self.path = resolve(path)
        self._kind, self._mark, self._flag = kind, mark, flag
        self._names = (*names, files.LOCK)

    def refuse_strangers(self) -> None:
        """Raise ValueError, in all processes, if the folder is none of this kind and not empty."""
        processes.on_first(self._refuse_strangers)

    def _refuse_strangers(self) -> None:
        if (self.path / self._mark).is_file():
            return
        strangers = []
        for path in sorted(self.path.iterdir()) if self.path.is_dir() else ():
            known = any(fnmatch.fnmatchcase(path.name, pattern) for pattern in self._names)
            if not known and not files.half_written(path.name):
                strangers.append(path.name)
        if strangers:
            raise ValueError(
                f"{self.path} holds files that are not of {self._kind} "
                f"({some(strangers, ', ', _MOST)}); use a new or empty folder for {self._flag}."
            )

    @contextlib.contextmanager
    def claimed(
        self, *shared: pathlib.Path, check: Callable[[], Any] | None = None
    ) -> Iterator[None]:
        """Be the only run at work in the folder while the block runs.

        Args:
          shared: other folders that all processes must see, such as the cache.
          check: what else process 0 refuses; called before the folder is touched and again once it
            is locked, as another run may have been at work meanwhile.

        Raises:
          ValueError: strangers in the folder, another run at work, processes that do not share it,
            or what `check` raises.
        """
        self._check(check)
        for folder in (self.path, *shared):
            processes.shared(folder)
        with processes.claimed(self.path):
            self._check(check)
            processes.on_first(self._clear_half_written)
            yield

    def _check(self, check: Callable[[], Any] | None) -> None:
        self.refuse_strangers()
        if check is not None:
            processes.on_first(check)

    def _clear_half_written(self) -> None:
        for path in self.path.iterdir():
            if files.half_written(path.name):
                delete(path)


def delete(path: pathlib.Path) -> None:
    """Delete a file or a folder with all that is in it; nothing happens if it is not there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
