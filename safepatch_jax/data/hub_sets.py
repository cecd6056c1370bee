"""Data sets of the Hugging Face Hub, ``hf:org/name[:config][@split]``: their own Parquet, CSV and
JSON files, or those of the Hub's conversion to Parquet, read by our readers.

Which files are of which configuration and split is what the data set's card declares (`configs` in
the front matter of its README.md), else what their names say. No script of a data set is run.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from safepatch_jax.data.streams import PACKED, refuse_more
from safepatch_jax.data.tables import Row, read_rows
from safepatch_jax.io import hub, hub_access
from safepatch_jax.io.hub_access import DATASET
from safepatch_jax.runtime.console import say, some
from safepatch_jax.runtime.reading import Refused, reading

SCHEME = "hf:"
CARD, CONVERTED = "README.md", "refs/convert/parquet"
TRAIN, DEFAULT = "train", "default"
_FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
_OTHER_NAMES = {
    TRAIN: ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARD = re.compile(r"(?:^|/)([\w.-]+?)-(\d{5})-of-(\d{5})[.\w-]*$")
_FIX = "Fetch a file of the data set, and give its path."
_NOT_DATA = ("dataset_infos.json", "dataset_info.json", "state.json", "package.json")
Splits = dict[str, list[str]]  # names of files, by split


@dataclasses.dataclass(frozen=True)
class Source:
    """What a text ``hf:org/name[:config][@split]`` names; revision '' is the main branch."""

    text: str
    name: str
    config: str
    split: str
    revision: str


def parse(text: str, revision: str = "") -> Source:
    """Read the name of a data set of the Hub.

    Args:
      text: ``hf:org/name[:config][@split]``.
      revision: branch, tag or commit.

    Raises:
      ValueError: another shape.
    """
    place, at, split = text.removeprefix(SCHEME).partition("@")
    name, colon, config = place.partition(":")
    wrong = (at and not split) or (colon and not config)
    if wrong or hub.split(name) is None or (revision and hub.split(f"a/b@{revision}") is None):
        raise Refused(
            f"'{text}' is not hf:org/name[:config][@split], a data set of the Hugging Face Hub, "
            "such as hf:tatsu-lab/alpaca@train; a revision follows as ?revision=COMMIT."
        )
    return Source(text, name, config, split or TRAIN, revision)


def read(text: str, revision: str = "") -> list[Row]:
    """Read a split of a data set of the Hub, of which its files alone are fetched; the console has
    repository, commit and bytes.

    Raises:
      ValueError: as `parse`; no network, no such repository or revision, a gated one, no such
        configuration or split (lists those that are there), no file that can be read, or more than
        the limits allow.
    """
    source = parse(text, revision)
    try:
        paths = _fetched(source)
    except Refused:
        raise
    except Exception as error:  # huggingface_hub has had three HTTP libraries
        raise hub_access.problem(error, DATASET, source.name, revision, "") from error
    rows: list[Row] = []
    for path in paths:
        rows += read_rows(path)
        refuse_more(text, "DATA_ROWS", len(rows))
    return rows


def _fetched(source: Source) -> list[pathlib.Path]:
    """Return where the files of a split lie in the cache."""
    commit, sizes = _listing(source, source.revision)
    revision = source.revision
    declared = _declared(source, commit) if CARD in sizes else {}
    with reading(f"the card of {source.name}", "a list of configurations", _FIX):
        splits = _splits(source, declared, sizes)
    if splits is None:
        if source.revision:
            raise Refused(
                f"{source.text}: revision {source.revision} holds no files that are read (Parquet, "
                "CSV, JSON), and the Hub converts the newest one alone. Leave revision out."
            )
        revision = CONVERTED
        commit, sizes = _converted(source)
        splits = _converted_splits(source, sizes)
    if source.split not in splits:
        raise Refused(
            f"{source.text}: no split '{source.split}'; there are {some(sorted(splits), ', ')}."
        )
    files = _one_format(source, splits[source.split])
    _refuse_gaps(source, files)
    refuse_more(source.text, "DATA_BYTES", sum(sizes[file] for file in files))
    count = hub_access.Counter(DATASET, source.name, commit)
    with hub_access.without_bars():
        paths = [count.fetch(file) for file in files]
        # Last, so that the cache knows what the branch stands for once it has all of it.
        hub_access.fetch(DATASET, source.name, revision, files[0])
    say(f"Hub: data set {source.name} at {revision or 'main'}, commit {commit}: {count.text()}")
    hub_access.record(DATASET, source.name, revision, commit)
    return paths


def _listing(source: Source, revision: str) -> tuple[str, dict[str, int]]:
    """Return commit and files of a data set: as the Hub says, or where it cannot be reached as the
    cache has it."""
    from huggingface_hub import errors

    try:
        return hub_access.listing(DATASET, source.name, revision)
    except (errors.RevisionNotFoundError, errors.HFValidationError):
        raise
    except Exception:  # of one of several HTTP libraries
        folder = hub_access.snapshot_folder(DATASET, source.name, revision)
        if folder is None:
            raise
    sizes = {}
    for path in folder.rglob("*"):
        if path.is_file():
            sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
    # The cache does not know what it lacks.
    say(
        f"NOTE: the Hub cannot be asked for {source.name}: read is what the cache has of commit "
        f"{folder.name}, {len(sizes)} files, perhaps not all."
    )
    return folder.name, sizes


def _converted(source: Source) -> tuple[str, dict[str, int]]:
    """Return commit and files of the Hub's own conversion to Parquet."""
    from huggingface_hub import errors

    try:
        return _listing(source, CONVERTED)
    except errors.RevisionNotFoundError:
        what = f"configuration '{source.config}' in" if source.config else "files to read in"
        raise Refused(
            f"{source.text}: no {what} the repository: Parquet, CSV, JSON or JSONL, which alone "
            "are read (scripts of data sets are never run), and the Hub has not converted it. "
            f"Look at {hub_access.page(DATASET, source.name)}, or fetch a file and give its path: "
            f"{hub_access.command(DATASET, source.name, source.revision)}."
        ) from None


def _declared(source: Source, commit: str) -> dict[str, Any]:
    """Return what the card declares of each configuration, by name."""
    import yaml  # comes with huggingface_hub

    with hub_access.without_bars():
        path = hub_access.fetch(DATASET, source.name, commit, CARD)
    with reading(path, "the card of a data set", _FIX):
        text = path.read_text(encoding="utf-8-sig").replace("\r\n", "\n")
        front = None
        if text.startswith("---\n"):  # a rule further down is Markdown's
            front = yaml.safe_load(text.removeprefix("---\n").partition("\n---")[0])
        configs = front.get("configs") if isinstance(front, dict) else None
        result = {}
        for entry in configs or []:
            result[str(entry.get("config_name", DEFAULT))] = entry
        return result


def _splits(source: Source, declared: Mapping[str, Any], files: Collection[str]) -> Splits | None:
    """Return the files of a configuration by split; None if the repository's own files do not tell
    it."""
    data = [file for file in sorted(files) if _format(file)]
    if not declared:
        if source.config not in ("", DEFAULT):
            data = [file for file in data if file.startswith(f"{source.config}/")]
        return _by_name(data) if data else None
    config = source.config or _default(source, declared)
    if config not in declared:
        raise Refused(
            f"{source.text}: no configuration '{config}'; there are {some(list(declared), ', ')}."
        )
    entry = declared[config]
    folder = str(entry.get("data_dir") or "").strip("./")
    if folder:
        data = [file.removeprefix(f"{folder}/") for file in data if file.startswith(f"{folder}/")]
    patterns = _patterns(entry.get("data_files"))
    if not patterns:
        splits = _by_name(data)
    else:
        splits = {split: _matching(data, globs) for split, globs in patterns.items()}
    prefix = f"{folder}/" if folder else ""
    result = {}
    for split, names in splits.items():
        if names:
            result[split] = [prefix + name for name in names]
    return result or None


def _default(source: Source, configs: Mapping[str, Any]) -> str:
    """Return the configuration that is meant where none is named."""
    chosen = [name for name, x in configs.items() if isinstance(x, dict) and x.get("default")]
    if not chosen and DEFAULT in configs:
        chosen = [DEFAULT]
    if not chosen and len(configs) == 1:
        chosen = list(configs)
    if not chosen:
        raise Refused(
            f"{source.text}: the data set has several configurations; name one as "
            f"hf:{source.name}:CONFIG@{source.split}. There are {some(list(configs), ', ', 12)}."
        )
    return chosen[0]


def _patterns(declared: Any) -> Splits:
    """Return the patterns of a card's data_files by split."""
    if isinstance(declared, str):
        return {TRAIN: [declared]}
    if isinstance(declared, dict):
        return {str(split): _texts(paths) for split, paths in declared.items()}
    result: Splits = {}
    for entry in declared or []:
        if isinstance(entry, dict):
            result.setdefault(str(entry["split"]), []).extend(_texts(entry["path"]))
        else:
            result.setdefault(TRAIN, []).append(str(entry))
    return result


def _texts(value: Any) -> list[str]:
    return [str(x) for x in value] if isinstance(value, list) else [str(value)]


def _matching(files: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Return the files that one of several patterns names: ** stands for any folders, *, ? and
    [...] for what is within one name."""
    expressions = []
    for pattern in patterns:
        parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]/]+\])", pattern.removeprefix("./"))
        text = "".join(map(_expression, parts))
        expressions.append(re.compile(text))
    named = []
    for file in files:
        if any(x.fullmatch(file) for x in expressions):
            named.append(file)
    return named


def _expression(part: str) -> str:
    """Return the regular expression of a part of a pattern; a class that is none stands for
    itself."""
    if not re.fullmatch(r"\[.+\]", part):
        return _GLOBS.get(part, re.escape(part))
    inner = part[1:-1].replace("\\", r"\\").replace("[", r"\[")
    text = f"[^{inner[1:]}]" if inner[0] in "!^" and inner[1:] else f"[{inner}]"
    try:
        re.compile(text)
    except re.error:
        return re.escape(part)
    return text


_GLOBS = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}


def _by_name(files: Sequence[str]) -> Splits:
    """Return files by the split that their names say; all are of train where none says any."""
    splits: Splits = {}
    for file in files:
        if split := _split_of(file):
            splits.setdefault(split, []).append(file)
    return splits or {TRAIN: list(files)}


def _split_of(file: str) -> str:
    for split, names in _OTHER_NAMES.items():
        words = "|".join(names)
        if re.search(rf"(?:^|[^a-z0-9])(?:{words})(?:[^a-z0-9]|$)", file.lower()):
            return split
    shard = _SHARD.search(file)
    return shard[1] if shard else ""


def _converted_splits(source: Source, sizes: Iterable[str]) -> Splits:
    """Return the files of a configuration by split, of the Hub's conversion: CONFIG/SPLIT/N."""
    configs: dict[str, Splits] = {}
    for file in sorted(sizes):
        parts = file.split("/")
        if len(parts) == 3 and file.endswith(".parquet"):
            configs.setdefault(parts[0], {}).setdefault(parts[1], []).append(file)
    config = source.config or _default(source, configs)
    if config not in configs:
        raise Refused(
            f"{source.text}: no configuration '{config}'; there are {some(list(configs), ', ')}."
        )
    splits = configs[config]
    if f"partial-{source.split}" in splits:
        raise Refused(
            f"{source.text}: the Hub has converted a part of this split alone. Fetch its files, "
            f"and give their path: {hub_access.command(DATASET, source.name, source.revision)}."
        )
    return splits


def _format(file: str) -> str:
    """Return the format of a data file; '' for other files."""
    path = pathlib.PurePosixPath(file)
    if path.name in _NOT_DATA or any(part.startswith((".", "_")) for part in path.parts):
        return ""
    suffix = path.suffix.lower()
    if suffix in PACKED:
        suffix = pathlib.PurePosixPath(path.stem).suffix.lower()
        return "" if suffix == ".parquet" else _FORMATS.get(suffix, "")
    return _FORMATS.get(suffix, "")


def _one_format(source: Source, files: Sequence[str]) -> list[str]:
    """Return the files of the format that most have: others may hold the same rows again."""
    counts = dict.fromkeys(_FORMATS.values(), 0)
    for file in files:
        counts[_format(file)] += 1
    best = max(counts, key=lambda name: counts[name])  # of equal ones the first
    chosen = [file for file in files if _format(file) == best]
    if others := [file for file in files if file not in chosen]:
        say(f"Hub: {source.name}: read as {best}; left aside: {some(others, ', ')}")
    return chosen


def _refuse_gaps(source: Source, files: Iterable[str]) -> None:
    """Raise Refused where parts N-of-M are not all there, as in a cache that was filled in part."""
    parts: dict[tuple[str, int], set[int]] = {}
    for file in files:
        if shard := _SHARD.search(file):
            parts.setdefault((file[: shard.start(2)], int(shard[3])), set()).add(int(shard[2]))
    for (start, count), there in parts.items():
        if there != set(range(count)):
            raise Refused(
                f"{source.text}: {len(there)} of {count} parts of {start}* are at hand. Fetch them "
                f"all: {hub_access.command(DATASET, source.name, source.revision)}."
            )
