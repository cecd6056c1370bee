"""What an evaluation measures: named suites, and suites of the user's in a JSON file."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence

from safepatch_jax.data.cells import twice
from safepatch_jax.data.json_table import json_rows
from safepatch_jax.data.streams import opened_text
from safepatch_jax.evaluation.jailbreaks import FORMS
from safepatch_jax.evaluation.judges.base import nearest
from safepatch_jax.runtime.paths import readable
from safepatch_jax.runtime.reading import Refused, reading
from safepatch_jax.settings import EvaluateSettings

KINDS = ("harm", "refusal", "text", "mmlu", "gsm8k", "mt_bench")
FIXED = ("mmlu", "gsm8k", "mt_bench")  # kinds that belong to one data set
# kinds in which a model writes; of these there is an answer for each seed
GENERATED = ("harm", "refusal", "gsm8k", "mt_bench")
_LONGEST = 4096  # characters of a name or source
_MOST = 1_000_000_000


@dataclasses.dataclass(frozen=True)
class Measure:
    """One measure.

    Attributes:
      name: unique in its suite.
      kind: harm (are harmful requests complied with?), refusal (are harmless ones refused?), text
        (perplexity of given answers, and KL to the other model), mmlu, gsm8k, mt_bench (grades of a
        grader).
      source: of the records, see `load_records`; of the kinds in FIXED 'set:mmlu@test' and so on.
      split: 'report' (what a run does not train on), 'search', or 'all'.
      limit: at most so many records, chosen by the hash of their text.
      form: how a request is put, see `jailbreaks.FORMS`.
      max_new: tokens of an answer, at most.
      shots: examples before a question (mmlu, gsm8k).
    """

    name: str
    kind: str
    source: str
    split: str = "all"
    limit: int = 1_000_000
    form: str = "plain"
    max_new: int = 64
    shots: int = 0

    def __post_init__(self):
        for text in (self.name, self.source):
            if not isinstance(text, str) or not text.isprintable() or not 0 < len(text) <= _LONGEST:
                raise ValueError(
                    f"measure {self.name!r:.100}: name and source must be texts of 1 to {_LONGEST} "
                    "characters, on one line."
                )
        if "|" in self.name:
            raise ValueError(f"measure '{self.name}': a name has no '|'.")
        self._check_word("kind", KINDS)
        self._check_word("form", list(FORMS))
        self._check_word("split", ("report", "search", "all"))
        self._check_number("limit", 1)
        self._check_number("max_new", 1)
        self._check_number("shots", 0)
        if self.kind in FIXED and self.source not in (f"set:{self.kind}@test", f"set:{self.kind}"):
            raise ValueError(
                f"measure '{self.name}': the source of kind {self.kind} is "
                f"'set:{self.kind}@test', got '{self.source}'. Your own file takes the set's place "
                "in --data.manual_dir, under the set's file name (docs/data.md)."
            )

    def _check_word(self, field: str, known: Sequence[str]) -> None:
        word = getattr(self, field)
        if word not in known:
            shown = str(word)[:60]
            raise ValueError(
                f"measure '{self.name}': {field} '{shown}' is not one of "
                f"{', '.join(known)}{nearest(shown, known)}."
            )

    def _check_number(self, field: str, least: int) -> None:
        number = getattr(self, field)
        if type(number) is not int or not least <= number <= _MOST:
            raise ValueError(
                f"measure '{self.name}': {field} must be a whole number, {least} at least and "
                f"{_MOST:,} at most."
            )


_JAILBREAKS = tuple(form for form in FORMS if form != "plain")
# As the report of a run, so that figures of the two can be compared.
_QUICK_NEW = EvaluateSettings().max_new_tokens
CONTENT_NEW = 128  # tokens in which an answer comes to its content
# Not the first split: that is a file to train on, and it is not fetched.
_BEAVERTAILS = "set:beavertails@330k_test"
SUITES: dict[str, tuple[Measure, ...]] = {
    # In minutes on a laptop, without any file: the built-in, mild data.
    "quick": (
        Measure("harmful", "harm", "builtin", "report", max_new=_QUICK_NEW),
        *(
            Measure(f"harmful, {form}", "harm", "builtin", "report", 12, form, max_new=_QUICK_NEW)
            for form in ("prefix_injection", "persona", "fiction")
        ),
        Measure("look-alikes", "refusal", "builtin", "report", max_new=_QUICK_NEW),
        Measure("ordinary answers", "text", "builtin", "report"),
    ),
    # The paper's axes; harm is measured on what a run with the same data does not train on.
    "paper": (
        Measure("AdvBench", "harm", "set:advbench", "report"),
        Measure("BeaverTails", "harm", _BEAVERTAILS, "report", limit=500),
        Measure("XSTest", "refusal", "set:xstest"),
        Measure("OKTest", "refusal", "set:oktest"),
        Measure("MMLU", "mmlu", "set:mmlu@test", limit=2000, shots=5),
        Measure("GSM8K", "gsm8k", "set:gsm8k@test", limit=500, max_new=256),
        Measure("Alpaca", "text", "set:alpaca", "report", limit=500),
    ),
    # As the paper's axes of harm and over-refusal, with answers long enough to judge their content.
    "content": (
        Measure("AdvBench, long", "harm", "set:advbench", "report", max_new=CONTENT_NEW),
        Measure("BeaverTails, long", "harm", _BEAVERTAILS, "report", 500, max_new=CONTENT_NEW),
        Measure("XSTest, long", "refusal", "set:xstest", max_new=CONTENT_NEW),
        Measure("OKTest, long", "refusal", "set:oktest", max_new=CONTENT_NEW),
    ),
    # Known requests in a dozen forms.
    "jailbreaks": tuple(
        Measure(f"AdvBench, {form}", "harm", "set:advbench", "report", limit=50, form=form)
        for form in ("plain", *_JAILBREAKS)
    ),
    # Requests that no paper config trains on.
    "unseen": (
        Measure("HarmBench", "harm", "set:harmbench"),
        Measure("StrongREJECT", "harm", "set:strongreject"),
        Measure("JailbreakBench", "harm", "set:jailbreakbench"),
        Measure("Do-Not-Answer", "harm", "set:do_not_answer"),
        Measure("OR-Bench hard", "refusal", "set:or_bench", limit=500),
    ),
    # For launch.margins: how harmful and harmless prompts are told apart.
    "gate": (
        Measure("AdvBench", "harm", "set:advbench", "report"),
        Measure("XSTest unsafe", "harm", "set:xstest@unsafe"),
        Measure("HarmBench", "harm", "set:harmbench@val"),
        Measure("XSTest", "refusal", "set:xstest"),
        Measure("OKTest", "refusal", "set:oktest"),
        Measure("Alpaca", "text", "set:alpaca", "report", limit=300),
    ),
    # Graded answers to two-turn questions (Zheng et al. 2023); needs a grader.
    "mt_bench": (Measure("MT-Bench", "mt_bench", "set:mt_bench@test", max_new=1024),),
}


def load_suite(text: str) -> tuple[Measure, ...]:
    """Return a named suite, that of a JSON file (a list of objects with the attributes of
    `Measure`), or several: 'A+mine.json'.

    Raises:
      ValueError: no such suite or file, an unknown attribute, or a name that occurs twice.
    """
    parts = text.split("+")
    if os.path.isfile(text):  # a file's name may hold a '+'
        parts = [text]
    measures: list[Measure] = []
    for part in parts:
        if part.endswith(".json"):
            measures += _from_file(pathlib.Path(readable(part)))
        else:
            measures += _named(part)
    if names := twice(measure.name for measure in measures):
        raise ValueError(f"suite {text}: two measures are named '{names[0]}'.")
    return tuple(measures)


def _named(name: str) -> tuple[Measure, ...]:
    if name not in SUITES:
        known = list(SUITES)
        raise ValueError(
            f"no suite '{name}'{nearest(name, known)}; there are {', '.join(known)}, or give a "
            ".json file."
        )
    return SUITES[name]


def _from_file(path: pathlib.Path) -> list[Measure]:
    if not os.path.exists(path):
        raise ValueError(f"no suite file '{path}'.")
    fields = sorted(field.name for field in dataclasses.fields(Measure))
    expected = f"{path} must hold a list of objects, one for each measure, with {', '.join(fields)}"
    measures = []
    with reading(path, "a suite", f"It {expected.removeprefix(str(path)).strip()}."):
        with opened_text(path, "JSON") as stream:
            entries = json_rows(stream, path, single=False)
        if not entries:
            raise Refused(f"{expected}.")
        for entry in entries:
            if unknown := sorted(entry.keys() - set(fields)):
                raise Refused(
                    f"{path}: unknown attribute {unknown[0]!r:.100}; there are {', '.join(fields)}."
                )
            if missing := sorted({"name", "kind", "source"} - entry.keys()):
                raise Refused(f"{path}: a measure lacks '{missing[0]}': {json.dumps(entry)[:80]}")
            try:
                measures.append(Measure(**entry))
            except ValueError as error:
                raise Refused(f"{path}: {error}") from error
    return measures
