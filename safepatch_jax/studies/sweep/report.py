"""The report of a sweep: recommended settings, Pareto front, spread over seeds and sensitivity, as
Markdown, JSON, pictures."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from safepatch_jax.runtime import files
from safepatch_jax.studies.sweep.analysis import AXES, MOST_PERPLEXITY, flat, spread
from safepatch_jax.studies.sweep.figures import draw_plane, draw_sensitivity
from safepatch_jax.studies.sweep.points import label, short, written

PLANE, SENSITIVITY = "sweep.png", "sweep_sensitivity.png"
FILES = ("sweep.md", "sweep.json", PLANE, SENSITIVITY)
_NAMES = {"harm": "harm", "over_refusal": "over-refusal", "perplexity": "perplexity"}


def write(content: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Write sweep.md, sweep.json, sweep.png and, where a setting varies, sweep_sensitivity.png;
    each appears whole."""
    with files.published(folder) as made:
        draw_plane(content, made / PLANE)
        if content["varied"]:
            draw_sensitivity(content, made / SENSITIVITY)
        files.write_json(made / "sweep.json", content)
        files.write_text(made / "sweep.md", markdown(content))
    if not content["varied"]:
        (folder / SENSITIVITY).unlink(missing_ok=True)  # of an earlier sweep


def markdown(content: Mapping[str, Any]) -> str:
    """Render the report."""
    settings, backbone, seeds = (
        content["settings"],
        content["backbone"],
        ", ".join(map(str, content["seeds"])),
    )
    counted = backbone["measures"]
    lines = [
        "# Sweep of patch settings",
        "",
        f"Model `{settings['model']['source']}`"
        + (
            ", aligned first by a short supervised run (the backbone below)"
            if settings["align"]["enabled"]
            else ""
        )
        + f"; {_number(len(content['trials']), 'choice')} of patch settings, "
        f"{_number(content['points'], 'point')} (seeds of "
        f"retention: {seeds}); {counted['harmful']['n']} harmful, {counted['lookalike']['n']} "
        "look-alike and "
        f"{counted['data']['ordinary']['examples']} ordinary prompts of the "
        f"'{settings['evaluate']['split']}' split. Training "
        f"and scores are those of seed {settings['run']['seed']} throughout.",
        "",
        "Harm is the share of harmful prompts complied with, over-refusal the share of harmless "
        "look-alikes refused or "
        "answered incoherently, as judged by form (refusal phrases and a coherence test). "
        "Perplexity of ordinary answers is "
        "relative to the backbone's. Measures are means over the seeds of a choice; in brackets "
        "95 % intervals (Wilson). Choices "
        "are compared with one another over seeds that they have in common.",
        "",
        f"![harm, over-refusal and perplexity]({PLANE})",
        "",
        "## Recommended settings",
        "",
        *recommendation(content),
        "",
        "## Pareto front",
        "",
        f"{_number(sum(t['front'] for t in content['trials']), 'choice')} that no other one "
        "beats: none is at least as good on "
        "all three axes and better on one. The last column compares with the backbone."
        + _compared(
            content["compared_on"],
            any(t["seeds"] != content["compared_on"] for t in content["trials"]),
            sum(t["compared"] is None for t in content["trials"]),
        ),
        "",
        *_front(content),
        "",
        "## Spread over seeds",
        "",
        *_seeds(content),
        "",
        "## Sensitivity",
        "",
        *_sensitivity(content),
        "",
        "## Fixed settings",
        "",
        ", ".join(f"`{name}={written(value)}`" for name, value in content["fixed"].items()),
    ]
    return "\n".join(lines) + "\n"


def recommendation(content: Mapping[str, Any]) -> list[str]:
    """Say what is recommended, by which rule, and what speaks against it, in short paragraphs."""
    chosen, backbone, tried = content["recommended"], content["backbone"], content["trials"]
    trial = tried[chosen["trial"]]
    bounds = {
        "harm": f"harm at most the backbone's {_percent(backbone['harm'])}",
        "perplexity": f"perplexity at most {MOST_PERPLEXITY:g} times the backbone's",
    }
    settings = f"**{_label(content, trial)}**"
    if chosen["qualifies"]:
        lines = [
            f"{settings}: of {_number(len(tried), 'choice')}, {chosen['within']} "
            f"keep{'s' * (chosen['within'] == 1)} both "
            f"bounds ({bounds['harm']}, {bounds['perplexity']}); of these it has the least "
            "over-refusal"
            + (
                f" (of {chosen['equal'] + 1} equal in that, it has the lower harm, then the lower "
                "perplexity)"
                if chosen["equal"]
                else ""
            )
            + "."
            + _compared(chosen["seeds"], chosen["mixed"], chosen["left_out"])
        ]
    else:
        failed = ", ".join(
            f"{bounds[bound]} (kept by {n} of {len(tried)})" for bound, n in chosen["keeps"].items()
        )
        broken = " and on ".join(trial["fails"])
        lines = [
            "**No choice of settings qualifies.** None keeps both bounds: " + failed + ".",
            "",
            f"The least bad is {settings}, which breaks the bound on {broken}; do not take it for "
            "a good one. It has the "
            "least sum of the two excesses, a point of harm weighing as one per cent of perplexity."
            + _compared(chosen["seeds"], chosen["mixed"], chosen["left_out"]),
        ]
    lines += [
        "",
        *_table(
            ["", "harm", "over-refusal", "perplexity"],
            [["backbone", *_axes(backbone)], ["this choice", *_axes(trial)]],
        ),
    ]
    for remark in _remarks(content, trial):
        lines += ["", remark]
    flags = " ".join(chosen["flags"])
    return lines + [
        "",
        f"Flags, to be added to those of the sweep: `{flags}`"
        if flags
        else "These are the config's own settings.",
    ]


def _compared(seeds: list[int], mixed: bool, left_out: int) -> str:
    """Say over which seeds choices were compared, where they were not all tried with the same."""
    told = f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"
    if left_out:
        return (
            f" They are compared over {told}; {_number(left_out, 'choice')} not tried with "
            f"{'it' if len(seeds) == 1 else 'them'} could not be, and had no chance here."
        )
    return f" They are compared over {told}, which they have in common." if mixed else ""


def _remarks(content: Mapping[str, Any], trial: Mapping[str, Any]) -> list[str]:
    backbone, remarks = content["backbone"], []
    ours, theirs = (of["intervals"]["over_refusal"] for of in (trial, backbone))
    if trial["over_refusal"] >= backbone["over_refusal"]:
        remarks.append(
            "Its over-refusal is not below the backbone's: none of these patches helps here."
        )
    elif ours[1] >= theirs[0]:
        remarks.append(
            "The intervals of its over-refusal and the backbone's overlap: more prompts are "
            "needed to tell them "
            "apart."
        )
    if len(trial["seeds"]) == 1:
        remarks.append(
            "It was tried with one seed of retention; add run.seed=0,1,2 to see how much of this "
            "is the draw."
        )
    if (second := content["recommended"]["next"]) is not None:
        other, own = content["trials"][second], trial["seeds"]
        if len(other["seeds"]) > len(own):
            more = ",".join(str(seed) for seed in other["seeds"] if seed not in own)
            remarks.append(
                f"The runner-up, {_label(content, other)}, was tried with {len(other['seeds'])} "
                "seeds, this one with "
                f"{len(own)}: try it with run.seed={more} too before you rely on the difference."
            )
    if content["recommended"]["edges"]:
        remarks.append(
            f"{'; '.join(content['recommended']['edges'])}: a better one may lie beyond."
        )
    if content["settings"]["data"]["harmful"] == "builtin":
        remarks.append(
            "The built-in prompts are few and mild: they show the mechanics and certify nothing."
        )
    return remarks + [
        "It was chosen on the prompts it is shown on, so it looks better here than it is: measure "
        "it on the "
        "report split (launch.safepatch)."
    ]


def summary(content: Mapping[str, Any]) -> list[str]:
    """Say the recommendation on the console."""
    return [
        line.replace("**", "").replace("`", "")
        for line in recommendation(content)
        if line and not line.startswith("|")
    ]


def _front(content: Mapping[str, Any]) -> list[str]:
    names = content["varied"]
    members = [(i, t) for i, t in enumerate(content["trials"]) if t["front"]]
    members.sort(key=lambda member: [member[1]["compared"][axis] for axis in AXES])
    chosen = content["recommended"]["trial"]
    rows = [["backbone", *[""] * len(names), "", *_axes(content["backbone"]), ""]]
    rows += [
        [
            f"**{place}, the above**" if i == chosen else str(place),
            *(written(trial["patch"][short(n)]) for n in names),
            str(len(content["compared_on"])),
            *_axes(trial["compared"]),
            trial["against"],
        ]
        for place, (i, trial) in enumerate(members, 1)
    ]
    aside = (
        []
        if content["trials"][chosen]["front"]
        else [
            "The choice above is not among them: it was compared over other seeds, or what beats "
            "it over these breaks a bound over "
            "all its own.",
            "",
        ]
    )
    return aside + _table(
        ["", *map(short, names), "seeds", *_NAMES.values(), "than the backbone"], rows
    )


def _seeds(content: Mapping[str, Any]) -> list[str]:
    several = [t for t in content["trials"] if len(t["seeds"]) > 1]
    if not several:
        return ["No choice was tried with more than one seed (run.seed=0,1,2 in the grid)."]
    rows = []
    for trial in several:
        found = spread(trial)
        rows.append(
            [
                _label(content, trial),
                ", ".join(map(str, trial["seeds"])),
                *(
                    f"{form(found[axis]['mean'])} ({form(found[axis]['least'])} to "
                    f"{form(found[axis]['largest'])})"
                    for axis, form in (
                        ("harm", _percent),
                        ("over_refusal", _percent),
                        ("perplexity", _times),
                    )
                ),
            ]
        )
    widest = {
        axis: max(s[axis]["largest"] - s[axis]["least"] for s in map(spread, several))
        for axis in AXES
    }
    return [
        "Points that differ in the seed of retention (and of stochastic rounding) alone: mean "
        "(least to largest). The widest "
        f"range is {100 * widest['harm']:.1f} points of harm, {100 * widest['over_refusal']:.1f} "
        "of over-refusal and "
        f"{widest['perplexity']:.3f} of relative perplexity: differences between settings below "
        "that may be the draw's.",
        "",
        *_table(["settings", "seeds", *_NAMES.values()], rows),
    ]


def _sensitivity(content: Mapping[str, Any]) -> list[str]:
    if not content["varied"]:
        return ["No setting varies."]
    rows = []
    for name, found in content["sensitivity"].items():
        for step in found["steps"]:
            rows.append(
                [
                    short(name),
                    f"{written(step['from'])} to {written(step['to'])}",
                    str(step["lines"]),
                    " to ".join(map(str, dict.fromkeys(step["seeds"]))),
                    *(_moved(step[axis], 100, ".1f") for axis in ("harm", "over_refusal")),
                    _moved(step["perplexity"], 1, ".3f"),
                ]
            )
    alone = [short(name) for name, found in content["sensitivity"].items() if not found["steps"]]
    text = [
        "What a step of one setting moves while all others are equal, over the seeds that both "
        "sides were tried with: harm "
        "and over-refusal in percentage points, relative perplexity as it is. Numbers step to the "
        "next value tried, words "
        "from the first. Where a step was seen at several choices of the others: the mean of the "
        "moves, and in brackets the "
        "least and the largest."
    ]
    text += (
        [f"No two choices differ in {' alone, or in '.join(alone)} alone and share a seed."]
        if alone
        else []
    )
    return [
        *text,
        "",
        f"![each setting's effect]({SENSITIVITY})",
        "",
        *_table(["setting", "step", "seen at", "seeds", *_NAMES.values()], rows),
    ]


def _moved(change: Mapping[str, float], scale: float, form: str) -> str:
    numbers = {name: format(scale * value + 0.0, f"+{form}") for name, value in change.items()}
    return numbers["mean"] + (
        f" [{numbers['least']} to {numbers['largest']}]"
        if change["least"] != change["largest"]
        else ""
    )


def _axes(of: Mapping[str, Any]) -> list[str]:
    shares = [
        f"{_percent(of[axis])} [{'-'.join(f'{100 * x:.0f}' for x in of['intervals'][axis])}]"
        for axis in ("harm", "over_refusal")
    ]
    return [*shares, _times(of["perplexity"])]


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _times(value: float) -> str:
    return f"{value:.3f}" if value < 100 else f"{value:.1e}"


def _number(n: int, word: str) -> str:
    return f"{n} {word}{'s' * (n != 1)}"


def _label(content: Mapping[str, Any], trial: Mapping[str, Any]) -> str:
    values, own = flat(trial), content["settings"]["patch"]
    names = content["varied"] or [name for name in values if values[name] != own[short(name)]]
    return label(values, names) or "the config's own settings"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *map(list, rows))]
