"""What JSON that was read must hold: types, patterns of texts, and objects with at least some
fields."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from safepatch_jax.runtime import files
from safepatch_jax.runtime.console import some
from safepatch_jax.runtime.reading import Refused

HASH = re.compile("[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class Each:
    """Wants an object all of whose values are like `value`."""

    value: Any


def read_record(path: str | pathlib.Path, wanted: Mapping[str, Any], fix: str) -> dict[str, Any]:
    """Read a file that holds one JSON object, and check its fields.

    Args:
      wanted: see `misfits`.
      fix: a sentence: what the user can do.

    Raises:
      ValueError: it is absent, no JSON or another object; says which fields, and ends with `fix`.
    """
    record = files.read_json(path, fix)
    if problems := list(misfits(record, wanted)):
        raise Refused(f"{path} is damaged: {some(problems)}. {fix}")
    return record


def misfits(value: Any, wanted: Any, name: str = "") -> Iterator[str]:
    """Yield what in a JSON value is not as wanted.

    Args:
      wanted: a type, or a tuple of some; a pattern of a text; `Each`; or a dictionary of what the
        fields of an object must be, which may have more.
      name: of the value.
    """
    if isinstance(wanted, (dict, Each)) and not isinstance(value, dict):
        yield f"{name or 'it'} is no object"
    elif isinstance(wanted, Each):
        for key, inner in value.items():
            yield from misfits(inner, wanted.value, f"{name}.{ascii(key)[1:-1]:.80}")
    elif isinstance(wanted, dict):
        for key, inner in wanted.items():
            where = f"{name}.{key}".lstrip(".")
            if key in value:
                yield from misfits(value[key], inner, where)
            else:
                yield f"{where} is missing"
    elif isinstance(wanted, re.Pattern):
        if not isinstance(value, str) or not wanted.fullmatch(value):
            yield f"{name} is {ascii(value):.80}"
    elif type(value) not in (wanted if isinstance(wanted, tuple) else (wanted,)):
        kinds = wanted if isinstance(wanted, tuple) else (wanted,)
        yield f"{name} is {ascii(value):.80}, not {' or '.join(kind.__name__ for kind in kinds)}"
