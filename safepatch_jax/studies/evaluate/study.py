"""Evaluation of a model, beside another one.

Answers, verdicts and grades lie in OUT as `answering` has it, of 'model' and 'against', with
several seeds a run for each of what is sampled; report.md, report.json and report.png follow from
these.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from safepatch_jax.evaluation import answers as answering
from safepatch_jax.evaluation import mt_bench, tasks
from safepatch_jax.evaluation.answers import JUDGED, ROLES, Sources, companions
from safepatch_jax.evaluation.engine import Engine
from safepatch_jax.evaluation.generate import Sampling
from safepatch_jax.evaluation.jailbreaks import FORMS
from safepatch_jax.evaluation.lines import Lines, check_names, lines_of
from safepatch_jax.evaluation.prompter import Prompter
from safepatch_jax.evaluation.suites import GENERATED, Measure, load_suite
from safepatch_jax.evaluation.timing import seconds_per_token
from safepatch_jax.models.config import read_hf_config, same_architecture
from safepatch_jax.run.stages import versions
from safepatch_jax.runtime import files, processes
from safepatch_jax.runtime.console import say
from safepatch_jax.studies.evaluate import report as evaluation_report

SETTINGS = "evaluation.json"


@dataclasses.dataclass(frozen=True)
class Options:
    """How an evaluation is done; `dataclasses` fields are the launcher's flags.

    Attributes:
      suite: see `load_suite`.
      judge, second_judge: see `open_judge`; the second one is for agreement with the first, '' for
        none.
      grader: grades the answers of mt_bench, see `mt_bench.open_grader`; needed by suites that have
        it.
      mesh, compute_dtype, batch_size: see `Engine`.
      temperature, top_p, seed: see `Sampling`.
      seeds: each measure in which a model writes is done once with each; () for once, with `seed`.
      manual_dir, data_dir: see `load_records`.
    """

    suite: str = "quick"
    judge: str = "phrases"
    second_judge: str = ""
    grader: str = ""
    mesh: str = "data:1,fsdp:-1,tensor:1"
    compute_dtype: str = "float32"
    batch_size: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    seeds: tuple[int, ...] = ()
    manual_dir: str = ""
    data_dir: str = "~/.cache/safepatch_jax/datasets"

    def deciding(self) -> dict[str, Any]:
        """Return what the stored answers depend on beside the suite's measures; judges and seeds
        have folders of their own."""
        left_out = (
            "suite",
            "judge",
            "second_judge",
            "grader",
            "mesh",
            "batch_size",
            "seeds",
            "manual_dir",
            "data_dir",
        )
        deciding = {k: v for k, v in dataclasses.asdict(self).items() if k not in left_out}
        return deciding | ({"seed": "several"} if self.seeds else {})

    def runs(self, measure: Measure) -> tuple[int | None, ...]:
        """Return the seeds with which a measure is done; None stands for the one of `seed`, and for
        measures without a draw."""
        return self.seeds if self.seeds and measure.kind in GENERATED else (None,)

    @property
    def sources(self) -> Sources:
        return Sources(self.manual_dir, self.data_dir)

    def sampling(self, run: int | None) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.seed if run is None else run)


def evaluate(
    model: str, out: str | pathlib.Path, options: Options = Options(), against: str = ""
) -> dict[str, Any]:
    """Evaluate a model, and another one on the same items.

    Args:
      model: a Hugging Face folder or a checkpoint of launch.convert.
      out: the evaluation's folder; one that was begun with the same models and options is gone on
        with.
      options: see `Options`.
      against: the model to compare with, such as the backbone; '' for none.

    Returns:
      the content of report.json.

    Raises:
      ValueError: bad suite, data, model or judge; a folder of another evaluation.
    """
    out, suite = pathlib.Path(out).absolute(), load_suite(options.suite)
    with processes.locked(
        out.with_name(f".{out.name}.lock")
    ):  # a second one waits, and then finds all of it done
        return _evaluate(model, out, suite, options, against)


def _evaluate(
    model: str, out: pathlib.Path, suite: Sequence[Measure], options: Options, against: str
) -> dict[str, Any]:
    folders = {"model": model} | ({"against": against} if against else {})
    texts = (options.judge, options.second_judge) if options.second_judge else (options.judge,)
    judges = answering.open_judges(
        texts,
        suite,
        mesh=options.mesh,
        compute_dtype=options.compute_dtype,
        batch_size=options.batch_size,
    )
    grader = answering.open_grader(options.grader, suite, options.suite)
    _check(suite, folders, options)
    items = {m.name: options.sources.items(m) for m in suite if m.kind in ROLES}
    processes.on_first(lambda: _claim(out, folders, suite, options, items))
    processes.on_first(lambda: answering.claim_judges(judges, out))
    items |= {m.name: options.sources.items(m) for m in suite if m.kind == "mt_bench"}
    for who, folder in reversed(folders.items()):
        _answer(who, folder, against if who == "model" else "", suite, items, out, options)
    names = list(judges)
    judged = [
        (who, m, run)
        for who in folders
        for m in suite
        if m.kind in JUDGED
        for run in options.runs(m)
    ]
    verdicts = {
        text: answering.judge_answers(text, judges.pop(text), judged, items, out) for text in names
    }  # memory is freed
    grades = {
        (who, m.name): [
            answering.grade_answers(grader, m, items[m.name], who, run, out)
            for run in options.runs(m)
        ]
        for who in folders
        for m in suite
        if m.kind == "mt_bench"
    }
    answers = {
        (who, m.name): [lines_of(out, "answers", who, m, run).rows for run in options.runs(m)]
        for who in folders
        for m in suite
    }
    speeds = {who: _speed(out, who).rows.get("speed") for who in folders}
    about = {
        "models": evaluation_report.labels(folders),
        "options": {"suite": options.suite} | options.deciding(),
        "judges": names,
        "versions": versions(),
    }
    about |= ({"seeds": list(options.seeds)} if options.seeds else {}) | (
        {"grader": grader.name} if grader else {}
    )
    content = evaluation_report.gather(suite, items, answers, verdicts, speeds, about, grades)
    processes.on_first(lambda: evaluation_report.write(content, out))
    say(f"Report: {out / 'report.md'}")
    return content


def _check(suite: Sequence[Measure], folders: Mapping[str, str], options: Options) -> None:
    """Raise ValueError for what else would show only after some answers."""
    options.sampling(None)
    if options.seeds:
        given = ",".join(map(str, options.seeds))
        if options.seed:
            raise ValueError(
                f"seed {options.seed} and seeds {given} are both given; leave --seed out."
            )
        if len(set(options.seeds)) < len(options.seeds) or min(options.seeds) < 0:
            raise ValueError(f"seeds must be different whole numbers, 0 at least, got {given}.")
        if not options.temperature:
            raise ValueError(
                f"seeds {given}: at temperature 0 every seed gives the same answers. Sample with "
                "--temperature=0.7, "
                "or leave --seeds out."
            )
        if not any(m.kind in GENERATED for m in suite):
            raise ValueError(
                f"seeds {given}: in suite {options.suite} no measure is sampled. Leave --seeds out."
            )
    check_names(suite, options.suite, {"speed": "the time of a token"})
    for folder in folders.values():
        if not pathlib.Path(folder).expanduser().is_dir():
            raise ValueError(f"no model folder '{folder}'.")
    if texts := [m.name for m in suite if m.kind == "text"]:
        configs = [read_hf_config(companions(folder)) for folder in folders.values()]
        if not same_architecture(configs[0], configs[-1]):
            raise ValueError(
                f"'{texts[0]}' compares predictions, and {' and '.join(folders.values())} are of "
                "different "
                "architectures. Give --against the model that was patched, or a suite without "
                "kind 'text'."
            )


def _claim(
    out: pathlib.Path,
    folders: Mapping[str, str],
    suite: Sequence[Measure],
    options: Options,
    items: Mapping[str, Any],
) -> None:
    """Write down what the folder is for, or compare with what is there."""
    wanted = {
        "models": {who: answering.fingerprint(folder) for who, folder in folders.items()},
        "suite": [dataclasses.asdict(m) for m in suite],
        "options": options.deciding(),
        "items": files.text_hash(items),
    }
    if data := {m.name: options.sources.hash(m) for m in suite if m.kind not in ROLES}:
        wanted["data"] = data
    if (path := out / SETTINGS).is_file():
        found = files.read_json(path)
        if changed := [
            _difference(name, found.get(name), wanted[name])
            for name in wanted
            if found.get(name) != wanted[name]
        ]:
            raise ValueError(
                f"{out} is an evaluation with other {' and '.join(changed)}. Give another --out, "
                "or delete it."
            )
        return
    files.refuse_full_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    files.write_json(path, wanted | {"versions": versions()})


def _difference(name: str, found: Any, wanted: Any) -> str:
    """Say what differs: of models and data which one, of options their values, of the others the
    name alone."""
    if name not in ("models", "options", "data") or not isinstance(found, dict):
        return name
    changed = [k for k in {**found, **wanted} if found.get(k) != wanted.get(k)]
    values = (
        f"{k} {found.get(k)} there, {wanted.get(k)} here" if name == "options" else k
        for k in changed
    )
    return f"{name} ({', '.join(values)})"


def _speed(out: pathlib.Path, who: str) -> Lines:
    return Lines(out / "answers" / who / "speed.jsonl")


def _answer(
    who: str,
    folder: str,
    against: str,
    suite: Sequence[Measure],
    items: Mapping[str, Any],
    out: pathlib.Path,
    options: Options,
) -> None:
    """Let one model do what is not done yet; it is not loaded if nothing is left."""

    @functools.cache
    def engine(folder: str) -> Engine:
        say(f"Loading {folder}")
        return Engine.open(
            folder,
            mesh=options.mesh,
            compute_dtype=options.compute_dtype,
            batch_size=options.batch_size,
        )

    for measure, run in [(m, run) for m in suite for run in options.runs(m)]:
        lines, asked = lines_of(out, "answers", who, measure, run), items.get(measure.name, {})
        if not answering.is_done(measure, asked, lines):
            title = f"{who}: {measure.name}" + ("" if run is None else f", seed {run}")
            other = engine(against) if against and measure.kind == "text" else None
            answering.answer(
                measure,
                asked,
                lines,
                engine(folder),
                other,
                options.sources,
                options.sampling(run),
                title,
            )
    speed = _speed(out, who)
    if "speed" not in speed.rows and any(m.kind in JUDGED for m in suite):
        speed.add({"id": "speed", "seconds_per_token": seconds_per_token(engine(folder))})


def show_examples(model: str, options: Options) -> list[str]:
    """Return lines that show how the first item of each measure is put to a model; expected answer
    tokens are green."""
    folder, lines = companions(model), []
    prompter = Prompter(read_hf_config(folder), folder)
    for measure in load_suite(options.suite):
        lines.append(f"--- {measure.name} ({measure.kind}, {measure.source})")
        lines += _example(measure, prompter, options)
    return lines


def _example(measure: Measure, prompter: Prompter, options: Options) -> list[str]:
    text = lambda ids: prompter.tokenizer.decode(ids, skip_special_tokens=False)
    green = lambda expected: f"\033[32m{expected}\033[0m"
    if measure.kind == "mmlu":
        question = tasks.mmlu_questions(
            prompter, **options.sources.task(measure) | {"limit": 1}
        ).items[0]
        return [
            text(question.prompt_ids) + green(text(question.choices["ABCD".index(question.answer)]))
        ]
    if measure.kind == "gsm8k":
        questions = tasks.gsm8k_questions(
            prompter, **options.sources.task(measure) | {"limit": 1}, max_new=measure.max_new
        )
        return [
            text(questions.items[0].prompt_ids) + green(f" ... #### {questions.items[0].answer}")
        ]
    if measure.kind == "mt_bench":
        question = next(iter(options.sources.items(measure).values()))
        read = mt_bench.examples(prompter, question)
        return [
            f"turn {k}: {x}" + (green(reference) if reference else "")
            for k, x, reference in zip(mt_bench.TURNS, read, question["references"])
        ]
    item = next(iter(options.sources.items(measure).values()))
    if measure.kind == "text":
        example = prompter.needed_chat().encode(item["prompt"], item["answer"])
        return [text(example.prompt_ids) + green(text(example.answer_ids))]
    return [prompter.needed_chat().prompt_text(FORMS[measure.form](item["prompt"]))]
