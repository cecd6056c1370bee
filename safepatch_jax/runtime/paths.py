"""How a path that a user gives is read: in every flag and setting, by these functions."""

from __future__ import annotations

import os
import pathlib
import re

from safepatch_jax.runtime import addresses
from safepatch_jax.runtime.reading import Refused

MODEL_KINDS = ("hf", "orbax", "gguf")  # before a model's path, with a colon
_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://?")


def plain(path: str | os.PathLike[str]) -> str:
    """Return a path with '~' as the home folder and without a slash at its end; a relative one is
    relative to the folder in which the command was started. The address of a bucket stays one.

    Raises:
      ValueError: it is empty or an address that cannot be used, or there is no such home folder.
    """
    text = os.fspath(path)
    if not text.strip():
        raise Refused(
            "A path is empty. Give the name of a file or folder ('.' is the current one)."
        )
    if "\0" in text:
        raise Refused(f"The path {text!r} holds a NUL character, which no name can.")
    if addresses.is_address(text):
        return addresses.plain(text)
    # pathlib would make one slash of the two, and a local folder of that name.
    if (match := _SCHEME.match(text)) and not os.path.exists(text):
        raise Refused(
            f"'{text}': {match[1]}:// is not supported; local paths are, and buckets as "
            "gs://BUCKET/... and s3://BUCKET/... Copy it to a local disk, and give that path."
        )
    try:
        return str(pathlib.Path(text).expanduser())
    except RuntimeError as error:
        raise Refused(f"'{text}': {error} Give the whole path.") from error


def on_disk(path: str | os.PathLike[str]) -> str:
    """Return what `plain` does, of what is read and written on a local disk alone. Raises
    ValueError also for an address of a bucket."""
    text = plain(path)
    if addresses.is_address(text):
        raise Refused(f"'{text}': this must be a local path. Copy it to a local disk.")
    return text


def resolve(path: str | os.PathLike[str]) -> pathlib.Path:
    """Return the absolute path of what a user named; of an address of a bucket the path that stands
    for it, at which there need not be anything yet. Raises ValueError as `plain` does."""
    return pathlib.Path(local(path)).absolute()


def local(path: str | os.PathLike[str]) -> str:
    """Return what `plain` does, with the path that stands for it in the place of an address of a
    bucket."""
    text = plain(path)
    if not addresses.is_address(text):
        return text
    from safepatch_jax.runtime import mirror  # here: few name buckets

    return str(mirror.stand_in(text))


def readable(path: str | os.PathLike[str]) -> str:
    """Return what `local` does; what lies in a bucket is brought here first. Raises ValueError also
    if it cannot be."""
    text = local(path)
    if addresses.is_address(path):
        from safepatch_jax.runtime import mirror

        mirror.fetch(pathlib.Path(text))
    return text


def model(text: str) -> str:
    """Return the name of a model with its path as `plain` gives it: DIR, FILE, or either after
    'hf:', 'orbax:' or 'gguf:'."""
    kind, colon, rest = text.partition(":")
    if colon and kind in MODEL_KINDS:
        return f"{kind}:{plain(rest)}"
    return plain(text)


def data(text: str) -> str:
    """Return a data source with its path as `plain` gives it; a name (builtin, set:, tfds:, hf:) as
    it is."""
    if text.startswith(("set:", "tfds:", "hf:")):
        return text
    if os.path.isfile(text):  # a file's name may hold a question mark
        return plain(text)
    place, mark, query = text.partition("?")
    return plain(place) + mark + query


def suite(text: str) -> str:
    """Return a list 'A+B' of suites, their .json files as `plain` gives them."""
    if os.path.isfile(text):  # a file's name may hold a plus sign
        return plain(text)
    return "+".join(plain(part) if part.endswith(".json") else part for part in text.split("+"))


def judge(text: str) -> str:
    """Return a judge's text, KIND or KIND:DIR?OPTIONS, with its folder as `plain` gives it; an
    endpoint's URL stays as it is."""
    kind, colon, rest = text.partition(":")
    if not rest or kind == "endpoint":
        return text
    place, mark, query = rest.partition("?")
    return kind + colon + plain(place) + mark + query
