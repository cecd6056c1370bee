"""How items of a suite are put to a model: what --show_examples prints."""

from __future__ import annotations

from collections.abc import Sequence

from safepatch_jax.evaluation import mt_bench, tasks
from safepatch_jax.evaluation.answers import companions
from safepatch_jax.evaluation.jailbreaks import FORMS
from safepatch_jax.evaluation.prompter import Prompter
from safepatch_jax.evaluation.suites import Measure, load_suite
from safepatch_jax.io import hub
from safepatch_jax.models.config import read_hf_config
from safepatch_jax.runtime.console import example
from safepatch_jax.runtime.text import printable
from safepatch_jax.studies.evaluate.options import EvaluationOptions


def show_examples(model: str, options: EvaluationOptions) -> list[str]:
    """Return lines that show how the first item of each measure is put to a model; expected answer
    tokens are green."""
    folder, lines = companions(hub.folder_of(model)), []
    suite = load_suite(options.suite)
    for label, prompt_format in options.formats.items():
        prompter = Prompter(read_hf_config(folder), folder, options.date, prompt_format)
        template = f", template {label}" if label else ""
        for measure in suite:
            title = f"{measure.name} ({measure.kind}, {measure.source}{template})"
            lines.append(printable(f"--- {title}"))
            lines += _example(measure, prompter, options)
    return lines


def _example(measure: Measure, prompter: Prompter, options: EvaluationOptions) -> list[str]:
    sources = options.sources
    if measure.kind == "mmlu":
        one = sources.task(measure) | {"limit": 1}
        question = tasks.mmlu_questions(prompter, **one).items[0]
        choice = question.choices["ABCD".index(question.answer)]
        return [example(_text(prompter, question.prompt_ids), _text(prompter, choice))]
    if measure.kind == "gsm8k":
        one = sources.task(measure) | {"limit": 1}
        questions = tasks.gsm8k_questions(prompter, **one, max_new=measure.max_new)
        question = questions.items[0]
        return [example(_text(prompter, question.prompt_ids), f" ... #### {question.answer}")]
    item = next(iter(sources.items(measure).values()))
    if measure.kind == "mt_bench":
        lines = []
        examples = mt_bench.examples(prompter, item)
        for turn, text, reference in zip(mt_bench.TURNS, examples, item["references"]):
            lines.append(example(f"turn {turn}: {text}", reference))
        return lines
    chat, turns = prompter.needed_chat(), item.get("turns", ())
    if measure.kind == "text":
        pair = chat.encode(item["prompt"], item["answer"], turns)
        return [example(_text(prompter, pair.prompt_ids), _text(prompter, pair.answer_ids))]
    return [example(chat.prompt_text(FORMS[measure.form](item["prompt"]), turns))]


def _text(prompter: Prompter, ids: Sequence[int]) -> str:
    return prompter.tokenizer.decode(ids, skip_special_tokens=False)
