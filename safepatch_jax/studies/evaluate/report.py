"""The report of an evaluation: counts with intervals, paired tests, categories, agreement of
judges, pictures; no answers."""

from __future__ import annotations

import collections
import math
import os.path
import pathlib
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from safepatch_jax.evaluation import statistics
from safepatch_jax.evaluation.judges.base import COMPLIED, OUTCOMES, REFUSED, UNKNOWN
from safepatch_jax.evaluation.mt_bench import LEAST, MOST, TURNS
from safepatch_jax.evaluation.statistics import agreement, mean_interval, wilson
from safepatch_jax.evaluation.suites import Measure
from safepatch_jax.runtime import files

COUNTED = {"harm": COMPLIED, "refusal": REFUSED}  # the outcome whose share is the rate
TITLES = {
    "harm": "Harm: harmful requests complied with",
    "refusal": "Over-refusal: harmless requests refused",
    "accuracy": "Utility: right answers",
}
_COLOURS = {"model": "#4477aa", "against": "#999999"}
_MOST = 12  # categories in a picture


def labels(folders: Mapping[str, str]) -> dict[str, str]:
    """Return a short name of each model folder: its last part, with the one before it where that
    says too little.

    Args:
      folders: of 'model', and of 'against' where there is one.
    """
    parts = {
        who: pathlib.Path(os.path.abspath(os.path.expanduser(folder))).parts[1:]
        for who, folder in folders.items()
    }
    last = {who: x[-1] if x else "/" for who, x in parts.items()}
    equal = len(set(last.values())) < len(last)
    names = {
        who: "/".join(parts[who][-2:]) if equal or name == "model" else name
        for who, name in last.items()
    }
    if len(set(names.values())) < len(names):
        names["against"] += " (against)"
    return names


def gather(
    suite: Sequence[Measure],
    items: Mapping[str, Mapping[str, Any]],
    answers: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]],
    verdicts: Mapping[str, Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]],
    speeds: Mapping[str, Any],
    about: Mapping[str, Any],
    grades: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]] = {},
) -> dict[str, Any]:
    """Return the content of report.json.

    Args:
      items: by measure, the records by id.
      answers: by (model, measure), for each run (one, or one a seed) the rows by id.
      verdicts: by judge, as `answers`; rates are the first judge's.
      speeds: by model, {'seconds_per_token'} or None.
      about: what is said of models, options and versions.
      grades: of measures of kind mt_bench, as `answers`.
    """
    first = next(iter(verdicts.values()), {})
    measures = []
    for measure in suite:
        of = {who: answers[who, measure.name] for who in about["models"]}
        if measure.kind in COUNTED:
            found = {
                who: judged(measure, items[measure.name], rows, first[who, measure.name])
                for who, rows in of.items()
            }
        elif measure.kind == "text":
            found = {who: likelihood(rows[0]) for who, rows in of.items()}
        elif measure.kind == "mt_bench":
            found = {
                who: graded(items[measure.name], rows, grades[who, measure.name])
                for who, rows in of.items()
            }
        else:
            found = {who: accuracy(rows) for who, rows in of.items()}
        holds = {who: x.pop("holds") for who, x in found.items()}
        compared = (
            {"paired": statistics.compare(holds["model"], holds["against"])}
            if ("against" in holds and measure.kind != "text")
            else {}
        )
        measures.append(
            {
                "name": measure.name,
                "kind": measure.kind,
                "form": measure.form,
                "source": measure.source,
                "split": measure.split,
                "models": found,
            }
            | compared
        )
    content: dict[str, Any] = dict(about) | {"measures": measures}
    if all(speeds.values()) and speeds:
        content["seconds_per_token"] = {who: x["seconds_per_token"] for who, x in speeds.items()}
        if "against" in speeds:
            content["atgr"] = (
                content["seconds_per_token"]["model"] / content["seconds_per_token"]["against"]
            )
    if len(verdicts) > 1:
        content["agreement"] = _agreements(suite, verdicts)
    return content


def judged(
    measure: Measure,
    items: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    verdicts: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Return rates of prompts, and of the answers (over all runs) the number of each outcome."""
    said = [v for run in verdicts for v in run.values()]
    counts = {outcome: sum(v.outcome == outcome for v in said) for outcome in (*OUTCOMES, UNKNOWN)}
    degrees = {d: sum(v.degree == d for v in said) for d in ("full", "partial")}
    holds = [
        {i: v.outcome == COUNTED[measure.kind] for i, v in run.items() if v.outcome != UNKNOWN}
        for run in verdicts
    ]
    return {
        "left_out": sum("left_out" in row for row in rows[0].values()),
        **counts,
        **statistics.rate(holds),
        "categories": _by_category(holds, {i: item["category"] for i, item in items.items()}),
        "degrees": degrees if any(degrees.values()) else {},
        "holds": holds,
    }


def _by_category(
    holds: Sequence[Mapping[str, bool]], categories: Mapping[str, str]
) -> dict[str, list[float]]:
    """Return [count, n, low, high] of each category, see `rate`; nothing where there is but
    one."""
    members = collections.defaultdict(set)
    for i in {i for run in holds for i in run}:
        members[categories[i]].add(i)
    rates = {
        name: statistics.rate([{i: run[i] for i in ids if i in run} for run in holds])
        for name, ids in sorted(members.items())
        if name
    }
    return (
        {name: [x["count"], x["n"], *x["interval"]] for name, x in rates.items()}
        if len(rates) > 1
        else {}
    )


def graded(
    items: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], grades: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return mean grades: of all questions, of each turn and category.

    A question counts with the mean over its turns and runs, and the intervals are Student's t over
    questions. `errors` are replies of the grader that were no grade; they are in no mean.
    """
    runs: list[dict[tuple[str, str], Fraction]] = []  # by (question, turn)
    for run in grades:
        runs.append(
            {
                tuple(name.rsplit(":", 1)): Fraction(str(x["grade"]))
                for name, x in run.items()
                if x["grade"] is not None
            }
        )

    def means(run: Mapping[tuple[str, str], Fraction]) -> dict[str, Fraction]:
        by_turn = [{i: x for (i, turn), x in run.items() if turn == k} for k in TURNS]
        return statistics.means(by_turn)

    def summary(wanted) -> dict[str, Any]:
        by_question = collections.defaultdict(list)
        for (i, turn), x in [pair for run in runs for pair in run.items()]:
            if wanted(i, turn):
                by_question[i].append(x)
        found = [float(sum(x) / len(x)) for x in by_question.values()]
        interval = statistics.t_interval(found)
        return {
            "n": len(found),
            "mean": math.fsum(found) / len(found) if found else None,
            "interval": interval and (max(interval[0], LEAST), min(interval[1], MOST)),
        }

    names = sorted({item["category"] for item in items.values()})
    by_run = [float(sum(x) / len(x)) if (x := means(run).values()) else None for run in runs]
    return {
        **summary(lambda *_: True),
        **statistics.spread(by_run),
        "grades": sum(map(len, runs)),
        "errors": sum(x["grade"] is None for run in grades for x in run.values()),
        "left_out": max(sum("left_out" in row for row in run.values()) for run in rows),
        "turns": {k: summary(lambda _, turn: turn == k) for k in TURNS},
        "categories": {name: summary(lambda i, _: items[i]["category"] == name) for name in names},
        "holds": [means(run) for run in runs],
    }


def likelihood(rows: Mapping[str, Any]) -> dict[str, Any]:
    kept = [row for row in rows.values() if "nll" in row]
    tokens = sum(row["tokens"] for row in kept)
    left_out = {"n": len(kept), "left_out": len(rows) - len(kept), "holds": {}}
    if not kept:
        return left_out | {"nll": None, "perplexity": None, "nll_interval_of_answers": None}
    nll = math.fsum(row["nll"] for row in kept) / tokens
    _, low, high = mean_interval([row["nll"] / row["tokens"] for row in kept])
    kl = (
        {"kl": math.fsum(row["kl"] for row in kept) / tokens}
        if all("kl" in row for row in kept)
        else {}
    )
    return (
        left_out
        | {
            "nll": nll,
            "perplexity": math.exp(min(nll, 80.0)),
            "nll_interval_of_answers": (low, high),
        }
        | kl
    )


def accuracy(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    holds = [{i: row["correct"] for i, row in run.items() if "correct" in row} for run in rows]
    found, end = statistics.rate(holds), rows[0]["complete"]
    categories = {i: row["category"] for run in rows for i, row in run.items() if "correct" in row}
    return {
        "left_out": end["left_out"],
        "shortened": end["shortened"],
        "note": end["note"],
        "right": found["count"],
        **found,
        "categories": _by_category(holds, categories),
        "holds": holds,
    }


def _agreements(
    suite: Sequence[Measure], verdicts: Mapping[str, Mapping[tuple[str, str], Any]]
) -> dict[str, Any]:
    """Return how far the two judges agree, by kind of measure, over all models and runs."""
    (_, a), (_, b) = verdicts.items()
    result = {}
    for kind in COUNTED:
        pairs = [
            (x[i], y[i])
            for key in a
            for x, y in zip(a[key], b[key])
            for i in x
            if i in y and any(m.name == key[1] and m.kind == kind for m in suite)
        ]
        if pairs:
            result[kind] = agreement([x for x, _ in pairs], [y for _, y in pairs])
    return result


def markdown(content: Mapping[str, Any]) -> str:
    """Return report.md."""
    names, options = content["models"], content["options"]
    seeds = content.get("seeds", [])
    of_seed = f"seeds {', '.join(map(str, seeds))}" if seeds else f"seed {options.get('seed', 0)}"
    sampling = (
        "greedy"
        if not options["temperature"]
        else (f"temperature {options['temperature']:g}, top-p {options['top_p']:g}, {of_seed}")
    )
    lines = [
        f"# Evaluation of {names['model']}"
        + (f" against {names['against']}" if "against" in names else ""),
        "",
        f"Judge: {content['judges'][0]}; answers {sampling}. Intervals are 95 % (Wilson); p is "
        "McNemar's exact test on the same "
        "items, with the number that only the model / only the other one has.",
        "",
    ]
    if len(seeds) > 1:
        lines += [
            "Where answers are sampled, a rate is the mean over the seeds, with the least and the "
            "largest rate of a seed "
            "behind it. Its interval takes each prompt once, whatever the number of seeds "
            "(answers to one prompt are not "
            "independent), so it is at least as wide as it should be. n counts prompts; the "
            "outcomes are those of all "
            "seeds together. There p is the exact sign-flip test on each prompt's difference of "
            "the means, with the "
            "prompts whose mean is higher / lower.",
            "",
        ]
    lines += ["![report](report.png)", ""]
    for kind, title in (("harm", TITLES["harm"]), ("refusal", TITLES["refusal"])):
        chosen = [m for m in content["measures"] if m["kind"] == kind]
        if chosen:
            lines += [
                f"## {title}",
                "",
                "| measure | model | n | rate | complied | refused | incoherent | unknown | "
                "paired |",
                "|---|---|---|---|---|---|---|---|---|",
            ]
            for m in chosen:
                for who, x in m["models"].items():
                    lines.append(
                        f"| {m['name']} | {names[who]} | {x['n']} | {_rate(x)} | {x['complied']} "
                        f"| {x['refused']}{_degrees(x)} "
                        f"| {x['incoherent']} | {x['unknown']} | "
                        f"{_paired(m) if who == 'model' else ''} |"
                    )
            lines.append("")
    tasks = [m for m in content["measures"] if m["kind"] in ("mmlu", "gsm8k")]
    if tasks:
        lines += [
            "## Utility: right answers",
            "",
            "| task | model | n | accuracy | paired |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {m['name']} | {names[who]} | {x['n']} | {_rate(x)} | "
            f"{_paired(m) if who == 'model' else ''} |"
            for m in tasks
            for who, x in m["models"].items()
        ] + [""]
        for m in tasks:
            for who, x in m["models"].items():
                fewer = (
                    f"{x['shortened']} questions with fewer examples, so that they fit"
                    if x["shortened"]
                    else ""
                )
                if said := "; ".join(filter(None, (x["note"], fewer))):
                    lines += [f"{m['name']}, {names[who]}: {said}.", ""]
    for m in content["measures"]:
        lines += _grade_lines(m, names, content["grader"]) if m["kind"] == "mt_bench" else []
    texts = [m for m in content["measures"] if m["kind"] == "text"]
    if texts:
        lines += [
            "## Utility: likelihood of ordinary answers",
            "",
            "KL is KL(other model || model), in nats a token.",
            "",
            "| text | model | n | NLL, nats a token | perplexity | KL |",
            "|---|---|---|---|---|---|",
        ]
        number = lambda x, digits: "" if x is None else f"{x:.{digits}f}"
        lines += [
            f"| {m['name']} | {names[who]} | {x['n']} | {number(x['nll'], 3)} | "
            f"{number(x['perplexity'], 2)} "
            f"| {number(x.get('kl'), 4)} |"
            for m in texts
            for who, x in m["models"].items()
        ] + [""]
    if "seconds_per_token" in content:
        times = ", ".join(
            f"{names[who]} {1e3 * s:.2f} ms" for who, s in content["seconds_per_token"].items()
        )
        ratio = (
            f"; ATGR {content['atgr']:.2f} (1 by construction where the architecture is the same)"
            if "atgr" in content
            else ""
        )
        lines += ["## Speed", "", f"Time of a generated token in a full batch: {times}{ratio}.", ""]
    for kind, found in content.get("agreement", {}).items():
        share, kappa = (
            "undefined" if x is None else form.format(x)
            for x, form in ((found["agree"], "{:.1%}"), (found["kappa"], "{:.2f}"))
        )
        lines += [
            f"## Agreement of the judges: {kind}",
            "",
            f"{content['judges'][0]} (rows) and {content['judges'][1]} (columns) agree on "
            f"{share} of {found['n']} answers; Cohen's kappa {kappa}; {found['unknown']} answers "
            "without a verdict of both.",
            "",
            "| | " + " | ".join(OUTCOMES) + " |",
            "|---|" + "---|" * len(OUTCOMES),
        ]
        lines += [
            f"| {a} | "
            + " | ".join(str(found["table"].get(a, {}).get(b, 0)) for b in OUTCOMES)
            + " |"
            for a in OUTCOMES
        ] + [""]
    left = [
        (m["name"], names[who], x["left_out"])
        for m in content["measures"]
        for who, x in m["models"].items()
        if x["left_out"]
    ]
    if left:
        lines += [
            "Left out because they are too long for the model: "
            + ", ".join(f"{n} of {name} ({who})" for name, who, n in left)
            + ".",
            "",
        ]
    return "\n".join(lines)


def _grade_lines(m: Mapping[str, Any], names: Mapping[str, str], grader: str) -> list[str]:
    """Return the tables of a graded measure."""
    lines = [
        f"## {m['name']}: grades from {LEAST} to {MOST}",
        "",
        f"Grader: {grader}. A question counts with the mean of its turns; intervals are 95 % "
        "(Student's t over questions); "
        "p is the exact sign-flip test on the questions' differences.",
        "",
        "| model | questions | mean | turn 1 | turn 2 | replies without a grade | paired |",
        "|---|---|---|---|---|---|---|",
    ]
    for who, x in m["models"].items():
        by_turn = " | ".join(_grade(x["turns"][k]) for k in TURNS)
        lines.append(
            f"| {names[who]} | {x['n']} | {_grade(x)} | {by_turn} | {x['errors']} of "
            f"{x['grades'] + x['errors']} "
            f"| {_paired(m) if who == 'model' else ''} |"
        )
    lines += [
        "",
        "| category | " + " | ".join(names[who] for who in m["models"]) + " |",
        "|---|" + "---|" * len(m["models"]),
    ]
    lines += [
        f"| {name} | "
        + " | ".join(_grade(x["categories"][name]) for x in m["models"].values())
        + " |"
        for name in m["models"]["model"]["categories"]
    ]
    return lines + [""]


def _grade(x: Mapping[str, Any]) -> str:
    if x["mean"] is None:
        return "none graded"
    interval = f" [{x['interval'][0]:.2f}-{x['interval'][1]:.2f}]" if x["interval"] else ""
    return f"{x['mean']:.2f}{interval}" + (
        f" ({x['spread'][0]:.2f} to {x['spread'][1]:.2f})" if x.get("spread") else ""
    )


def _rate(x: Mapping[str, Any]) -> str:
    low, high = x["interval"]
    found = (
        "none judged"
        if x["rate"] is None
        else f"{x['rate']:.1%} [{100 * low:.1f}-{100 * high:.1f}]"
    )
    return found + (
        f" ({100 * x['spread'][0]:.1f} to {100 * x['spread'][1]:.1f})" if x.get("spread") else ""
    )


def _degrees(x: Mapping[str, Any]) -> str:
    return (
        f" ({x['degrees']['full']} full, {x['degrees']['partial']} partial)"
        if x.get("degrees")
        else ""
    )


def _paired(measure: Mapping[str, Any]) -> str:
    if (p := measure.get("paired")) is None:
        return ""
    return f"+{p['gained']} / -{p['lost']}, p = {p['p']:.2g}"


def picture(content: Mapping[str, Any], path: pathlib.Path) -> None:
    """Draw the three axes with intervals, the categories, and the plane of harm and
    over-refusal."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measures, names = content["measures"], content["models"]
    groups = {
        "harm": [m for m in measures if m["kind"] == "harm"],
        "refusal": [m for m in measures if m["kind"] == "refusal"],
        "accuracy": [m for m in measures if m["kind"] in ("mmlu", "gsm8k")],
    }
    rows = max(map(len, groups.values()))
    figure, axes = plt.subplots(
        2,
        3,
        figsize=(16, 6.6 + 0.34 * rows),
        constrained_layout=True,
        height_ratios=(1.4 + 0.34 * rows, 4.4),
    )
    for axis, (kind, chosen) in zip(axes[0], groups.items()):
        if kind == "accuracy" and not chosen:
            _perplexities(axis, [m for m in measures if m["kind"] == "text"], names)
        else:
            _dots(
                axis,
                [
                    (
                        m["name"],
                        {who: (x["rate"], *x["interval"]) for who, x in m["models"].items()},
                    )
                    for m in chosen
                ],
                names,
                TITLES[kind],
            )
    for axis, kind in zip(axes[1], ("harm", "refusal")):
        _categories(axis, groups[kind], names, kind)
    _plane(axes[1, 2], groups, names)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    handles = [
        plt.Line2D([], [], marker="o", linestyle="", color=_COLOURS[who], label=name)
        for who, name in names.items()
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _empty(axis, title: str) -> None:
    axis.set(title=title, xticks=[], yticks=[])
    axis.text(
        0.5,
        0.5,
        "not measured",
        ha="center",
        va="center",
        color="#888888",
        transform=axis.transAxes,
    )


def _dots(
    axis, rows: Sequence[tuple[str, Mapping[str, tuple]]], names: Mapping[str, str], title: str
) -> None:
    """Draw rates with intervals, one line a row."""
    rows = [
        (name, {who: x for who, x in found.items() if x[0] is not None}) for name, found in rows
    ]
    if not rows:
        return _empty(axis, title)
    for offset, who in zip((-0.15, 0.15) if len(names) > 1 else (0.0,), names):
        points = [(i, *found[who]) for i, (_, found) in enumerate(rows) if who in found]
        axis.errorbar(
            [100 * p[1] for p in points],
            [p[0] + offset for p in points],
            xerr=np.transpose([_arms(*p[1:]) for p in points]) if points else None,
            fmt="o",
            color=_COLOURS[who],
            ecolor=_COLOURS[who],
            markersize=5,
            capsize=2,
        )
    axis.set(
        title=title,
        xlabel="%",
        xlim=(-2, 102),
        yticks=range(len(rows)),
        yticklabels=[name for name, _ in rows],
        ylim=(len(rows) - 0.5, -0.5),
    )
    axis.grid(axis="x", color="#eeeeee")


def _arms(share: float, low: float, high: float) -> tuple[float, float]:
    """Return in per cent how far an interval reaches to both sides; rounding may put its end 1e-16
    on the wrong one."""
    return max(0.0, 100 * (share - low)), max(0.0, 100 * (high - share))


def _perplexities(axis, chosen: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> None:
    chosen = [m for m in chosen if all(m["models"][who]["n"] for who in names)]
    if not chosen:
        return _empty(axis, TITLES["accuracy"])
    for offset, who in zip((-0.2, 0.2), names):
        bars = axis.barh(
            [i + offset for i in range(len(chosen))],
            [m["models"][who]["perplexity"] for m in chosen],
            0.38,
            color=_COLOURS[who],
        )
        axis.bar_label(bars, fmt="%.1f", padding=2, fontsize=9)
    axis.set(
        title="Utility: perplexity of given answers\n(lower is better)",
        yticks=range(len(chosen)),
        yticklabels=[m["name"] for m in chosen],
    )
    axis.margins(x=0.15)
    axis.invert_yaxis()


def _categories(
    axis, chosen: Sequence[Mapping[str, Any]], names: Mapping[str, str], kind: str
) -> None:
    """Draw the rates of the categories of the measure that has most of them, the largest
    categories."""
    with_some = [m for m in chosen if m["models"]["model"]["categories"]]
    if not with_some:
        return _empty(axis, f"{TITLES[kind].partition(':')[0]} by category")
    m = max(with_some, key=lambda m: len(m["models"]["model"]["categories"]))
    largest = sorted(m["models"]["model"]["categories"].items(), key=lambda x: (-x[1][1], x[0]))[
        :_MOST
    ]
    found = [
        (
            f"{name} ({x[1]})",
            {who: _share(m["models"][who]["categories"].get(name)) for who in names},
        )
        for name, x in largest
    ]
    _dots(axis, found, names, f"{TITLES[kind].partition(':')[0]} by category: {m['name']}")


def _share(x: Sequence[float] | None) -> tuple:
    return (None, 0, 0) if x is None else (x[0] / x[1], x[2], x[3])


def _plane(
    axis, groups: Mapping[str, Sequence[Mapping[str, Any]]], names: Mapping[str, str]
) -> None:
    """Draw each model at (over-refusal, harm), pooled over the plain measures."""
    title = "Trade-off (all plain measures together)"
    pooled = {}
    for kind in ("harm", "refusal"):
        plain = [m for m in groups[kind] if m["form"] == "plain"]
        for who in names:
            count = sum(m["models"][who]["count"] for m in plain)
            pooled[kind, who] = (count, sum(m["models"][who]["n"] for m in plain))
    if not all(n for _, n in pooled.values()):
        return _empty(axis, title)
    for who in names:
        (x, across), (y, up) = (
            (count / n, np.reshape(_arms(count / n, *wilson(count, n)), (2, 1)))
            for count, n in (pooled["refusal", who], pooled["harm", who])
        )
        axis.errorbar(
            100 * x,
            100 * y,
            xerr=across,
            yerr=up,
            fmt="o",
            color=_COLOURS[who],
            markersize=8,
            capsize=3,
        )
        axis.annotate(
            names[who], (100 * x, 100 * y), textcoords="offset points", xytext=(8, 8), fontsize=9
        )
    axis.set(
        title=title, xlabel="over-refusal, %", ylabel="harm, %", xlim=(-3, 103), ylim=(-3, 103)
    )
    axis.grid(color="#eeeeee")
    axis.text(101, 101, "both lower = better", ha="right", va="top", fontsize=9, color="#888888")


def write(content: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Write report.json, report.md and report.png into a folder."""
    files.write_json(folder / "report.json", content)
    files.write_text(folder / "report.md", markdown(content))
    picture(content, folder / "report.png")
