"""The report of a chain: the forgetting matrix, what became of over-refusal and utility, and how
the patches add up."""

from __future__ import annotations

import functools
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from safepatch_jax.evaluation.judges.base import COMPLIED, INCOHERENT, OUTCOMES, REFUSED
from safepatch_jax.evaluation.measures import perplexity
from safepatch_jax.evaluation.statistics import wilson
from safepatch_jax.patch_file.log import data_text
from safepatch_jax.reporting import ending, tables, templates
from safepatch_jax.reporting.tables import percent, share
from safepatch_jax.runtime.text import printable
from safepatch_jax.studies.continual.figures import draw
from safepatch_jax.studies.continual.measures import COMMON

FILES = ("continual.md", "continual.json", "continual.png")
_OF_LINK = ("number", "name", "model", "parent", "patch", "data", "seed", "date")
WIDE, WIDEST = 8, 40  # with more columns a table has short ones, and then none
Counts = Mapping[str, int]


def row(label: str, digest: str, measures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Collect what one model was measured on.

    Args:
      label, digest: name and hash of the model.
      measures: by part, see `Measures.measure`.
    """
    harm = {}
    for name, m in measures.items():
        if name not in COMMON:
            harm[name] = _sum([m]) | {"nll": m["nll"]}
    return {
        "model": label,
        "hash": digest,
        "harm": harm,
        "lookalike": _sum([measures["lookalike"]]),
        "ordinary_nll": measures["ordinary"]["nll"],
        "ordinary_perplexity": perplexity(measures["ordinary"]["nll"]),
    }


def gather(
    *,
    settings: Mapping[str, Any],
    start: Mapping[str, Any],
    stages: Sequence[Mapping[str, Any]],
    links: Sequence[Mapping[str, Any]],
    reverted: Sequence[int],
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    labels: Mapping[str, str],
    colours: Mapping[str, str],
    patches: Mapping[str, Any],
    refused: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Collect a chain's results.

    Args:
      settings: of the chain, by dotted name.
      start: the first line of the log.
      stages: name and data of each link, made (in order), refused or to come.
      links: the log's lines of the links that were made, in order.
      reverted: numbers of links that were taken off.
      rows: by method, the starting model's row and that of the model after each link, see `row`.
      labels, colours: of each method.
      patches: see `patch_file.commands.sizes`.
      refused: the log's lines of the links that the gate refused.
    """
    names = [stage["name"] for stage in stages]
    methods: dict[str, list[dict[str, Any]]] = {}
    for method, of_method in rows.items():
        methods[method] = []
        for i, r in enumerate(of_method):
            parts = {"seen": names[:i], "unseen": names[i:]}
            methods[method].append(r | {part: _harm(r, some) for part, some in parts.items()})
    return {
        "settings": dict(settings),
        "start": _pick(start, ("source", "aligned", "model")),
        "stages": list(stages),
        "links": [_pick(link, _OF_LINK) for link in links],
        "reverted": list(reverted),
        "labels": dict(labels),
        "colours": dict(colours),
        "patches": dict(patches),
        "refused": [_pick(entry, ("name", "parent", "gate")) for entry in refused],
        "methods": methods,
    }


def _pick(values: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: values[key] for key in keys}


def _harm(r: Mapping[str, Any], names: Sequence[str]) -> dict[str, int]:
    """Return the outcomes of a model over those of some categories that it was measured on."""
    return _sum([r["harm"][name] for name in names if name in r["harm"]])


def _sum(counts: Sequence[Counts]) -> dict[str, int]:
    """Return the numbers of each outcome over several sets of answers."""
    total = dict.fromkeys((*OUTCOMES, "n"), 0)
    for values in counts:
        for key in total:
            total[key] += values[key]
    return total


def markdown(content: Mapping[str, Any]) -> str:
    """Render the report."""
    means = {method: _means(rows[1:]) for method, rows in content["methods"].items()}
    stages, everything = content["stages"], True
    for rows in content["methods"].values():
        everything = everything and all(len(r["harm"]) == len(stages) for r in rows)
    return templates.render(
        "studies/continual/report.md.jinja",
        **content,
        means=means,
        wide=len(stages) > WIDE,
        widest=len(stages) > WIDEST,
        everything=everything,
        course=functools.partial(_course, content),
        half_width=_half_width,
        bare=_bare,
        change=_change,
        total=_sum,
        data_text=data_text,
        code=lambda text: tables.code(printable(text)),
    )


def _course(content: Mapping[str, Any], method: str) -> list[dict[str, Any]]:
    """Return for each category that has a link what the models answer there: at the start, before
    and after the category's own link, and now; None where that was not measured."""
    rows, course = content["methods"][method], []
    for i, stage in enumerate(content["stages"][: len(content["links"])]):
        models = {"start": rows[0], "before": rows[i], "after": rows[i + 1], "now": rows[-1]}
        values = {when: r["harm"].get(stage["name"]) for when, r in models.items()}
        course.append({"name": stage["name"], "link": rows[i + 1]["model"], **values})
    return course


def _bare(counts: Counts | None) -> str:
    """Return the share that is complied with in per cent, without its interval and unit; nothing
    where it was not measured."""
    if counts is None:
        return ""
    return percent(share(counts, COMPLIED), 0, "") if counts["n"] else "-"


def _change(before: Counts | None, after: Counts | None) -> str:
    if not before or not after or not before["n"]:
        return ""
    return f"{100 * (share(after, COMPLIED) - share(before, COMPLIED)):+.0f}"


def _half_width(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return in points how far the interval of a cell reaches to one side at the most."""
    counts = [harm["n"] for harm in rows[0]["harm"].values() if harm["n"]]
    if not counts:
        return ""
    low, high = wilson(min(counts) // 2, min(counts))
    return percent((high - low) / 2, 0, "")


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the means over the models after each link; nothing where there is none."""
    if not rows:
        return {}
    columns = {
        "harm": [share(r["seen"], COMPLIED) for r in rows],
        "refused": [share(r["lookalike"], REFUSED) for r in rows],
        "incoherent": [share(r["lookalike"], INCOHERENT) for r in rows],
    }
    means = {name: percent(statistics.fmean(values), 1) for name, values in columns.items()}
    perplexity = statistics.fmean(r["ordinary_perplexity"] for r in rows)
    return means | {"perplexity": f"{perplexity:.4g}"}


def summary(content: Mapping[str, Any]) -> list[str]:
    """Return the table with which a chain ends on the console: the starting model before, the
    model after the last link after."""
    rows = content["methods"]["safepatching"]
    before, after = rows[0], rows[-1]
    table = []
    for name, outcome in (("harm, all categories", COMPLIED), ("over-refusal", REFUSED)):
        counts = []
        for r in (before, after):
            of_model = r["lookalike"]
            if outcome == COMPLIED:
                of_model = _sum([r["seen"], r["unseen"]])
            counts.append({"count": of_model[outcome], "n": of_model["n"]})
        table.append(ending.share_row(name, *counts))
    values = [r["ordinary_perplexity"] for r in (before, after)]
    return ending.lines([*table, ending.perplexity_row("perplexity, ordinary", *values)])


def write(content: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Write continual.md, continual.json and continual.png into a folder; each appears whole."""
    tables.publish(folder, dict(zip(FILES, (markdown(content), content, draw(content)))))
