"""Judges behind one interface: refusal phrases, a classifier, generative safety judges, an
endpoint.

Every judge gives the three outcomes of `judge`, or UNKNOWN where its reply is none of its format.
Broken answers are incoherent before any judge is asked. About harm, a harmless reply counts as
refused: refused or deflected, nothing harmful was said.
"""

from __future__ import annotations

import difflib
import pathlib
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from safepatch_jax.evaluation.judges import formats as judge_formats
from safepatch_jax.evaluation.judges.formats import ABOUT, HARM, REFUSAL, Reading
from safepatch_jax.evaluation.judges.phrases import INCOHERENT, OUTCOMES
from safepatch_jax.evaluation.judges.phrases import judge as judge_phrases

UNKNOWN = "unknown"
FORMS = (
    "phrases",
    "classifier:DIR",
    "llama_guard:DIR",
    "wildguard:DIR",
    "harmbench:DIR",
    "endpoint:URL?model=NAME",
)
ENOUGH = 8
_BATCH = 64  # generative judges; a batch is what a killed run asks again

Complete = Callable[
    [Sequence[str], int], list[str]
]  # (texts, max_new) -> their greedy continuations


@dataclass(frozen=True)
class Item:
    prompt: str
    answer: str


@dataclass(frozen=True)
class Verdict:
    """outcome: one of OUTCOMES, or UNKNOWN. degree: 'full' or 'partial' refusal where the judge
    tells. raw: what it said."""

    outcome: str
    degree: str = ""
    raw: str = ""


Done = Callable[[int, Verdict], None]


class Judge(Protocol):
    """A judge.

    Attributes:
      name: the text it was opened with.
      tells_refusals: whether it can judge about 'refusal'.
      expected: the form of its replies, for error messages.
    """

    name: str
    tells_refusals: bool
    expected: str

    def judge(
        self, items: Sequence[Item], about: str = HARM, done: Done | None = None
    ) -> list[Verdict]:
        """Judge answers.

        Args:
          about: 'harm' (does the answer help with harm?) or 'refusal' (does it refuse?).
          done: called with an item's number and verdict as soon as there is one, batch by batch,
            broken answers first. Who stores these should ask again for UNKNOWN ones.

        Raises:
          ValueError: about 'refusal' of a judge that cannot tell; more than half of 8 or more
            replies are nonsense.
          JudgeUnavailable: an endpoint does not answer.
        """


class JudgeUnavailable(ConnectionError):
    """An endpoint that does not answer; verdicts given to `done` are valid."""


def judge_all(
    judge: Judge,
    items: Sequence[Item],
    about: str,
    done: Done | None,
    ask: Callable[[Sequence[Item]], list[Verdict]],
    batch: int,
) -> list[Verdict]:
    """Give broken answers their outcome, ask about the others batch by batch, and refuse a judge
    that talks nonsense."""
    if about not in ABOUT:
        raise ValueError(f"about is {about!r}, expected one of {', '.join(ABOUT)}")
    if about == REFUSAL and not judge.tells_refusals:
        raise ValueError(
            f"{judge.name} tells harm from no harm, not refusals from answers, so it cannot judge "
            "over-refusal. "
            "Judges that can: phrases, wildguard:DIR, endpoint:URL?model=NAME, and a classifier "
            "whose labels name "
            "refusals (such as LibrAI/longformer-action-ro)."
        )
    verdicts: dict[int, Verdict] = {}

    def settle(number: int, verdict: Verdict) -> None:
        verdicts[number] = verdict
        if done is not None:
            done(number, verdict)

    asked = []
    for i, item in enumerate(items):
        if judge_phrases(item.answer) == INCOHERENT:
            settle(i, Verdict(INCOHERENT))
        else:
            asked.append(i)
    for start in range(0, len(asked), batch):
        group = asked[start : start + batch]
        for i, verdict in zip(group, ask([items[i] for i in group]), strict=True):
            settle(i, verdict)
    refuse_nonsense(judge, [verdicts[i] for i in asked])
    return [verdicts[i] for i in range(len(items))]


def refuse_nonsense(judge: Judge, verdicts: Sequence[Verdict]) -> None:
    """Raise ValueError if more than half of these replies are UNKNOWN; fewer than ENOUGH say
    nothing of a judge."""
    nonsense = [v.raw for v in verdicts if v.outcome == UNKNOWN]
    if len(verdicts) >= ENOUGH and 2 * len(nonsense) > len(verdicts):
        raise ValueError(
            f"{judge.name}: {len(nonsense)} of {len(verdicts)} replies are no verdict. Expected: "
            f"{judge.expected}. "
            f"Got: {', '.join(map(repr, nonsense[:3]))}. Is this the right model for this kind of "
            "judge?"
        )


def verdict_of(reading: Reading | None, raw: str) -> Verdict:
    outcome, degree = reading or (UNKNOWN, "")
    return Verdict(outcome, degree, raw[:200])


class Phrases:
    """The offline judge of `judge`: form, not content, and the same about harm and about
    refusal."""

    name, tells_refusals, expected = "phrases", True, ""

    def judge(
        self, items: Sequence[Item], about: str = HARM, done: Done | None = None
    ) -> list[Verdict]:
        return judge_all(
            self,
            items,
            about,
            done,
            lambda group: [Verdict(judge_phrases(i.answer)) for i in group],
            _BATCH,
        )


class Generative:
    """Llama Guard, WildGuard or HarmBench's classifier, on an engine that continues text."""

    def __init__(self, name: str, form: judge_formats.Format, complete: Complete):
        self.name, self.tells_refusals, self.expected = name, form.tells_refusals, form.expected
        self._form, self._complete = form, complete

    def judge(
        self, items: Sequence[Item], about: str = HARM, done: Done | None = None
    ) -> list[Verdict]:
        def ask(group: Sequence[Item]) -> list[Verdict]:
            replies = self._complete(
                [self._form.render(i.prompt, i.answer) for i in group], self._form.max_new
            )
            return [verdict_of(self._form.parse(reply, about), reply.strip()) for reply in replies]

        return judge_all(self, items, about, done, ask, _BATCH)


def options_of(query: str, known: Sequence[str], where: str) -> dict[str, str]:
    """Split KEY=VALUE&KEY=VALUE; an unknown, doubled or empty key is an error."""
    pairs = urllib.parse.parse_qsl(query, keep_blank_values=True)
    for key, value in pairs:
        if key not in known:
            raise ValueError(
                f"{where}: unknown option {key!r}{_nearest(key, known)}; known are "
                f"{', '.join(known)}"
            )
        if not value:
            raise ValueError(f"{where}: {key} is empty")
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"{where}: an option is given twice")
    return dict(pairs)


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def open_judge(text: str, open_engine: Callable[[str], Complete]) -> Judge:
    """Open a judge.

    Args:
      text: one of FORMS; for options of a classifier see `Classifier`.
      open_engine: for generative judges: model folder -> what continues texts in the judge's own
        format greedily, special tokens read as written and left out of the reply.

    Raises:
      ValueError: another text, or a folder that is not there; see the judges.
    """
    kind, _, rest = text.partition(":")
    kinds = [form.partition(":")[0] for form in FORMS]
    if kind not in kinds or bool(rest) == (kind == "phrases"):
        raise ValueError(
            f"judge {text!r}{'' if kind in kinds else _nearest(kind, kinds)}: expected one of "
            f"{', '.join(FORMS)}"
        )
    if kind == "phrases":
        return Phrases()
    if kind == "endpoint":
        from safepatch_jax.evaluation.judges.endpoint import (
            Endpoint,  # imported here: it and the classifier import this module
        )

        return Endpoint(rest)
    folder = folder_of(text)
    if not pathlib.Path(folder).is_dir():
        raise ValueError(
            f"judge {text!r}: there is no folder {folder}. Judges are read from disk; download "
            "the model first."
        )
    if kind == "classifier":
        from safepatch_jax.evaluation.judges.classifier import Classifier

        return Classifier(rest)
    return Generative(text, judge_formats.open_format(kind, folder), open_engine(folder))


def folder_of(text: str) -> str:
    """Return the model folder that a judge's text names, '' for a judge without one."""
    kind, _, rest = text.partition(":")
    return {"phrases": "", "endpoint": "", "classifier": rest.partition("?")[0]}.get(kind, rest)


def agreement(a: Sequence[Verdict], b: Sequence[Verdict]) -> dict[str, Any]:
    """Compare two judges' verdicts of the same answers.

    Returns:
      n: pairs compared; unknown: pairs left out because one verdict is UNKNOWN; table: {outcome of
        a: {outcome of b: count}};
      agree: share of equal outcomes, None where n is 0; kappa: Cohen's, (agree - chance) / (1 -
        chance), None where both judges
      give one and the same outcome throughout.

    Raises:
      ValueError: lists of different length.
    """
    if len(a) != len(b):
        raise ValueError(
            f"agreement: {len(a)} verdicts against {len(b)}; both judges must judge the same "
            "answers"
        )
    table = {x: dict.fromkeys(OUTCOMES, 0) for x in OUTCOMES}
    pairs = [(x.outcome, y.outcome) for x, y in zip(a, b) if UNKNOWN not in (x.outcome, y.outcome)]
    for x, y in pairs:
        table[x][y] += 1
    n, same = len(pairs), sum(table[x][x] for x in OUTCOMES)
    chance = sum(
        sum(table[x].values()) * sum(row[x] for row in table.values()) for x in OUTCOMES
    )  # times n * n
    return {
        "n": n,
        "unknown": len(a) - n,
        "table": table,
        "agree": same / n if n else None,
        "kappa": (n * same - chance) / (n * n - chance) if chance < n * n else None,
    }
