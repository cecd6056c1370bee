"""The front by its definition, the recommendation and the effects of settings on hand-made rows,
the report and its pictures."""

import itertools
import json
import math
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safepatch_jax.evaluation.statistics import wilson
from safepatch_jax.settings import Settings
from safepatch_jax.studies.sweep import report as sweep_report
from safepatch_jax.studies.sweep.analysis import (
    AXES,
    against,
    common_seeds,
    edges,
    fails,
    front,
    gather,
    recommend,
    sensitivity,
    spread,
    trials,
)

OWN = Settings().override({"model.source": "model", "patch.beta": 2.5})
COORDINATE = st.one_of(st.integers(0, 3), st.floats(0, 1))


def measures(complied, unhelped, perplexity, n=20):
    """Measures of a model that complied with so many harmful prompts, and refused or garbled so
    many look-alikes."""
    refused = unhelped // 2
    return {
        "harmful": {"complied": complied, "refused": n - complied, "incoherent": 0, "n": n},
        "lookalike": {
            "complied": n - unhelped,
            "refused": refused,
            "incoherent": unhelped - refused,
            "n": n,
        },
        "harmful_nll": 2.0,
        "ordinary_nll": math.log(perplexity),
        "ordinary_perplexity": perplexity,
        "data": {
            role: {"examples": n, "left_out": 0, "cut": 0}
            for role in ("harmful", "lookalike", "ordinary")
        },
    }


BACKBONE = measures(2, 16, 10.0)


def row(result, seed=0, **patch):
    return {"patch": OWN.to_dict()["patch"] | patch, "seed": seed, "measures": result}


def content(rows):
    return json.loads(json.dumps(gather(OWN, rows, BACKBONE), allow_nan=False))


@given(st.lists(st.tuples(COORDINATE, COORDINATE, COORDINATE), max_size=40))
@settings(max_examples=300, deadline=None)
def test_front_is_what_no_other_point_dominates(points):
    def dominates(a, b):
        return all(x <= y for x, y in zip(a, b)) and any(x < y for x, y in zip(a, b))

    for point, on_front in zip(points, front(points)):
        assert on_front == (not any(dominates(other, point) for other in points))


def test_trials_join_seeds():
    result = trials(
        [
            row(measures(1, 10, 10.0), 3, beta=1.0),
            row(measures(0, 4, 11.0), 0, beta=2.0),
            row(measures(4, 12, 12.0), 1, beta=1.0),
        ],
        BACKBONE,
    )
    assert [t["seeds"] for t in result] == [[1, 3], [0]]
    assert [result[0][axis] for axis in AXES] == pytest.approx([5 / 40, 22 / 40, 1.1])
    assert [s["harm"] for s in result[0]["single"]] == [0.2, 0.05]
    assert result[0]["intervals"]["harm"] == list(wilson(2.5, 20)) and result[1]["intervals"][
        "over_refusal"
    ] == list(wilson(4, 20))
    assert spread(result[0])["over_refusal"] == {"mean": 0.55, "least": 0.5, "largest": 0.6}


@pytest.mark.parametrize(
    "rows, chosen, within, equal",
    [
        # (harm, over-refusal, perplexity) of each; the backbone has (2, 16, 10) of 20
        (
            [(2, 8, 10.0), (3, 1, 10.0), (2, 2, 10.6), (1, 9, 9.0)],
            0,
            2,
            0,
        ),  # more harm and more perplexity do not qualify
        (
            [(2, 8, 10.0), (1, 8, 10.4), (1, 8, 10.3)],
            2,
            3,
            2,
        ),  # ties: lower harm, then lower perplexity
        ([(1, 8, 10.3), (1, 8, 10.3)], 0, 2, 1),  # then the first
        ([(2, 8, 10.5)], 0, 1, 0),  # both bounds are inclusive
        (
            [(0, 18, 10.0)],
            0,
            1,
            0,
        ),  # qualifies, although it helps less than the backbone: the report says so
    ],
)
def test_rule_of_the_recommendation(rows, chosen, within, equal):
    result = content([row(measures(*axes), beta=float(i)) for i, axes in enumerate(rows)])[
        "recommended"
    ]
    assert (result["trial"], result["qualifies"], result["within"], result["equal"]) == (
        chosen,
        True,
        within,
        equal,
    )


@pytest.mark.parametrize(
    "rows, chosen, keeps",
    [
        ([(4, 0, 10.0), (3, 9, 10.0)], 1, {"harm": 0, "perplexity": 2}),
        (
            [(0, 0, 20.0), (3, 9, 10.0)],
            1,
            {"harm": 1, "perplexity": 1},
        ),  # 5 points of harm weigh less than 95 % of perplexity
        ([(4, 0, 10.0), (2, 9, 10.7)], 1, {"harm": 1, "perplexity": 1}),
        (
            [(3, 9, 10.0), (3, 8, 10.5)],
            1,
            {"harm": 0, "perplexity": 2},
        ),  # equal in excess: the less over-refusal
    ],
)
def test_where_none_qualifies_the_least_bad_is_named_as_such(rows, chosen, keeps):
    result = content([row(measures(*axes), beta=float(i)) for i, axes in enumerate(rows)])
    assert not result["recommended"]["qualifies"] and result["recommended"]["within"] == 0
    assert (result["recommended"]["trial"], result["recommended"]["keeps"]) == (chosen, keeps)
    text = " ".join(sweep_report.recommendation(result))
    assert (
        "No choice of settings qualifies" in text
        and "The least bad is" in text
        and f"kept by {keeps['harm']} of 2" in text
    )


def test_seeds_are_averaged_before_the_rule():
    lucky, unlucky = row(measures(0, 2, 10.0), 0, beta=5.0), row(measures(5, 2, 10.0), 1, beta=5.0)
    steady = [row(measures(2, 9, 10.0), seed, beta=1.0) for seed in (0, 1)]
    assert content([lucky, *steady])["recommended"]["trial"] == 0
    assert content([lucky, unlucky, *steady])["recommended"]["trial"] == 1


def several(*choices):
    """Rows by beta and seed: of each choice, (harm, over-refusal) by seed."""
    rows = []
    for i, by_seed in enumerate(choices):
        for seed, values in by_seed.items():
            rows.append(row(measures(*values, 10.0), seed, beta=float(i)))
    return rows


def test_choices_are_ranked_over_the_seeds_that_they_share():
    easy = {
        0: (0, 2),
        1: (0, 10),
        2: (0, 12),
    }  # at seed 0 better than the other one, over its three worse
    result = content(several({0: (0, 4)}, easy))
    assert (
        result["compared_on"],
        result["recommended"]["trial"],
        result["recommended"]["seeds"],
    ) == (
        [0],
        1,
        [0],
    )
    assert [t["front"] for t in result["trials"]] == [False, True] and result["trials"][1][
        "compared"
    ]["over_refusal"] == 0.1
    text = sweep_report.markdown(result)
    assert text.count(" They are compared over seed 0, which they have in common.") == 2
    assert "**1, the above** | 1 | 1 | 0.0 % [0-16] | 10.0 %" in text and "runner-up" not in text


def test_a_runner_up_with_more_seeds_is_told():
    result = content(several({0: (0, 2)}, {0: (0, 4), 1: (0, 1), 2: (0, 1)}))
    assert (result["recommended"]["trial"], result["recommended"]["next"]) == (0, 1)
    remark = "The runner-up, beta 1, was tried with 3 seeds, this one with 1: try it with run.seed"
    assert f"{remark}=1,2 too before" in sweep_report.markdown(result)
    assert "runner-up" not in sweep_report.markdown(content(several({0: (0, 2)}, {0: (0, 4)})))


def test_a_bound_is_kept_or_broken_over_all_seeds_of_a_choice():
    """The first qualifies at seed 0, where it is best, and over all three does not."""
    result = content(several({0: (2, 2), 1: (3, 2), 2: (2, 2)}, {0: (2, 9)}))
    assert result["recommended"]["trial"] == 1 and [t["front"] for t in result["trials"]] == [
        True,
        False,
    ]
    assert "The choice above is not among them" in sweep_report.markdown(result)


def test_what_shares_no_seed_with_most_is_not_compared():
    result = content(several({0: (1, 5)}, {0: (1, 4), 1: (1, 4)}, {7: (0, 0)}))
    assert result["recommended"]["trial"] == 1 and result["recommended"]["left_out"] == 1
    assert [t["front"] for t in result["trials"]] == [False, True, False] and result["trials"][2][
        "compared"
    ] is None
    assert "compared over seed 0; 1 choice not tried with it could not be" in sweep_report.markdown(
        result
    )
    assert common_seeds(trials(several({4: (0, 0)}, {3: (0, 0)}), BACKBONE)) == [3]


def test_a_step_is_taken_over_the_seeds_of_both_sides(tmp_path):
    result = content(
        several(
            {0: (1, 5)},
            {0: (1, 5), 1: (9, 15), 2: (9, 15)},
            {1: (9, 11), 2: (9, 17), 5: (0, 0)},
            {4: (0, 0)},
        )
    )
    steps = result["sensitivity"]["patch.beta"]["steps"]
    assert [(s["from"], s["to"], s["lines"], s["seeds"]) for s in steps] == [
        (0, 1, 1, [1, 1]),
        (1, 2, 1, [2, 2]),
    ]
    for step, over_refusal in zip(steps, (0, -0.05)):
        means = [step[axis]["mean"] for axis in AXES]
        assert means == pytest.approx([0, over_refusal, 0])
    line = result["sensitivity"]["patch.beta"]["lines"][0]
    assert (line["values"], line["seeds"], line["harm"]) == ([0, 1], [0], [0.05, 0.05])
    sweep_report.write(result, tmp_path)
    assert "| beta | 1 to 2 | 1 | 2 | +0.0 | -5.0 | +0.000 |" in (tmp_path / "sweep.md").read_text()


def test_bounds_and_comparison_with_the_backbone():
    backbone = {"harm": 0.1, "over_refusal": 0.8, "perplexity": 1.0}
    assert [
        against(backbone | change, backbone)
        for change in ({}, {"harm": 0.0}, {"over_refusal": 0.9}, {"harm": 0.0, "perplexity": 1.1})
    ] == ["equal", "better", "worse", "mixed"]
    assert fails(backbone | {"harm": 0.11, "perplexity": 1.06}, backbone) == ["harm", "perplexity"]
    assert fails(backbone | {"over_refusal": 1.0}, backbone) == []
    equal = trials([row(BACKBONE)], BACKBONE)
    assert recommend(equal, equal[0])["qualifies"]


def test_sensitivity_compares_at_equal_others():
    rows = [
        row(measures(h, u, 10.0), beta=b, retention=p)
        for b, p, h, u in (
            (1.0, 0.3, 0, 20),
            (2.0, 0.3, 2, 16),
            (3.0, 0.3, 6, 10),
            (1.0, 1.0, 1, 18),
            (3.0, 1.0, 9, 2),
            (7.0, 0.5, 20, 0),
        )
    ]
    result = sensitivity(trials(rows, BACKBONE), "patch.beta")
    assert [line["values"] for line in result["lines"]] == [[1.0, 2.0, 3.0], [1.0, 3.0]]
    steps = {}
    for step in result["steps"]:
        means = (round(step[axis]["mean"], 9) for axis in ("harm", "over_refusal"))
        steps[step["from"], step["to"]] = (step["lines"], *means)
    assert steps == {
        (1.0, 2.0): (1, 0.1, -0.2),
        (2.0, 3.0): (1, 0.2, -0.3),
        (1.0, 3.0): (1, 0.4, -0.8),
    }
    step = sensitivity(trials(rows, BACKBONE), "patch.retention")["steps"][0]
    assert (step["from"], step["to"], step["lines"]) == (0.3, 1.0, 2)
    assert [round(step["harm"][k], 9) for k in ("mean", "least", "largest")] == [0.1, 0.05, 0.15]


def test_words_are_compared_with_the_first_of_them():
    rows = [
        row(measures(h, 9, 10.0), combine=c)
        for c, h in (("union", 4), ("difference", 1), ("intersection", 2))
    ]
    steps = sensitivity(trials(rows, BACKBONE), "patch.combine")["steps"]
    assert [(s["from"], s["to"], round(s["harm"]["mean"], 9)) for s in steps] == [
        ("difference", "intersection", 0.05),
        ("difference", "union", 0.15),
    ]


def test_edges_of_what_was_tried():
    points = itertools.product((1.0, 2.0, 3.0), (0.1, 0.5, 1.0))
    rows = [row(measures(1, 9, 10.0), beta=beta, retention=p) for beta, p in points]
    result = trials(rows, BACKBONE)
    names = ["patch.beta", "patch.retention"]
    assert edges(result, 0, names) == [
        f"patch.{x} is the smallest value tried" for x in ("beta=1", "retention=0.1")
    ]
    assert edges(result, 8, names) == [
        "patch.beta=3 is the largest value tried"
    ]  # retention cannot be above 1
    assert edges(result, 4, names) == []


def test_report_says_what_a_reader_needs(tmp_path):
    rows = []
    for beta, *axes in ((1.0, 0, 18, 10.1), (2.0, 1, 5, 10.2), (3.0, 9, 0, 10.4)):
        rows += [row(measures(*axes), seed, beta=beta) for seed in (0, 1)]
    result = content(rows)
    sweep_report.write(result, tmp_path)
    text = (tmp_path / "sweep.md").read_text()
    for part in (
        "3 choices of patch settings, 6 points (seeds of retention: 0, 1)",
        "harm at most the backbone's 10.0 %",
        "**beta 2**: of 3 choices, 2 keep both bounds",
        "`--patch.beta=2`",
        "| backbone |  |  | 10.0 %",
        "| **2, the above** | 2 | 2 |",
        "| beta 2 | 0, 1 | 5.0 % (5.0 % to 5.0 %)",
        "| beta | 1 to 2 | 1 | 2 | +5.0 | -65.0 | +0.010 |",
        "measure it on the report split",
    ):
        assert part in text, part
    assert "one seed" not in text and json.loads((tmp_path / "sweep.json").read_text()) == result
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(sweep_report.FILES)
    sweep_report.write(content(rows[:1]), tmp_path)  # nothing varies: its picture goes
    assert "sweep_sensitivity.png" not in {p.name for p in tmp_path.iterdir()}


def test_flags_lead_from_the_sweeps_own_settings():
    def flags(**patch):
        return content([row(measures(0, 4, 10.0), **patch)])["recommended"]["flags"]

    assert flags() == [] and flags(beta=3.0, rescale=True) == [
        "--patch.rescale=true",
        "--patch.beta=3",
    ]
    assert "the config's own settings" in " ".join(
        sweep_report.recommendation(content([row(measures(0, 4, 10.0))]))
    )


def test_what_speaks_against_a_recommendation_is_said():
    def text(*rows):
        return " ".join(sweep_report.recommendation(content(list(rows))))

    assert "not below the backbone's: none of these patches helps" in text(
        row(measures(0, 16, 10.0))
    )
    assert "overlap: more prompts" in text(row(measures(0, 14, 10.0))) and "overlap" not in text(
        row(measures(0, 1, 10.0))
    )
    assert "one seed of retention" in text(row(measures(0, 1, 10.0)))


@pytest.mark.parametrize("points", [1, 8, 66])
def test_pictures_of_few_and_many_points(points, tmp_path):
    rows = []
    for i in range(points):
        perplexity = 10.0 + 0.1 * (i % 9) + 9000 * (i == 65)
        of_point = measures(i % 21, (7 * i) % 21, perplexity)
        for seed in range(1 + (i == 2)):
            rows.append(row(of_point, seed, beta=float(i % 11), alpha=float(i // 11)))
    sweep_report.write(content(rows), tmp_path)
    for name in sorted(p.name for p in tmp_path.glob("*.png")):
        head = (tmp_path / name).read_bytes()[:24]
        assert head.startswith(b"\x89PNG") and min(struct.unpack(">II", head[16:])) > 400, name
