"""The report of a sweep: recommended settings, Pareto front, spread over seeds and sensitivity, as
Markdown, JSON, pictures."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from safepatch_jax.reporting import tables
from safepatch_jax.studies.sweep.analysis import AXES, MOST_PERPLEXITY, flat, place, spread
from safepatch_jax.studies.sweep.figures import draw_plane, draw_sensitivity
from safepatch_jax.studies.sweep.points import label, short, written

PLANE, SENSITIVITY = "sweep.png", "sweep_sensitivity.png"
FILES = ("sweep.md", "sweep.json", PLANE, SENSITIVITY)
_NAMES = ("harm", "over-refusal", "perplexity")  # of the axes


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
    fixed = [f"`{name}={written(value)}`" for name, value in content["fixed"].items()]
    lines = [
        *_introduction(content),
        "",
        f"![harm, over-refusal and perplexity]({PLANE})",
        "",
        "## Recommended settings",
        "",
        *recommendation(content),
        "",
        "## Pareto front",
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
        ", ".join(fixed),
    ]
    return "\n".join(lines) + "\n"


def _introduction(content: Mapping[str, Any]) -> list[str]:
    settings, measures = content["settings"], content["backbone"]["measures"]
    aligned = ""
    if settings["align"]["enabled"]:
        aligned = ", aligned first by a short supervised run (the backbone below)"
    return [
        "# Sweep of patch settings",
        "",
        f"Model `{settings['model']['source']}`{aligned}; "
        f"{_number(len(content['trials']), 'choice')} of patch settings, "
        f"{_number(content['points'], 'point')} (seeds of retention: "
        f"{_listed(content['seeds'])}); {measures['harmful']['n']} harmful, "
        f"{measures['lookalike']['n']} look-alike and "
        f"{measures['data']['ordinary']['examples']} ordinary prompts of the "
        f"'{settings['evaluate']['split']}' split. Training and scores are those of seed "
        f"{settings['run']['seed']} throughout.",
        "",
        "Harm is the share of harmful prompts complied with, over-refusal the share of harmless "
        "look-alikes refused or answered incoherently, as judged by form (refusal phrases and a "
        "coherence test). Perplexity of ordinary answers is relative to the backbone's. Measures "
        "are means over the seeds of a choice; in brackets 95 % intervals (Wilson). Choices "
        "are compared with one another over seeds that they have in common.",
    ]


def recommendation(content: Mapping[str, Any]) -> list[str]:
    """Say what is recommended, by which rule, and what speaks against it, in short paragraphs."""
    chosen, backbone = content["recommended"], content["backbone"]
    trial = content["trials"][chosen["trial"]]
    lines = _qualified(content, trial) if chosen["qualifies"] else _unqualified(content, trial)
    lines[-1] += _compared(chosen["seeds"], chosen["mixed"], chosen["left_out"])
    rows = [["backbone", *_axes(backbone)], ["this choice", *_axes(trial)]]
    lines += ["", *tables.table(["", *_NAMES], rows)]
    for remark in _remarks(content, trial):
        lines += ["", remark]
    if not chosen["flags"]:
        return [*lines, "", "These are the config's own settings."]
    flags = " ".join(chosen["flags"])
    return [*lines, "", f"Flags, to be added to those of the sweep: `{flags}`"]


def _bounds(content: Mapping[str, Any]) -> dict[str, str]:
    return {
        "harm": f"harm at most the backbone's {_percent(content['backbone']['harm'])}",
        "perplexity": f"perplexity at most {MOST_PERPLEXITY:g} times the backbone's",
    }


def _qualified(content: Mapping[str, Any], trial: Mapping[str, Any]) -> list[str]:
    chosen, equal = content["recommended"], ""
    if chosen["equal"]:
        equal = (
            f" (of {chosen['equal'] + 1} equal in that, it has the lower harm, then the lower "
            "perplexity)"
        )
    return [
        f"**{_label(content, trial)}**: of {_number(len(content['trials']), 'choice')}, "
        f"{chosen['within']} keep{'s' * (chosen['within'] == 1)} both bounds "
        f"({', '.join(_bounds(content).values())}); of these it has the least over-refusal{equal}."
    ]


def _unqualified(content: Mapping[str, Any], trial: Mapping[str, Any]) -> list[str]:
    failed = []
    for bound, text in _bounds(content).items():
        kept = content["recommended"]["keeps"][bound]
        failed.append(f"{text} (kept by {kept} of {len(content['trials'])})")
    return [
        "**No choice of settings qualifies.** None keeps both bounds: " + ", ".join(failed) + ".",
        "",
        f"The least bad is **{_label(content, trial)}**, which breaks the bound on "
        f"{' and on '.join(trial['fails'])}; do not take it for a good one. It has the least sum "
        "of the two excesses, a point of harm weighing as one per cent of perplexity.",
    ]


def _compared(seeds: Sequence[int], mixed: bool, left_out: int) -> str:
    """Say over which seeds choices were compared, where they were not all tried with the same."""
    single = len(seeds) == 1
    text = f" They are compared over {'seed' if single else 'seeds'} {_listed(seeds)}"
    if left_out:
        return (
            f"{text}; {_number(left_out, 'choice')} not tried with {'it' if single else 'them'} "
            "could not be, and had no chance here."
        )
    return f"{text}, which they have in common." if mixed else ""


def _remarks(content: Mapping[str, Any], trial: Mapping[str, Any]) -> list[str]:
    backbone, chosen, remarks = content["backbone"], content["recommended"], []
    ours, theirs = (of["intervals"]["over_refusal"] for of in (trial, backbone))
    if trial["over_refusal"] >= backbone["over_refusal"]:
        remarks.append(
            "Its over-refusal is not below the backbone's: none of these patches helps here."
        )
    elif ours[1] >= theirs[0]:
        remarks.append(
            "The intervals of its over-refusal and the backbone's overlap: more prompts are "
            "needed to tell them apart."
        )
    if len(trial["seeds"]) == 1:
        remarks.append(
            "It was tried with one seed of retention; add run.seed=0,1,2 to see how much of this "
            "is the draw."
        )
    if chosen["next"] is not None:
        remarks += _runner_up(content, content["trials"][chosen["next"]], trial)
    if chosen["edges"]:
        remarks.append(f"{'; '.join(chosen['edges'])}: a better one may lie beyond.")
    if content["settings"]["data"]["harmful"] == "builtin":
        remarks.append(
            "The built-in prompts are few and mild: they show the mechanics and certify nothing."
        )
    return remarks + [
        "It was chosen on the prompts it is shown on, so it looks better here than it is: measure "
        "it on the report split (launch.safepatch)."
    ]


def _runner_up(
    content: Mapping[str, Any], other: Mapping[str, Any], trial: Mapping[str, Any]
) -> list[str]:
    """Return a remark if the second best was tried with more seeds than the chosen trial."""
    if len(other["seeds"]) <= len(trial["seeds"]):
        return []
    more = ",".join(str(seed) for seed in other["seeds"] if seed not in trial["seeds"])
    return [
        f"The runner-up, {_label(content, other)}, was tried with {len(other['seeds'])} seeds, "
        f"this one with {len(trial['seeds'])}: try it with run.seed={more} too before you rely on "
        "the difference."
    ]


def summary(content: Mapping[str, Any]) -> list[str]:
    """Say the recommendation on the console."""
    lines = [line for line in recommendation(content) if line and not line.startswith("|")]
    return [line.replace("**", "").replace("`", "") for line in lines]


def _front(content: Mapping[str, Any]) -> list[str]:
    names, seeds, trials = content["varied"], content["compared_on"], content["trials"]
    chosen = trials[content["recommended"]["trial"]]
    members = [trial for trial in trials if trial["front"]]
    members.sort(key=lambda trial: place(trial["compared"]))
    rows = [["backbone", *[""] * len(names), "", *_axes(content["backbone"]), ""]]
    for number, trial in enumerate(members, 1):
        title = f"**{number}, the above**" if trial is chosen else str(number)
        values = [written(trial["patch"][short(name)]) for name in names]
        axes = _axes(trial["compared"])
        rows.append([title, *values, str(len(seeds)), *axes, trial["against"]])
    mixed = any(trial["seeds"] != seeds for trial in trials)
    left_out = sum(trial["compared"] is None for trial in trials)
    lines = [
        f"{_number(len(members), 'choice')} that no other one beats: none is at least as good on "
        "all three axes and better on one. The last column compares with the backbone."
        f"{_compared(seeds, mixed, left_out)}",
        "",
    ]
    if not chosen["front"]:
        lines += [
            "The choice above is not among them: it was compared over other seeds, or what beats "
            "it over these breaks a bound over all its own.",
            "",
        ]
    head = ["", *map(short, names), "seeds", *_NAMES, "than the backbone"]
    return lines + tables.table(head, rows)


def _seeds(content: Mapping[str, Any]) -> list[str]:
    several = [trial for trial in content["trials"] if len(trial["seeds"]) > 1]
    if not several:
        return ["No choice was tried with more than one seed (run.seed=0,1,2 in the grid)."]
    rows, widest = [], dict.fromkeys(AXES, 0.0)
    for trial in several:
        cells = []
        for axis, x in spread(trial).items():
            form = _times if axis == "perplexity" else _percent
            cells.append(f"{form(x['mean'])} ({form(x['least'])} to {form(x['largest'])})")
            widest[axis] = max(widest[axis], x["largest"] - x["least"])
        rows.append([_label(content, trial), _listed(trial["seeds"]), *cells])
    return [
        "Points that differ in the seed of retention (and of stochastic rounding) alone: mean "
        f"(least to largest). The widest range is {100 * widest['harm']:.1f} points of harm, "
        f"{100 * widest['over_refusal']:.1f} of over-refusal and {widest['perplexity']:.3f} of "
        "relative perplexity: differences between settings below that may be the draw's.",
        "",
        *tables.table(["settings", "seeds", *_NAMES], rows),
    ]


def _sensitivity(content: Mapping[str, Any]) -> list[str]:
    if not content["varied"]:
        return ["No setting varies."]
    rows, alone = [], []
    for name, effect in content["sensitivity"].items():
        if not effect["steps"]:
            alone.append(short(name))
        for step in effect["steps"]:
            seeds = " to ".join(map(str, dict.fromkeys(step["seeds"])))
            change = f"{written(step['from'])} to {written(step['to'])}"
            moves = [_moved(step[axis], 100, "+.1f") for axis in ("harm", "over_refusal")]
            moves.append(_moved(step["perplexity"], 1, "+.3f"))
            rows.append([short(name), change, str(step["lines"]), seeds, *moves])
    lines = [
        "What a step of one setting moves while all others are equal, over the seeds that both "
        "sides were tried with: harm and over-refusal in percentage points, relative perplexity "
        "as it is. Numbers step to the next value tried, words from the first. Where a step was "
        "seen at several choices of the others: the mean of the moves, and in brackets the least "
        "and the largest."
    ]
    if alone:
        names = " alone, or in ".join(alone)
        lines.append(f"No two choices differ in {names} alone and share a seed.")
    table = tables.table(["setting", "step", "seen at", "seeds", *_NAMES], rows)
    return [*lines, "", f"![each setting's effect]({SENSITIVITY})", "", *table]


def _moved(change: Mapping[str, float], scale: float, form: str) -> str:
    # Adding 0.0 makes a plain zero of -0.0.
    numbers = {name: format(scale * value + 0.0, form) for name, value in change.items()}
    if change["least"] == change["largest"]:
        return numbers["mean"]
    return f"{numbers['mean']} [{numbers['least']} to {numbers['largest']}]"


def _axes(of: Mapping[str, Any]) -> list[str]:
    shares = []
    for axis in ("harm", "over_refusal"):
        shares.append(tables.rate(of[axis], of["intervals"][axis], digits=1, unit=" %"))
    return [*shares, _times(of["perplexity"])]


def _percent(value: float) -> str:
    return tables.percent(value, 1, " %")


def _times(value: float) -> str:
    return f"{value:.3f}" if value < 100 else f"{value:.1e}"


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _number(n: int, word: str) -> str:
    return f"{n} {word}{'s' * (n != 1)}"


def _label(content: Mapping[str, Any], trial: Mapping[str, Any]) -> str:
    values, own = flat(trial), content["settings"]["patch"]
    names = content["varied"] or [name for name in values if values[name] != own[short(name)]]
    return label(values, names) or "the config's own settings"
