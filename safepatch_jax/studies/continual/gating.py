"""The gate of a chain: may a link that was made be added to it?

It is measured on the chain's own records like every model of the chain; of ordinary answers each
one's likelihood is kept too, as a paired test needs them.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from safepatch_jax.evaluation.sequential import FAIL, PASS
from safepatch_jax.evaluation.suites import Measure
from safepatch_jax.run.stages import versions
from safepatch_jax.runtime import files, processes
from safepatch_jax.runtime.console import say
from safepatch_jax.studies.continual.measures import COMMON, EACH, Measures, Model
from safepatch_jax.studies.gate import report
from safepatch_jax.studies.gate.checks import (
    CODES,
    OURS,
    THEIRS,
    Check,
    line,
    of_row,
    verdict_of,
)
from safepatch_jax.studies.gate.rules import ACCEPT, KINDS, START, Rules

GATES = "gates"
LOOKALIKE, ORDINARY = COMMON


def chosen(rules: Rules, harmful: Iterable[str]) -> dict[str, list[str]]:
    """Return the names of a chain's measures by the kind of check.

    Args:
      harmful: names of its harmful sets.

    Raises:
      ValueError: rules for measures that a chain does not have.
    """
    suite = [Measure(name, "harm", "chain") for name in harmful]
    suite += [Measure(LOOKALIKE, "refusal", "chain"), Measure(ORDINARY, "text", "chain")]
    names = {}
    for kind in rules.checks:
        names[kind] = [measure.name for measure in rules.chosen(kind, suite)]
    return names


class ChainGate:
    """Judges links by rules.

    Args:
      rules: of the gate.
      measures: of the chain.
      folder: receives a folder with the report of each link that was judged.

    Raises:
      ValueError: see `chosen`.
    """

    def __init__(self, rules: Rules, measures: Measures, folder: pathlib.Path):
        self.rules, self._measures, self._folder = rules, measures, folder
        self._chosen = chosen(rules, measures.names)

    @property
    def against_start(self) -> bool:
        """Whether links are compared with the starting model, and not with their parents."""
        return self.rules.against == START

    def judge(self, candidate: Model, against: Model, names: Mapping[str, str]) -> dict[str, Any]:
        """Measure both models and write the report of the gate.

        Args:
          names: of both, in the report.

        Returns:
          what the log has of it: rules, verdict, whether the link is accepted, and a line a check.
        """
        models = {OURS: candidate, THEIRS: against}
        prompts: dict[str, Any] = {}
        values = {side: self._values(model, prompts) for side, model in models.items()}
        checks = []
        for kind, parts in self._chosen.items():
            members: dict[str, list[str]] = {}
            for part in parts:
                for i in values[OURS][part].keys() & values[THEIRS][part].keys():
                    members.setdefault(i, []).append(part)
            if not members:
                raise ValueError(
                    f"[{kind}]: the chain has no prompt of {', '.join(parts)} that both models "
                    "have answered. Leave the check out of the rules."
                )
            check = Check(kind, self.rules, members)
            while check.open:
                check.look(values)
            checks.append(check)
        content = self._content(checks, prompts, names)
        processes.on_first(report.write, content, self._folder / names[OURS])
        for text in report.summary(content):
            say(f"  {text}")
        verdict = content["verdict"]
        return {
            "rules": self.rules.hash,
            "against": names[THEIRS],
            "verdict": verdict,
            "accepted": verdict == PASS or (verdict != FAIL and self.rules.undecided == ACCEPT),
            "checks": [line(check) for check in content["checks"]],
        }

    def _values(self, model: Model, prompts: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Return by part and prompt what a model did; adds the prompts to `prompts`."""
        parts = set()
        for names in self._chosen.values():
            parts.update(names)
        wanted = [EACH if part == ORDINARY else part for part in sorted(parts)]
        self._measures.measure(model, wanted)
        values: dict[str, dict[str, Any]] = {}
        for part in wanted:
            rows = processes.on_first(self._measures.answers, model, part)
            by_id = values[ORDINARY if part == EACH else part] = {}
            for row in rows:
                i = files.text_hash(row["prompt"])[:16]
                by_id[i] = of_row(row) if part == EACH else row["outcome"]
                prompts[i] = {"prompt": row["prompt"], "category": ""}
        return values

    def _content(
        self, checks: list[Check], prompts: Mapping[str, Any], names: Mapping[str, str]
    ) -> dict[str, Any]:
        verdict = verdict_of(checks)
        return {
            "verdict": verdict,
            "exit_code": CODES[verdict],
            "models": dict(names),
            "stored": [],
            "suite": "the records of the chain",
            "judge": "phrases",
            "options": {},
            "rules": self.rules.to_dict(),
            "checks": [check.result(prompts) for check in checks],
            "not_checked": [KINDS[kind].title for kind in KINDS if kind not in self.rules.checks],
            "versions": versions(),
        }
