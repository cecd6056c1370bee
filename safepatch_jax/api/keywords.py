"""Settings given by keyword: which option of the settings table a keyword names."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from safepatch_jax.data.records import DATA_ROLES
from safepatch_jax.option import nearest
from safepatch_jax.runtime import files
from safepatch_jax.settings import Settings, declared_options


def option_of(keyword: str, groups: Sequence[str] = ()) -> str:
    """Return the setting, 'group.option', that a keyword names.

    Args:
      keyword: the option, where one group alone has it or one of `groups` has; 'group_option' or
        'group.option' always.
      groups: of the call, which come first.

    Raises:
      ValueError: there is none (with the nearest name), or several groups have it.
    """
    known = declared_options()
    candidates = [f"{group}.{keyword}" for group in groups]
    candidates += [keyword, keyword.replace("_", ".", 1)]
    for name in candidates:
        if name in known:
            return name
    several = [name for name in known if name.partition(".")[2] == keyword]
    if len(several) == 1:
        return several[0]
    if several:
        fits = " or ".join(name.replace(".", "_", 1) for name in several)
        raise ValueError(f"The setting {keyword} is one of several groups: give {fits}.")
    words = {name.partition(".")[2] for name in known}
    words |= {name.replace(".", "_", 1) for name in known}
    raise ValueError(
        f"There is no setting '{keyword}'{nearest(keyword, sorted(words))}. docs/api.md says how "
        "settings are named; safepatch run --help_all lists them."
    )


def with_keywords(
    settings: Settings,
    values: Mapping[str, Any],
    groups: Sequence[str],
    data: pathlib.Path,
    where: str,
) -> Settings:
    """Return settings with keywords put in; a value of None changes nothing.

    Args:
      settings: to begin with.
      values: by keyword. Of a data role (harmful, lookalike, ordinary) also a sequence of records:
        dictionaries with prompt, answer and so on.
      groups: see `option_of`.
      data: the folder in which records are kept, as files by their hash.
      where: the call, for errors.

    Raises:
      ValueError: an unknown keyword, or a bad value; what is wrong with all values is collected.
    """
    changes: dict[str, Any] = {}
    for keyword, value in values.items():
        if value is None:
            continue
        name = option_of(keyword, groups)
        if name in changes:
            raise ValueError(f"{where}: {name} is given twice, once as {keyword}. Give it once.")
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        role = name.removeprefix("data.")
        if role in DATA_ROLES and isinstance(value, list | tuple):
            value = _kept(role, value, data)
        changes[name] = value
    return settings.override(changes, where)


def _kept(role: str, records: Sequence[Any], folder: pathlib.Path) -> str:
    """Write records into a file that is called by their hash; return its path."""
    if not records or not all(isinstance(record, Mapping) for record in records):
        raise ValueError(
            f"{role}: records are dictionaries such as {{'prompt': ..., 'answer': ...}}, at least "
            "one; or give a file, 'builtin' or 'set:NAME'."
        )
    rows = [dict(record) for record in records]
    try:
        path = folder / f"{role}-{files.text_hash(rows)[:16]}.jsonl"
    except TypeError as error:
        raise ValueError(f"{role}: a record is not of texts alone: {error}.") from None
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        files.write_jsonl(path, rows)
    return str(path)
