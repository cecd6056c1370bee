"""What a run reads besides the model: records by role and split, and how prompts are written. Needs
no JAX."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Sequence

from safepatch_jax.data.prompt_format import read_format
from safepatch_jax.data.records import DATA_ROLES, Record, load_records, take
from safepatch_jax.data.windows import DERIVE
from safepatch_jax.runtime import files
from safepatch_jax.runtime.paths import resolve
from safepatch_jax.settings import Settings

Read = Callable[..., Sequence[Record]]  # reads a role's records, as `load_records`


class Inputs:
    """Records and their hashes; read on first use and kept.

    Args:
      settings: of the run.
      read: reads a role's records; runs that share data may share a reader that remembers.

    Attributes:
      settings: of the run.
      prompt_format: how prompts are written.
      cache_dir: absolute path.
    """

    def __init__(self, settings: Settings, read: Read = load_records):
        self.settings, self._read = settings, read
        # Now: a file that is edited later is another template.
        data = settings.data
        self.prompt_format = read_format(
            data.template,
            data.system,
            data.template_kwargs,
            settings.evaluate.thinking,
            settings.evaluate.think_tokens,
        )
        self.cache_dir = resolve(settings.run.cache_dir)

    @functools.cached_property
    def records(self) -> dict[str, list[Record]]:
        data = self.settings.data
        records = {}
        for role in DATA_ROLES:
            source = getattr(data, role)
            records[role] = list(
                self._read(role, source, data.manual_dir, self.cache_dir / "datasets")
            )
        if data.category:
            records["harmful"] = _of_categories(records["harmful"], data.category, data.harmful)
        return records

    @functools.cached_property
    def data_hashes(self) -> dict[str, str]:
        """Of each role's records, and of a template that is a file."""
        hashes = {}
        for role, records in self.records.items():
            hashes[role] = files.text_hash([record.fields() for record in records])
        if self.prompt_format.sha256:
            hashes["template"] = self.prompt_format.sha256
        return hashes

    def split(self, role: str, split: str, limit: int | None = None) -> list[Record]:
        data = self.settings.data
        if limit is None:
            limit = data.train_limit if split == "train" else data.eval_limit
        return take(self.records[role], split, limit)


def score_window(settings: Settings, role: str) -> str:
    """Return the window of answer tokens over which a patch is scored."""
    window = getattr(settings.score, f"{role}_tokens")
    return getattr(settings.derive, f"{role}_tokens") if window == DERIVE else window


def _of_categories(records: Sequence[Record], names: str, source: str) -> list[Record]:
    """Return the records of categories given as 'A+B'; one of several categories ('A; B') is in
    each of them.

    Raises:
      ValueError: no record is of one of the categories; lists those that are there.
    """
    choice = _parts(names, "+")
    counts: collections.Counter[str] = collections.Counter()
    result = []
    for record in records:
        categories = _parts(record.category, ";")
        counts.update(name or "(none)" for name in categories)
        if categories & choice:
            result.append(record)
    if unknown := sorted(choice - counts.keys()):
        missing = ", ".join(map(repr, unknown))
        known = ", ".join(f"{name} ({count:,})" for name, count in sorted(counts.items()))
        raise ValueError(
            f"{source}: no record is of the category {missing} (data.category). There are {known}."
        )
    return result


def _parts(text: str, separator: str) -> set[str]:
    return {part.strip() for part in text.split(separator)}
