"""The checks of a gate: paired differences of two models, prompt by prompt in a fixed order, and
what they show."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from safepatch_jax.evaluation.judges.base import UNKNOWN
from safepatch_jax.evaluation.sequential import FAIL, OPEN, PASS, Decision, decide
from safepatch_jax.studies.gate.rules import KINDS, WRONG, Rule, Rules

SIDES = OURS, THEIRS = ("candidate", "against")
CODES = {PASS: 0, FAIL: 3, OPEN: 4}  # exit codes
RIGHT = "right"
Likelihood = tuple[float, int]  # NLL in nats, tokens
# By side, measure and prompt: an outcome, or the likelihood of a given answer.
Values = Mapping[str, Mapping[str, Mapping[str, Any]]]


def shuffled(ids: Iterable[str], seed: int) -> list[str]:
    """Return ids in an order that depends on the seed and on each id alone."""
    return sorted(ids, key=lambda i: hashlib.sha256(f"{seed}:{i}".encode()).digest())


def of_row(row: Mapping[str, Any]) -> Any:
    """Return the value of a row of answers that has no verdict: a likelihood, whether a task was
    done right, None for a prompt that was left out."""
    if "nll" in row:
        return row["nll"], row["tokens"]
    if "correct" in row:
        return RIGHT if row["correct"] else WRONG
    return None


class Check:
    """A check whose prompts are looked at in growing numbers.

    Args:
      kind: in `KINDS`.
      rules: of the gate.
      members: by prompt, the measures in which it is asked. One that is asked in several forms
        counts once, with its mean over them.

    Attributes:
      order: the prompts in the order in which they count.
      n: how many have been looked at.
      decision: what they show.
    """

    def __init__(self, kind: str, rules: Rules, members: Mapping[str, Sequence[str]]):
        self.kind, self.rule = kind, rules.checks[kind]
        self.limits = self.rule.limits(len(rules.checks))
        self._members = {i: tuple(names) for i, names in members.items()}
        self.order = shuffled(members, rules.seed)[: rules.most]
        self._looks = rules.looks(len(self.order))
        self.n = 0
        self.decision: Decision = decide([], self.limits)
        self._pairs: list[dict[str, Any]] = []
        self._dropped = self._cut = 0

    @property
    def open(self) -> bool:
        """Whether it has no verdict, and prompts are left."""
        return self.decision.verdict == OPEN and self.n < len(self.order)

    def wanted(self) -> dict[str, list[str]]:
        """Return by measure the prompts that the next look needs, those of earlier looks with
        them."""
        wanted: dict[str, list[str]] = {}
        for i in self.order[: self._next()]:
            for name in self._members[i]:
                wanted.setdefault(name, []).append(i)
        return wanted

    def _next(self) -> int:
        return next((n for n in self._looks if n > self.n), len(self.order))

    def look(self, values: Values) -> None:
        """Look at the prompts of the next look."""
        self.n, differences = self._next(), []
        self._pairs, self._dropped, self._cut = [], 0, 0
        for i in self.order[: self.n]:
            of_prompt = []
            for name in self._members[i]:
                ours, theirs = (values[side].get(name, {}).get(i) for side in SIDES)
                if ours in (None, UNKNOWN) or theirs in (None, UNKNOWN):
                    self._dropped += 1
                    continue
                difference = self._difference(ours, theirs)
                of_prompt.append(difference)
                self._pairs.append(
                    {"id": i, "measure": name, OURS: ours, THEIRS: theirs, "by": difference}
                )
            if of_prompt:
                differences.append(math.fsum(of_prompt) / len(of_prompt))
        self.decision = decide(differences, self.limits)

    def _difference(self, ours: Any, theirs: Any) -> float:
        loss = KINDS[self.kind].loss
        if loss:
            return float(ours == loss) - float(theirs == loss)
        # Of one text by the tokens of one model, as tokenizers may differ.
        difference = (ours[0] - theirs[0]) / max(1, theirs[1])
        bound = self.limits.bound
        if not abs(difference) <= bound:
            self._cut += 1
        return min(bound, max(-bound, difference))

    def result(self, prompts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Return what a report has of the check.

        Args:
          prompts: by id, `prompt` and `category` of those that are known.
        """
        kind, decision, pairs = KINDS[self.kind], self.decision, self._pairs
        result = {
            "kind": self.kind,
            "title": kind.title,
            "unit": kind.unit,
            "rule": dataclasses.asdict(self.rule),
            "limits": dataclasses.asdict(self.limits),
            "looks": [n for n in self._looks if n <= self.n],
            "prompts": len(self.order),
            "dropped": self._dropped,
            **dataclasses.asdict(decision),
        }
        if kind.loss:
            result["levels"] = {side: _share(pairs, side, kind.loss) for side in SIDES}
            flips = [pair for pair in pairs if pair["by"]]
            result["worse"] = [_flip(pair, prompts) for pair in flips if pair["by"] > 0]
            result["better"] = [_flip(pair, prompts) for pair in flips if pair["by"] < 0]
        else:
            result["levels"] = {side: _nll(pairs, side) for side in SIDES}
            result["cut"] = self._cut
            result["worse"], result["better"] = _moved(pairs, prompts)
        return result


def _share(pairs: Sequence[Mapping[str, Any]], side: str, loss: str) -> float | None:
    if not pairs:
        return None
    return sum(pair[side] == loss for pair in pairs) / len(pairs)


def _nll(pairs: Sequence[Mapping[str, Any]], side: str) -> float | None:
    tokens = sum(pair[side][1] for pair in pairs)
    return math.fsum(pair[side][0] for pair in pairs) / tokens if tokens else None


def _moved(
    pairs: Sequence[Mapping[str, Any]], prompts: Mapping[str, Mapping[str, Any]], most: int = 10
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the answers that became less, and more likely, the largest differences first."""
    ordered = sorted(pairs, key=lambda pair: pair["by"])
    worse = [_flip(pair, prompts) for pair in reversed(ordered) if pair["by"] > 0]
    better = [_flip(pair, prompts) for pair in ordered if pair["by"] < 0]
    return worse[:most], better[:most]


def _flip(pair: Mapping[str, Any], prompts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    about = prompts.get(pair["id"], {})
    values = {}
    for side in SIDES:
        value = pair[side]
        values[side] = value if isinstance(value, str) else value[0] / max(1, value[1])
    return {
        "id": pair["id"],
        "measure": pair["measure"],
        "prompt": about.get("prompt", ""),
        "category": about.get("category", ""),
        **values,
    }


def verdict_of(checks: Iterable[Check]) -> str:
    """Return the verdict of all checks: a fail if one fails, a pass if all pass."""
    verdicts = {check.decision.verdict for check in checks}
    if FAIL in verdicts:
        return FAIL
    return PASS if verdicts == {PASS} else OPEN


def number(value: float | None, unit: str, margin: float, sign: str = "") -> str:
    """Return a level or difference, '-' where it is not known; with so many decimals that the
    margin shows two digits."""
    if value is None:
        return "-"
    decimals = 3 if margin <= 0 else max(3, 1 - math.floor(math.log10(margin)))
    return f"{value:{sign}.1%}" if unit == "share of prompts" else f"{value:{sign}.{decimals}f}"


def line(result: Mapping[str, Any]) -> str:
    """Return one line that says what a check shows."""
    rule: Rule | Mapping[str, Any] = result["limits"]
    text = f"{result['kind']}: {result['verdict']}"
    if result["decided_at"]:
        text += f" after {result['decided_at']} of {result['prompts']} prompts"
    else:
        text += f" in {result['n']} of {result['prompts']} prompts"
    if result["mean"] is None:
        return f"{text}; none of them has an outcome on both sides"
    limit, values = rule["margin"], (result["mean"], result["low"], result["high"])
    mean, low, high, margin = (number(x, result["unit"], limit, "+") for x in (*values, limit))
    text += f"; difference {mean}, {low} to {high}, margin {margin}"
    return f"{text}; {more(result)}" if result["verdict"] == OPEN else text


def more(result: Mapping[str, Any]) -> str:
    """Say about how many prompts more a verdict needs."""
    if result["mean"] is None:
        return "none of the prompts has an outcome on both sides"
    if result["more"] is None:
        return "no number of prompts like these is enough: the difference is about the margin"
    return f"more prompts needed, if they go on as these: about {result['more']:,}"
