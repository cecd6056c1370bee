"""The report of a chain: the forgetting matrix, what became of over-refusal and utility, and how
the patches add up."""

from __future__ import annotations

import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from safepatch_jax.evaluation.judges.base import COMPLIED, INCOHERENT, OUTCOMES, REFUSED
from safepatch_jax.evaluation.measures import perplexity
from safepatch_jax.patch_file.log import data_text, plain
from safepatch_jax.reporting import tables
from safepatch_jax.reporting.tables import counted, percent, share
from safepatch_jax.studies.continual.figures import draw
from safepatch_jax.studies.continual.measures import COMMON

FILES = ("continual.md", "continual.json", "continual.png")
_OF_LINK = ("number", "name", "model", "parent", "patch", "data", "seed", "date")
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
) -> dict[str, Any]:
    """Collect a chain's results.

    Args:
      settings: of the chain, by dotted name.
      start: the first line of the log.
      stages: name and data of each link, made or to come, in order.
      links: the log's lines of the links that were made, in order.
      reverted: numbers of links that were taken off.
      rows: by method, the starting model's row and that of the model after each link, see `row`.
      labels, colours: of each method.
      patches: see `continual_commands.sizes`.
    """
    names = [stage["name"] for stage in stages]
    methods: dict[str, list[dict[str, Any]]] = {}
    for method, of_method in rows.items():
        methods[method] = []
        for i, r in enumerate(of_method):
            harm = [r["harm"][name] for name in names]
            methods[method].append({**r, "seen": _sum(harm[:i]), "unseen": _sum(harm[i:])})
    return {
        "settings": dict(settings),
        "start": _pick(start, ("source", "aligned", "model")),
        "stages": list(stages),
        "links": [_pick(link, _OF_LINK) for link in links],
        "reverted": list(reverted),
        "labels": dict(labels),
        "colours": dict(colours),
        "patches": dict(patches),
        "methods": methods,
    }


def _pick(values: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: values[key] for key in keys}


def _sum(counts: Sequence[Counts]) -> dict[str, int]:
    """Return the numbers of each outcome over several sets of answers."""
    return {key: sum(of[key] for of in counts) for key in (*OUTCOMES, "n")}


def markdown(content: Mapping[str, Any]) -> str:
    """Render the report."""
    lines = _introduction(content)
    if content["reverted"]:
        lines += [f"Taken off again: link {', '.join(map(str, content['reverted']))}.", ""]
    lines += ["![the chain](continual.png)", ""]
    for method, rows in content["methods"].items():
        matrix = _matrix(rows, [stage["name"] for stage in content["stages"]])
        lines += [f"## {content['labels'][method]}", "", *matrix, "", *_course(rows), ""]
    return "\n".join(lines + _patches(content)) + "\n"


def _introduction(content: Mapping[str, Any]) -> list[str]:
    settings, start = content["settings"], content["start"]
    aligned = ", aligned first by a short supervised run" if start["aligned"] else ""
    data = []
    for stage in content["stages"]:
        data.append(f"{stage['name']}: {_code(data_text(stage))} ({stage['records']} records)")
    return [
        "# Continual post-safety-alignment",
        "",
        f"Model {_code(start['source'])}{aligned}; {len(content['links'])} of "
        f"{len(content['stages'])} links. Split '{settings['evaluate.split']}', "
        f"{settings['evaluate.max_new_tokens']} greedy tokens an answer, the same records for "
        "every model. Judge: refusal phrases and a coherence test; it judges the form of an "
        "answer, not its content. In brackets: 95 % intervals (Wilson). One seed.",
        "",
        f"Data: {'; '.join(data)}; look-alikes {_code(settings['data.lookalike'])}; ordinary "
        f"{_code(settings['data.ordinary'])}.",
        "",
    ]


def _code(text: str) -> str:
    """Return a text as Markdown that shows it as it is; names of links and methods need no such
    care."""
    return tables.code(plain(text))


def _matrix(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """Return the forgetting matrix, harm by model and category, and that of the NLL."""
    heads = [f"{name} (n {rows[0]['harm'][name]['n']})" for name in names]
    return [
        "Harm: share of a category's requests that are complied with. In italics: categories the "
        "model has not yet seen.",
        "",
        *_by_stage(rows, names, heads, lambda harm: counted(harm, COMPLIED)),
        "",
        "NLL of a category's harmful answers, nats a token: higher is less likely.",
        "",
        *_by_stage(rows, names, names, lambda harm: f"{harm['nll']:.2f}"),
    ]


def _by_stage(
    rows: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    heads: Sequence[str],
    cell: Callable[[Mapping[str, Any]], str],
) -> list[str]:
    """Return a table of models by categories; those a model has not yet seen are in italics."""
    lines = []
    for i, r in enumerate(rows):
        cells = [cell(r["harm"][name]) for name in names]
        lines.append([r["model"], *cells[:i], *(f"*{text}*" for text in cells[i:])])
    return tables.table(["after", *heads], lines)


def _course(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what became of each model on the whole."""
    lines = []
    for r in rows:
        lines.append(
            [
                r["model"],
                _with_n(r["seen"], COMPLIED),
                _with_n(r["unseen"], COMPLIED),
                counted(_sum([r["seen"], r["unseen"]]), INCOHERENT),
                _with_n(r["lookalike"], REFUSED),
                counted(r["lookalike"], INCOHERENT),
                f"{r['ordinary_perplexity']:.4g}",
            ]
        )
    after = rows[1:]
    if after:
        lines.append(
            [
                "mean of the links",
                _mean_share(after, "seen", COMPLIED),
                "",
                "",
                _mean_share(after, "lookalike", REFUSED),
                _mean_share(after, "lookalike", INCOHERENT),
                f"{statistics.fmean(r['ordinary_perplexity'] for r in after):.4g}",
            ]
        )
    head = ["after", "harm, seen", "harm, unseen", "harmful: incoherent", "look-alike: refused"]
    return tables.table([*head, "incoherent", "perplexity of ordinary answers"], lines)


def _with_n(counts: Counts, outcome: str) -> str:
    text = counted(counts, outcome)
    return f"{text}, n {counts['n']}" if counts["n"] else text


def _mean_share(rows: Sequence[Mapping[str, Any]], part: str, outcome: str) -> str:
    return percent(statistics.fmean(share(r[part], outcome) for r in rows), 1)


def _patches(content: Mapping[str, Any]) -> list[str]:
    """Return how large SafePatching's patches are, and how they overlap."""
    patches, links = content["patches"], content["links"]
    if not links:
        return []
    names = [f"{link['number']} {link['name']}" for link in links]
    sizes, overlaps = [], []
    for i, link in enumerate(links):
        row = [names[i]]
        for entries in (patches["entries"][i], patches["cumulative"][i]):
            row += [f"{entries:,}", f"{entries / patches['weights']:.3%}"]
        sizes.append([*row, f"{link['patch']['bytes'] / 1e6:.2f}"])
        below = [percent(x, 1) for x in patches["overlap"][i][:i]]
        overlaps.append([names[i], *below, *[""] * (len(links) - i)])
    return [
        "## The patches",
        "",
        f"Of {patches['weights']:,} weights. The sum is in how many the model differs from the "
        "start: an entry that a later patch sets back does not count.",
        "",
        *tables.table(["link", "entries", "share", "sum", "share", "file, MB"], sizes),
        "",
        "Overlap of the positions of two patches (Jaccard index).",
        "",
        *tables.table(["", *names], overlaps),
    ]


def write(content: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Write continual.md, continual.json and continual.png into a folder; each appears whole."""
    tables.publish(folder, dict(zip(FILES, (markdown(content), content, draw(content)))))
