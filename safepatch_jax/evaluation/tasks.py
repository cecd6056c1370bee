"""MMLU and GSM8K: questions as token ids, a model's answers to them, and their accuracy.

`mmlu_questions` and `gsm8k_questions` write the prompts; `choose` answers by log-likelihood,
`solve` in writing.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

from safepatch_jax.data.builders import load_set
from safepatch_jax.data.sets import DATA_DIR, Row
from safepatch_jax.evaluation.batching import padded
from safepatch_jax.evaluation.engine import Engine, first_stop
from safepatch_jax.evaluation.generate import Sampling
from safepatch_jax.evaluation.prompter import Prompter
from safepatch_jax.evaluation.thoughts import after_thought
from safepatch_jax.runtime.console import say

LETTERS = "ABCD"
Item = dict[str, Any]
Done = Callable[[int, Item], None]
_NUMBER = r"((?<![\w)])-)?(?:\$\s?(-?))?((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)"
_NEXT = "Question:"  # where the prompt writes so, a model continues with the next question
_INSTRUCTION = (
    "Think step by step. Write the final number alone on the last line, as '#### number'."
)


@dataclasses.dataclass(frozen=True)
class Question:
    """A question as a model reads it.

    Attributes:
      prompt_ids: token ids of the prompt.
      answer: the right answer: a letter (MMLU) or a number (GSM8K).
      choices: token ids of each choice (MMLU).
      shots: examples that the prompt holds.
    """

    id: str
    category: str
    prompt_ids: tuple[int, ...]
    answer: str
    choices: tuple[tuple[int, ...], ...] = ()
    shots: int = 0


@dataclasses.dataclass(frozen=True)
class Questions:
    """What a model is asked.

    Attributes:
      left_out: questions too long for the model even without examples.
      shortened: questions with fewer examples than asked for, so that they fit.
      max_new: tokens at most of a written answer.
      note: how the prompts differ from what was asked for, or ''.
    """

    items: tuple[Question, ...]
    left_out: int
    shortened: int
    max_new: int = 0
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Material:
    """What prompts are written from.

    Attributes:
      rows: those asked about.
      examples: those that examples are taken from.
      note: why there are no examples, or ''.
    """

    rows: tuple[Row, ...]
    examples: tuple[Row, ...]
    note: str = ""


def mmlu_material(
    *,
    manual_dir: str = "",
    data_dir: str | pathlib.Path = DATA_DIR,
    shots: int = 5,
    limit: int = 0,
    seed: int = 0,
) -> Material:
    """Return MMLU's test questions, and its dev split; arguments and errors as of
    `mmlu_questions`."""
    if not 0 <= shots <= 5:
        raise ValueError(f"MMLU: shots must be 0 to 5, got {shots}.")
    examples = load_set("mmlu", "dev", manual_dir, data_dir) if shots else ()
    rows = subset(load_set("mmlu", "test", manual_dir, data_dir), limit, seed)
    return Material(tuple(rows), tuple(examples))


def gsm8k_material(
    *,
    manual_dir: str = "",
    data_dir: str | pathlib.Path = DATA_DIR,
    shots: int = 5,
    limit: int = 0,
    seed: int = 0,
) -> Material:
    """Return GSM8K's test questions, and so many examples of its train split, where that is at
    hand; see `gsm8k_questions`."""
    if shots < 0:
        raise ValueError(f"GSM8K: shots must be 0 or more, got {shots}.")
    rows = subset(load_set("gsm8k", "test", manual_dir, data_dir), limit, seed)
    examples, note = [], ""
    if shots:
        try:
            examples = subset(load_set("gsm8k", "train", manual_dir, data_dir), shots, seed)
        except ValueError as error:
            note = f"no examples, for GSM8K's train split is not at hand: {error}"
    return Material(tuple(rows), tuple(examples), note)


def mmlu_questions(
    engine: Prompter,
    *,
    manual_dir: str = "",
    data_dir: str | pathlib.Path = DATA_DIR,
    shots: int = 5,
    limit: int = 0,
    seed: int = 0,
) -> Questions:
    """Write MMLU's test questions as prompts (Hendrycks et al. 2021).

    Args:
      engine: the model, or its tokenizer alone.
      manual_dir, data_dir: see `load_set`.
      shots: examples before a question, 0 to 5: the first ones of its subject's dev split.
      limit, seed: which questions are asked, see `subset`.

    Raises:
      ValueError: as `load_set`; shots or limit out of range; no question fits.
    """
    material = mmlu_material(
        manual_dir=manual_dir, data_dir=data_dir, shots=shots, limit=limit, seed=seed
    )
    examples = collections.defaultdict(list)
    for row in material.examples:
        examples[row["category"]].append(row)
    # A choice's tokens are those it has after the prompt's last word; what stands before that has
    # no part in them.
    start = len(_ids(engine, "Answer:"))
    choices = tuple(tuple(_ids(engine, f"Answer: {letter}")[start:]) for letter in LETTERS)

    def prompt_ids(row: Row, k: int) -> list[int]:
        return _ids(engine, mmlu_prompt(row, examples[row["category"]][:k]))

    return _questions(engine, material.rows, prompt_ids, lambda row: row["answer"], shots, choices)


def gsm8k_questions(
    engine: Prompter,
    *,
    manual_dir: str = "",
    data_dir: str | pathlib.Path = DATA_DIR,
    shots: int = 5,
    limit: int = 0,
    seed: int = 0,
    max_new: int = 256,
) -> Questions:
    """Write GSM8K's test questions as prompts for a chain of thought (Cobbe et al. 2021).

    Args:
      shots: worked examples before a question, chosen from the train split by hash. Without (0 is
        asked for, the split is not at hand, or none fits) a model that has a chat template is asked
        in it, for a solution that ends in '#### number'.
      max_new: tokens at most of an answer.
      others: see `mmlu_questions`.
    """
    material = gsm8k_material(
        manual_dir=manual_dir, data_dir=data_dir, shots=shots, limit=limit, seed=seed
    )
    if material.note:
        say(f"GSM8K: {material.note}")

    def prompt_ids(row, k):
        if not k and engine.chat:
            return engine.ask(f"{row['prompt']}\n\n{_INSTRUCTION}")
        return _ids(engine, gsm8k_prompt(row, material.examples[:k]))

    return _questions(
        engine,
        material.rows,
        prompt_ids,
        lambda row: final_number(row["extra"]["final"]),
        len(material.examples),
        max_new=max_new,
        note=material.note,
    )


def mmlu_prompt(row: Row, examples: Sequence[Row]) -> str:
    """Return the text before the answer's letter: the subject, solved examples, the question."""
    subject = row["category"].replace("_", " ")
    solved = "".join(f"{_mmlu_block(example)} {example['answer']}\n\n" for example in examples)
    return (
        f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        f"{solved}{_mmlu_block(row)}"
    )


def _mmlu_block(row: Row) -> str:
    choices = [f"{letter}. {text}" for letter, text in zip(LETTERS, row["extra"]["choices"])]
    return "\n".join([row["prompt"], *choices, "Answer:"])


def gsm8k_prompt(row: Row, examples: Sequence[Row]) -> str:
    """Return the text before the solution: worked examples, the question."""
    solved = "".join(
        f"Question: {example['prompt']}\nAnswer: {example['answer']}\n\n" for example in examples
    )
    return f"{solved}Question: {row['prompt']}\nAnswer:"


def subset(rows: Sequence[Row], limit: int, seed: int = 0) -> list[Row]:
    """Choose rows, from each category in proportion to its size; file order stays, 0 chooses all.

    Seed and texts alone decide, and the rows of a smaller limit are among those of a larger one.
    Raises ValueError if the limit is negative.
    """
    if limit < 0:
        raise ValueError(f"limit must be 0 (all) or more, got {limit}.")
    members = collections.defaultdict(list)
    for i, row in enumerate(rows):
        share = _share(seed, row["prompt"], row["answer"], row["extra"])
        members[row["category"]].append((share, i))
    places = []
    for category, ranked in members.items():
        for rank, (_, i) in enumerate(sorted(ranked)):
            places.append(((rank + _share(seed, category)) / len(ranked), i))
    chosen = [i for _, i in sorted(places)][: limit or None]
    return [rows[i] for i in sorted(chosen)]


def choose(
    engine: Engine,
    questions: Questions,
    *,
    title: str = "MMLU",
    done: Done | None = None,
    skip: Collection[str] = (),
) -> list[Item]:
    """Answer each question with its most likely choice, the first of equal ones.

    Args:
      done: called with (number of the question, item) as soon as an item is there.
      skip: ids of questions that are answered already; they are not among the items.

    Returns:
      an item a question: id, category, correct, and raw: the letter given, the right answer, shots,
        and the log-likelihood of each choice in nats.
    """
    pairs, places = [], []
    for n, question in _unanswered(questions, skip):
        for k, choice in enumerate(question.choices):
            pairs.append((question.prompt_ids, choice))
            places.append((n, k))
    scores: dict[int, dict[int, float]] = collections.defaultdict(dict)
    items: dict[int, Item] = {}

    def keep(index: int, score: tuple[float, bool]) -> None:
        n, k = places[index]
        scores[n][k], _ = score
        question = questions.items[n]
        if len(scores[n]) == len(question.choices):
            logprobs = [logprob for _, logprob in sorted(scores[n].items())]
            letter = LETTERS[logprobs.index(max(logprobs))]
            items[n] = _item(question, letter, logprobs=logprobs)
            if done:
                done(n, items[n])

    engine.score(pairs, title, keep)
    return [items[n] for n in sorted(items)]


def solve(
    engine: Engine,
    questions: Questions,
    *,
    title: str = "GSM8K",
    done: Done | None = None,
    skip: Collection[str] = (),
    sampling: Sampling = Sampling(),
) -> list[Item]:
    """Answer each question in writing, greedily by default; correct if the final number is the
    right one.

    Args and returns: see `choose`; raw has the number given ('' if none), the right answer, shots,
    and the text. A draw depends on the seed of `sampling` and the question's place alone.
    """
    items: dict[int, Item] = {}

    def write(part: Sequence[tuple[int, Question]], until: Sequence[str]) -> None:
        def keep(index: int, ids: Sequence[int]) -> None:
            n, question = part[index]
            text = _before(engine.decode(ids), until)
            items[n] = _item(question, final_number(after_thought(text)), text=text)
            if done:
                done(n, items[n])

        prompts, numbers = [question.prompt_ids for _, question in part], [n for n, _ in part]
        engine.complete_ids(prompts, questions.max_new, title, sampling, keep, numbers, until=until)

    parts: dict[bool, list[tuple[int, Question]]] = {}
    for n, question in _unanswered(questions, skip):
        parts.setdefault(question.shots > 0, []).append((n, question))
    for with_examples, part in parts.items():
        write(part, _stops(engine, with_examples))
    return [items[n] for n in sorted(items)]


def _stops(engine: Prompter, with_examples: bool) -> tuple[str, ...]:
    """Return the stop texts of an answer: the next question, where the prompt writes questions so.
    Most chat templates do not, and an answer in them may hold the word."""
    if with_examples or engine.chat is None:
        return (_NEXT,)
    return (_NEXT,) if _NEXT in engine.tokenizer.decode(engine.ask("1 + 1?")) else ()


def _before(text: str, until: Sequence[str]) -> str:
    """Return a text up to the first stop text behind its thought."""
    answer = after_thought(text)
    thought = text.removesuffix(answer)
    return (thought + answer[: first_stop(answer, until)]).strip()


def accuracy(items: Sequence[Item]) -> dict[str, Any]:
    """Return n, correct and accuracy of the items, and by_category: the same of each category.
    Raises ValueError if empty."""
    if not items:
        raise ValueError("accuracy of no items is not defined.")
    groups = collections.defaultdict(list)
    for item in items:
        groups[item["category"]].append(item["correct"])
    by_category = {name: _share_of(groups[name]) for name in sorted(groups)}
    return _share_of([item["correct"] for item in items]) | {"by_category": by_category}


def _share_of(marks: Sequence[bool]) -> dict[str, Any]:
    return {"n": len(marks), "correct": sum(marks), "accuracy": sum(marks) / len(marks)}


def final_number(text: str) -> str:
    """Return the last number that stands right after '####', else the last one of the text; '' if
    there is none.

    Thousands commas, a dollar sign, a full stop at the end and zeros at the ends do not count; 16-3
    holds no negative number.
    """
    text = text.replace("\N{MINUS SIGN}", "-")
    numbers = re.findall(r"####\s*" + _NUMBER, text) or re.findall(_NUMBER, text)
    if not numbers:
        return ""
    *signs, digits = numbers[-1]
    whole, _, part = digits.replace(",", "").partition(".")
    number = (whole.lstrip("0") or "0") + f".{part.rstrip('0')}".rstrip(".")
    return f"-{number}" if any(signs) and number != "0" else number


def _questions(
    engine: Prompter,
    rows: Sequence[Row],
    prompt_ids: Callable[[Row, int], Sequence[int]],
    answer: Callable[[Row], str],
    shots: int,
    choices: tuple = (),
    max_new: int = 0,
    note: str = "",
) -> Questions:
    """Write each row's prompt with as many examples as fit."""
    items = []
    tail = max(map(len, choices), default=1) - 1
    room = engine.room(max_new) if max_new else 0
    for row in rows:
        for k in range(shots, -1, -1):
            ids = prompt_ids(row, k)
            if padded(len(ids) + tail) + room <= engine.config.max_length:
                items.append(
                    Question(row["id"], row["category"], tuple(ids), answer(row), choices, k)
                )
                break
    if not items:
        hint = f" with {max_new} tokens of an answer; lower max_new." if max_new else "."
        raise ValueError(
            f"None of {len(rows)} questions fits into the model's {engine.config.max_length} "
            f"positions{hint}"
        )
    shortened = sum(question.shots < shots for question in items)
    return Questions(tuple(items), len(rows) - len(items), shortened, max_new, note)


def _unanswered(questions: Questions, skip: Collection[str]) -> list[tuple[int, Question]]:
    return [(n, question) for n, question in enumerate(questions.items) if question.id not in skip]


def _item(question: Question, given: str, **more: Any) -> Item:
    raw = {"given": given, "answer": question.answer, "shots": question.shots} | more
    return {
        "id": question.id,
        "category": question.category,
        "correct": given == question.answer,
        "raw": raw,
    }


def _ids(engine: Prompter, text: str) -> list[int]:
    """Tokenise a text that is no conversation, with the tokens that the tokenizer itself puts
    before one."""
    return engine.tokenizer(text)["input_ids"]


def _share(*parts: Any) -> float:
    """Return a number in [0, 1) that the parts decide."""
    digest = hashlib.sha256(json.dumps(parts, ensure_ascii=False, sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
