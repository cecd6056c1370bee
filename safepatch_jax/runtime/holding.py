"""What this process holds in buckets: leases, below which alone it publishes, and folders that it
keeps in step."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

from safepatch_jax.runtime import lease


class Held:
    """The leases of this process, by address (nothing is published below one that is lost), and
    the folders that it keeps in step."""

    leases: dict[str, lease.Lease] = {}
    workspaces: list[Any] = []
    compared: dict[str, Any] = {}  # version and entry of objects that were read, by address
    used: set[pathlib.Path] = set()  # copies of stages that this process works with


@contextlib.contextmanager
def leased(address: str, *, over: str = "", wait: bool = False) -> Iterator[None]:
    """Hold the lease of an address while the block runs.

    Args:
      over: the address whose publications it guards; by default itself.
      wait: until another holder has let it go.

    Raises:
      ValueError: another holder has it.
    """
    with lease.held(address, wait=wait) as held:
        Held.leases[over or address] = held
        try:
            yield
        finally:
            del Held.leases[over or address]


def check_leases(address: str) -> None:
    """Raise `lease.Lost` if a lease on a folder above an address is lost."""
    for held in leases_above(address):
        held.check()


def leases_above(address: str) -> list[lease.Lease]:
    """Return the leases of this process on a folder and those above it."""
    found = []
    for place, held in list(Held.leases.items()):
        if address == place or address.startswith(f"{place}/"):
            found.append(held)
    return found
