"""What --grid and --around ask for, and a user's mistakes in them."""

import itertools

import pytest

from safepatch_jax.settings import Settings
from safepatch_jax.studies.sweep.points import Point, design, label, ordered, varied, written

OWN = Settings().override({"patch.beta": 2.5, "run.seed": 7})


def seen(points, *names):
    return [tuple(map(point.flat().get, names)) for point in points]


def test_a_grid_is_a_product_in_order():
    points = design(OWN, ["patch.beta=1,2,3; patch.retention=.3,1"], [])
    assert seen(points, "patch.beta", "patch.retention") == list(
        itertools.product((1.0, 2.0, 3.0), (0.3, 1.0))
    )
    assert {point.seed for point in points} == {7}


def test_the_seed_leaves_the_patch_settings_alone():
    points = design(OWN, ["run.seed=7,0,1"], [])
    assert seen(points, "run.seed") == [(7,), (0,), (1,)] and {point.patch for point in points} == {
        OWN.patch
    }


def test_words_and_truths_are_read():
    points = design(
        OWN, ["patch.support=fill;patch.combine=union,difference;patch.rescale=true,False"], []
    )
    assert seen(points, "patch.support", "patch.combine", "patch.rescale") == [
        ("fill", "union", True),
        ("fill", "union", False),
        ("fill", "difference", True),
        ("fill", "difference", False),
    ]


def test_around_moves_one_setting_at_a_time():
    points = design(OWN, [], ["patch.beta=1,2.5;patch.alpha=0,1,2"])
    assert seen(points, "patch.beta", "patch.alpha") == [
        (2.5, 1.0),
        (1.0, 1.0),
        (2.5, 0.0),
        (2.5, 2.0),
    ]


def test_the_union_has_each_point_once():
    grids, arounds = ["patch.beta=1,2", "patch.beta=2,3,3.0"], ["patch.beta=1,4", "patch.alpha=0"]
    points = design(OWN, grids, arounds)
    assert seen(points, "patch.beta", "patch.alpha") == [
        (1, 1),
        (2, 1),
        (3, 1),
        (2.5, 1),
        (4, 1),
        (2.5, 0),
    ]
    assert len(set(points)) == len(points) == 6 and points[3] == Point.of(OWN)


def test_names_of_points():
    points = [point.flat() for point in design(OWN, ["patch.beta=1,2.5;run.seed=0,1"], [])]
    assert varied(points) == ["patch.beta", "run.seed"] and varied(points[:1]) == []
    assert label(points[3], varied(points)) == "beta 2.5, seed 1"
    assert [written(v) for v in (1.0, 0.1, 1234567.0, True, "fill", 3)] == [
        "1",
        "0.1",
        "1234567.0",
        "true",
        "fill",
        "3",
    ]
    assert ordered("patch.combine", ["union", "difference", "union"]) == ["difference", "union"]


@pytest.mark.parametrize(
    "grid, message",
    [
        ("patch.bta=1", r"unknown setting 'patch.bta' \(did you mean 'patch.beta'\?\)"),
        ("beta=1", r"unknown setting 'beta' \(did you mean 'patch.beta'\?\)"),
        ("derive.se_steps=1,2", "derive.se_steps is not patch.OPTION or run.seed"),
        ("patch.scope=all", "give it as a flag"),
        ("patch.beta", "'patch.beta' is not patch.OPTION=VALUE"),
        ("patch.beta=", "patch.beta has an empty value"),
        ("patch.beta=1,,2", "patch.beta has an empty value"),
        ("patch.beta=two", "patch.beta must be a number, got 'two'"),
        ("patch.rescale=1", "patch.rescale must be true or false, got '1'"),
        ("run.seed=1.5", "run.seed must be a whole number, got '1.5'"),
        (
            "patch.beta=1;patch.retention=0.5,2",
            r"point patch.beta=1, patch.retention=2: 'patch.retention' must be at most 1.0",
        ),
        ("patch.beta=nan", "point patch.beta=nan: 'patch.beta' must be finite"),
        (
            "patch.merge=tie",
            "point patch.merge=tie: 'patch.merge' must be one of safepatching, average",
        ),
        ("run.seed=0,-1", "point run.seed=-1: 'run.seed' must be at least 0"),
        ("patch.beta=1;patch.beta=2", "patch.beta is given twice"),
        ("", "is empty"),
        (" ; ", "is empty"),
    ],
)
@pytest.mark.parametrize("flag", ["--grid", "--around"])
def test_mistakes_are_named(flag, grid, message):
    if flag == "--around":  # the other setting is not part of such a point
        message = message.replace("patch.beta=1, patch.ret", "patch.ret")
    with pytest.raises(ValueError, match=f"^{flag}.*{message}"):
        design(OWN, [grid] * (flag == "--grid"), [grid] * (flag == "--around"))


def test_nothing_asked_for_is_said():
    with pytest.raises(ValueError, match="Nothing to try: give --grid=.* --around="):
        design(OWN, [], [])
