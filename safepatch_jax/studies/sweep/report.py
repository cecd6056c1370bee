"""The report of a sweep: recommended settings, Pareto front, spread over seeds and sensitivity, as
Markdown, JSON, pictures."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from safepatch_jax.reporting import tables, templates
from safepatch_jax.reporting.tables import rate
from safepatch_jax.studies.sweep.analysis import (
    AXES,
    MOST_PERPLEXITY,
    flat,
    measured,
    place,
    spread,
)
from safepatch_jax.studies.sweep.figures import draw_plane, draw_sensitivity
from safepatch_jax.studies.sweep.points import label, short, written

PLANE, SENSITIVITY = "sweep.png", "sweep_sensitivity.png"
FILES = ("sweep.md", "sweep.json", PLANE, SENSITIVITY)


def write(content: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Write sweep.md, sweep.json, sweep.png and, where a setting varies, sweep_sensitivity.png;
    each appears whole."""
    contents = {"sweep.md": markdown(content), "sweep.json": content, PLANE: draw_plane(content)}
    if content["varied"]:
        contents[SENSITIVITY] = draw_sensitivity(content)
    tables.publish(folder, contents)
    if not content["varied"]:
        (folder / SENSITIVITY).unlink(missing_ok=True)  # of an earlier sweep


def markdown(content: Mapping[str, Any]) -> str:
    """Render the report."""
    trials, seeds = content["trials"], content["compared_on"]
    several = [trial for trial in trials if len(trial["seeds"]) > 1]
    widest = dict.fromkeys(AXES, 0.0)
    for trial in several:
        for axis, x in spread(trial).items():
            widest[axis] = max(widest[axis], x["largest"] - x["least"])
    members = [trial for trial in trials if trial["front"]]
    members.sort(key=lambda trial: place(trial["compared"]))
    mixed = any(trial["seeds"] != seeds for trial in trials)
    left_out = sum(trial["compared"] is None for trial in trials)
    alone = [short(name) for name, effect in content["sensitivity"].items() if not effect["steps"]]
    return templates.render(
        "studies/sweep/report.md.jinja",
        **_values(content),
        recommendation=recommendation(content),
        names=list(map(short, content["varied"])),
        front=members,
        compared=_compared(seeds, mixed, left_out),
        several=several,
        widest=widest,
        never_alone=alone,
        by_margins="margins" in content["backbone"]["measures"],
        plane=PLANE,
        sensitivity_picture=SENSITIVITY,
    )


def recommendation(content: Mapping[str, Any]) -> list[str]:
    """Say what is recommended, by which rule, and what speaks against it, in short paragraphs."""
    chosen, following = content["recommended"], None
    if chosen["next"] is not None:
        following = content["trials"][chosen["next"]]
    text = templates.render(
        "studies/sweep/recommendation.md.jinja",
        **_values(content),
        compared=_compared(chosen["seeds"], chosen["mixed"], chosen["left_out"]),
        most_perplexity=MOST_PERPLEXITY,
        next=following,
    )
    return text.splitlines()


def _values(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the templates use: the content, the chosen trial, and how things are written."""
    functions = {
        "answered": _answered,
        "label": lambda trial: _label(content, trial),
        "moved": _moved,
        "number_of": _number_of,
        "short": short,
        "spread": spread,
        "times": _times,
        "written": written,
    }
    return {**content, "chosen": content["trials"][content["recommended"]["trial"]], **functions}


def summary(content: Mapping[str, Any]) -> list[str]:
    """Say the recommendation on the console."""
    lines = [line for line in recommendation(content) if line and not line.startswith("|")]
    return [line.replace("**", "").replace("`", "") for line in lines]


def _compared(seeds: Sequence[int], mixed: bool, left_out: int) -> str:
    """Say over which seeds choices were compared, where they were not all tried with the same."""
    word, pronoun = ("seed", "it") if len(seeds) == 1 else ("seeds", "them")
    text = f" They are compared over {word} {', '.join(map(str, seeds))}"
    if left_out:
        return (
            f"{text}; {_number_of(left_out, 'choice')} not tried with {pronoun} could not be, and "
            "had no chance here."
        )
    return f"{text}, which they have in common." if mixed else ""


def _moved(change: Mapping[str, float], scale: float, form: str) -> str:
    # Adding 0.0 makes a plain zero of -0.0.
    numbers = {name: format(scale * value + 0.0, form) for name, value in change.items()}
    if change["least"] == change["largest"]:
        return numbers["mean"]
    return f"{numbers['mean']} [{numbers['least']} to {numbers['largest']}]"


def _answered(measures: Mapping[str, Any]) -> str:
    """Return harm and over-refusal of answers, two cells."""
    return " | ".join(rate(*_of_answers(measures, axis)) for axis in ("harm", "over_refusal"))


def _of_answers(measures: Mapping[str, Any], axis: str) -> tuple[float, Sequence[float]]:
    single = measured([measures], measures)
    return single[axis], single["intervals"][axis]


def _times(value: float) -> str:
    return f"{value:.3f}" if value < 100 else f"{value:.1e}"


def _number_of(n: int, word: str) -> str:
    return f"{n} {word}{'s' * (n != 1)}"


def _label(content: Mapping[str, Any], trial: Mapping[str, Any]) -> str:
    values, start = flat(trial), content["settings"]["patch"]
    names = content["varied"] or [name for name in values if values[name] != start[short(name)]]
    return label(values, names) or "the config's own settings"
