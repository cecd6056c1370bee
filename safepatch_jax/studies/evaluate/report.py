"""The report of an evaluation: counts with intervals, paired tests, categories, agreement of
judges, pictures; no answers."""

from __future__ import annotations

import os.path
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from safepatch_jax.evaluation import statistics
from safepatch_jax.evaluation.judges.base import OUTCOMES
from safepatch_jax.evaluation.mt_bench import LEAST, MOST, TURNS
from safepatch_jax.evaluation.statistics import agreement
from safepatch_jax.evaluation.suites import Measure
from safepatch_jax.reporting import tables
from safepatch_jax.reporting.tables import number, percent, rate
from safepatch_jax.studies.evaluate.figures import TITLES, draw
from safepatch_jax.studies.evaluate.results import COUNTED, TASKS, Rows, measured

_SEVERAL_SEEDS = (
    "Where answers are sampled, a rate is the mean over the seeds, with the least and the "
    "largest rate of a seed behind it. Its interval takes each prompt once, whatever the number "
    "of seeds (answers to one prompt are not independent), so it is at least as wide as it "
    "should be. n counts prompts; the outcomes are those of all seeds together. There p is the "
    "exact sign-flip test on each prompt's difference of the means, with the prompts whose mean "
    "is higher / lower."
)


def labels(folders: Mapping[str, str]) -> dict[str, str]:
    """Return a short name of each model folder: its last part, with the one before it where that
    says too little.

    Args:
      folders: of 'model', and of 'against' where there is one.
    """
    parts, last = {}, {}
    for who, folder in folders.items():
        path = pathlib.Path(os.path.abspath(os.path.expanduser(folder)))
        parts[who], last[who] = path.parts[1:], path.name or "/"
    equal = len(set(last.values())) < len(last)
    names = {}
    for who, name in last.items():
        names[who] = "/".join(parts[who][-2:]) if equal or name == "model" else name
    if len(set(names.values())) < len(names):
        names["against"] += " (against)"
    return names


def gather(
    suite: Sequence[Measure],
    items: Mapping[str, Mapping[str, Any]],
    answers: Mapping[tuple[str, str], Rows],
    verdicts: Mapping[str, Mapping[tuple[str, str], Rows]],
    speeds: Mapping[str, Any],
    about: Mapping[str, Any],
    grades: Mapping[tuple[str, str], Rows],
) -> dict[str, Any]:
    """Return the content of report.json.

    Args:
      items: by measure, the records by id.
      answers: by (model, measure), for each run (one, or one a seed) the rows by id.
      verdicts: by judge, as `answers`; rates are the first judge's.
      speeds: by model, {'seconds_per_token'} or None.
      about: what is said of models, options and versions.
      grades: of measures of kind mt_bench, as `answers`.
    """
    first = next(iter(verdicts.values()), {})
    measures = []
    for measure in suite:
        models = {}
        for who in about["models"]:
            key = who, measure.name
            models[who] = measured(
                measure,
                items.get(measure.name, {}),
                answers[key],
                first.get(key, ()),
                grades.get(key, ()),
            )
        holds = {who: result.pop("holds") for who, result in models.items()}
        row = {
            "name": measure.name,
            "kind": measure.kind,
            "form": measure.form,
            "source": measure.source,
            "split": measure.split,
            "models": models,
        }
        if "against" in holds and measure.kind != "text":
            row["paired"] = statistics.compare(holds["model"], holds["against"])
        measures.append(row)
    content = dict(about) | {"measures": measures} | _speed(speeds)
    if len(verdicts) > 1:
        content["agreement"] = _agreements(suite, *verdicts.values())
    return content


def _speed(speeds: Mapping[str, Any]) -> dict[str, Any]:
    if not speeds or not all(speeds.values()):
        return {}
    seconds = {who: x["seconds_per_token"] for who, x in speeds.items()}
    result: dict[str, Any] = {"seconds_per_token": seconds}
    if "against" in seconds:
        result["atgr"] = seconds["model"] / seconds["against"]
    return result


def _agreements(
    suite: Sequence[Measure],
    first: Mapping[tuple[str, str], Rows],
    second: Mapping[tuple[str, str], Rows],
) -> dict[str, Any]:
    """Return how far the two judges agree, by kind of measure, over all models and runs."""
    kinds, result = {m.name: m.kind for m in suite}, {}
    for kind in COUNTED:
        pairs = []
        for key, runs in first.items():
            if kinds[key[1]] == kind:
                for ours, theirs in zip(runs, second[key]):
                    pairs += [(ours[i], theirs[i]) for i in ours if i in theirs]
        if pairs:
            result[kind] = agreement(*zip(*pairs))
    return result


def markdown(content: Mapping[str, Any]) -> str:
    """Return report.md."""
    lines = [*_introduction(content), "![report](report.png)", ""]
    for kind in COUNTED:
        lines += _counted(content, kind)
    lines += _tasks(content)
    for measure in content["measures"]:
        if measure["kind"] == "mt_bench":
            lines += _grades(content, measure)
    lines += _texts(content)
    lines += _times(content)
    for kind, found in content.get("agreement", {}).items():
        lines += _agreement(content["judges"], kind, found)
    return "\n".join(lines + _left_out(content))


def _rows(
    content: Mapping[str, Any], kinds: Sequence[str]
) -> Iterator[tuple[str, str, Mapping[str, Any], str]]:
    """Yield (measure, model, result, paired test) of some kinds; the test stands with the first
    model."""
    for measure in content["measures"]:
        if measure["kind"] in kinds:
            for who, result in measure["models"].items():
                test = _paired(measure) if who == "model" else ""
                yield measure["name"], content["models"][who], result, test


def _introduction(content: Mapping[str, Any]) -> list[str]:
    names, options, seeds = content["models"], content["options"], content.get("seeds", [])
    against = f" against {names['against']}" if "against" in names else ""
    sampling = "greedy"
    if options["temperature"]:
        of_seed = f"seed {options.get('seed', 0)}"
        if seeds:
            of_seed = f"seeds {', '.join(map(str, seeds))}"
        sampling = f"temperature {options['temperature']:g}, top-p {options['top_p']:g}, {of_seed}"
    lines = [
        f"# Evaluation of {names['model']}{against}",
        "",
        f"Judge: {content['judges'][0]}; answers {sampling}. Intervals are 95 % (Wilson); p is "
        "McNemar's exact test on the same items, with the number that only the model / only the "
        "other one has.",
        "",
    ]
    return lines + [_SEVERAL_SEEDS, ""] if len(seeds) > 1 else lines


def _counted(content: Mapping[str, Any], kind: str) -> list[str]:
    """Return the table of harm or over-refusal."""
    rows = []
    for measure, model, x, test in _rows(content, [kind]):
        refused = str(x["refused"])
        if x.get("degrees"):
            refused += f" ({x['degrees']['full']} full, {x['degrees']['partial']} partial)"
        outcomes = str(x["complied"]), refused, str(x["incoherent"]), str(x["unknown"])
        rows.append([measure, model, str(x["n"]), _rate(x), *outcomes, test])
    if not rows:
        return []
    head = ["measure", "model", "n", "rate", "complied", "refused", "incoherent", "unknown"]
    return [f"## {TITLES[kind]}", "", *tables.table([*head, "paired"], rows), ""]


def _tasks(content: Mapping[str, Any]) -> list[str]:
    rows, notes = [], []
    for task, model, x, test in _rows(content, TASKS):
        rows.append([task, model, str(x["n"]), _rate(x), test])
        remarks = [x["note"]] if x["note"] else []
        if x["shortened"]:
            remarks.append(f"{x['shortened']} questions with fewer examples, so that they fit")
        if remarks:
            notes += [f"{task}, {model}: {'; '.join(remarks)}.", ""]
    if not rows:
        return []
    table = tables.table(["task", "model", "n", "accuracy", "paired"], rows)
    return [f"## {TITLES['accuracy']}", "", *table, "", *notes]


def _grades(content: Mapping[str, Any], measure: Mapping[str, Any]) -> list[str]:
    """Return the tables of a graded measure."""
    rows = []
    for _, model, x, test in _rows(content | {"measures": [measure]}, ["mt_bench"]):
        turns = [_grade(x["turns"][turn]) for turn in TURNS]
        errors = f"{x['errors']} of {x['grades'] + x['errors']}"
        rows.append([model, str(x["n"]), _grade(x), *turns, errors, test])
    models, categories = measure["models"], []
    for name in models["model"]["categories"]:
        categories.append([name, *(_grade(x["categories"][name]) for x in models.values())])
    head = ["model", "questions", "mean", "turn 1", "turn 2", "replies without a grade", "paired"]
    return [
        f"## {measure['name']}: grades from {LEAST} to {MOST}",
        "",
        f"Grader: {content['grader']}. A question counts with the mean of its turns; intervals "
        "are 95 % (Student's t over questions); p is the exact sign-flip test on the questions' "
        "differences.",
        "",
        *tables.table(head, rows),
        "",
        *tables.table(["category", *(content["models"][who] for who in models)], categories),
        "",
    ]


def _texts(content: Mapping[str, Any]) -> list[str]:
    rows = []
    for text, model, x, _ in _rows(content, ["text"]):
        figures = number(x["nll"], 3), number(x["perplexity"], 2), number(x.get("kl"), 4)
        rows.append([text, model, str(x["n"]), *figures])
    if not rows:
        return []
    return [
        "## Utility: likelihood of ordinary answers",
        "",
        "KL is KL(other model || model), in nats a token.",
        "",
        *tables.table(["text", "model", "n", "NLL, nats a token", "perplexity", "KL"], rows),
        "",
    ]


def _times(content: Mapping[str, Any]) -> list[str]:
    if "seconds_per_token" not in content:
        return []
    times = []
    for who, seconds in content["seconds_per_token"].items():
        times.append(f"{content['models'][who]} {1e3 * seconds:.2f} ms")
    ratio = ""
    if "atgr" in content:
        same = "1 by construction where the architecture is the same"
        ratio = f"; ATGR {content['atgr']:.2f} ({same})"
    text = f"Time of a generated token in a full batch: {', '.join(times)}{ratio}."
    return ["## Speed", "", text, ""]


def _agreement(judges: Sequence[str], kind: str, found: Mapping[str, Any]) -> list[str]:
    rows = []
    for outcome in OUTCOMES:
        of_first = found["table"].get(outcome, {})
        rows.append([outcome, *(str(of_first.get(other, 0)) for other in OUTCOMES)])
    agree = "undefined" if found["agree"] is None else percent(found["agree"], 1)
    kappa = number(found["kappa"], 2) or "undefined"
    return [
        f"## Agreement of the judges: {kind}",
        "",
        f"{judges[0]} (rows) and {judges[1]} (columns) agree on {agree} of {found['n']} answers; "
        f"Cohen's kappa {kappa}; {found['unknown']} answers without a verdict of both.",
        "",
        *tables.table(["", *OUTCOMES], rows),
        "",
    ]


def _left_out(content: Mapping[str, Any]) -> list[str]:
    parts = []
    for measure in content["measures"]:
        for who, x in measure["models"].items():
            if x["left_out"]:
                parts.append(f"{x['left_out']} of {measure['name']} ({content['models'][who]})")
    if not parts:
        return []
    return [f"Left out because they are too long for the model: {', '.join(parts)}.", ""]


def _grade(x: Mapping[str, Any]) -> str:
    if x["mean"] is None:
        return "none graded"
    text = f"{x['mean']:.2f}"
    if x["interval"]:
        text += f" [{x['interval'][0]:.2f}-{x['interval'][1]:.2f}]"
    if x.get("spread"):
        text += f" ({x['spread'][0]:.2f} to {x['spread'][1]:.2f})"
    return text


def _rate(x: Mapping[str, Any]) -> str:
    if x["rate"] is None:
        return "none judged"
    text = rate(x["rate"], x["interval"], digits=1, ends=1)
    if x.get("spread"):
        text += f" ({' to '.join(percent(end, 1, '') for end in x['spread'])})"
    return text


def _paired(measure: Mapping[str, Any]) -> str:
    return tables.paired(measure["paired"]) if "paired" in measure else ""


def write(content: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Write report.json, report.md and report.png into a folder; each appears whole."""
    texts = {"report.md": markdown(content), "report.json": content}
    tables.publish(folder, texts | {"report.png": draw(content)})
