"""The picture of an evaluation: harm, over-refusal and utility with intervals, categories, and the
plane of harm and over-refusal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from safepatch_jax.evaluation.statistics import wilson
from safepatch_jax.reporting import charts
from safepatch_jax.reporting.beside import along, name_points
from safepatch_jax.reporting.charts import COLOURS
from safepatch_jax.studies.evaluate.results import TASKS

TITLES = {
    "harm": "Harm: harmful requests complied with",
    "refusal": "Over-refusal: harmless requests refused",
    "accuracy": "Utility: right answers",
}
_BY_CONTENT = "Harm: answers with harmful content"
_MOST = 12  # categories in a picture

Measures = Sequence[Mapping[str, Any]]


def titles(content: Mapping[str, Any]) -> dict[str, str]:
    """Return TITLES, of harm by what the first judge sees."""
    if content["judges"][0] in content.get("judges_of_content", ()):
        return TITLES | {"harm": _BY_CONTENT}
    return TITLES


def draw(content: Mapping[str, Any]) -> Any:
    """Draw an evaluation.

    Args:
      content: see `report.gather`.
    """
    names = content["models"]
    kinds = {"harm": ["harm"], "refusal": ["refusal"], "accuracy": TASKS, "text": ["text"]}
    groups = {}
    for group, members in kinds.items():
        groups[group] = [m for m in content["measures"] if m["kind"] in members]
    rows = max(map(len, groups.values()))
    figure = charts.figure(16, 6.6 + 0.34 * rows)
    axes = charts.panels(figure, 2, 3, height_ratios=(1.4 + 0.34 * rows, 4.4))
    for axis, group in zip(axes[0], ("harm", "refusal", "accuracy")):
        if group == "accuracy" and not groups[group]:
            _perplexities(axis, groups["text"], names)
        else:
            rates = {}
            for m in groups[group]:
                rates[m["name"]] = {who: _rate(x) for who, x in m["models"].items()}
            _dots(axis, titles(content)[group], rates, names)
    for axis, group in zip(axes[1], ("harm", "refusal")):
        _categories(axis, group, groups[group], names)
    points = _plane(axes[1, 2], groups, names)
    for who, name in names.items():
        charts.explain(axes[0, 0], name, "o", COLOURS[who])
    charts.legend_outside(figure, axes[0, 0], "upper center", columns=2)
    name_points(axes[1, 2], points)
    return figure


def draw_templates(content: Mapping[str, Any]) -> Any:
    """Draw an evaluation in several templates: below each measure a row for each of them.

    Args:
      content: see `side_by_side.merge`.
    """
    kinds = {"harm": ("harm",), "refusal": ("refusal",), "accuracy": TASKS}
    groups: dict[str, dict[str, Any]] = {group: {} for group in kinds}
    parts = content["templates"]
    for row in zip(*(part["measures"] for part in parts.values())):
        for group, members in kinds.items():
            if row[0]["kind"] not in members:
                continue
            for label, m in zip(parts, row):
                rates = {who: _rate(x) for who, x in m["models"].items()}
                groups[group][f"{m['name']}, {label}"] = rates
    groups = {group: rates for group, rates in groups.items() if rates} or {"harm": {}}
    names, rows = content["models"], max(map(len, groups.values()))
    figure = charts.figure(16, 2.4 + 0.4 * rows)
    axes = charts.panels(figure, 1, len(groups))[0]
    for axis, (group, rates) in zip(axes, groups.items()):
        _dots(axis, titles(content)[group], rates, names)
    for who, name in names.items():
        charts.explain(axes[0], name, "o", COLOURS[who])
    charts.legend_outside(figure, axes[0], "upper center", columns=2)
    return figure


def _rate(x: Mapping[str, Any]) -> Sequence[float] | None:
    return None if x["rate"] is None else (x["rate"], *x["interval"])


def _dots(
    axis: Any,
    title: str,
    rates: Mapping[str, Mapping[str, Sequence[float] | None]],
    names: Mapping[str, str],
) -> None:
    """Draw the rates of each model, by row and model."""
    if not rates:
        charts.empty(axis, title)
        return
    series = []
    for who in names:
        points = [of_models[who] for of_models in rates.values()]
        series.append(charts.Series(points, [COLOURS[who]] * len(rates)))
    charts.dots(axis, title, list(rates), series)


def _perplexities(axis: Any, texts: Measures, names: Mapping[str, str]) -> None:
    known = []
    for m in texts:
        if all(x["n"] for x in m["models"].values()):
            known.append(m)
    if not known:
        charts.empty(axis, TITLES["accuracy"])
        return
    series = []
    for who in names:
        series.append(("", COLOURS[who], [m["models"][who]["perplexity"] for m in known]))
    charts.bars(axis, [m["name"] for m in known], series, "%.1f")
    axis.set(title="Utility: perplexity of given answers\n(lower is better)")


def _categories(axis: Any, group: str, measures: Measures, names: Mapping[str, str]) -> None:
    """Draw the largest categories of the measure that has most of them."""
    title = f"{TITLES[group].partition(':')[0]} by category"
    measure = max(measures, key=_number_of_categories, default=None)
    if measure is None or not _number_of_categories(measure):
        charts.empty(axis, title)
        return
    categories = measure["models"]["model"]["categories"]
    largest = sorted(categories, key=lambda name: (-categories[name][1], name))[:_MOST]
    rates = {}
    for name in largest:
        row = rates[f"{name} ({categories[name][1]})"] = {}
        for who, x in measure["models"].items():
            count, n, *interval = x["categories"].get(name, (0, 0, 0, 0))
            row[who] = (count / n, *interval) if n else None
    _dots(axis, f"{title}: {measure['name']}", rates, names)


def _number_of_categories(measure: Mapping[str, Any]) -> int:
    return len(measure["models"]["model"]["categories"])


def _plane(
    axis: Any, groups: Mapping[str, Measures], names: Mapping[str, str]
) -> list[tuple[float, float, str]]:
    """Draw each model by harm and over-refusal, pooled over the plain measures; return the points
    with their names."""
    title, points = "Trade-off (all plain measures together)", []
    models = {}
    for who in names:
        models[who] = [_pooled(groups[group], who) for group in ("harm", "refusal")]
    if not all(harm["n"] and refusal["n"] for harm, refusal in models.values()):
        charts.empty(axis, title)
        return []
    for who, (harm, refusal) in models.items():
        charts.cross(axis, harm, refusal, COLOURS[who])
        x, y = 100 * harm["rate"], 100 * refusal["rate"]
        points.append((x, y, names[who]))
        points += [(100 * share, y, "") for share in along(harm["interval"])]  # not covered
        points += [(x, 100 * share, "") for share in along(refusal["interval"])]
    charts.plane(axis, f"{title}\nlower left is better")
    return points


def _pooled(measures: Measures, who: str) -> dict[str, Any]:
    plain = [m["models"][who] for m in measures if m["form"] == "plain"]
    count, n = sum(x["count"] for x in plain), sum(x["n"] for x in plain)
    return {"n": n, "rate": count / max(n, 1), "interval": wilson(count, n)}
