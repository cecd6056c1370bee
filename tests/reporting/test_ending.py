"""The table with which a command ends, and names beside points."""

import itertools
import math

import numpy as np
import pytest
from matplotlib.cbook import is_math_text
from matplotlib.text import Text

from safepatch_jax.evaluation.statistics import difference
from safepatch_jax.reporting import charts, ending
from safepatch_jax.reporting.beside import along, name_points


@pytest.mark.parametrize(
    "gained, lost, told", [(0, 9, "fewer"), (9, 0, "more"), (3, 4, "not told apart")]
)
def test_a_verdict_says_what_the_test_says(gained, lost, told):
    test = {"n": 36, "gained": gained, "lost": lost, "p": 0.004 if told != "not told apart" else 1}
    counts = {"count": 12, "n": 36}, {"count": 12 + gained - lost, "n": 36}
    table = ending.lines([ending.share_row("harm", *counts, test)])
    assert "12 of 36, 33%" in table[1] and told in table[1]
    moved, low, high = difference(36, gained, lost)
    assert low < moved < high and f"{100 * moved:+.0f} points" in table[1]
    assert (low < 0 < high) == (told == "not told apart")


def test_a_table_is_short_and_aligned():
    rows = [ending.share_row(f"{i} " + "x" * 90, None, {"count": 1, "n": 3}) for i in range(30)]
    table = ending.lines([*rows, ending.perplexity_row("text", 10.0, 12.0)])
    assert len(table) == ending.MOST and max(map(len, table)) <= 100
    assert table[-1] == "and 23 more in the report"
    assert len({line.index("1 of 3") for line in table[1:-1]}) == 1
    assert "+20.0 %" in ending.lines([ending.perplexity_row("text", 10.0, 12.0)])[1]


def test_names_cover_neither_points_nor_one_another():
    figure = charts.figure(6, 5)
    axis = charts.panels(figure, 1, 1)[0, 0]
    charts.plane(axis, "title")
    places = [(0, 100), (0, 100), (1, 99), (50, 50), (51, 51), (52, 49), (100, 0), (100, 2)]
    name_points(axis, [(*place, f"method number {i}") for i, place in enumerate(places)])
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axis.texts]
    assert len(boxes) == len(places)
    for a, b in itertools.combinations(boxes, 2):
        assert not a.padded(-1).overlaps(b.padded(-1))
    points = axis.transData.transform(places)
    assert not any(box.contains(*point) for box in boxes for point in points)
    frame = axis.get_window_extent().padded(1)
    assert all(frame.contains(*corner) for box in boxes for corner in np.array(box))


def test_a_name_is_nearest_to_its_own_point_and_covers_no_bar():
    figure = charts.figure(6, 5)
    axis = charts.panels(figure, 1, 1)[0, 0]
    charts.plane(axis, "title")
    places = {"first": (8, 0), "second": (11, 0)}
    bars = [(x, 0, "") for x in along((2, 26))] + [(8, y, "") for y in along((0, 10))]
    name_points(axis, [*((*place, name) for name, place in places.items()), *bars])
    figure.draw_without_rendering()
    middles = {name: axis.transData.transform(place) for name, place in places.items()}
    for text in axis.texts:
        box = text.get_window_extent()
        away = {name: math.dist(m, np.clip(m, box.p0, box.p1)) for name, m in middles.items()}
        assert away[text.get_text()] <= min(away.values()) + 1
        ends = axis.transData.transform([(x, y) for x, y, _ in bars])
        assert not any(box.contains(*end) for end in ends)


def test_foreign_text_sets_no_mathematics():
    figure = charts.figure(6, 5)
    upper, lower = charts.panels(figure, 2, 1)[:, 0]
    name = r"Fraud ($$), $x_\frac$ \\ \$6"
    charts.dots(upper, name, [name], [charts.Series([(0.1, 0, 0.2)], ["red"], label=name)])
    charts.legend_below(upper)
    charts.empty(lower, name)
    name_points(upper, [(10, 0, name)])
    figure.draw_without_rendering()
    texts = [text.get_text() for text in figure.findobj(Text) if "$" in text.get_text()]
    assert len(texts) >= 5 and not any(map(is_math_text, texts))
    # Matplotlib shows what is no mathematics with each escaped $ as $.
    assert {text.replace(r"\$", "$") for text in texts} == {name}


FEWER = {"n": 400, "gained": 1, "lost": 120, "p": 3.2e-12}


def test_a_long_name_gives_way_to_figures():
    counts = {"count": 130, "n": 400}, {"count": 11, "n": 400}
    row = ending.share_row("harm: " + "prefix_injection " * 8, *counts, FEWER)
    lines = ending.lines([row])
    assert max(map(len, lines)) <= 100
    assert lines[1].startswith("harm: prefix") and "…" in lines[1]
    assert lines[1].endswith("fewer (p = 3.2e-12)")


@pytest.mark.parametrize(
    "after, verdict",
    [
        (10.4, "kept within 5 %"),
        (10.6, "worse by more than 5 %"),
        (5.0, "better by more than 5 %"),
        (float("nan"), "not a number"),
    ],
)
def test_what_a_perplexity_says(after, verdict):
    assert ending.perplexity_row("perplexity", 10.0, after)[-1] == verdict
