"""What a comparison compares, as its config file and its flags say."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from safepatch_jax.methods.bench import Method
from safepatch_jax.runtime import config_file
from safepatch_jax.settings import Settings


@dataclasses.dataclass(frozen=True)
class ComparisonOptions:
    """What is compared; a config file may hold them as a dictionary COMPARE.

    Attributes:
      methods: see `parse_methods`.
      suite: see `load_suite`.
      seeds: of training, scores and random retention; each seeded method is made once with each.
      judge, grader: see `open_judge` and `mt_bench.open_grader`.
      settings: {method: {'group.option': value}}: settings of one method alone.
    """

    methods: str = "all"
    suite: str = "quick"
    seeds: tuple[int, ...] = (0,)
    judge: str = "phrases"
    grader: str = ""
    settings: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, path: str | pathlib.Path) -> ComparisonOptions:
        """Read COMPARE of a config file; without it the defaults.

        Raises:
          ValueError: an unknown name or another form.
        """
        values = config_file.read(path)[1].get("COMPARE", {})
        if not isinstance(values, dict):
            raise ValueError(
                f"{path}: COMPARE must be a dictionary with {', '.join(_FORMS)}, got {values!r}."
            )
        if unknown := sorted(map(str, values.keys() - _FORMS.keys())):
            known = ", ".join(sorted(_FORMS))
            raise ValueError(f"{path}: COMPARE has no '{unknown[0]}'; there are {known}.")
        for name, value in values.items():
            fits, form = _FORMS[name]
            if not fits(value):
                raise ValueError(f"{path}: COMPARE, {name} must be {form}, got {value!r}.")
        if "seeds" in values:
            values = values | {"seeds": tuple(values["seeds"])}
        return cls(**values)

    def replaced(self, flags: Mapping[str, str]) -> ComparisonOptions:
        """Return these options with some replaced by what flags say.

        Raises:
          ValueError: seeds that are no whole numbers.
        """
        values: dict[str, Any] = dict(flags)
        if "seeds" in values:
            try:
                values["seeds"] = tuple(map(int, values["seeds"].split(",")))
            except ValueError:
                raise ValueError(
                    "--seeds takes whole numbers with commas between, such as 0,1,2; got "
                    f"'{values['seeds']}'."
                ) from None
        return dataclasses.replace(self, **values)

    def differences(self, method: Method) -> dict[str, Any]:
        """Return the settings in which a method differs from the run's."""
        return {**method.settings, **self.settings.get(method.name, {})}

    def settings_of(self, method: Method, settings: Settings) -> Settings:
        """Return the settings of a method.

        Raises:
          ValueError: a setting that is not the method's, or a bad value.
        """
        values = self.settings.get(method.name, {})
        where = f"COMPARE, settings of {method.name}"
        for name in values:
            if name not in method.options:
                settings.override({name: values[name]}, where)  # raises if there is no such setting
                options = ", ".join(method.options) or "none"
                raise ValueError(
                    f"{where}: {name} is not one that it takes alone ({options}). Give it for all "
                    "methods, in CONFIG or as a flag."
                )
        return settings.override(dict(method.settings), method.name).override(dict(values), where)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_seeds(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(type(seed) is int for seed in value)


def _is_settings(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(own, dict) for own in value.values())


_FORMS = {
    "methods": (_is_text, "a text"),
    "suite": (_is_text, "a text"),
    "judge": (_is_text, "a text"),
    "grader": (_is_text, "a text"),
    "seeds": (_is_seeds, "whole numbers: (0, 1, 2)"),
    "settings": (_is_settings, "{method: {'group.option': value}}"),
}
