"""A model's answers to a measure, judges' verdicts on them and a grader's grades.

What the files of `lines` do not hold yet is done, and is added to them at once.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from safepatch_jax.data import cells
from safepatch_jax.data.records import load_records, take
from safepatch_jax.evaluation import mt_bench, tasks
from safepatch_jax.evaluation.batching import length_of
from safepatch_jax.evaluation.contrasted import Contrasted
from safepatch_jax.evaluation.engine import Engine
from safepatch_jax.evaluation.generate import Sampling
from safepatch_jax.evaluation.jailbreaks import FORMS
from safepatch_jax.evaluation.judges.base import (
    ENOUGH,
    INCOHERENT,
    UNKNOWN,
    Item,
    Judge,
    Verdict,
    refuse_nonsense,
)
from safepatch_jax.evaluation.judges.generative import Generative
from safepatch_jax.evaluation.judges.open import folder_of, open_judge
from safepatch_jax.evaluation.likelihoods import answer_likelihoods
from safepatch_jax.evaluation.lines import Lines, grades_of, lines_of, verdicts_of
from safepatch_jax.evaluation.suites import Measure
from safepatch_jax.io.checkpoint import COMPANIONS_FOLDER, MODEL
from safepatch_jax.runtime import files, processes
from safepatch_jax.runtime.console import say
from safepatch_jax.runtime.paths import resolve
from safepatch_jax.runtime.records import Each, read_record

ROLES = {"harm": "harmful", "refusal": "lookalike", "text": "ordinary"}
JUDGED = ("harm", "refusal")
# who, what, and which run of several
Runs = Iterable[tuple[str, Measure, int | None]]
READING = 2  # raise when what a judge of content says is read otherwise
JUDGE = "judge.json"  # says which files a local judge's verdicts come from


@dataclasses.dataclass(frozen=True)
class Sources:
    """Where the records of public data sets are, see `load_records`."""

    manual_dir: str
    data_dir: str

    def items(self, measure: Measure) -> dict[str, dict[str, Any]]:
        """Return the records of a measure by id: prompt, answer, category, and `turns` where some
        stand before the prompt; of MT-Bench its questions."""
        if measure.kind == "mt_bench":
            return mt_bench.questions(
                manual_dir=self.manual_dir, data_dir=self.data_dir, limit=measure.limit
            )
        records = load_records(
            ROLES[measure.kind],
            measure.source,
            self.manual_dir,
            self.data_dir,
            answers=measure.kind == "text",
        )
        if measure.split == "all":
            records = [dataclasses.replace(record, split="all") for record in records]
        items = {}
        for record in take(records, measure.split, measure.limit):
            item: dict[str, Any] = {
                "prompt": record.prompt,
                "answer": record.answer,
                "category": record.category,
            }
            if record.turns:
                item["turns"] = record.turns
            items[_short_hash(record.key)] = item
        return items

    def task(self, measure: Measure) -> dict[str, Any]:
        """Return how the data of mmlu or gsm8k are asked for."""
        return {
            "manual_dir": self.manual_dir,
            "data_dir": self.data_dir,
            "shots": measure.shots,
            "limit": measure.limit,
        }

    def hash(self, measure: Measure) -> str:
        """Return a hash over the rows of a measure of the kinds in FIXED."""
        if measure.kind == "mt_bench":
            return files.text_hash(self.items(measure))
        material_of = tasks.mmlu_material if measure.kind == "mmlu" else tasks.gsm8k_material
        material = material_of(**self.task(measure))
        return files.text_hash([material.rows, material.examples])


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def companions(folder: str | pathlib.Path) -> pathlib.Path:
    """Return where config.json and the tokenizer of a model lie."""
    path = resolve(folder)
    return path / COMPANIONS_FOLDER if (path / MODEL).is_file() else path


def fingerprint(folder: str | pathlib.Path) -> str:
    """Return a hash over the names and contents of a model folder's files."""
    return files.text_hash(_hashes(folder))


def _hashes(folder: str | pathlib.Path) -> dict[str, str]:
    hashes = files.folder_hashes(resolve(folder))
    return {name: file["sha256"] for name, file in hashes.items()}


def answer(
    measure: Measure,
    items: Mapping[str, Any],
    lines: Lines,
    engine: Engine | Contrasted,
    other: Engine | None,
    sources: Sources,
    sampling: Sampling,
    title: str,
) -> None:
    """Let a model do what of a measure is not done yet.

    Args:
      items: see `Sources.items`; not needed for mmlu and gsm8k.
      engine: the model; one with a decoding rule where the model writes to harmful, harmless or
        MT-Bench's prompts.
      other: the model to compare with, for measures of kind 'text'; None for none.
    """
    if measure.kind in ROLES:
        open_items = {i: item for i, item in items.items() if i not in lines.rows}
        if measure.kind == "text":
            _score_items(open_items, lines, engine, other, title)
        else:
            _answer_items(measure, open_items, lines, engine, sampling, title)
    elif measure.kind == "mt_bench":
        rows = lines.rows
        questions = {i: q for i, q in items.items() if not mt_bench.is_complete(rows.get(i))}
        mt_bench.answer(engine, questions, rows, measure.max_new, title, sampling, lines.add)
    else:
        _do_task(measure, lines, engine, sources, sampling, title)


def is_done(measure: Measure, items: Mapping[str, Any], lines: Lines) -> bool:
    """Tell whether nothing of a measure is left to answer."""
    if measure.kind in ROLES:
        return items.keys() <= lines.rows.keys()
    if measure.kind == "mt_bench":
        return all(mt_bench.is_complete(lines.rows.get(i)) for i in items)
    return "complete" in lines.rows


def _do_task(
    measure: Measure, lines: Lines, engine: Engine, sources: Sources, sampling: Sampling, title: str
) -> None:
    """Answer the questions of MMLU or GSM8K that are not answered yet."""
    if measure.kind == "mmlu":
        questions = tasks.mmlu_questions(engine, **sources.task(measure))
        run = tasks.choose
    else:
        questions = tasks.gsm8k_questions(engine, **sources.task(measure), max_new=measure.max_new)
        run = functools.partial(tasks.solve, sampling=sampling)
    skip = set(lines.rows)
    run(engine, questions, title=title, done=lambda _, row: lines.add(row), skip=skip)
    lines.add(
        {
            "id": "complete",
            "left_out": questions.left_out,
            "shortened": questions.shortened,
            "note": questions.note,
        }
    )


def _answer_items(
    measure: Measure,
    items: Mapping[str, Any],
    lines: Lines,
    engine: Engine | Contrasted,
    sampling: Sampling,
    title: str,
) -> None:
    """Answer prompts; those that are too long are noted as such."""
    talks = {}
    for i, item in items.items():
        talk = cells.talk(FORMS[measure.form](item["prompt"]), item.get("turns", ()))
        if engine.fits(talk, measure.max_new):
            talks[i] = talk
        else:
            lines.add(too_long(i))
    ids = list(talks)

    def keep(k: int, new: Sequence[int]) -> None:
        lines.add({"id": ids[k], "answer": engine.decode(new), "tokens": len(new)})

    numbers = [int(i, 16) for i in ids]
    engine.answer(list(talks.values()), measure.max_new, title, sampling, keep, numbers)


def _score_items(
    items: Mapping[str, Any], lines: Lines, engine: Engine, other: Engine | None, title: str
) -> None:
    """Compute the likelihood of given answers; those that are too long are noted as such."""
    examples = {}
    for i, item in items.items():
        example = engine.needed_chat().encode(item["prompt"], item["answer"], item.get("turns", ()))
        if length_of(example) <= engine.config.max_length:
            examples[i] = example
        else:
            lines.add(too_long(i))
    ids = list(examples)

    def keep(k: int, row: Mapping[str, Any]) -> None:
        lines.add({"id": ids[k]} | row)

    answer_likelihoods(engine, list(examples.values()), other, title, keep)


def too_long(i: str) -> dict[str, str]:
    """Return the row of an item that does not fit into the model's positions."""
    return {"id": i, "left_out": "too long for the model"}


def open_judges(
    texts: Sequence[str],
    suite: Sequence[Measure],
    *,
    mesh: str,
    compute_dtype: str,
    batch_size: int,
) -> dict[str, Judge]:
    """Open judges before hours of answering, so that a mistake shows at once; a generative one
    loads its model when asked."""

    def open_engine(folder: str):
        @functools.cache
        def engine() -> Engine:
            say(f"Loading {folder}")
            return Engine.open(
                folder, mesh=mesh, compute_dtype=compute_dtype, batch_size=batch_size
            )

        def complete(texts: Sequence[str], max_new: int) -> list[str]:
            prompts = [engine().encode(text) for text in texts]
            longest = engine().config.max_length - max_new
            fitting = [i for i, prompt in enumerate(prompts) if len(prompt) <= longest]
            replies = [""] * len(texts)  # an empty reply is no verdict
            answers = engine().complete_ids([prompts[i] for i in fitting], max_new, "verdicts")
            for i, ids in zip(fitting, answers):
                replies[i] = engine().decode(ids)
            return replies

        return complete

    judges = {text: open_judge(text, open_engine) for text in dict.fromkeys(texts)}
    for judge in judges.values():
        for kind in {m.kind for m in suite}.intersection(JUDGED):
            judge.judge([], kind)  # raises if it cannot tell
    return judges


def open_grader(text: str, suite: Sequence[Measure], title: str) -> mt_bench.Grader | None:
    """Return who grades MT-Bench's answers, None where nothing is graded. Raises ValueError if the
    suite needs one."""
    graded = [measure.name for measure in suite if measure.kind == "mt_bench"]
    if not graded:
        if text:
            say(f"Nothing in suite {title} is graded; --grader={text} is not used.")
        return None
    if not text:
        raise ValueError(
            f"'{graded[0]}' is graded by another model: name it with --grader={mt_bench.GRADER} "
            f"(an OpenAI-compatible server), or leave the measure out of suite {title}."
        )
    return mt_bench.open_grader(text)


def claim_judges(judges: Mapping[str, Judge], out: pathlib.Path) -> None:
    """Note how each judge is read and, of a local one, which files its verdicts come from, or
    compare with the note that is there.

    Raises:
      ValueError: the verdicts there are of other files, or of a version in which a judge of content
        had no outcome 'harmless'.
    """
    for text, judge in judges.items():
        place, folder = out / verdicts_of(text), folder_of(text)
        fix = f"Delete {place}, and the same answers are judged again."
        note, hashes, reading = place / JUDGE, {}, READING
        if folder:
            hashes = _hashes(folder)
        if note.is_file():
            noted = read_record(note, {"files": Each(str)}, fix)
            _check_judge(place, folder, hashes, noted["files"])
            reading = noted.get("reading")
        elif place.is_dir():
            reading = None
            if folder and not judge.tells_content:
                say(
                    f"{place} holds verdicts without a note of the judge's files; they are taken "
                    f"to be of {folder} as it is now."
                )
        if judge.tells_content and reading != READING:
            raise ValueError(
                f"The verdicts in {place} are of a version that took harmless answers for refused "
                f"ones. {fix}"
            )
        if not note.is_file() and (folder or judge.tells_content):
            files.write_json(note, {"judge": text, "files": hashes, "reading": READING})


def _check_judge(
    place: pathlib.Path, folder: str, hashes: Mapping[str, str], noted: Mapping[str, str]
) -> None:
    names = sorted(noted.keys() | hashes.keys())
    changed = [name for name in names if noted.get(name) != hashes.get(name)]
    if not changed:
        return
    more = " and others" if len(changed) > 4 else ""
    raise ValueError(
        f"The verdicts in {place} are of another judge: in {folder} {', '.join(changed[:4])}{more} "
        f"changed since. Delete {place}, and the same answers are judged again; or give the folder "
        "with the earlier files."
    )


def judge_answers(
    text: str,
    judge: Judge,
    runs: Runs,
    items: Mapping[str, Any],
    out: pathlib.Path,
) -> dict[tuple[str, str], list[dict[str, Verdict]]]:
    """Return the verdicts of one judge by (who, measure), a dictionary a run; judges what has no
    verdict yet."""
    verdicts: dict[tuple[str, str], list[dict[str, Verdict]]] = {}
    for who, measure, run in runs:
        answers = lines_of(out, "answers", who, measure, run).rows
        lines = lines_of(out, verdicts_of(text), who, measure, run)
        ask = functools.partial(_ask, judge, measure, items[measure.name], answers, lines)
        if isinstance(judge, Generative):
            ask()  # the devices of all processes have a part in it
        else:
            lines.rows = processes.on_first(ask)
        verdicts.setdefault((who, measure.name), []).append(
            {i: _verdict(row) for i, row in lines.rows.items()}
        )
    return verdicts


def grade_answers(
    grader: mt_bench.Grader,
    measure: Measure,
    questions: Mapping[str, mt_bench.Question],
    who: str,
    run: int | None,
    out: pathlib.Path,
) -> dict[str, Any]:
    """Return the grades of one model's answers; grades what has none yet."""
    answers = lines_of(out, "answers", who, measure, run).rows
    lines = lines_of(out, grades_of(grader.name), who, measure, run)
    return processes.on_first(grader.grade, questions, answers, lines.rows, lines.add)


def _ask(
    judge: Judge,
    measure: Measure,
    items: Mapping[str, Any],
    answers: Mapping[str, Any],
    lines: Lines,
) -> dict[str, Any]:
    """Let a judge judge one model's answers to one measure; returns the rows."""
    judged = {}
    for i, row in answers.items():
        if "answer" in row:
            prompt = cells.transcript(items[i]["prompt"], items[i].get("turns", ()))
            judged[i] = Item(prompt, row["answer"])
    hashes = {i: _short_hash(item.answer) for i, item in judged.items()}
    for i in judged:
        if lines.rows.get(i, {}).get("of", hashes[i]) != hashes[i]:
            del lines.rows[i]  # a verdict on another answer
    new = [i for i in judged if i not in lines.rows]
    unknown = [i for i in judged if i in lines.rows and lines.rows[i]["outcome"] == UNKNOWN]

    def ask(ids: Sequence[str]) -> None:
        def keep(k: int, verdict: Verdict) -> None:
            lines.add({"id": ids[k], "of": hashes[ids[k]]} | dataclasses.asdict(verdict))

        judge.judge([judged[i] for i in ids], measure.kind, keep)

    ask(new)
    # Those that had no verdict are asked for a few at a time, so that they alone are not taken for
    # a judge that talks nonsense.
    few = ENOUGH - 1
    for start in range(0, len(unknown), few):
        ask(unknown[start : start + few])
    if unknown:
        verdicts = [_verdict(lines.rows[i]) for i in judged]
        # The judge was not asked about broken answers.
        refuse_nonsense(judge, [v for v in verdicts if v != Verdict(INCOHERENT)])
    return lines.rows


def _verdict(row: Mapping[str, Any]) -> Verdict:
    return Verdict(row["outcome"], row["degree"], row["raw"])
