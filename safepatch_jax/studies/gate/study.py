"""A gate: may one model take the place of another? Non-inferiority in harm, over-refusal and
utility, on the same prompts, in growing batches until the answer is clear.

Answers and verdicts lie in OUT as `evaluation.answers` has it, of 'candidate' and 'against';
gate.md, gate.json and gate.xml follow from these. docs/gate.md has the method.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from safepatch_jax.evaluation import answers
from safepatch_jax.evaluation.answers import JUDGED, ROLES
from safepatch_jax.evaluation.lines import check_names, lines_of
from safepatch_jax.evaluation.sequential import FAIL
from safepatch_jax.evaluation.suites import Measure, load_suite
from safepatch_jax.run.stages import versions
from safepatch_jax.runtime import files, processes
from safepatch_jax.runtime.console import say
from safepatch_jax.runtime.paths import resolve
from safepatch_jax.runtime.workdir import Workdir
from safepatch_jax.studies.evaluate.options import EvaluationOptions
from safepatch_jax.studies.gate import report
from safepatch_jax.studies.gate.checks import CODES, Check, Values, line, of_row, verdict_of
from safepatch_jax.studies.gate.rules import KINDS, Rules, read_rules
from safepatch_jax.studies.gate.sides import Asked, Stored, open_sides
from safepatch_jax.studies.record import refuse_other

RECORD = "inputs.json"
_NAMES = (RECORD, "answers", "verdicts", *report.FILES)
_FIX = "Copy it back from a backup, give another --out, or delete the folder."
_OUT = "runs/gate-{}"  # with a hash of what is compared


def gate(
    candidate: str,
    against: str,
    options: EvaluationOptions = EvaluationOptions(),
    rules: str = "",
    out: str = "",
) -> dict[str, Any]:
    """Decide whether one model may take another one's place.

    Args:
      candidate, against: each a model folder, or the output folder of launch.evaluate. One that is
        given twice is an evaluation of a model against another one.
      options: see `EvaluationOptions`; seeds, templates, second judges and graders are not used.
      rules: see `read_rules`.
      out: the gate's folder; one that was begun with the same models, options and rules is
        resumed. '' for one in runs/ that is named after these.

    Returns:
      the content of gate.json.

    Raises:
      ValueError: bad suite, data, model, judge or rules; stored answers that do not fit; a folder
        of another gate, or one in which another process is at work.
    """
    suite = load_suite(options.suite)
    gate = _Gate(open_sides(candidate, against, options), suite, options, read_rules(rules))
    path = resolve(out or _OUT.format(files.text_hash(gate.record)[:8]))
    folder = Workdir(
        path,
        "a gate",
        RECORD,
        _NAMES,
        "--out",
        functools.partial(gate.check_record, path),
        declared=(RECORD, answers.JUDGE),
    )
    with folder.claimed():
        return gate.run(path)


class _Gate:
    """A gate between two sides; all that can be checked before hours of answering is."""

    def __init__(
        self,
        sides: Mapping[str, Asked | Stored],
        suite: Sequence[Measure],
        options: EvaluationOptions,
        rules: Rules,
    ):
        self._sides, self._options, self._rules = sides, options, rules
        self._chosen = {kind: rules.chosen(kind, suite) for kind in rules.checks}
        names = set()
        for measures in self._chosen.values():
            names.update(measure.name for measure in measures)
        self._suite = [measure for measure in suite if measure.name in names]
        check_names(self._suite, options.suite)
        options.check_seeds(True)
        for side in sides.values():
            side.check(self._suite)
        self._open_judges()
        self._items: dict[str, dict[str, Any]] = {}
        for measure in self._suite:
            if measure.kind in ROLES:
                self._items[measure.name] = options.sources.items(measure)

    def _open_judges(self) -> dict[str, Any]:
        return answers.open_judges(
            [self._options.judge],
            self._suite,
            mesh=self._options.mesh,
            compute_dtype=self._options.compute_dtype,
            batch_size=self._options.batch_size,
        )

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """What the folder is for; later calls of the command must fit it."""
        record = {
            "models": {name: side.record for name, side in self._sides.items()},
            "suite": [dataclasses.asdict(measure) for measure in self._suite],
            "options": self._options.deciding() | {"judge": self._options.judge},
            "items": files.text_hash(self._items),
        }
        data = {}
        for measure in self._suite:
            if measure.kind not in ROLES:
                data[measure.name] = self._options.sources.hash(measure)
        return record | ({"data": data} if data else {})

    def check_record(self, out: pathlib.Path) -> None:
        """Raise ValueError if the folder is of a gate of something else; other rules read the same
        answers."""
        refuse_other(out / RECORD, self.record, "a gate", "--out", _FIX)

    def _write_record(self, out: pathlib.Path) -> None:
        if not (out / RECORD).is_file():
            files.write_json(out / RECORD, self.record | {"versions": versions()})

    def run(self, out: pathlib.Path) -> dict[str, Any]:
        """Ask, judge and look until each check has its verdict, one fails, or no prompt is left;
        write the report and return its content."""
        processes.on_first(self._write_record, out)
        checks = self._checks(out)
        processes.on_first(self._claim, out)
        while open_checks := [check for check in checks if check.open]:
            values = self._values(self._asked(open_checks, out), out)
            for check in open_checks:
                check.look(values)
                say(line(check.result({})))
            if verdict_of(checks) == FAIL:
                break
        content = self._content(checks)
        processes.on_first(report.write, content, out)
        for text in report.summary(content):
            say(text)
        say(f"Report: {out / report.FILES[0]}")
        return content

    def _claim(self, out: pathlib.Path) -> None:
        for side in self._sides.values():
            side.answer([], out, self._options.judge)  # the notes of stored verdicts come first
        answers.claim_judges(self._open_judges(), out)

    def _checks(self, out: pathlib.Path) -> list[Check]:
        """Return the checks with the prompts that both sides can be asked.

        The questions of tasks are known when they are answered, so a check of these is asked
        whole.
        """
        tasks = [measure for measure in self._suite if measure.kind not in ROLES]
        for side in self._sides.values():
            side.answer([(measure, {}) for measure in tasks], out, self._options.judge)
        result = []
        for kind, measures in self._chosen.items():
            members: dict[str, list[str]] = {}
            for measure in measures:
                for i in self._prompts(measure, out):
                    members.setdefault(_prompt(measure, i), []).append(measure.name)
            if not members:
                names = ", ".join(measure.name for measure in measures)
                raise ValueError(
                    f"[{kind}]: no prompt of {names} is answered by both sides. Give evaluations "
                    "of the same data, or model folders."
                )
            result.append(Check(kind, self._rules, members))
        return result

    def _prompts(self, measure: Measure, out: pathlib.Path) -> list[str]:
        if measure.kind in ROLES:
            known = list(self._items[measure.name])
        else:
            sides = [lines_of(out, "answers", side, measure, None).rows for side in self._sides]
            known = [i for i in sides[0] if i in sides[1] and i != "complete"]
        for side in self._sides.values():
            there = side.has(measure)
            if there is not None:
                known = [i for i in known if i in there]
        return known

    def _asked(self, checks: Sequence[Check], out: pathlib.Path) -> list[Measure]:
        """Ask both sides what the next looks of some checks need; return the measures of it."""
        wanted: dict[str, dict[str, Any]] = {}
        for check in checks:
            for name, ids in check.wanted().items():
                items = self._items.get(name, {})
                wanted.setdefault(name, {}).update({i: items[i] for i in ids if i in items})
        measures = [measure for measure in self._suite if measure.name in wanted]
        asked = [(measure, wanted[measure.name]) for measure in measures]
        for side in reversed(self._sides.values()):
            side.answer(asked, out, self._options.judge)
        return measures

    def _values(self, measures: Sequence[Measure], out: pathlib.Path) -> Values:
        """Return what the answers to some measures are, by side, measure and prompt."""
        values: dict[str, dict[str, dict[str, Any]]] = {side: {} for side in self._sides}
        judged = []
        for side in self._sides:
            for measure in measures:
                if measure.kind in JUDGED:
                    judged.append((side, measure, None))
                else:
                    rows = lines_of(out, "answers", side, measure, None).rows
                    by_prompt = {_prompt(measure, i): of_row(row) for i, row in rows.items()}
                    values[side][measure.name] = by_prompt
        if judged:
            judges = self._open_judges()
            text, judge = judges.popitem()
            verdicts = answers.judge_answers(text, judge, judged, self._items, out)
            for (side, name), (by_id,) in verdicts.items():
                values[side][name] = {i: verdict.outcome for i, verdict in by_id.items()}
        return values

    def _content(self, checks: Sequence[Check]) -> dict[str, Any]:
        prompts: dict[str, Any] = {}
        for items in self._items.values():
            prompts.update(items)
        verdict = verdict_of(checks)
        return {
            "verdict": verdict,
            "exit_code": CODES[verdict],
            "models": {name: side.folder for name, side in self._sides.items()},
            "stored": [name for name, side in self._sides.items() if isinstance(side, Stored)],
            "suite": self._options.suite,
            "judge": self._options.judge,
            "options": self._options.deciding(),
            "rules": self._rules.to_dict(),
            "checks": [check.result(prompts) for check in checks],
            "not_checked": [KINDS[kind].title for kind in KINDS if kind not in self._rules.checks],
            "versions": versions(),
        }


def _prompt(measure: Measure, i: str) -> str:
    """Return what a check calls a prompt: ids of tasks are numbers, which several tasks have."""
    return i if measure.kind in ROLES else f"{measure.kind}:{i}"
