"""Which points a sweep tries: products of values, and one setting at a time around the config's own
point."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from safepatch_jax.settings import PatchSettings, Settings, declared_options

SEED = "run.seed"
MARGINS, ANSWERS = "margins", "answers"  # by what a sweep measures
MEASURES = (MARGINS, ANSWERS)
EXAMPLE = "'patch.beta=1,2,3;patch.retention=0.3,1'"


@dataclasses.dataclass(frozen=True)
class Point:
    """Patch settings, and the seed of random retention and stochastic rounding; training and scores
    keep the run's own."""

    patch: PatchSettings
    seed: int

    @classmethod
    def of(cls, settings: Settings) -> Point:
        return cls(settings.patch, settings.run.seed)

    def flat(self) -> dict[str, Any]:
        values = dataclasses.asdict(self.patch)
        return {f"patch.{name}": value for name, value in values.items()} | {SEED: self.seed}


def design(settings: Settings, grids: Sequence[str], arounds: Sequence[str]) -> list[Point]:
    """Return the points of all grids, then those around the settings' own point; each once.

    Args:
      settings: where the own point lies.
      grids: each ``NAME=VALUE,VALUE;NAME=...``, of which all combinations are tried.
      arounds: likewise; the own point, and those in which one setting has another of its values,
        are tried.

    Raises:
      ValueError: nothing is given, it is not of this form, or a point is out of bounds (names the
        point).
    """
    if not grids and not arounds:
        raise ValueError(
            f"Nothing to try: give --grid={EXAMPLE} (all combinations), --around={EXAMPLE} (one "
            "setting at a time), or both."
        )
    points = []
    for text in grids:
        grid = parse_values(text, "--grid")
        for values in itertools.product(*grid.values()):
            points.append(_point(settings, dict(zip(grid, values)), "--grid"))
    for text in arounds:
        points.append(Point.of(settings))
        for name, values in parse_values(text, "--around").items():
            points += [_point(settings, {name: value}, "--around") for value in values]
    return list(dict.fromkeys(points))


def parse_values(text: str, flag: str) -> dict[str, list[Any]]:
    """Read values by setting, such as ``patch.beta=1,2,3;patch.retention=0.3,1``.

    Raises:
      ValueError: not of this form, an unknown setting (with the nearest match), or one that is
        neither of the patch group nor the seed.
    """
    values: dict[str, list[Any]] = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        name, equals, words = (word.strip() for word in part.partition("="))
        if not equals:
            raise ValueError(
                f"{flag}: '{part}' is not patch.OPTION=VALUE,VALUE,... or {SEED}=VALUE,..."
            )
        if name in values:
            raise ValueError(
                f"{flag}: {name} is given twice; put all its values in one list, or give a second "
                f"{flag}."
            )
        _check_name(name, flag)
        values[name] = [_value(name, word.strip(), flag) for word in words.split(",")]
    if not values:
        raise ValueError(f"{flag} is empty; give for instance {flag}={EXAMPLE}.")
    return values


def _check_name(name: str, flag: str) -> None:
    if name not in declared_options():
        Settings().override({name: None}, flag)  # raises, with the nearest match
    if name == "patch.scope":
        raise ValueError(
            f"{flag}: patch.scope decides what is scored; give it as a flag and sweep once for "
            "each scope."
        )
    if name != SEED and not name.startswith("patch."):
        raise ValueError(
            f"{flag}: {name} is not patch.OPTION or {SEED}; what changes training or scores is "
            "given as a flag, with a workdir and a sweep for each value."
        )


def _value(name: str, text: str, flag: str) -> Any:
    kind = type(declared_options()[name].default)
    if not text:
        raise ValueError(f"{flag}: {name} has an empty value; separate values by single commas.")
    try:
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError) as error:
        expected = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise ValueError(f"{flag}: {name} must be {expected}, got '{text}'.") from error


def _point(settings: Settings, values: Mapping[str, Any], flag: str) -> Point:
    text = ", ".join(f"{name}={written(value)}" for name, value in values.items())
    return Point.of(settings.override(values, f"{flag}, point {text}"))


def varied(points: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names whose values differ among flat points, in the order of the settings."""
    first, *others = points
    names = set()
    for point in others:
        names.update(name for name in first if point[name] != first[name])
    return [name for name in first if name in names]


def label(values: Mapping[str, Any], names: Iterable[str]) -> str:
    """Say some of a flat point's settings in a few words."""
    return ", ".join(f"{short(name)} {written(values[name])}" for name in names)


def short(name: str) -> str:
    return name.partition(".")[2]


def written(value: Any) -> str:
    """Return a value as a flag takes it."""
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return str(value).lower()


def ordered(name: str, values: Iterable[Any]) -> list[Any]:
    """Return a setting's values, each once: numbers by size, words as the setting declares them."""
    choices = declared_options()[name].metadata["choices"]
    return sorted(set(values), key=choices.index if choices else None)
