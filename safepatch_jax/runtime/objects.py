"""Objects in a bucket: listed, read, written and deleted, through fsspec (gcsfs, s3fs).

An object appears whole or not at all, and there is no renaming; so what belongs together is told by
a list of it that is written last, see `mirror`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from safepatch_jax.runtime.addresses import SCHEMES
from safepatch_jax.runtime.reading import Refused, reason
from safepatch_jax.runtime.text import without_user

EMULATOR = "STORAGE_EMULATOR_HOST"  # environment variable of Google's clients
_PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}
_PARALLEL = 8  # objects on their way at a time
_PIECE = 1 << 24  # bytes that are read at a time


class Objects:
    """The objects below an address.

    Args:
      address: ``gs://BUCKET/FOLDER`` or ``s3://...``. An object is named relative to it; '' is that
        of the address itself.

    Every method raises ValueError where the bucket cannot be used: says why, and what to do.
    """

    def __init__(self, address: str):
        self.address = address
        self._scheme, _, self._place = address.partition("://")

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each object, by name; {} if there is none."""
        return {name: row["size"] for name, row in self._rows().items()}

    def tags(self) -> dict[str, str]:
        """Return the version of each object, by name: its generation or ETag."""
        rows = self._rows().items()
        return {name: str(row.get("generation") or row.get("ETag") or "") for name, row in rows}

    def _rows(self) -> dict[str, dict[str, Any]]:
        with self._explained("list"):
            rows = self._files.find(self._place, detail=True)
        skip = len(self._place) + 1
        return {row["name"][skip:]: row for row in rows.values() if row["name"][skip:]}

    def folders(self) -> list[str]:
        """Return the names of folders right below the address."""
        with self._explained("list"):
            try:
                rows = self._files.ls(self._place, detail=True)
            except FileNotFoundError:
                return []
        names = [pathlib.PurePosixPath(x["name"]).name for x in rows if x["type"] == "directory"]
        return sorted(names)

    def exists(self) -> bool:
        """Return whether there is an object of this very address."""
        with self._explained("read"):
            return self._files.isfile(self._place)

    def read(self, name: str = "", most: int | None = None) -> bytes | None:
        """Return an object's content, of a longer one its first `most` bytes; None if there is no
        such object."""
        with self._explained("read"):
            try:
                return self._files.cat_file(self._at(name), end=most)
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        with self._explained("write"):
            self._files.pipe_file(self._at(name), content)

    def upload(
        self, paths: Mapping[str, pathlib.Path], check: Callable[[], None] | None = None
    ) -> None:
        """Write files as objects, by name.

        Args:
          check: called before each; when it raises, those that have not begun are not written.
        """

        def put(name: str) -> None:
            if check is not None:
                check()
            self._files.put_file(paths[name], self._at(name))

        with self._explained("write"):
            self._each(put, paths)

    def download(
        self, paths: Mapping[str, pathlib.Path], wanted: Mapping[str, str] | None = None
    ) -> list[str]:
        """Read objects into files, by name; each file appears whole.

        Args:
          wanted: SHA-256 by name; a file of other bytes does not appear.

        Returns:
          the names of such files.
        """

        def bring(name: str) -> bool:
            target = paths[name]
            temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(temporary, "wb") as out:
                    digest = self._copied(name, out)
                if wanted is not None and wanted[name] != digest:
                    return False
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
            return True

        with self._explained("read"):
            return [name for name, fits in self._each(bring, paths).items() if not fits]

    def hashes(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Return {name: {bytes, sha256}} of objects, which are streamed."""

        def look(name: str) -> dict[str, Any]:
            counted = _Counted()
            digest = self._copied(name, counted)
            return {"bytes": counted.bytes, "sha256": digest}

        with self._explained("read"):
            return self._each(look, sorted(names))

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects; one that is not there is no error."""

        def remove(name: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                self._files.rm_file(self._at(name))

        with self._explained("delete"):
            self._each(remove, list(names))

    def _copied(self, name: str, out: Any) -> str:
        """Copy an object into a file; return its SHA-256."""
        digest, place = hashlib.sha256(), self._at(name)
        size = self._files.info(place)["size"]
        for start in range(0, size, _PIECE):
            piece = self._files.cat_file(place, start=start, end=min(size, start + _PIECE))
            digest.update(piece)
            out.write(piece)
        return digest.hexdigest()

    def _each(self, function: Any, names: Iterable[str]) -> dict[str, Any]:
        names = list(names)
        with concurrent.futures.ThreadPoolExecutor(_PARALLEL) as pool:
            return dict(zip(names, pool.map(function, names)))

    def _at(self, name: str) -> str:
        return f"{self._place}/{name}" if name else self._place

    @property
    def _files(self) -> Any:
        return filesystem(self._scheme)

    @contextlib.contextmanager
    def _explained(self, verb: str) -> Iterator[None]:
        """Raise what goes wrong with a bucket as a ValueError of one line."""
        try:
            yield
        except Refused:
            raise
        except Exception as error:
            if why := cause(error):
                raise Refused(f"Cannot {verb} {self.address}: {why}") from error
            raise


class _Counted:
    """A file that only counts what is written to it."""

    bytes = 0

    def write(self, piece: bytes) -> None:
        self.bytes += len(piece)


def cause(error: Exception) -> str:
    """Say what went wrong with a bucket, and what to do; '' of an error of another kind."""
    kind, code = type(error), str(getattr(error, "code", "") or "")
    text = reason(error)
    if kind.__name__ in ("DefaultCredentialsError", "NoCredentialsError", "RefreshError"):
        return (
            f"no credentials ({text}). Log in (gcloud auth application-default login; aws "
            "configure), or start on a machine with a service account."
        )
    if isinstance(error, PermissionError) or code in ("401", "403") or "Forbidden" in text:
        return (
            f"no permission ({text}). Give this account the right to read and write objects there "
            "(roles/storage.objectAdmin; s3:GetObject, PutObject, DeleteObject, ListBucket)."
        )
    if isinstance(error, FileNotFoundError) or code == "404":
        return f"there is no such bucket or object ({text}). Is the address right?"
    if isinstance(error, OSError) or code or kind.__module__.split(".")[0] in _CLIENTS:
        return (
            f"it does not answer ({text}). What was published stays as it is; give the same "
            "command again once the network is there."
        )
    return ""


_CLIENTS = ("aiohttp", "gcsfs", "google", "botocore", "aiobotocore", "fsspec")


@functools.cache
def filesystem(scheme: str) -> Any:
    """Return fsspec's file system. Raises ValueError if the package for the scheme is not there."""
    assert scheme in SCHEMES, scheme
    for_emulator()
    try:
        import fsspec

        return fsspec.filesystem(scheme, use_listings_cache=False)
    except ImportError as error:
        package = _PACKAGES[scheme]
        raise Refused(
            f"{scheme}:// needs the package {package}: pip install {package}, or "
            "'safepatch-jax[buckets]'."
        ) from error


def for_emulator() -> None:
    """Let all clients talk to the emulator that STORAGE_EMULATOR_HOST names, if it is set."""
    if host := os.environ.get(EMULATOR):
        url = host if "://" in host else f"http://{host}"
        os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", url)
        os.environ.setdefault("GOOGLE_AUTH_TOKEN_FOR_TESTING", "emulator")
        # gcsfs would ask for the bucket's kind over gRPC, which emulators do not answer.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")


def refuse_own_endpoint(address: str) -> None:
    """Raise ValueError for an s3:// address where another endpoint than AWS's is set: files are
    read and written there, but orbax, which writes arrays, knows AWS's alone."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if address.startswith("s3://") and endpoint:
        raise Refused(
            f"{address}: a run keeps arrays, which orbax cannot write to another endpoint than "
            f"AWS's own (AWS_ENDPOINT_URL is {without_user(endpoint)}). Models, data and patch "
            "files may lie there; give a folder or gs:// for the workdir and the cache."
        )
