"""How much a file or a server of others may take: each bound has a default, which an environment
variable of its name raises or lowers."""

from __future__ import annotations

import dataclasses
import os

from safepatch_jax.runtime.reading import Refused

_PREFIX = "SAFEPATCH_"


@dataclasses.dataclass(frozen=True)
class Limit:
    """A row of `LIMITS`: its default value, and what it bounds, with the unit."""

    default: int
    what: str


LIMITS = {
    "TEMPLATE_SECONDS": Limit(20, "seconds of a processor for one conversation"),
    "TEMPLATE_MEGABYTES": Limit(512, "megabytes of memory"),
    "TEMPLATE_CHARACTERS": Limit(10_000_000, "characters for one conversation"),
    "ENDPOINT_SECONDS": Limit(300, "seconds for one request and its repetitions"),
    "ENDPOINT_BYTES": Limit(10_000_000, "bytes of one reply"),
    "CONFIG_BYTES": Limit(10_000_000, "bytes"),  # the published ones have a few thousand
    "TEMPLATES": Limit(100, "additional chat templates"),
    "TEMPLATE_BYTES": Limit(1_000_000, "bytes"),
    "INDEX_BYTES": Limit(100_000_000, "bytes"),  # one of 1,000 tensors has 100,000
    "INDEX_FILES": Limit(10_000, "weight files"),
    "ROW_CHARACTERS": Limit(1_000_000, "characters"),
    "DATA_ROWS": Limit(1_000_000, "rows"),
    "DATA_BYTES": Limit(4 << 30, "bytes, unpacked"),
    "ARCHIVE_MEMBERS": Limit(10_000, "members"),
}


def limit(name: str) -> int:
    """Return a bound.

    Raises:
      ValueError: its environment variable is no whole number above 0.
    """
    text = os.environ.get(_PREFIX + name)
    if text is None:
        return LIMITS[name].default
    if not text.strip().isdecimal() or not int(text):
        raise Refused(
            f"{_PREFIX}{name}={text!r:.40} must be a whole number above 0: {LIMITS[name].what}."
        )
    return int(text)


def too_much(name: str) -> str:
    """Say that a bound is passed, and how to raise it."""
    return f"more than {limit(name):,} {LIMITS[name].what} ({_PREFIX}{name}=N allows more)"
