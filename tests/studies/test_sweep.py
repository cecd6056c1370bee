"""Sweeps on a tiny model: rows, resumption, damaged rows, the seed of retention, and what is
written."""

import functools
import shutil

import numpy as np
import pytest

from safepatch_jax.models.table import unnest
from safepatch_jax.run import models, steps
from safepatch_jax.run.job import open_run
from safepatch_jax.runtime import files
from safepatch_jax.runtime.files import read_json
from safepatch_jax.studies.sweep import report as sweep_report
from safepatch_jax.studies.sweep import study as sweep
from safepatch_jax.studies.sweep.merging import Merger
from safepatch_jax.studies.sweep.plan import plan
from safepatch_jax.studies.sweep.points import ANSWERS, MARGINS, design
from tests.jobs import interrupted_at, stages_run

pytestmark = pytest.mark.usefixtures("one_device")
swept_by_answers = functools.partial(sweep.sweep, measure=ANSWERS)
HALF = {"export.dtype": "float16", "export.rounding": "stochastic"}
BROKEN = "patch.beta=1e38;patch.alpha=1e38;patch.retention=1"


@pytest.fixture(scope="module")
def points(settings):
    return design(settings, ["patch.beta=1,4;run.seed=0,3"], [])


@pytest.fixture(scope="module")
def swept(one_device, settings, points, tmp_path_factory):
    return swept_by_answers(settings, tmp_path_factory.mktemp("swept") / "work", points).parent


@pytest.fixture
def trained(swept, tmp_path):
    """A workdir with the stages of the sweep and none of its rows."""
    shutil.copytree(swept / "stages", tmp_path / "work" / "stages")
    return tmp_path / "work"


def rows_of(work):
    return files.read_jsonl(work / "sweep.jsonl")


def test_rows_and_report(swept):
    rows = rows_of(swept)
    assert [(row["patch"]["beta"], row["seed"]) for row in rows] == [(1, 0), (1, 3), (4, 0), (4, 3)]
    for row in rows:
        assert set(row) == {"patch", "seed", "keys", "measures", "seconds", "weights"}
        assert len(row["weights"]) == 64 and row["seconds"] > 0
        assert set(row["keys"]) == {*sweep.PARTS, "dtype", "rounding"}
        assert row["measures"]["harmful"]["n"] == 2
    assert {path.name for path in swept.iterdir()} == {
        "stages",
        files.LOCK,
        "sweep.jsonl",
        "sweep_settings.json",
        "environment.json",
        "metrics.jsonl",
        "tensorboard",
        *sweep_report.FILES,
    }
    content = read_json(swept / "sweep.json")
    assert content["varied"] == ["patch.beta"] and content["seeds"] == [0, 3]
    assert len(content["trials"]) == 2
    backbone = read_json(swept / "stages" / "evaluate_backbone" / "manifest.json")["result"]
    assert content["backbone"]["measures"] == backbone


def test_again_nothing_is_computed_and_the_report_comes_back(swept, settings, points, capsys):
    rows, report = (swept / "sweep.jsonl").read_bytes(), (swept / "sweep.md").read_text()
    for name in sweep_report.FILES:
        (swept / name).unlink()
    swept_by_answers(settings, swept, points)
    out = capsys.readouterr().out
    assert "4 points on the search split, 0 to compute" in out and out.count("has a row") == 4
    assert not stages_run(out) and "[4/4] beta 4, seed 3: harmful complied" in out
    assert (swept / "sweep.jsonl").read_bytes() == rows
    assert (swept / "sweep.md").read_text() == report


def test_an_interrupted_sweep_is_resumed_and_more_points_join(
    swept, trained, settings, points, capsys
):
    with interrupted_at("[2/4] "):
        swept_by_answers(settings, trained, points)
    assert len(rows_of(trained)) == 2 and not (trained / "sweep.md").exists()
    for name in ("sweep.jsonl", "environment.json"):
        (trained / f".{name}.123.partial").write_text('{"patch"')  # killed while it wrote
    swept_by_answers(settings, trained, points)
    out = capsys.readouterr().out
    assert "4 points on the search split, 2 to compute" in out and " s left\n" in out
    assert not list(trained.glob(".*.partial"))
    expected = [row["measures"] for row in rows_of(swept)]
    assert [row["measures"] for row in rows_of(trained)] == expected
    swept_by_answers(settings, trained, design(settings, [], ["patch.beta=1,2;patch.support=fill"]))
    out = capsys.readouterr().out
    assert "4 points on the search split, 2 to compute" in out and not stages_run(out)
    added = [(row["patch"]["beta"], row["patch"]["support"]) for row in rows_of(trained)[4:]]
    assert added == [(2, "sequential"), (4, "fill")]
    content = read_json(trained / "sweep.json")
    assert content["points"] == 6 and content["varied"] == ["patch.support", "patch.beta"]


def test_rows_of_another_evaluation_are_kept_and_not_used(swept, trained, settings, points, capsys):
    other = settings.override({"evaluate.max_new_tokens": 3})
    shutil.copy(swept / "sweep.jsonl", trained)
    swept_by_answers(other, trained, points[:1])
    assert stages_run(capsys.readouterr().out) == ["evaluate_backbone"]
    rows = rows_of(trained)
    assert rows[:4] == rows_of(swept) and len(rows) == 5 and rows[4]["keys"] != rows[0]["keys"]
    assert read_json(trained / "sweep.json")["points"] == 1


def test_damaged_rows(swept, settings, points, tmp_path, capsys):
    """A last line that breaks off is left out; another one is named before anything runs."""
    path = tmp_path / "sweep.jsonl"
    text = (swept / "sweep.jsonl").read_text()
    path.write_text(text[:-40])
    assert "1 without a row" in plan(settings, tmp_path, points, ANSWERS)[-1]
    assert "line 4, the last one, breaks off and is left out" in capsys.readouterr().out
    lines = text.splitlines()
    path.write_text("\n".join([lines[0], "{", *lines[2:]]))
    message = r"line 2 is damaged .* Delete that line, and its point alone is tried again"
    with pytest.raises(ValueError, match=message):
        swept_by_answers(settings, tmp_path, points)
    assert not (tmp_path / "stages").exists()


def test_workdirs_of_others_are_refused(settings, points, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"not of a sweep \(mine.txt\)"):
        swept_by_answers(settings, tmp_path, points)
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a run"):
        plan(settings, tmp_path, points)


def test_the_plan_lists_the_points_and_reads_no_model(swept, settings, tmp_path):
    settings = settings.override({"model.source": "/nowhere"})
    wanted = design(settings, ["patch.beta=4;run.seed=3,0"], ["patch.retention=0.5"])
    lines = plan(settings, swept, wanted, ANSWERS)
    assert lines[:3] == [
        "1 retention 0.3, seed 3 (has a row)",
        "2 retention 0.3, seed 0 (has a row)",
        "3 retention 0.5, seed 3",
    ]
    assert lines[3].startswith("3 points, 1 without a row by answers in") and "s each" in lines[3]
    assert plan(settings, tmp_path / "new", wanted[:1])[0] == "1 the config's own settings"
    assert not (tmp_path / "new").exists()


def test_points_of_the_same_weights_share_their_measures(trained, settings, capfd):
    """With retention 1 nothing is drawn: the second seed is merged and not measured."""
    grid = design(settings, ["patch.retention=1;run.seed=0,3"], [])
    swept_by_answers(settings, trained, grid)
    first, second = rows_of(trained)
    assert (first["seed"], second["seed"]) == (0, 3) and first["measures"] == second["measures"]
    assert first["weights"] == second["weights"]
    bars = capfd.readouterr().err
    assert bars.count("patched: answers: 100%") == 1


def test_points_that_give_no_row_are_named_and_stop_no_other(trained, settings, capsys):
    """Weights that overflow, and a patch that changes nothing."""
    nothing = "patch.top_rate_se=0;patch.top_rate_osm=0"
    with pytest.raises(
        ValueError,
        match=r"2 of 3 points gave no row \(.*beta 1e\+38; .*\), for the reasons above",
    ):
        swept_by_answers(settings, trained, design(settings, [BROKEN, nothing, "patch.beta=1"], []))
    out = capsys.readouterr().out
    assert "beta 1e+38: no row: " in out and "no row: No entry is kept" in out
    assert (trained / "sweep.md").exists() and len(rows_of(trained)) == 1


def test_weights_that_overflow_in_the_storage_dtype_give_no_row(trained, settings, capsys):
    half = settings.override(HALF)
    with pytest.raises(ValueError, match="1 of 1 points gave no row"):
        swept_by_answers(half, trained, design(half, [BROKEN.replace("e38", "e20")], []))
    assert "no row: " in capsys.readouterr().out and not (trained / "sweep.md").exists()


def test_what_any_point_would_meet_ends_the_sweep(settings, points, tmp_path):
    still = settings.override({"derive.se_learning_rate": 1e-30})
    with pytest.raises(ValueError, match="^The SE patch is zero everywhere"):
        swept_by_answers(still, tmp_path / "work", points)
    assert not (tmp_path / "work" / "sweep.jsonl").exists()


@pytest.fixture(scope="module")
def run(swept, settings):
    return open_run(settings.override({"evaluate.split": "search"}), swept)


def bits(flat):
    return {path: np.asarray(x).tobytes() for path, x in flat.items()}


def test_the_runs_own_seed_changes_nothing(swept, run, settings):
    last = rows_of(swept)[-1]
    assert (last["patch"]["beta"], last["seed"]) == (settings.patch.beta, settings.run.seed)
    flat = models.patched(run, settings.patch)
    assert models.weights_hash(flat) == last["weights"]
    assert models.measure(run, flat, "test")[0] == last["measures"]


@pytest.mark.parametrize(
    "change",
    [{}, HALF, {"patch.support": "fill"}],
)
def test_a_seed_gives_what_a_run_of_that_seed_gives_on_the_same_scores(
    run, swept, tmp_path, change
):
    """The other way: the patch stage of a run whose own seed it is, which is lent the derived
    models and scores."""
    seed = 11
    ours = open_run(run.settings.override(change), swept)
    theirs = open_run(run.settings.override({"run.seed": seed, **change}), tmp_path / "theirs")
    ours.runner = theirs.runner = run.runner
    (tmp_path / "out").mkdir()
    steps.patch(theirs, tmp_path / "out")
    patch = ours.settings.patch
    merged = models.apply_patch(ours, patch, "test", seed).weights
    written = unnest(ours.context.load(tmp_path / "out" / "model")[1])
    stored = {path: written[path] for path in merged}
    assert bits(merged) == bits(stored)
    assert bits(merged) != bits(models.apply_patch(ours, patch, "test").weights)


def test_points_that_share_a_selection_have_the_bits_of_whole_merges(run, settings):
    points = design(settings, ["patch.beta=1,2,3;patch.alpha=0.5,1,2"], [])
    merger = Merger(run)
    merger.expect(points)
    for point in points[::4]:
        assert bits(merger.merged(point)) == bits(models.patched(run, point.patch, point.seed))
    assert merger.held == 1


def test_by_margins_the_front_alone_answers(settings, points, trained, capsys):
    """The rows are expectations over all prompts; those of answers in the workdir do not count."""
    swept_by_answers(settings, trained, points[:1])
    more = settings.override({"evaluate.margin_limit": 3})
    wide = design(more, ["patch.beta=1,4,40;run.seed=0"], [])
    sweep.sweep(more, trained, wide)
    rows = [row for row in rows_of(trained) if row["keys"].get("measure") == MARGINS]
    assert len(rows) == 3 and len(rows_of(trained)) == 4
    content = read_json(trained / "sweep.json")
    for row, trial in zip(rows, content["trials"], strict=True):
        for role in ("harmful", "lookalike"):
            counts = row["measures"][role]
            assert 0 < counts["refused"] < counts["n"] <= 3
            assert counts["refused"] + counts["complied"] == pytest.approx(counts["n"])
        wanted = trial["front"] or trial is content["trials"][content["recommended"]["trial"]]
        assert ("answers" in row) == wanted == ("answers" in trial)
        assert "answers" not in row or row["answers"]["harmful"]["n"] == 2
    page = (trained / "sweep.md").read_text()
    assert "Measured by margins" in page and "harm (answers)" in page
    before = rows_of(trained)
    assert "answers of the front [1/" in capsys.readouterr().out
    sweep.sweep(more, trained, wide)  # nothing is computed again
    out = capsys.readouterr().out
    assert rows_of(trained) == before and "3 points on the search split, 0 to compute" in out
    assert "answers of the front" not in out and "1 of 4 rows there are not by margins" in out
    assert plan(more, trained, wide)[-1].startswith("3 points, 0 without a row by margins")
    by_answers = plan(more, trained, wide, ANSWERS)[-1]
    assert by_answers.startswith("3 points, 2 without a row by answers")
