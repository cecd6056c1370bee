"""An object of a bucket that is replaced on the condition that it is still the one that was
read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from safepatch_jax.runtime.objects import for_emulator
from safepatch_jax.runtime.reading import Refused, reason


def read(address: str, name: str) -> tuple[bytes | None, bytes]:
    """Return an object's content (None if there is no such object), and its version. Raises
    ValueError if the bucket cannot be used."""
    found = _asked(address, lambda store: store.read(name))
    content = found.value if found.state == "value" else None
    return content, found.stamp.generation


def write(address: str, name: str, content: bytes, version: bytes) -> bool:
    """Replace an object; return False, and leave it, if it is not of this version any more. Raises
    ValueError if the bucket cannot be used."""
    stamp = _asked(address, lambda store: store.write(name, content, if_equal=version))
    return bool(stamp.generation)


def _asked(address: str, ask: Callable[[Any], Any]) -> Any:
    for_emulator()
    import tensorstore as ts

    try:
        return ask(ts.KvStore.open(f"{address}/").result()).result()
    except Exception as error:  # tensorstore raises its own as ValueError
        raise Refused(f"Cannot replace an object of {address}: {reason(error)[:300]}") from error
