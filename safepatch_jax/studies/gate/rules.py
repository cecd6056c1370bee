"""The rules of a gate: what may become worse by how much, and how surely that must be shown.

A TOML or JSON file; docs/gate.md has its keys.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from safepatch_jax.evaluation.judges.base import COMPLIED, INCOHERENT, REFUSED
from safepatch_jax.evaluation.sequential import Limits
from safepatch_jax.evaluation.suites import Measure
from safepatch_jax.option import nearest
from safepatch_jax.runtime import files
from safepatch_jax.runtime.config_file import shipped_file
from safepatch_jax.runtime.console import some
from safepatch_jax.runtime.reading import Refused, reading

DEFAULT = "gate.toml"  # in configs/
REFUSE, ACCEPT = UNDECIDED = ("refuse", "accept")
PARENT, START = AGAINST = ("parent", "start")


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of check.

    Attributes:
      title: in reports.
      measures: kinds of measures of a suite that it takes.
      loss: the outcome that is to become no more frequent; '' of likelihoods, 'wrong' of tasks.
      unit: of a difference.
      bound: largest size of a difference, unless a rule says otherwise.
    """

    title: str
    measures: tuple[str, ...]
    loss: str
    unit: str = "share of prompts"
    bound: float = 1.0


WRONG = "wrong"
KINDS = {
    "harm": Kind("Harm: harmful requests complied with", ("harm",), COMPLIED),
    "refusal": Kind("Over-refusal: harmless requests refused", ("refusal",), REFUSED),
    "incoherent": Kind("Incoherent answers to harmless requests", ("refusal",), INCOHERENT),
    "text": Kind("Utility: NLL of given answers", ("text",), "", "nats a token"),
    "accuracy": Kind("Utility: wrong answers to tasks", ("mmlu", "gsm8k"), WRONG),
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """One check of a gate; the fields are the keys of its table.

    Attributes:
      margin: how much more of it is tolerated: a share of prompts, of 'text' nats a token.
      fail_above: fails where the difference is shown to be above this; the margin if left out.
      confidence: of a pass.
      bound: differences of 'text' beyond it are cut to it.
      measures: names of the suite's measures; all of the kind if left out.
    """

    margin: float
    fail_above: float | None = None
    confidence: float = 0.95
    bound: float = 1.0
    measures: tuple[str, ...] = ()

    def limits(self, checks: int) -> Limits:
        """Return what is to be shown. The error of a fail is shared by all checks, as one fail is
        enough; a pass needs them all, so each may have its own."""
        alpha = 1 - self.confidence
        fail_above = self.margin if self.fail_above is None else self.fail_above
        return Limits(self.margin, fail_above, alpha, alpha / checks, self.bound)


@dataclasses.dataclass(frozen=True)
class Rules:
    """The rules of a gate; the fields are the file's keys, and `checks` its tables, by kind.

    Attributes:
      seed: of the order in which prompts are asked.
      first: prompts of each check before the first look.
      growth: each look has so many times as many prompts as the one before.
      most: prompts of a check, at most.
      undecided: what a chain does with a link on which there is not enough evidence.
      against: what a chain compares a link with, its parent or the starting model.
    """

    checks: Mapping[str, Rule]
    seed: int = 0
    first: int = 50
    growth: float = 1.5
    most: int = 1_000_000
    undecided: str = REFUSE
    against: str = PARENT

    @property
    def hash(self) -> str:
        return files.text_hash(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def looks(self, prompts: int) -> list[int]:
        """Return after how many prompts one looks, of so many; the last look has them all."""
        last, n, looks = min(prompts, self.most), min(self.first, self.most), []
        while n < last:
            looks.append(n)
            n = max(n + 1, int(n * self.growth))
        return [*looks, last]

    def chosen(self, kind: str, suite: Sequence[Measure]) -> list[Measure]:
        """Return the measures of a suite that a check takes.

        Raises:
          ValueError: there is none, or a name of the rule is not among them.
        """
        wanted = " or ".join(KINDS[kind].measures)
        fitting = {m.name: m for m in suite if m.kind in KINDS[kind].measures}
        if not fitting:
            raise Refused(
                f"[{kind}]: the suite has no measure of kind {wanted}. Give a --suite that has "
                "one, or rules without that table."
            )
        names = self.checks[kind].measures or tuple(fitting)
        for name in names:
            if name not in fitting:
                raise Refused(
                    f"[{kind}] measures: the suite has no measure '{name:.100}' of kind {wanted}"
                    f"{nearest(name, fitting)}."
                )
        return [m for m in fitting.values() if m.name in names]


_NUMBERS = {  # least and most of each, inclusive
    "margin": (1e-6, 1e6),
    "fail_above": (0.0, 1e6),
    "confidence": (0.5, 0.999999),
    "bound": (1e-6, 1e6),
    "growth": (1.0, 100.0),
    "seed": (0, 2**63),
    "first": (1, 1_000_000),
    "most": (1, 1_000_000),
}
_WHOLE = ("seed", "first", "most")
_WORDS = {"undecided": UNDECIDED, "against": AGAINST}


def read_rules(text: str) -> Rules:
    """Read a rules file; '' is the shipped one.

    Raises:
      ValueError: there is no such file, it is neither TOML nor JSON, or a key or value is wrong.
    """
    path = pathlib.Path(text) if text else shipped_file(DEFAULT)
    if not os.path.isfile(path):
        raise Refused(
            f"no rules file '{path}'. Give a .toml or .json file, such as a copy of {DEFAULT} of "
            "configs/."
        )
    with reading(path, "rules", "It is TOML (.toml) or JSON (.json); docs/gate.md has the keys."):
        raw = path.read_text(encoding="utf-8")
        entries = json.loads(raw) if path.suffix == ".json" else tomllib.loads(raw)
        if not isinstance(entries, dict):
            raise Refused(f"{path} holds no table of rules; docs/gate.md has the keys.")
        return _rules(str(path), entries)


def _rules(path: str, entries: Mapping[str, Any]) -> Rules:
    keys = [field.name for field in dataclasses.fields(Rules) if field.name != "checks"]
    checks, problems, values = {}, [], {}
    for key, value in entries.items():
        if key in KINDS:
            checks[key] = _rule(key, value, problems)
        elif key in keys:
            values[key] = _value(key, key, value, problems)
        else:
            problems.append(_unknown(key, "", [*keys, *KINDS]))
    if not checks and not problems:
        problems.append(f"there is no check: give at least one table of {', '.join(KINDS)}")
    if problems:
        raise Refused(f"{path}: {some(problems)}.")
    return Rules(checks, **values)


def _rule(kind: str, entries: Any, problems: list[str]) -> Rule | None:
    """Return the rule of a table; what is wrong with it goes to `problems`."""
    if not isinstance(entries, dict):
        problems.append(f"{kind} is no table: write [{kind}] and below it margin = 0.05")
        return None
    keys, values, before = [field.name for field in dataclasses.fields(Rule)], {}, len(problems)
    for key, value in entries.items():
        where = f"[{kind}] {key}"
        if key not in keys:
            problems.append(_unknown(key, f"[{kind}] ", keys))
        elif key == "bound" and kind != "text":
            problems.append(f"{where}: only [text] has one, shares are bounded by 1")
        elif key == "measures":
            values[key] = _names(where, value, problems)
        else:
            values[key] = _value(where, key, value, problems)
    if "margin" not in entries:
        problems.append(f"[{kind}] lacks margin, the rise that is tolerated")
    if len(problems) > before:
        return None
    try:
        rule = Rule(**values)
        rule.limits(1)
    except ValueError as error:
        problems.append(f"[{kind}] {str(error).rstrip('.')}")
        return None
    return rule


def _unknown(key: str, where: str, known: Sequence[str]) -> str:
    return f"{where}unknown key '{key:.60}'{nearest(key, known)}; there are {', '.join(known)}"


def _names(where: str, value: Any, problems: list[str]) -> tuple[str, ...]:
    if isinstance(value, list) and value and all(isinstance(name, str) for name in value):
        return tuple(value)
    problems.append(f"{where} must be a list of names of measures")
    return ()


def _value(where: str, key: str, value: Any, problems: list[str]) -> Any:
    """Return a number or word; what is wrong with it goes to `problems`."""
    if key in _WORDS:
        if value not in _WORDS[key]:
            problems.append(f"{where} must be {' or '.join(_WORDS[key])}, got {value!r:.60}")
        return value
    least, most = _NUMBERS[key]
    kinds = (int,) if key in _WHOLE else (int, float)
    if type(value) not in kinds or not least <= value <= most:
        kind = "whole number" if key in _WHOLE else "number"
        problems.append(f"{where} must be a {kind} from {least:g} to {most:g}, got {value!r:.60}")
    return value
