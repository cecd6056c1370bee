"""The report of a chain: the forgetting matrix, what became of over-refusal and utility, and how
the patches add up."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from safepatch_jax.evaluation.judges.phrases import COMPLIED, INCOHERENT, OUTCOMES, REFUSED
from safepatch_jax.evaluation.measures import perplexity
from safepatch_jax.evaluation.statistics import wilson
from safepatch_jax.patch_file.log import data_text, plain
from safepatch_jax.runtime import files
from safepatch_jax.studies.continual.figures import draw
from safepatch_jax.studies.continual.measures import COMMON

FILES = ("continual.md", "continual.json", "continual.png")
Counts = Mapping[str, int]


def row(label: str, digest: str, measures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Collect what one model was measured on.

    Args:
      label, digest: name and hash of the model.
      measures: by part, see `Measures.measure`.
    """
    counts = lambda part: {key: part[key] for key in (*OUTCOMES, "n")}
    return {
        "model": label,
        "hash": digest,
        "harm": {
            name: counts(m) | {"nll": m["nll"]}
            for name, m in measures.items()
            if name not in COMMON
        },
        "lookalike": counts(measures["lookalike"]),
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
    return {
        "settings": dict(settings),
        "start": {k: start[k] for k in ("source", "aligned", "model")},
        "stages": list(stages),
        "links": [
            {
                k: link[k]
                for k in ("number", "name", "model", "parent", "patch", "data", "seed", "date")
            }
            for link in links
        ],
        "reverted": list(reverted),
        "labels": dict(labels),
        "colours": dict(colours),
        "patches": dict(patches),
        "methods": {
            method: [
                {**r, "seen": _pooled(r, names[:i]), "unseen": _pooled(r, names[i:])}
                for i, r in enumerate(own)
            ]
            for method, own in rows.items()
        },
    }


def markdown(content: Mapping[str, Any]) -> str:
    """Render the report."""
    settings, start, stages = content["settings"], content["start"], content["stages"]
    lines = [
        "# Continual post-safety-alignment",
        "",
        f"Model {_code(start['source'])}"
        + (", aligned first by a short supervised run" if start["aligned"] else "")
        + f"; {len(content['links'])} of {len(stages)} links. Split "
        f"'{settings['evaluate.split']}', "
        f"{settings['evaluate.max_new_tokens']} greedy tokens an answer, the same records for "
        "every model. Judge: refusal "
        "phrases and a coherence test; it judges the form of an answer, not its content. In "
        "brackets: 95 % intervals (Wilson). "
        "One seed.",
        "",
        "Data: "
        + "; ".join(f"{s['name']}: {_code(data_text(s))} ({s['records']} records)" for s in stages)
        + f"; look-alikes {_code(settings['data.lookalike'])}; ordinary "
        f"{_code(settings['data.ordinary'])}.",
        "",
    ]
    if content["reverted"]:
        lines += [f"Taken off again: link {', '.join(map(str, content['reverted']))}.", ""]
    lines += ["![the chain](continual.png)", ""]
    for method, rows in content["methods"].items():
        lines += [
            "## " + content["labels"][method],
            "",
            *_matrix(rows, stages),
            "",
            *_course(rows),
            "",
        ]
    return "\n".join(lines + _patches(content)) + "\n"


def write(content: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Write continual.md, continual.json and continual.png into a folder; each appears whole."""
    with files.published(folder) as made:
        files.write_text(made / FILES[0], markdown(content))
        files.write_json(made / FILES[1], content)
        draw(content, made / FILES[2])


def _code(text: str) -> str:
    """Return a text as Markdown that shows it as it is; names of links and methods need no such
    care."""
    return "`" + plain(text).replace("`", "'") + "`"


def _matrix(rows: Sequence[Mapping[str, Any]], stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the forgetting matrix, harm by model and category, and that of the NLL."""
    names = [stage["name"] for stage in stages]
    return [
        "Harm: share of a category's requests that are complied with. In italics: categories the "
        "model has not yet seen.",
        "",
        *_table(
            rows,
            [f"{name} (n {rows[0]['harm'][name]['n']})" for name in names],
            lambda r: [_share(r["harm"][name], COMPLIED) for name in names],
        ),
        "",
        "NLL of a category's harmful answers, nats a token: higher is less likely.",
        "",
        *_table(rows, names, lambda r: [f"{r['harm'][name]['nll']:.2f}" for name in names]),
    ]


def _table(
    rows: Sequence[Mapping[str, Any]],
    heads: Sequence[str],
    cells: Callable[[Mapping[str, Any]], Sequence[str]],
) -> list[str]:
    lines = ["| after | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    return lines + [
        f"| {r['model']} | "
        + " | ".join(c if j < i else f"*{c}*" for j, c in enumerate(cells(r)))
        + " |"
        for i, r in enumerate(rows)
    ]


def _course(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what became of each model on the whole."""
    lines = [
        "| after | harm, seen | harm, unseen | harmful: incoherent | look-alike: refused | "
        "incoherent "
        "| perplexity of ordinary answers |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        every = _sum([r["seen"], r["unseen"]])
        cells = [
            _share(r["seen"], COMPLIED, n=True),
            _share(r["unseen"], COMPLIED, n=True),
            _share(every, INCOHERENT),
            _share(r["lookalike"], REFUSED, n=True),
            _share(r["lookalike"], INCOHERENT),
            f"{r['ordinary_perplexity']:.4g}",
        ]
        lines.append(f"| {r['model']} | " + " | ".join(cells) + " |")
    if after := rows[1:]:
        mean = lambda values: sum(values) / len(after)
        share = lambda part, outcome: (
            f"{mean([r[part][outcome] / r[part]['n'] for r in after]):.1%}"
        )
        lines.append(
            f"| mean of the links | {share('seen', COMPLIED)} | | | {share('lookalike', REFUSED)} "
            "| "
            f"{share('lookalike', INCOHERENT)} | "
            f"{mean([r['ordinary_perplexity'] for r in after]):.4g} |"
        )
    return lines


def _patches(content: Mapping[str, Any]) -> list[str]:
    """Return how large SafePatching's patches are, and how they overlap."""
    patches, links = content["patches"], content["links"]
    if not links:
        return []
    percent = lambda count: f"{count / patches['weights']:.3%}"
    lines = [
        "## The patches",
        "",
        f"Of {patches['weights']:,} weights. The sum is in how many the model differs from the "
        "start: "
        "an entry that a later patch sets back does not count.",
        "",
        "| link | entries | share | sum | share | file, MB |",
        "|---|---|---|---|---|---|",
    ]
    for link, entries, total in zip(links, patches["entries"], patches["cumulative"]):
        lines.append(
            f"| {link['number']} {link['name']} | {entries:,} | {percent(entries)} | {total:,} | "
            f"{percent(total)} | "
            f"{link['patch']['bytes'] / 1e6:.2f} |"
        )
    heads = [f"{link['number']} {link['name']}" for link in links]
    lines += [
        "",
        "Overlap of the positions of two patches (Jaccard index).",
        "",
        "| | " + " | ".join(heads) + " |",
        "|---" * (1 + len(heads)) + "|",
    ]
    return lines + [
        f"| {head} | " + " | ".join(f"{x:.1%}" if j < i else "" for j, x in enumerate(own)) + " |"
        for i, (head, own) in enumerate(zip(heads, patches["overlap"]))
    ]


def _share(counts: Counts, outcome: str, n: bool = False) -> str:
    if not counts["n"]:
        return "-"
    low, high = wilson(counts[outcome], counts["n"])
    text = f"{counts[outcome] / counts['n']:.0%} [{100 * low:.0f}-{100 * high:.0f}]"
    return f"{text}, n {counts['n']}" if n else text


def _pooled(own: Mapping[str, Any], names: Sequence[str]) -> dict[str, int]:
    return _sum([own["harm"][name] for name in names])


def _sum(counts: Sequence[Counts]) -> dict[str, int]:
    return {key: sum(c[key] for c in counts) for key in (*OUTCOMES, "n")}
