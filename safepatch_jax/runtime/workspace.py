"""A folder of work in step with a bucket: its small files, and the lease on it."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import json
import pathlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from safepatch_jax.runtime import files, lease
from safepatch_jax.runtime.addresses import address_of
from safepatch_jax.runtime.holding import Held, check_leases, leased
from safepatch_jax.runtime.listing import below, inside
from safepatch_jax.runtime.objects import Objects


class Workspace:
    """The files of a folder of work, apart from stages, in step with its address.

    Args:
      folder: that stands for an address.
      apart: patterns of folders in it, at any depth, that are brought by others.
    """

    def __init__(self, folder: pathlib.Path, apart: Iterable[str] = ("stages",)):
        self._folder, self._apart = folder, (*apart, lease.NAME)
        self._objects = Objects(address_of(folder))
        self._note_path = folder.with_name(f".{folder.name}.in_step")
        self._seen: dict[str, tuple[int, int]] = {}  # size and time when last in step
        self._lock = threading.RLock()  # a thread of its own pushes too, see `claimed`

    def pull(self) -> None:
        """Make the local files those of the bucket; what is in step is not read again."""
        tags = {name: tag for name, tag in self._objects.tags().items() if self._is_kept(name)}
        for name in self._local().keys() - tags.keys():
            (self._folder / name).unlink()
        noted, looks, paths = self._noted(), self._looks(), {}
        for name, tag in tags.items():
            if not tag or noted.get(name) != [tag, *looks.get(name, ())]:
                paths[name] = inside(self._folder, name)
        self._objects.download(paths)
        self._seen = self._looks()
        self._note(tags)

    def _noted(self) -> dict[str, Any]:
        try:
            return json.loads(self._note_path.read_text())
        except (OSError, ValueError):
            return {}

    def _note(self, tags: Mapping[str, str]) -> None:
        """Take down which versions of objects the local files are."""
        noted = {name: [tags[name], *look] for name, look in self._seen.items() if name in tags}
        files.write_json(self._note_path, noted)

    def took(self, path: pathlib.Path) -> None:
        """Take note of a folder that was published by itself."""
        with self._lock:
            for name, look in self._looks().items():
                if (self._folder / name).is_relative_to(path):
                    self._seen[name] = look

    def push(self) -> None:
        """Bring what changed here to the bucket, and delete there what was deleted here."""
        check = functools.partial(check_leases, self._objects.address)
        with self._lock:
            looks = self._looks()
            changed = [name for name, look in looks.items() if self._seen.get(name) != look]
            self._objects.upload({name: self._folder / name for name in changed}, check)
            check()
            self._objects.delete(self._seen.keys() - looks.keys())
            self._seen = looks

    def _looks(self) -> dict[str, tuple[int, int]]:
        looks = {}
        for name, path in self._local().items():
            with contextlib.suppress(FileNotFoundError):  # it was replaced meanwhile
                status = path.stat()
                looks[name] = status.st_size, status.st_mtime_ns
        return looks

    def _local(self) -> dict[str, pathlib.Path]:
        return {name: path for name, path in below(self._folder).items() if self._is_kept(name)}

    def _is_kept(self, name: str) -> bool:
        parts = pathlib.PurePosixPath(name).parts
        hidden = any(part.startswith(".") for part in parts)
        apart = any(fnmatch.filter(parts, pattern) for pattern in self._apart)
        return not hidden and not apart

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Hold the lease of the folder while the block runs, and keep the bucket in step: every few
        seconds, and at the end. Raises ValueError if another run holds it."""
        address = self._objects.address
        with leased(address):
            Held.workspaces.append(self)
            try:
                # Before all is here, old local files would be pushed over newer ones.
                self.pull()
                try:
                    with self._pushed_meanwhile():
                        yield
                finally:
                    self.push()
                    self._note(self._objects.tags())
            finally:
                Held.workspaces.remove(self)

    @contextlib.contextmanager
    def _pushed_meanwhile(self) -> Iterator[None]:
        """Push every few seconds while the block runs, from a thread that is not the one which
        renews the lease: a push may last longer than the lease does."""
        ended = threading.Event()
        thread = threading.Thread(target=self._push_until, args=(ended,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _push_until(self, ended: threading.Event) -> None:
        while not ended.wait(lease.SECONDS / 4):
            with contextlib.suppress(Exception):  # tried again, and raised by the last push
                self.push()


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """Hold a lease in the place of a lock file while the block runs; wait for it."""
    guarded = address_of(path.with_name(path.name.removeprefix(".").removesuffix(files.LOCK)))
    with leased(address_of(path), over=guarded, wait=True):
        yield
