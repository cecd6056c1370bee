"""The report of a durability study: what is left of a patch's effect and of its entries."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from safepatch_jax.reporting import tables, templates
from safepatch_jax.studies.durability.effects import (
    BETTER,
    MEASURES,
    WORSE,
    effect,
    left,
    names_of,
)
from safepatch_jax.studies.durability.effects import NONE as NONE_SHOWN
from safepatch_jax.studies.durability.figures import draw
from safepatch_jax.studies.durability.options import FINETUNE, NONE, DurabilityOptions, Treatment

FILES = ("durability.md", "durability.json", "durability.png")


def gather(
    results: Mapping[str, Mapping[str, Any]], options: DurabilityOptions, about: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content of durability.json.

    Args:
      results: by treatment, that of nothing first: 'values' by model and measure, 'entries' (see
        `entries.total`), 'failed', and 'nll' of training steps; of a failed one 'failed' alone.
      options: of the study.
      about: what is said of models, data and versions.
    """
    before = results[NONE]["values"]
    names = names_of(options.kinds, before)
    effects = {name: effect(name, before) for name in names}
    treatments = []
    for name, result in results.items():
        if name == NONE:
            continue
        row = {"name": name, "title": title_of(name, options), "failed": result["failed"]}
        if not result["failed"]:
            after = result["values"]
            row |= {
                "effects": {measure: effect(measure, after) for measure in names},
                "left": {measure: left(measure, before, after) for measure in names},
                "entries": result["entries"],
                "nll": result["nll"],
            }
        treatments.append(row)
    by_shown = {}
    for shown in (BETTER, WORSE, NONE_SHOWN):
        by_shown[shown] = [name for name in names if effects[name]["shown"] == shown]
    return dict(about) | {
        "measures": {name: dataclasses.asdict(MEASURES[name]) for name in names},
        "before": effects,
        "shown": by_shown,
        "entries": results[NONE]["entries"],
        "treatments": treatments,
    }


def title_of(name: str, options: DurabilityOptions) -> str:
    """Say what a treatment does."""
    treatment = Treatment.parse(name)
    if treatment.dtype:
        return f"cast to {treatment.dtype}"
    if name == FINETUNE:
        return f"{options.steps} steps of benign fine-tuning at {options.learning_rate:g}"
    scheme = treatment.scheme
    shares = f"a scale for {scheme.group} weights" if scheme.group else "a scale a channel"
    asymmetric = "" if scheme.symmetric else ", asymmetric"
    return f"{scheme.bits}-bit weights, {shares}{asymmetric}"


def headline(content: Mapping[str, Any]) -> str:
    """Say whether the patched model was any better to begin with."""
    shown = content["shown"]
    titles = {key: _titles(content, shown[key]) for key in shown}
    if not shown[BETTER] and not shown[WORSE]:
        return (
            "Before any treatment no effect of the patch is shown on any measure here: nothing can "
            "be said of what is left of it but by its entries. More prompts would tell more."
        )
    worse = f"worse in {titles[WORSE]}" if shown[WORSE] else "worse in none"
    if not shown[BETTER]:
        return (
            "The patched model was no better than its base to begin with: before any treatment it "
            f"is better in no measure here, {worse}. What is left below is of changes for the "
            "worse."
        )
    return f"Before any treatment the patched model is better in {titles[BETTER]}, {worse}."


def _titles(content: Mapping[str, Any], names: Sequence[str]) -> str:
    return "; ".join(content["measures"][name]["title"] for name in names)


def summary(content: Mapping[str, Any]) -> list[str]:
    """Return the lines with which a study ends on the console."""
    lines = [headline(content)]
    for treatment in content["treatments"]:
        if treatment["failed"]:
            lines.append(f"{treatment['name']}: not measured: {treatment['failed']}")
            continue
        parts = []
        for name, x in treatment["left"].items():
            if x:
                title = content["measures"][name]["title"]
                parts.append(f"{title} {_left(treatment, name)}")
        along = treatment["entries"]["along_patch"]
        parts.append(f"of its entries {along:.1%} along the patch")
        lines.append(f"{treatment['name']} leaves: {'; '.join(parts)}")
    return lines


def markdown(content: Mapping[str, Any]) -> str:
    """Return durability.md."""
    shown = [*content["shown"][BETTER], *content["shown"][WORSE]]
    measured = [x for x in content["treatments"] if not x["failed"]]
    return templates.render(
        "studies/durability/report.md.jinja",
        **content,
        names=[name for name in content["measures"] if name in shown],
        silent=content["shown"][NONE_SHOWN],
        measured=measured,
        headline=headline(content),
        level=_level,
        change=_change,
        left=_left,
        count=_count,
        code=tables.code,
    )


def _level(unit: str, value: float, sign: str = "") -> str:
    if unit == "share":
        return f"{100 * value:{sign}.1f}%"
    return f"{value:{sign}.3f}"


def _change(unit: str, x: Mapping[str, Any]) -> str:
    """Return an effect with its interval."""
    text = _level(unit, x["effect"], "+")
    if x["interval"] is None:
        return f"{text} (one prompt)"
    low, high = (_level(unit, end, "+") for end in x["interval"])
    return f"{text} [{low}, {high}]"


def _left(treatment: Mapping[str, Any], name: str) -> str:
    """Return what is left of an effect, and whether it still is one."""
    x = treatment["left"][name]
    low, high = x["interval"]
    text = f"{x['value']:.0%} [{100 * low:.0f}, {100 * high:.0f}]"
    if treatment["effects"][name]["shown"] == NONE_SHOWN:
        return f"{text}, no longer shown"
    return f"{text}, reversed" if x["value"] < 0 else text


def _count(entries: Mapping[str, Any], name: str) -> str:
    return f"{entries[name] / entries['changed']:.2%}"


def write(content: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Write durability.md, .json and .png into a folder; each appears whole."""
    pages = {FILES[0]: markdown(content), FILES[1]: content}
    tables.publish(folder, pages | {FILES[2]: draw(content)})
