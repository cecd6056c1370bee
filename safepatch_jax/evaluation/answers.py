"""Answers, verdicts and grades of models, in files that a killed evaluation goes on from.

OUT/answers/WHO/MEASURE.jsonl holds what a model did on each item,
OUT/verdicts/JUDGE/WHO/MEASURE.jsonl what a judge said of it, OUT/grades/GRADER/WHO/MEASURE.jsonl
what a grader did. Where a measure is done several times, WHO is followed by seed-N.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from safepatch_jax.data.records import load_records, take
from safepatch_jax.evaluation import mt_bench, tasks
from safepatch_jax.evaluation.engine import Contrasted, Engine, Sampling
from safepatch_jax.evaluation.jailbreaks import FORMS
from safepatch_jax.evaluation.judges.base import (
    ENOUGH,
    UNKNOWN,
    Generative,
    Item,
    Judge,
    Verdict,
    folder_of,
    open_judge,
    refuse_nonsense,
)
from safepatch_jax.evaluation.judges.phrases import INCOHERENT
from safepatch_jax.evaluation.likelihoods import answer_likelihoods
from safepatch_jax.evaluation.suites import Measure
from safepatch_jax.io.checkpoint import COMPANIONS_FOLDER, MODEL
from safepatch_jax.runtime import files, processes
from safepatch_jax.runtime.console import say

ROLES = {"harm": "harmful", "refusal": "lookalike", "text": "ordinary"}
JUDGED = ("harm", "refusal")
Asked = Iterable[tuple[str, Measure, int | None]]  # who, what, and which run of several
_JUDGE = "judge.json"


@dataclasses.dataclass(frozen=True)
class Sources:
    """Where the records of public data sets are, see `load_records`."""

    manual_dir: str
    data_dir: str

    def items(self, measure: Measure) -> dict[str, dict[str, Any]]:
        """Return the records of a measure by id: prompt, answer, category; of MT-Bench its
        questions."""
        if measure.kind == "mt_bench":
            return mt_bench.questions(
                manual_dir=self.manual_dir, data_dir=self.data_dir, limit=measure.limit
            )
        data_dir = pathlib.Path(self.data_dir).expanduser()
        records = load_records(
            ROLES[measure.kind],
            measure.source,
            self.manual_dir,
            data_dir,
            answers=measure.kind == "text",
        )
        if measure.split == "all":
            records = [dataclasses.replace(r, split="all") for r in records]
        chosen = take(records, measure.split, measure.limit)
        return {
            hashlib.sha256(r.prompt.encode()).hexdigest()[:16]: {
                "prompt": r.prompt,
                "answer": r.answer,
                "category": r.category,
            }
            for r in chosen
        }

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
        material = (tasks.mmlu_material if measure.kind == "mmlu" else tasks.gsm8k_material)(
            **self.task(measure)
        )
        return files.text_hash([material.rows, material.examples])


class Lines:
    """Rows of a JSONL file, the last of each id; what is added is on the disk at once. A last line
    that was cut off is dropped."""

    def __init__(self, path: pathlib.Path):
        self._path, self.rows = path, {}
        self.rows = processes.on_first(_read_lines, path)

    def add(self, row: Mapping[str, Any]) -> None:
        self.rows[row["id"]] = dict(row)
        if processes.first():
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def blank(path: pathlib.Path, field: str) -> None:
    """Take a field out of all rows of a file, where it has them; as this process sees it."""
    rows = _read_lines(path).values()
    if any(field in row for row in rows):
        kept = [{k: v for k, v in row.items() if k != field} for row in rows]
        files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))


def _read_lines(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = path.read_bytes() if path.is_file() else b""
    whole = raw[: raw.rfind(b"\n") + 1]
    if whole != raw:
        with open(path, "rb+") as file:
            file.truncate(len(whole))
    try:
        return {row["id"]: row for row in map(json.loads, whole.decode().split("\n")[:-1])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}). Delete it, and its answers are given again."
        ) from error


def lines_of(out: pathlib.Path, kind: str, who: str, measure: Measure, run: int | None) -> Lines:
    """Return the lines of one kind ('answers', 'verdicts/JUDGE', 'grades/GRADER') of one run of a
    measure."""
    folder = out / kind / who if run is None else out / kind / who / f"seed-{run}"
    return Lines(folder / f"{file_name(measure.name)}.jsonl")


def verdicts_of(judge: str) -> str:
    """Return the kind of a judge's lines."""
    return f"verdicts/{_folder_name(judge)}"


def _folder_name(text: str) -> str:
    """Return the name of a judge's or grader's folder."""
    name = re.sub(r"[^A-Za-z0-9.-]+", "_", text)
    if name != text:  # cut to what a file system takes, and different for different judges
        name = f"{name[:80]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return name


def file_name(name: str) -> str:
    """Return a measure's name as that of a file."""
    return re.sub(r"[^\w.-]+", "_", name)


def companions(folder: str | pathlib.Path) -> pathlib.Path:
    """Return where config.json and the tokenizer of a model lie."""
    path = pathlib.Path(folder).expanduser()
    return path / COMPANIONS_FOLDER if (path / MODEL).is_file() else path


def fingerprint(folder: str | pathlib.Path) -> str:
    """Return a hash over the names and contents of a model folder's files."""
    found = files.folder_hashes(pathlib.Path(folder).expanduser())
    return files.text_hash({name: file["sha256"] for name, file in found.items()})


def check_names(suite: Sequence[Measure], title: str, taken: Mapping[str, str] = {}) -> None:
    """Raise ValueError if two measures of a suite would be in one file, or one in a file that is
    taken."""
    names = dict(taken)
    for measure in suite:
        if (
            other := names.setdefault(file_name(measure.name).lower(), measure.name)
        ) != measure.name:
            raise ValueError(
                f"suite {title}: the answers of '{measure.name}' and of {other!r} would be in one "
                "file, "
                f"{file_name(measure.name)}.jsonl. Rename the measure."
            )


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
        if left := {i: item for i, item in items.items() if i not in lines.rows}:
            _answer_items(measure, left, lines, engine, other, sampling, title)
    elif measure.kind == "mt_bench":
        left = {i: q for i, q in items.items() if not mt_bench.is_complete(lines.rows.get(i))}
        mt_bench.answer(engine, left, lines.rows, measure.max_new, title, sampling, lines.add)
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
    done = lambda _, row: lines.add(row)
    if measure.kind == "mmlu":
        questions = tasks.mmlu_questions(engine, **sources.task(measure))
        tasks.choose(engine, questions, title=title, done=done, skip=set(lines.rows))
    else:
        questions = tasks.gsm8k_questions(engine, **sources.task(measure), max_new=measure.max_new)
        tasks.solve(
            engine, questions, title=title, done=done, skip=set(lines.rows), sampling=sampling
        )
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
    left: Mapping[str, Any],
    lines: Lines,
    engine: Engine | Contrasted,
    other: Engine | None,
    sampling: Sampling,
    title: str,
) -> None:
    """Answer prompts, or take the likelihood of given answers; items that are too long are noted as
    such."""
    ids = list(left)
    if measure.kind == "text":
        asked = [engine.needed_chat().encode(left[i]["prompt"], left[i]["answer"]) for i in ids]
        fits = [len(e.prompt_ids) + len(e.answer_ids) <= engine.config.max_length for e in asked]
    else:
        asked = [FORMS[measure.form](left[i]["prompt"]) for i in ids]
        fits = [engine.fits(talk, measure.max_new) for talk in asked]
    for i in (i for i, fit in zip(ids, fits) if not fit):
        lines.add({"id": i, "left_out": "too long for the model"})
    ids, asked = ([x for x, fit in zip(xs, fits) if fit] for xs in (ids, asked))
    note = lambda k, row: lines.add({"id": ids[k]} | row)
    if measure.kind == "text":
        answer_likelihoods(engine, asked, other, title, done=note)
    else:
        engine.answer(
            asked,
            measure.max_new,
            title,
            sampling,
            numbers=[int(i, 16) for i in ids],
            done=lambda k, new: note(k, {"answer": engine.decode(new), "tokens": len(new)}),
        )


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
            fits = [len(engine().encode(t)) + max_new <= engine().config.max_length for t in texts]
            said = iter(
                engine().complete([t for t, fit in zip(texts, fits) if fit], max_new, "verdicts")
            )
            return [next(said) if fit else "" for fit in fits]  # nothing said is no verdict

        return complete

    judges = {text: open_judge(text, open_engine) for text in dict.fromkeys(texts)}
    for judge in judges.values():
        for kind in {m.kind for m in suite}.intersection(JUDGED):
            judge.judge([], kind)  # raises if it cannot tell
    return judges


def open_grader(text: str, suite: Sequence[Measure], title: str) -> mt_bench.Grader | None:
    """Return who grades MT-Bench's answers, None where nothing is graded. Raises ValueError if the
    suite needs one."""
    if not (graded := [m.name for m in suite if m.kind == "mt_bench"]):
        if text:
            say(f"Nothing in suite {title} is graded; --grader={text} is not used.")
        return None
    if not text:
        raise ValueError(
            f"'{graded[0]}' is graded by another model: name it with --grader={mt_bench.GRADER} "
            "(an "
            f"OpenAI-compatible server), or leave the measure out of suite {title}."
        )
    return mt_bench.open_grader(text)


def claim_judges(texts: Sequence[str], out: pathlib.Path) -> None:
    """Write down which files each local judge's verdicts come from, or compare with what is
    there."""
    for text in filter(folder_of, texts):
        place, folder = out / verdicts_of(text), folder_of(text)
        wanted = {name: x["sha256"] for name, x in files.folder_hashes(folder).items()}
        if not (path := place / _JUDGE).is_file():
            if place.is_dir():
                say(
                    f"{place} holds verdicts without a note of the judge's files; they are taken "
                    f"to be of {folder} as it is now."
                )
            files.write_json(path, {"judge": text, "files": wanted})
            continue
        found = files.read_json(path).get("files", {})
        if changed := sorted(
            name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)
        ):
            raise ValueError(
                f"The verdicts in {place} are of another judge: in {folder} "
                f"{', '.join(changed[:4])}"
                f"{' and others' if len(changed) > 4 else ''} changed since. Delete {place}, and "
                "the same answers "
                "are judged again; or give the folder with the earlier files."
            )


def judge_answers(
    text: str,
    judge: Judge,
    asked: Asked,
    items: Mapping[str, Any],
    out: pathlib.Path,
) -> dict[tuple[str, str], list[dict[str, Verdict]]]:
    """Return the verdicts of one judge by (who, measure), a dictionary a run; judges what has no
    verdict yet."""
    verdicts: dict[tuple[str, str], list[dict[str, Verdict]]] = {}
    for who, measure, run in asked:
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
    lines = lines_of(out, f"grades/{_folder_name(grader.name)}", who, measure, run)

    def ask():
        grader.grade(questions, answers, lines.rows, lines.add)
        return lines.rows

    return processes.on_first(ask)


def _ask(
    judge: Judge,
    measure: Measure,
    items: Mapping[str, Any],
    answers: Mapping[str, Any],
    lines: Lines,
) -> dict[str, Any]:
    """Let a judge judge one model's answers to one measure; returns the rows."""
    given = {
        i: Item(items[i]["prompt"], row["answer"]) for i, row in answers.items() if "answer" in row
    }
    of = {i: hashlib.sha256(item.answer.encode()).hexdigest()[:16] for i, item in given.items()}
    for i in [i for i in given if lines.rows.get(i, {}).get("of", of[i]) != of[i]]:
        del lines.rows[i]  # a verdict on another answer
    new = [i for i in given if i not in lines.rows]
    again = [i for i in given if i in lines.rows and lines.rows[i]["outcome"] == UNKNOWN]
    # Those that had no verdict come a few at a time, so that they alone are not taken for a judge
    # that talks nonsense.
    for ids in (new, *(again[k : k + ENOUGH - 1] for k in range(0, len(again), ENOUGH - 1))):
        judge.judge(
            [given[i] for i in ids],
            measure.kind,
            lambda k, verdict, ids=ids: lines.add(
                {"id": ids[k], "of": of[ids[k]]} | dataclasses.asdict(verdict)
            ),
        )
    if again:
        verdicts = [_verdict(lines.rows[i]) for i in given]
        refuse_nonsense(
            judge, [v for v in verdicts if v != Verdict(INCOHERENT)]
        )  # those the judge was not asked about
    return lines.rows


def _verdict(row: Mapping[str, Any]) -> Verdict:
    return Verdict(row["outcome"], row["degree"], row["raw"])
