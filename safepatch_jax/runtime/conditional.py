"""An object of a bucket that is written only if nobody else has written it meanwhile.

gs:// knows generations, through tensorstore; s3:// ETags, through s3fs: tensorstore compares before
it writes where the store is not AWS's own, so that two writers could both win.
"""

from __future__ import annotations

from typing import Any

from safepatch_jax.runtime.objects import cause, filesystem, for_emulator
from safepatch_jax.runtime.reading import Refused, reason

ABSENT = ""  # the version of an object that is not there
_NOT_THERE = b"\x02"  # tensorstore's; b'' is no condition


class Conditional:
    """One object.

    Args:
      address: of its folder.
      name: of the object.

    Every method raises ValueError where the bucket cannot be used.
    """

    def __init__(self, address: str, name: str):
        self._address = address
        self._place: _Google | _Amazon
        if address.startswith("gs://"):
            self._place = _Google(address, name)
        else:
            self._place = _Amazon(address, name)

    def read(self) -> tuple[bytes, str]:
        """Return (content, version); (b'', ABSENT) if it is not there."""
        return self._asked(self._place.read)

    def write(self, content: bytes, version: str) -> str:
        """Write the object in the place of a version; return the new one, '' if it was no longer
        that."""
        return self._asked(self._place.write, content, version)

    def delete(self, version: str) -> None:
        """Delete the object if it is still of a version."""
        self._asked(self._place.delete, version)

    def _asked(self, ask: Any, *args: Any) -> Any:
        try:
            return ask(*args)
        except Refused:
            raise
        except Exception as error:  # tensorstore raises its own as ValueError
            why = cause(error) or reason(error)
            raise Refused(f"Cannot lock {self._address}: {why}") from error


class _Google:
    """By generations. They go from here as text, which tensorstore takes as bytes."""

    def __init__(self, address: str, name: str):
        self._address, self._name = address, name

    def read(self) -> tuple[bytes, str]:
        found = self._store().read(self._name).result()
        if found.state != "value":
            return b"", ABSENT
        return found.value, found.stamp.generation.decode("latin-1")

    def write(self, content: bytes, version: str) -> str:
        before = version.encode("latin-1") or _NOT_THERE
        stamp = self._store().write(self._name, content, if_equal=before).result()
        return stamp.generation.decode("latin-1")

    def delete(self, version: str) -> None:
        before = version.encode("latin-1")
        self._store().write(self._name, None, if_equal=before).result()

    def _store(self) -> Any:
        for_emulator()
        import tensorstore as ts

        return ts.KvStore.open(f"{self._address}/").result()


class _Amazon:
    """By ETags."""

    def __init__(self, address: str, name: str):
        bucket, _, folder = address.partition("://")[2].partition("/")
        self._where = {"Bucket": bucket, "Key": f"{folder}/{name}".lstrip("/")}
        self._address = address

    def read(self) -> tuple[bytes, str]:
        files = filesystem("s3")
        path = f"{self._where['Bucket']}/{self._where['Key']}"
        try:
            tag = files.call_s3("head_object", **self._where)["ETag"]
            return files.cat_file(path), tag
        except FileNotFoundError:
            return b"", ABSENT

    def write(self, content: bytes, version: str) -> str:
        if version:
            return self._put(content, {"IfMatch": version})
        tag = self._put(content, {"IfNoneMatch": "*"})
        if tag and self._put(content, {"IfNoneMatch": "*"}):
            raise Refused(
                f"{self._address}: this store knows no conditional writes (If-None-Match), which "
                "keep two runs from one folder. Use another store, or a folder."
            )
        return tag

    def _put(self, content: bytes, condition: dict[str, str]) -> str:
        try:
            done = filesystem("s3").call_s3("put_object", Body=content, **self._where, **condition)
        except FileNotFoundError:
            if "IfMatch" in condition:  # it was deleted
                return ""
            raise
        except OSError as error:
            if _is_condition(error):
                return ""
            raise
        return done["ETag"]

    def delete(self, version: str) -> None:
        if self.read()[1] == version:  # S3 has no conditional deletion everywhere
            filesystem("s3").call_s3("delete_object", **self._where)


def _is_condition(error: OSError) -> bool:
    text = f"{error} {error.__cause__}"
    return any(word in text for word in ("PreconditionFailed", "pre-condition", "Conflict", "412"))
