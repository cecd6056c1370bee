"""Evaluation of a model, beside another one: answers, verdicts and likelihoods in files that a killed run goes on from.

OUT/answers/MODEL/MEASURE.jsonl holds what a model did on each item, OUT/verdicts/JUDGE/MODEL/MEASURE.jsonl what a judge said
of it, OUT/grades/GRADER/MODEL/MEASURE.jsonl what a grader did; report.md, report.json and report.png follow from these. MODEL is
'model' or 'against', with several seeds 'model/seed-0' and so on for what is sampled.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from typing import Any, Mapping, Sequence

from safepatch_jax import files, processes
from safepatch_jax.console import say
from safepatch_jax.data.chat import Example
from safepatch_jax.data.records import load_records, take
from safepatch_jax.evaluation import mt_bench, tasks
from safepatch_jax.evaluation.engine import Engine, Prompter, Sampling
from safepatch_jax.evaluation.jailbreaks import FORMS
from safepatch_jax.evaluation.judge import INCOHERENT
from safepatch_jax.evaluation.judges import (
    ENOUGH, UNKNOWN, Generative, Item, Judge, Verdict, folder_of, open_judge, refuse_nonsense)
from safepatch_jax.evaluation.likelihoods import answer_likelihoods
from safepatch_jax.evaluation.suites import GENERATED, Measure, load_suite
from safepatch_jax.io.checkpoint import COMPANIONS_FOLDER, MODEL
from safepatch_jax.models.config import read_hf_config, same_architecture
from safepatch_jax.pipeline import evaluation_report
from safepatch_jax.pipeline.stages import versions

ROLES = {"harm": "harmful", "refusal": "lookalike", "text": "ordinary"}
JUDGED = ("harm", "refusal")
SETTINGS, JUDGE = "evaluation.json", "judge.json"


@dataclasses.dataclass(frozen=True)
class Options:
    """How an evaluation is done; `dataclasses` fields are the launcher's flags.

    Attributes:
      suite: see `load_suite`.
      judge, second_judge: see `open_judge`; the second one is for agreement with the first, '' for none.
      grader: grades the answers of mt_bench, see `mt_bench.open_grader`; needed by suites that have it.
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
        """Return what the stored answers depend on beside the suite's measures; judges and seeds have folders of their own."""
        left_out = ("suite", "judge", "second_judge", "grader", "mesh", "batch_size", "seeds", "manual_dir", "data_dir")
        deciding = {k: v for k, v in dataclasses.asdict(self).items() if k not in left_out}
        return deciding | ({"seed": "several"} if self.seeds else {})

    def runs(self, measure: Measure) -> tuple[int | None, ...]:
        """Return the seeds with which a measure is done; None stands for the one of `seed`, and for measures without a draw."""
        return self.seeds if self.seeds and measure.kind in GENERATED else (None,)

    def sampling(self, run: int | None) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.seed if run is None else run)


class Lines:
    """Rows of a JSONL file, the last of each id; what is added is on the disk at once. A last line that was cut off is dropped."""

    def __init__(self, path: pathlib.Path):
        self._path, self.rows = path, {}
        self.rows = processes.on_first(lambda: _read_lines(path))

    def add(self, row: Mapping[str, Any]) -> None:
        self.rows[row["id"]] = dict(row)
        if processes.first():
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _read_lines(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = path.read_bytes() if path.is_file() else b""
    whole = raw[:raw.rfind(b"\n") + 1]
    if whole != raw:
        with open(path, "rb+") as file:
            file.truncate(len(whole))
    try:
        return {row["id"]: row for row in map(json.loads, whole.decode().split("\n")[:-1])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}). Delete it, and its answers are given again.") from error


def evaluate(model: str, out: str | pathlib.Path, options: Options = Options(), against: str = "") -> dict[str, Any]:
    """Evaluate a model, and another one on the same items.

    Args:
      model: a Hugging Face folder or a checkpoint of launch.convert.
      out: the evaluation's folder; one that was begun with the same models and options is gone on with.
      options: see `Options`.
      against: the model to compare with, such as the backbone; '' for none.

    Returns:
      the content of report.json.

    Raises:
      ValueError: bad suite, data, model or judge; a folder of another evaluation.
    """
    out, suite = pathlib.Path(out).absolute(), load_suite(options.suite)
    with processes.locked(out.with_name(f".{out.name}.lock")):  # a second one waits, and then finds all of it done
        return _evaluate(model, out, suite, options, against)


def _evaluate(model: str, out: pathlib.Path, suite: Sequence[Measure], options: Options, against: str) -> dict[str, Any]:
    folders = {"model": model} | ({"against": against} if against else {})
    judges, grader = _open_judges(suite, options), _open_grader(suite, options)
    _check(suite, folders, options)
    items = {m.name: _items(m, options) for m in suite if m.kind in ROLES}
    processes.on_first(lambda: _claim(out, folders, suite, options, items))
    processes.on_first(lambda: _claim_judges(judges, out))
    items |= {m.name: _questions(m, options) for m in suite if m.kind == "mt_bench"}
    for who, folder in reversed(folders.items()):
        _answer(who, folder, against if who == "model" else "", suite, items, out, options)
    names = list(judges)
    verdicts = {text: _judge(text, judges.pop(text), suite, items, folders, out, options) for text in names}  # memory is freed
    grades = {(who, m.name): [_grade(grader, m, items[m.name], who, run, out) for run in options.runs(m)]
              for who in folders for m in suite if m.kind == "mt_bench"}
    answers = {(who, m.name): [_lines(out, "answers", who, m, run).rows for run in options.runs(m)]
               for who in folders for m in suite}
    speeds = {who: _speed(out, who).rows.get("speed") for who in folders}
    about = {"models": evaluation_report.labels(folders), "options": {"suite": options.suite} | options.deciding(),
             "judges": names, "versions": versions()}
    about |= ({"seeds": list(options.seeds)} if options.seeds else {}) | ({"grader": grader.name} if grader else {})
    content = evaluation_report.gather(suite, items, answers, verdicts, speeds, about, grades)
    processes.on_first(lambda: evaluation_report.write(content, out))
    say(f"Report: {out / 'report.md'}")
    return content


def _open_judges(suite: Sequence[Measure], options: Options) -> dict[str, Judge]:
    """Open the judges before hours of answering, so that a mistake shows at once; a generative one loads its model when asked."""
    def open_engine(folder: str):
        @functools.cache
        def engine() -> Engine:
            say(f"Loading {folder}")
            return Engine.open(folder, mesh=options.mesh, compute_dtype=options.compute_dtype, batch_size=options.batch_size)

        def complete(texts: Sequence[str], max_new: int) -> list[str]:
            fits = [len(engine().encode(t)) + max_new <= engine().config.max_length for t in texts]
            said = iter(engine().complete([t for t, fit in zip(texts, fits) if fit], max_new, "verdicts"))
            return [next(said) if fit else "" for fit in fits]  # nothing said is no verdict

        return complete

    texts = dict.fromkeys((options.judge, options.second_judge) if options.second_judge else (options.judge,))
    judges = {text: open_judge(text, open_engine) for text in texts}
    for judge in judges.values():
        for kind in {m.kind for m in suite}.intersection(JUDGED):
            judge.judge([], kind)  # raises if it cannot tell
    return judges


def _open_grader(suite: Sequence[Measure], options: Options) -> mt_bench.Grader | None:
    if not (graded := [m.name for m in suite if m.kind == "mt_bench"]):
        if options.grader:
            say(f"Nothing in suite {options.suite} is graded; --grader={options.grader} is not used.")
        return None
    if not options.grader:
        raise ValueError(f"'{graded[0]}' is graded by another model: name it with --grader={mt_bench.GRADER} (an "
                         f"OpenAI-compatible server), or leave the measure out of suite {options.suite}.")
    return mt_bench.open_grader(options.grader)


def _check(suite: Sequence[Measure], folders: Mapping[str, str], options: Options) -> None:
    """Raise ValueError for what else would show only after some answers."""
    options.sampling(None)
    if options.seeds:
        given = ",".join(map(str, options.seeds))
        if options.seed:
            raise ValueError(f"seed {options.seed} and seeds {given} are both given; leave --seed out.")
        if len(set(options.seeds)) < len(options.seeds) or min(options.seeds) < 0:
            raise ValueError(f"seeds must be different whole numbers, 0 at least, got {given}.")
        if not options.temperature:
            raise ValueError(f"seeds {given}: at temperature 0 every seed gives the same answers. Sample with --temperature=0.7, "
                             "or leave --seeds out.")
        if not any(m.kind in GENERATED for m in suite):
            raise ValueError(f"seeds {given}: in suite {options.suite} no measure is sampled. Leave --seeds out.")
    names: dict[str, str] = {"speed": "the time of a token"}
    for measure in suite:
        if (other := names.setdefault(_file_name(measure.name).lower(), measure.name)) != measure.name:
            raise ValueError(f"suite {options.suite}: the answers of '{measure.name}' and of {other!r} would be in one file, "
                             f"{_file_name(measure.name)}.jsonl. Rename the measure.")
    for folder in folders.values():
        if not pathlib.Path(folder).expanduser().is_dir():
            raise ValueError(f"no model folder '{folder}'.")
    if texts := [m.name for m in suite if m.kind == "text"]:
        configs = [read_hf_config(_companions(folder)) for folder in folders.values()]
        if not same_architecture(configs[0], configs[-1]):
            raise ValueError(f"'{texts[0]}' compares predictions, and {' and '.join(folders.values())} are of different "
                             "architectures. Give --against the model that was patched, or a suite without kind 'text'.")


def _items(measure: Measure, options: Options) -> dict[str, dict[str, str]]:
    """Return the records of a measure by id: prompt, answer, category."""
    data_dir = pathlib.Path(options.data_dir).expanduser()
    records = load_records(ROLES[measure.kind], measure.source, options.manual_dir, data_dir, answers=measure.kind == "text")
    if measure.split == "all":
        records = [dataclasses.replace(r, split="all") for r in records]
    chosen = take(records, measure.split, measure.limit)
    return {hashlib.sha256(r.prompt.encode()).hexdigest()[:16]: {
        "prompt": r.prompt, "answer": r.answer, "category": r.category} for r in chosen}


def _questions(measure: Measure, options: Options) -> dict[str, mt_bench.Question]:
    return mt_bench.questions(manual_dir=options.manual_dir, data_dir=options.data_dir, limit=measure.limit)


def _task(measure: Measure, options: Options) -> dict[str, Any]:
    """Return how the data of mmlu or gsm8k are asked for."""
    return {"manual_dir": options.manual_dir, "data_dir": options.data_dir, "shots": measure.shots, "limit": measure.limit}


def _data_hash(measure: Measure, options: Options) -> str:
    """Return a hash over the rows that a task's prompts are written from."""
    if measure.kind == "mt_bench":
        return files.text_hash(_questions(measure, options))
    material = (tasks.mmlu_material if measure.kind == "mmlu" else tasks.gsm8k_material)(**_task(measure, options))
    return files.text_hash([material.rows, material.examples])


def _claim(out: pathlib.Path, folders: Mapping[str, str], suite: Sequence[Measure], options: Options,
           items: Mapping[str, Any]) -> None:
    """Write down what the folder is for, or compare with what is there."""
    wanted = {
        "models": {who: _fingerprint(pathlib.Path(folder).expanduser()) for who, folder in folders.items()},
        "suite": [dataclasses.asdict(m) for m in suite], "options": options.deciding(), "items": files.text_hash(items)}
    if data := {m.name: _data_hash(m, options) for m in suite if m.kind not in ROLES}:
        wanted["data"] = data
    if (path := out / SETTINGS).is_file():
        found = files.read_json(path)
        if changed := [_difference(name, found.get(name), wanted[name]) for name in wanted if found.get(name) != wanted[name]]:
            raise ValueError(f"{out} is an evaluation with other {' and '.join(changed)}. Give another --out, or delete it.")
        return
    files.refuse_full_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    files.write_json(path, wanted | {"versions": versions()})


def _difference(name: str, found: Any, wanted: Any) -> str:
    """Say what differs: of models and data which one, of options their values, of the others the name alone."""
    if name not in ("models", "options", "data") or not isinstance(found, dict):
        return name
    changed = [k for k in {**found, **wanted} if found.get(k) != wanted.get(k)]
    values = (f"{k} {found.get(k)} there, {wanted.get(k)} here" if name == "options" else k for k in changed)
    return f"{name} ({', '.join(values)})"


def _claim_judges(texts: Sequence[str], out: pathlib.Path) -> None:
    """Write down which files each local judge's verdicts come from, or compare with what is there."""
    for text in filter(folder_of, texts):
        place, folder = out / "verdicts" / _folder_name(text), folder_of(text)
        wanted = {name: x["sha256"] for name, x in files.folder_hashes(folder).items()}
        if not (path := place / JUDGE).is_file():
            if place.is_dir():
                say(f"{place} holds verdicts without a note of the judge's files; they are taken to be of {folder} as it is now.")
            files.write_json(path, {"judge": text, "files": wanted})
            continue
        found = files.read_json(path).get("files", {})
        if changed := sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)):
            raise ValueError(f"The verdicts in {place} are of another judge: in {folder} {', '.join(changed[:4])}"
                             f"{' and others' if len(changed) > 4 else ''} changed since. Delete {place}, and the same answers "
                             "are judged again; or give the folder with the earlier files.")


def _companions(folder: str) -> pathlib.Path:
    """Return where config.json and the tokenizer of a model lie."""
    path = pathlib.Path(folder).expanduser()
    return path / COMPANIONS_FOLDER if (path / MODEL).is_file() else path


def _fingerprint(folder: pathlib.Path) -> str:
    """Return a hash over the names and contents of a model folder's files."""
    return files.text_hash({k: v["sha256"] for k, v in files.folder_hashes(folder).items()})


def _lines(out: pathlib.Path, kind: str, who: str, measure: Measure, run: int | None) -> Lines:
    folder = out / kind / who if run is None else out / kind / who / f"seed-{run}"
    return Lines(folder / f"{_file_name(measure.name)}.jsonl")


def _folder_name(text: str) -> str:
    """Return the name of a judge's or grader's folder."""
    name = re.sub(r"[^A-Za-z0-9.-]+", "_", text)
    if name != text:  # cut to what a file system takes, and different for different judges
        name = f"{name[:80]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return name


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)


def _speed(out: pathlib.Path, who: str) -> Lines:
    return Lines(out / "answers" / who / "speed.jsonl")


def _answer(who: str, folder: str, against: str, suite: Sequence[Measure], items: Mapping[str, Any], out: pathlib.Path,
            options: Options) -> None:
    """Let one model do what is not done yet; it is not loaded if nothing is left."""
    @functools.cache
    def engine(folder: str) -> Engine:
        say(f"Loading {folder}")
        return Engine.open(folder, mesh=options.mesh, compute_dtype=options.compute_dtype, batch_size=options.batch_size)

    for measure, run in [(m, run) for m in suite for run in options.runs(m)]:
        lines, sampling = _lines(out, "answers", who, measure, run), options.sampling(run)
        title = f"{who}: {measure.name}" + ("" if run is None else f", seed {run}")
        if measure.kind in ROLES:
            left = {i: item for i, item in items[measure.name].items() if i not in lines.rows}
            if left:
                other = engine(against) if against and measure.kind == "text" else None
                _answer_items(measure, left, lines, engine(folder), other, sampling, title)
        elif measure.kind == "mt_bench":
            left = {i: q for i, q in items[measure.name].items() if not mt_bench.is_complete(lines.rows.get(i))}
            if left:
                mt_bench.answer(engine(folder), left, lines.rows, measure.max_new, title, sampling, lines.add)
        elif "complete" not in lines.rows:
            _do_task(measure, lines, engine(folder), options, sampling, title)
    speed = _speed(out, who)
    if "speed" not in speed.rows and any(m.kind in JUDGED for m in suite):
        speed.add({"id": "speed", "seconds_per_token": engine(folder).seconds_per_token()})


def _do_task(measure: Measure, lines: Lines, engine: Engine, options: Options, sampling: Sampling, title: str) -> None:
    """Answer the questions of MMLU or GSM8K that are not answered yet."""
    done = lambda _, row: lines.add(row)
    if measure.kind == "mmlu":
        questions = tasks.mmlu_questions(engine, **_task(measure, options))
        tasks.choose(engine, questions, title=title, done=done, skip=set(lines.rows))
    else:
        questions = tasks.gsm8k_questions(engine, **_task(measure, options), max_new=measure.max_new)
        tasks.solve(engine, questions, title=title, done=done, skip=set(lines.rows), sampling=sampling)
    lines.add({"id": "complete", "left_out": questions.left_out, "shortened": questions.shortened, "note": questions.note})


def _answer_items(measure: Measure, left: Mapping[str, Any], lines: Lines, engine: Engine, other: Engine | None,
                  sampling: Sampling, title: str) -> None:
    """Answer prompts, or take the likelihood of given answers; items that are too long are noted as such."""
    ids = list(left)
    if measure.kind == "text":
        examples = [engine.needed_chat().encode(left[i]["prompt"], left[i]["answer"]) for i in ids]
        room = lambda e: len(e.prompt_ids) + len(e.answer_ids)
    else:
        put = FORMS[measure.form]
        examples = [Example(tuple(engine.ask(put(left[i]["prompt"]))), ()) for i in ids]
        room = lambda e: len(e.prompt_ids) + measure.max_new
    fitting = [k for k, e in enumerate(examples) if room(e) <= engine.config.max_length]
    for k in set(range(len(ids))) - set(fitting):
        lines.add({"id": ids[k], "left_out": "too long for the model"})
    note = lambda k, row: lines.add({"id": ids[fitting[k]]} | row)
    if measure.kind == "text":
        answer_likelihoods(engine, [examples[k] for k in fitting], other, title, done=note)
    else:
        engine.complete_ids(
            [examples[k].prompt_ids for k in fitting], measure.max_new, title, sampling,
            done=lambda k, new: note(k, {"answer": engine.decode(new), "tokens": len(new)}),
            numbers=[int(ids[k], 16) for k in fitting])


def _judge(text: str, judge: Judge, suite: Sequence[Measure], items: Mapping[str, Any], folders: Mapping[str, str],
           out: pathlib.Path, options: Options) -> dict[tuple[str, str], list[dict[str, Verdict]]]:
    """Return the verdicts of one judge by (model, measure), a dictionary a run; judges what has no verdict yet."""
    verdicts: dict[tuple[str, str], list[dict[str, Verdict]]] = {}
    for who in folders:
        for measure, run in [(m, run) for m in suite if m.kind in JUDGED for run in options.runs(m)]:
            answers = _lines(out, "answers", who, measure, run).rows
            lines = _lines(out, f"verdicts/{_folder_name(text)}", who, measure, run)
            ask = functools.partial(_ask, judge, measure, items[measure.name], answers, lines)
            if isinstance(judge, Generative):
                ask()  # the devices of all processes have a part in it
            else:
                lines.rows = processes.on_first(ask)
            verdicts.setdefault((who, measure.name), []).append({i: _verdict(row) for i, row in lines.rows.items()})
    return verdicts


def _grade(grader: mt_bench.Grader, measure: Measure, questions: Mapping[str, mt_bench.Question], who: str, run: int | None,
           out: pathlib.Path) -> dict[str, Any]:
    """Return the grades of one model's answers; grades what has none yet."""
    answers = _lines(out, "answers", who, measure, run).rows
    lines = _lines(out, f"grades/{_folder_name(grader.name)}", who, measure, run)

    def ask():
        grader.grade(questions, answers, lines.rows, lines.add)
        return lines.rows

    return processes.on_first(ask)


def _ask(judge: Judge, measure: Measure, items: Mapping[str, Any], answers: Mapping[str, Any], lines: Lines) -> dict[str, Any]:
    """Let a judge judge one model's answers to one measure; returns the rows."""
    given = {i: Item(items[i]["prompt"], row["answer"]) for i, row in answers.items() if "answer" in row}
    new = [i for i in given if i not in lines.rows]
    again = [i for i in given if i in lines.rows and lines.rows[i]["outcome"] == UNKNOWN]
    # Those that had no verdict come a few at a time, so that they alone are not taken for a judge that talks nonsense.
    for ids in (new, *(again[k:k + ENOUGH - 1] for k in range(0, len(again), ENOUGH - 1))):
        judge.judge([given[i] for i in ids], measure.kind,
                    lambda k, verdict, ids=ids: lines.add({"id": ids[k]} | dataclasses.asdict(verdict)))
    if again:
        verdicts = [_verdict(lines.rows[i]) for i in given]
        refuse_nonsense(judge, [v for v in verdicts if v != Verdict(INCOHERENT)])  # those the judge was not asked about
    return lines.rows


def _verdict(row: Mapping[str, Any]) -> Verdict:
    return Verdict(row["outcome"], row["degree"], row["raw"])


def show_examples(model: str, options: Options) -> list[str]:
    """Return lines that show how the first item of each measure is put to a model; expected answer tokens are green."""
    folder, lines = _companions(model), []
    prompter = Prompter(read_hf_config(folder), folder)
    for measure in load_suite(options.suite):
        lines.append(f"--- {measure.name} ({measure.kind}, {measure.source})")
        lines += _example(measure, prompter, options)
    return lines


def _example(measure: Measure, prompter: Prompter, options: Options) -> list[str]:
    text = lambda ids: prompter.tokenizer.decode(ids, skip_special_tokens=False)
    green = lambda expected: f"\033[32m{expected}\033[0m"
    if measure.kind == "mmlu":
        question = tasks.mmlu_questions(prompter, **_task(measure, options) | {"limit": 1}).items[0]
        return [text(question.prompt_ids) + green(text(question.choices["ABCD".index(question.answer)]))]
    if measure.kind == "gsm8k":
        questions = tasks.gsm8k_questions(prompter, **_task(measure, options) | {"limit": 1}, max_new=measure.max_new)
        return [text(questions.items[0].prompt_ids) + green(f" ... #### {questions.items[0].answer}")]
    if measure.kind == "mt_bench":
        question = next(iter(_questions(measure, options).values()))
        read = mt_bench.examples(prompter, question)
        return [f"turn {k}: {x}" + (green(reference) if reference else "")
                for k, x, reference in zip(mt_bench.TURNS, read, question["references"])]
    item = next(iter(_items(measure, options).values()))
    if measure.kind == "text":
        example = prompter.needed_chat().encode(item["prompt"], item["answer"])
        return [text(example.prompt_ids) + green(text(example.answer_ids))]
    return [prompter.needed_chat().prompt_text(FORMS[measure.form](item["prompt"]))]
