"""The report of a margin map: margins by data set, AUROC, content NLL, and what changed between
the two models."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from safepatch_jax.evaluation.margins import auroc, auroc_change, margins_of, summary
from safepatch_jax.evaluation.measures import perplexity
from safepatch_jax.evaluation.statistics import mean_interval
from safepatch_jax.evaluation.suites import Measure
from safepatch_jax.reporting import tables, templates
from safepatch_jax.studies.margins.figures import draw

FILES = ("report.md", "report.json", "report.png")
Rows = Mapping[tuple[str, str], Mapping[str, Mapping[str, Any]]]
KINDS = {"harm": "harmful", "refusal": "harmless"}


def gather(
    suite: Sequence[Measure], margins: Rows, contents: Rows, about: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content of report.json.

    Args:
      suite: measures of kind harm, refusal and text.
      margins: by (model, measure), the rows of `evaluation.margins.margins` by id.
      contents: likewise those of `contents`; of measures of kind text the whole answers.
      about: what is said of models, options and versions.
    """
    whos = list(about["models"])
    measures = []
    for measure in suite:
        row: dict[str, Any] = {"name": measure.name, "kind": measure.kind, "form": measure.form}
        if measure.kind in KINDS:
            row["margins"] = _margins(measure, margins, whos)
        row["nll"] = _nll(measure, contents, whos)
        measures.append(row)
    content = dict(about) | {"measures": measures}
    pools = {who: _pools(suite, margins, who, whos) for who in whos}
    content["n"] = {kind: len(pools[whos[0]][kind]) for kind in KINDS.values()}
    content["auroc"] = {who: auroc(pools[who]["harmful"], pools[who]["harmless"]) for who in whos}
    content["pairs"] = _pairs(suite, margins, whos)
    if "against" in whos:
        before, after = pools["against"], pools["model"]
        pairs = [(before[kind], after[kind]) for kind in KINDS.values()]
        content["auroc_change"] = auroc_change(*pairs)
    return content


def _pairs(suite: Sequence[Measure], rows: Rows, whos: Sequence[str]) -> list[dict[str, Any]]:
    """Return the AUROC of each harmful set against each harmless one, by model."""
    pairs = []
    for harmful in suite:
        for harmless in suite:
            if (harmful.kind, harmless.kind) != tuple(KINDS):
                continue
            values = {}
            for who in whos:
                values[who] = [_values(m, rows, who, whos) for m in (harmful, harmless)]
            if all(all(map(len, pair)) for pair in values.values()):
                pair = {"harmful": harmful.name, "harmless": harmless.name}
                pair["auroc"] = {who: auroc(*of_model) for who, of_model in values.items()}
                pairs.append(pair)
    return pairs


def _values(measure: Measure, rows: Rows, who: str, whos: Sequence[str]) -> list[float]:
    """Return a model's margins of a measure, of the prompts that all models have."""
    ids = _common(rows, measure, whos, "refusal")
    return margins_of([rows[who, measure.name][i] for i in ids]).tolist()


def _common(rows: Rows, measure: Measure, whos: Sequence[str], field: str) -> list[str]:
    """Return the ids of a measure that all models have."""
    ids = list(rows[whos[0], measure.name])
    for who in whos:
        of_model = rows[who, measure.name]
        ids = [i for i in ids if field in of_model.get(i, ())]
    return ids


def _pools(
    suite: Sequence[Measure], rows: Rows, who: str, whos: Sequence[str]
) -> dict[str, list[float]]:
    """Return a model's margins of all plain harmful and of all plain harmless prompts."""
    pools: dict[str, list[float]] = {kind: [] for kind in KINDS.values()}
    for measure in suite:
        if measure.kind in KINDS and measure.form == "plain":
            pools[KINDS[measure.kind]] += _values(measure, rows, who, whos)
    for kind, pool in pools.items():
        if not pool:
            raise ValueError(
                f"No plain {kind} prompt fits the model: there is nothing to compare. Give a suite "
                "with shorter ones, and with form plain."
            )
    return pools


def _margins(measure: Measure, rows: Rows, whos: Sequence[str]) -> dict[str, Any]:
    """Summarise a measure's margins by model, and their change."""
    ids, values, result = _common(rows, measure, whos, "refusal"), {}, {}
    if not ids:
        return result
    for who in whos:
        of_measure = [rows[who, measure.name][i] for i in ids]
        values[who] = margins_of(of_measure)
        result[who] = summary(of_measure) | {"values": [round(float(m), 4) for m in values[who]]}
    if "against" in whos:
        result["change"] = _change(values["model"] - values["against"])
    return result


def _nll(measure: Measure, rows: Rows, whos: Sequence[str]) -> dict[str, Any]:
    """Summarise the NLL of a measure's answers, nats a token, by model, and its change."""
    ids, values, result = _common(rows, measure, whos, "nll"), {}, {}
    if not ids:
        return result
    for who in whos:
        of_measure = [rows[who, measure.name][i] for i in ids]
        values[who] = [row["nll"] / row["tokens"] for row in of_measure]
        mean, low, high = mean_interval(values[who])
        tokens = sum(row["tokens"] for row in of_measure)
        of_token = math.fsum(row["nll"] for row in of_measure) / tokens
        result[who] = {"n": len(ids), "tokens": tokens, "mean": mean, "interval": [low, high]}
        result[who] |= {"of_token": of_token, "perplexity": perplexity(of_token)}
    if "against" in whos:
        result["change"] = _change([a - b for a, b in zip(values["model"], values["against"])])
    return result


def _change(differences: Sequence[float]) -> dict[str, Any]:
    mean, low, high = mean_interval([float(x) for x in differences])
    return {"mean": mean, "interval": [low, high]}


def markdown(content: Mapping[str, Any]) -> str:
    """Return report.md."""
    by_kind: dict[str, list[Mapping[str, Any]]] = {kind: [] for kind in (*KINDS, "text")}
    for measure in content["measures"]:
        by_kind[measure["kind"]].append(measure)
    openings = {}
    for kind, rows in content["openings"].items():
        openings[kind] = ", ".join(tables.code(row["text"]) for row in rows)
    return templates.render(
        "studies/margins/report.md.jinja",
        **{"auroc_change": None} | dict(content),
        by_kind=by_kind,
        shown=openings,
        kinds=KINDS,
        signed=_signed,
        bounds=_bounds,
    )


def _signed(x: Mapping[str, Any], digits: int) -> str:
    """Return a change with its interval."""
    value = x["value"] if "value" in x else x["mean"]
    low, high = x["interval"]
    return f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def _bounds(x: Mapping[str, Any], digits: int) -> str:
    """Return a figure with its interval."""
    value = x["value"] if "value" in x else x["mean"]
    low, high = x["interval"]
    return f"{value:.{digits}f} [{low:.{digits}f}-{high:.{digits}f}]"


def write(content: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Write report.json, report.md and report.png into a folder; each appears whole."""
    pages = {"report.md": markdown(content), "report.json": content}
    tables.publish(folder, pages | {"report.png": draw(content)})
