"""The plane of alpha and beta: predicted from four models, checked by true ones."""

import numpy as np
import pytest

from safepatch_jax.run.job import Job
from safepatch_jax.run.margins import expected_measures
from safepatch_jax.runtime import files
from safepatch_jax.studies.sweep.slope_figures import draw
from safepatch_jax.studies.sweep.slopes import SlopeOptions, gather, predicted, slopes

pytestmark = pytest.mark.usefixtures("one_device")
OPTIONS = SlopeOptions(alpha=1.0, beta=2.0, step=0.5, checks=2)


def rows_at(place, curved=0.0):
    """Rows that are bilinear in the place, and a part that is not."""
    alpha, beta = place
    bend = curved * alpha * alpha
    harmful, look, ordinary = [], [], []
    for k in range(5):
        up = alpha * (1 + k) - beta * k + 0.3 * alpha * beta + bend
        harmful.append({"refusal": k - 2 + up, "affirmative": -1.0, "nll": 10 + alpha + k})
        harmful[-1] |= {"tokens": 5, "opening_nll": 4.0, "opening_tokens": 2}
        look.append({"refusal": k - 3 - beta * k, "affirmative": -1.0 + alpha})
        ordinary.append({"nll": 20 + alpha + beta, "tokens": 10, "opening_tokens": 0})
    return {"harmful": harmful, "lookalike": look, "ordinary": ordinary}


def test_what_is_bilinear_is_predicted_exactly():
    corners = {place: rows_at(place) for place in OPTIONS.corners}
    for place in ((0.0, 0.0), (0.5, 1.0), (0.25, 1.75), (1.0, 2.0)):
        ours, true = predicted(corners, OPTIONS, place), rows_at(place)
        for role, rows in true.items():
            for got, row in zip(ours[role], rows, strict=True):
                assert got == pytest.approx(row)
    bent = {place: rows_at(place, curved=1.0) for place in OPTIONS.corners}
    wrong = predicted(bent, OPTIONS, (1.0, 0.0))["harmful"][0]["refusal"]
    assert wrong != pytest.approx(rows_at((1.0, 0.0), curved=1.0)["harmful"][0]["refusal"])


def test_slopes_and_plane(settings):
    corners = {place: rows_at(place) for place in OPTIONS.corners}
    content = gather(settings, corners, OPTIONS)
    assert content["slopes"]["alpha"]["harmful"] == pytest.approx(np.mean([1, 2, 3, 4, 5]))
    assert content["slopes"]["alpha"]["lookalike"] == pytest.approx(-1)
    assert content["slopes"]["beta"]["harmful"] == pytest.approx(-2)
    assert content["slopes"]["alpha"]["content_nll"] == pytest.approx(1 / 5)
    assert content["slopes"]["beta"]["ordinary_nll"] == pytest.approx(1 / 10)
    true = expected_measures(rows_at((0.5, 1.0)))
    point = content["plane"][10][10]
    assert (point["alpha"], point["beta"]) == (0.5, 1.0)
    assert point["harm"] == pytest.approx(true["harmful"]["complied"] / 5)
    assert point["auroc"] == true["margins"]["auroc"]["value"]
    start, points = content["backbone"], sum(content["plane"], [])
    below = []
    for p in points:
        lower = all(p[axis] <= start[axis] - 0.005 for axis in ("harm", "refusal"))
        sound = p["covered"] >= start["covered"] / 2
        below.append(lower and sound and p["ordinary_nll"] - start["ordinary_nll"] <= np.log(1.05))
    assert content["both"] == sum(below) > 0
    assert [p["both"] for p in points] == below


def test_a_method_without_a_plane_is_refused_before_anything_is_trained(settings, tmp_path):
    for merge in ("ties", "dare_ties", "resta"):
        with pytest.raises(ValueError, match=f"patch.merge={merge}: .*or one of safepatching"):
            slopes(settings.override({"patch.merge": merge}), tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_a_tiny_models_plane_is_checked_and_resumed(settings, tmp_path, capsys):
    few = settings.override({"evaluate.margin_limit": 3})
    page = slopes(few, tmp_path / "work", OPTIONS)
    kept = tmp_path / "work" / "stages"
    assert f"kept in {kept}: jailbroken and broken models" in capsys.readouterr().out
    content = files.read_json(page.with_suffix(".json"))
    assert len(content["checks"]) == 2 and "Checked points" in page.read_text()
    assert page.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    points = sorted((tmp_path / "work" / "slope_points").iterdir())
    assert len(points) >= 4
    stamps = [path.stat().st_mtime_ns for path in points]
    slopes(few, tmp_path / "work", OPTIONS)
    again = sorted((tmp_path / "work" / "slope_points").iterdir())
    assert [path.stat().st_mtime_ns for path in again] == stamps
    Job(few, tmp_path / "work")  # the folder may become a run's
    # A true model at a corner is what the prediction goes through.
    a, b = OPTIONS.corners[3]
    corner = next(p for p in map(files.read_json, points) if p["place"] == [a, b])
    row = next(p for p in sum(content["plane"], []) if (p["alpha"], p["beta"]) == (a, b))
    assert row["auroc"] == expected_measures(corner["rows"])["margins"]["auroc"]["value"]


@pytest.mark.parametrize("wrong", [{"alpha": 0.0}, {"step": 1.5}, {"checks": -1}])
def test_options_that_make_no_plane(wrong):
    with pytest.raises(ValueError, match="above 0, step in"):
        SlopeOptions(**wrong)


def test_a_quantity_that_does_not_vary_is_no_plane():
    """What is left of it is rounding, which a scale of colours would blow up."""
    names = ("harm", "refusal", "auroc", "content_nll", "both")
    plane = []
    for alpha in (0.0, 1.0):
        row = []
        for beta in (0.0, 1.0):
            values = (1 - 1e-9 * alpha, 0.5 * beta, 0.5, 5 + alpha * beta, 0.0)
            row.append(dict(zip(names, values)))
        plane.append(row)
    content = {"alphas": [0.0, 1.0], "betas": [0.0, 1.0], "plane": plane, "checks": []}
    figure = draw(content | {"backbone": plane[0][0]})
    texts = {axis.get_title(): [text.get_text() for text in axis.texts] for axis in figure.axes}
    assert texts["Harm: expected compliance, %"] == ["100 everywhere"]
    assert texts["AUROC, harmful against look-alikes"] == ["0.5 everywhere"]
    assert texts["Content NLL, nats a token"] == texts["Over-refusal: expected refusals, %"] == []
