"""The report of an evaluation: counts with intervals, paired tests, categories, agreement of
judges, pictures; no answers."""

from __future__ import annotations

import os.path
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from safepatch_jax.evaluation import statistics
from safepatch_jax.evaluation.mt_bench import LEAST, MOST
from safepatch_jax.evaluation.statistics import agreement
from safepatch_jax.evaluation.suites import KINDS, Measure
from safepatch_jax.io import hub
from safepatch_jax.reporting import ending, tables, templates
from safepatch_jax.reporting.tables import percent, rate
from safepatch_jax.runtime.paths import plain
from safepatch_jax.studies.evaluate.figures import draw, titles
from safepatch_jax.studies.evaluate.results import (
    COUNTED,
    TASKS,
    Rows,
    contents,
    described,
    measured,
)

_WORDS = {"harm": "harm", "refusal": "over-refusal", "text": "perplexity"}
_NO_ATGR = (
    "no ATGR, as they are not known to have been timed with the same batch size, mesh and device: "
    "delete answers/*/speed.jsonl, and the same command times both"
)


def labels(folders: Mapping[str, str]) -> dict[str, str]:
    """Return a short name of each model folder: its last part, with the one before it where that
    says too little.

    Args:
      folders: of 'model', and of 'against' where there is one.
    """
    parts, last = {}, {}
    for who, folder in folders.items():
        path = pathlib.Path(os.path.abspath(plain(folder)))
        name = hub.short_name(hub.origin_of(path)) or path.name or "/"
        parts[who], last[who] = path.parts[1:], name
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
      speeds: by model, {'seconds_per_token'} with its `conditions`, or None.
      about: what is said of models, options, judges and versions.
      grades: of measures of kind mt_bench, as `answers`.
    """
    first = next(iter(verdicts.values()), {})
    measures = []
    for measure in suite:
        models, of_measure = {}, items.get(measure.name, {})
        for who in about["models"]:
            key = who, measure.name
            parts = answers[key], first.get(key, ()), grades.get(key, ())
            models[who] = measured(measure, of_measure, *parts)
        holds = {who: result.pop("holds") for who, result in models.items()}
        row = described(measure) | {"models": models}
        if "against" in holds and measure.kind != "text":
            row["paired"] = statistics.compare(holds["model"], holds["against"])
        if measure.kind == "harm":
            of_models = {who: answers[who, measure.name] for who in about["models"]}
            if shares := contents(of_measure, of_models):
                row["content"] = shares
        measures.append(row)
    content = dict(about) | {"measures": measures} | _speed(speeds)
    if len(verdicts) > 1:
        content["agreement"] = _agreements(suite, *verdicts.values())
    return content


def conditions(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return under which conditions a model was timed: batch size, mesh and device; None for what
    an earlier version did not note."""
    return {name: row.get(name) for name in ("batch_size", "mesh", "device")}


def _speed(speeds: Mapping[str, Any]) -> dict[str, Any]:
    if not speeds or not all(speeds.values()):
        return {}
    seconds = {who: x["seconds_per_token"] for who, x in speeds.items()}
    result: dict[str, Any] = {"seconds_per_token": seconds}
    if "against" in seconds:
        ours, theirs = (conditions(speeds[who]) for who in ("model", "against"))
        if ours == theirs and None not in ours.values():
            result["atgr"] = seconds["model"] / seconds["against"]
        else:
            result["no_atgr"] = _NO_ATGR
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


def markdown(content: Mapping[str, Any], picture: str = "report.png") -> str:
    """Return report.md; `picture` is the file to show in it."""
    kinds: dict[str, list[Mapping[str, Any]]] = {kind: [] for kind in (*KINDS, "task")}
    left_out, unfinished = [], []
    for measure in content["measures"]:
        kinds["task" if measure["kind"] in TASKS else measure["kind"]].append(measure)
        for who, x in measure["models"].items():
            if x["left_out"]:
                left_out.append(f"{x['left_out']} of {measure['name']} ({content['models'][who]})")
            if count := x.get("unfinished"):
                unfinished.append(f"{count} of {measure['name']} ({content['models'][who]})")
    empty = {
        "seeds": [],
        "grader": "",
        "agreement": {},
        "seconds_per_token": {},
        "judges_of_content": [],
        "prompts": "",
    }
    values = empty | dict(content) | {"picture": picture}
    return templates.render(
        "studies/evaluate/report.md.jinja",
        **values,
        kinds=kinds,
        left_out=left_out,
        unfinished=unfinished,
        titles=titles(content),
        content_share=_content_share,
        content_difference=_content_difference,
        least=LEAST,
        most=MOST,
        rate=rated,
        grade=grade,
        test=_test,
    )


def ending_rows(content: Mapping[str, Any], label: str = "") -> list[ending.Row]:
    """Return a row of the console's table for each measure; 'before' is the model against which
    the evaluation was made.

    Args:
      label: of the template, where there are several.
    """
    rows = []
    for m in content["measures"]:
        name = f"{_WORDS.get(m['kind'], m['kind'])}: {m['name']}"
        if label:
            name += f", {label}"
        before, after = m["models"].get("against"), m["models"]["model"]
        if m["kind"] == "text":
            values = [x and x["perplexity"] for x in (before, after)]
            rows.append(ending.perplexity_row(name, *values))
        elif m["kind"] == "mt_bench":
            texts = [grade(x) if x else "" for x in (before, after)]
            rows.append((name, *texts, "", ""))
        else:
            means = "by_run" in after
            rows.append(ending.share_row(name, before, after, m.get("paired"), means))
    return rows


def grade(x: Mapping[str, Any]) -> str:
    """Return a mean grade with its interval, and the range of the seeds' means."""
    if x["mean"] is None:
        return "none graded"
    text = f"{x['mean']:.2f}"
    if x["interval"]:
        text += f" [{x['interval'][0]:.2f}-{x['interval'][1]:.2f}]"
    if x.get("spread"):
        text += f" ({x['spread'][0]:.2f} to {x['spread'][1]:.2f})"
    return text


def rated(x: Mapping[str, Any]) -> str:
    """Return a rate with its interval, and the range of the seeds' rates."""
    if x["rate"] is None:
        return "none judged"
    text = rate(x["rate"], x["interval"], digits=1, ends=1)
    if x.get("spread"):
        text += f" ({' to '.join(percent(end, 1, '') for end in x['spread'])})"
    return text


def _content_share(x: Mapping[str, Any]) -> str:
    return "-" if x["mean"] is None else rate(x["mean"], x["interval"], digits=1, ends=1)


def _content_difference(x: Mapping[str, Any]) -> str:
    """Return the difference of two models' shares, which stands with the first one."""
    if "difference" not in x:
        return ""
    difference = x["difference"]
    if difference["mean"] is None:
        return "-"
    low, high = difference["interval"]
    return f"{100 * difference['mean']:+.1f} [{100 * low:+.1f} to {100 * high:+.1f}]"


def _test(measure: Mapping[str, Any], who: str) -> str:
    """Return the paired test of two models, which stands with the first one."""
    return tables.paired(measure["paired"]) if who == "model" and "paired" in measure else ""


def write(content: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Write report.json, report.md and report.png into a folder; each appears whole."""
    texts = {"report.md": markdown(content), "report.json": content}
    tables.publish(folder, texts | {"report.png": draw(content)})
