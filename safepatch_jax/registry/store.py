"""Where a registry lies: a folder, or a bucket.

Its index is replaced as a whole, and last: a patch that it does not list is no part of the
registry. Who changes it holds a lock (on a disk) or the lease of the folder (in a bucket); there it
is written, moreover, on the condition that it is still the one that was read, so that not even a
writer whose lease has expired takes another one's entry away.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable
from typing import Any

from safepatch_jax.registry.index import Entry, Index, load, read_manifest
from safepatch_jax.runtime import files, mirror, paths
from safepatch_jax.runtime.addresses import address_of, name_of
from safepatch_jax.runtime.conditional import ABSENT, Conditional
from safepatch_jax.runtime.holding import check_leases, leased
from safepatch_jax.runtime.limits import limit, too_much
from safepatch_jax.runtime.objects import Objects
from safepatch_jax.runtime.reading import Refused

INDEX, PATCHES, PATCH, MANIFEST = "index.json", "patches", "patch.safetensors", "patch.json"


class Store:
    """A registry, opened; nothing is read yet.

    Args:
      place: a folder, or the address of a bucket's.

    Attributes:
      folder: its path; of an address the path that stands for it.
      name: how it is shown.
    """

    def __init__(self, place: str):
        self.folder = paths.resolve(place)
        self._address = address_of(self.folder)
        self.name = name_of(self.folder)

    def read(self) -> Index:
        """Return the index. Raises ValueError if there is none, or it cannot be used."""
        content = self._content()
        if content is None:
            raise Refused(
                f"There is no registry at {self.name}: no {INDEX}. Is the place right? safepatch "
                "registry add makes one."
            )
        return load(content, f"{self.name}/{INDEX}")

    def change(self, edit: Callable[[Index], Index | None]) -> None:
        """Replace the index by what `edit` makes of it, while nobody else does.

        Args:
          edit: is called again where another writer came first; None leaves all as it is. A new
            registry has an empty index.

        Raises:
          ValueError: as `read` and `edit`, the place cannot be locked, or what `edit` makes of the
            index could not be read again.
        """
        with self._held():
            while True:
                content, version = self._versioned()
                where = f"{self.name}/{INDEX}"
                index = edit(Index() if content is None else load(content, where))
                if index is None or self._written(self._dumped(index, where), version):
                    return

    def _dumped(self, index: Index, where: str) -> bytes:
        """Return the content of an index that can be read again."""
        content = index.dump()
        try:
            self._refuse_large(len(content))
            load(content, where)
        except Refused as error:
            raise Refused(
                f"The registry was not changed, as it could not be read any more: {error}"
            ) from error
        return content

    def fill(self, entry: Entry, fill: Callable[[pathlib.Path], None]) -> None:
        """Put the folder of a patch in its place: `fill` is given an empty one. Raises `lease.Lost`
        before anything is deleted if another writer has taken the lease."""
        folder = self._folder(entry.hash)
        files.refuse_link(folder, self.folder)
        with files.new_folder(folder, replace=True) as new:
            fill(new)
            files.write_json(new / MANIFEST, entry.to_json())

    def patch(self, entry: Entry) -> pathlib.Path:
        """Return the patch file of an entry, whose bytes are those that the manifest says; of a
        bucket a local copy. Raises ValueError if they are not, or it is missing."""
        return self._checked(entry, PATCH, entry.manifest["patch"])

    def beside(self, entry: Entry) -> dict[str, pathlib.Path]:
        """Return the files beside a patch file by name, as `patch` does, its manifest too."""
        found = {}
        for name, wanted in entry.files.items():
            found[name] = self._checked(entry, name, wanted)
        return found | {MANIFEST: self._manifest(entry)}

    def is_whole(self, entry: Entry) -> bool:
        """Return whether the files of a patch lie there as they were added; of a bucket all are
        read, not only what is new since they were brought here."""
        try:
            if self._address:
                folder = self._folder(entry.hash)
                self._refuse_other_objects(folder, entry)
                objects = Objects(address_of(folder))
                hashes = objects.hashes(objects.sizes().keys() & {PATCH, *entry.files})
                wanted = entry.files | {PATCH: entry.manifest["patch"]}
                if any(hashes.get(x, {}).get("sha256") != y["sha256"] for x, y in wanted.items()):
                    return False
            self.patch(entry)
            self.beside(entry)
        except (ValueError, OSError):
            return False
        return True

    def has(self, entry: Entry) -> bool:
        """Return whether anything of a patch is there."""
        folder = self._folder(entry.hash)
        if self._address:
            return bool(Objects(address_of(folder)).sizes())
        return folder.is_dir()

    def _folder(self, digest: str) -> pathlib.Path:
        return self.folder / PATCHES / digest

    def _checked(self, entry: Entry, name: str, wanted: dict[str, Any]) -> pathlib.Path:
        path = self._brought(entry) / name
        fix = "Copy it back from a backup."
        if not path.is_file():
            raise Refused(f"{name_of(path)} is missing. {fix}")
        size = path.stat().st_size
        if size != wanted["bytes"] or files.file_sha256(path) != wanted["sha256"]:
            raise Refused(
                f"{name_of(path)} is not the file that was added: its bytes are others than the "
                f"index says ({size:,}, {wanted['bytes']:,} were added). {fix}"
            )
        return path

    def _manifest(self, entry: Entry) -> pathlib.Path:
        path = self._brought(entry) / MANIFEST
        if not path.is_file() or path.stat().st_size > limit("INDEX_BYTES"):
            raise Refused(f"{name_of(path)} is missing or damaged. Copy it back from a backup.")
        manifest, signature = read_manifest(path.read_bytes(), name_of(path))
        # A signature that the index does not have is of a command that was killed.
        if manifest != entry.manifest or entry.signature not in (None, signature):
            raise Refused(
                f"{name_of(path)} says something else than {INDEX}. Copy both back from one backup."
            )
        return path

    def _brought(self, entry: Entry) -> pathlib.Path:
        """Return the folder of a patch; what lies in a bucket is brought here first."""
        folder = self._folder(entry.hash)
        if not self._address:
            files.refuse_link(folder, self.folder)
            return folder
        self._refuse_other_objects(folder, entry)
        return mirror.fetch(folder)

    def _refuse_other_objects(self, folder: pathlib.Path, entry: Entry) -> None:
        """Raise ValueError if a bucket has more of a patch, or of other sizes, than was added."""
        wanted = {name: file["bytes"] for name, file in entry.files.items()}
        wanted[PATCH] = entry.manifest["patch"]["bytes"]
        most = dict.fromkeys((MANIFEST, mirror.LIST, mirror.PUBLISHING), limit("INDEX_BYTES"))
        for name, size in Objects(address_of(folder)).sizes().items():
            where = f"{name_of(folder)}/{ascii(name)[1:-1]:.80}"
            if name not in wanted and name not in most:
                raise Refused(f"{where} is none of the files that were added. Delete it there.")
            if size != wanted.get(name, size):
                raise Refused(
                    f"{where} has {size:,} bytes, and {wanted[name]:,} were added. Copy it back "
                    "from a backup."
                )
            if size > most.get(name, size):
                raise Refused(f"{where} has {too_much('INDEX_BYTES')}.")

    def _held(self) -> contextlib.AbstractContextManager[None]:
        if self._address:
            return leased(self._address, wait=True)
        return files.locked(self.folder / files.LOCK)

    def _content(self) -> bytes | None:
        """Return the index as it lies there, None if there is none; no more is read than an index
        may have."""
        most = limit("INDEX_BYTES")
        if self._address:
            content = Objects(self._address).read(INDEX, most + 1)
        elif (self.folder / INDEX).is_file():
            with open(self.folder / INDEX, "rb") as file:
                content = file.read(most + 1)
        else:
            return None
        self._refuse_large(len(content or b""))
        return content

    def _versioned(self) -> tuple[bytes | None, str]:
        """Return the index as it lies there, None if there is none, and of a bucket its version."""
        content = self._content()  # first, as this alone reads no more than an index may have
        if not self._address or content is None:
            return content, ABSENT
        content, version = Conditional(self._address, INDEX).read()
        self._refuse_large(len(content))
        return (content if version else None), version

    def _refuse_large(self, size: int) -> None:
        if size > limit("INDEX_BYTES"):
            raise Refused(f"{self.name}/{INDEX} has {too_much('INDEX_BYTES')}.")

    def _written(self, content: bytes, version: str) -> bool:
        """Write the index; return False if another one took the place of this version meanwhile."""
        if self._address:
            check_leases(self._address)
            return bool(Conditional(self._address, INDEX).write(content, version))
        files.write_text(self.folder / INDEX, content.decode())
        files.sync_folder(self.folder)
        return True
