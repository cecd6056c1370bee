"""Sweeps on a tiny model: rows, resumption, damaged rows, the seed of retention, and what is
written."""

import json

import jax
import numpy as np
import pytest

from safepatch_jax.io.checkpoint import load_tree
from safepatch_jax.models.table import nest, unnest
from safepatch_jax.numerics import NotFinite
from safepatch_jax.run.job import Job
from safepatch_jax.runtime import files
from safepatch_jax.settings import Settings
from safepatch_jax.studies.sweep import report as sweep_report
from safepatch_jax.studies.sweep import rows as sweep_rows
from safepatch_jax.studies.sweep import study as sweep
from safepatch_jax.studies.sweep.points import Point, design
from tests.run.test_job import FAST


@pytest.fixture(scope="module")
def settings(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    data = {}
    for role in ("harmful", "lookalike", "ordinary"):
        rows = [
            f"{role} {i},the answer {i},{s}"
            for i, s in enumerate(["train"] * 5 + ["search"] * 2 + ["report"] * 3)
        ]
        (folder / f"{role}.csv").write_text("\n".join(["prompt,answer,split", *rows]) + "\n")
        data[f"data.{role}"] = str(folder / f"{role}.csv")
    return Settings().override(
        {
            **FAST,
            **data,
            "align.enabled": False,
            "model.source": str(tiny),
            "run.cache_dir": str(folder / "cache"),
            "run.seed": 3,
            "patch.beta": 4.0,
            "patch.alpha": 3.0,
        }
    )


@pytest.fixture(scope="module")
def points(settings):
    return design(settings, ["patch.beta=1,4;run.seed=0,3"], [])


@pytest.fixture(scope="module")
def swept(settings, points, tmp_path_factory):
    return sweep.sweep(settings, tmp_path_factory.mktemp("swept") / "work", points).parent


def rows_of(work):
    return files.read_jsonl(work / "sweep.jsonl")


def count_trials(monkeypatch, fail_at=None):
    """Count the points that are computed; fail at one of them, as a kill would."""
    tried, real = [], Job.try_patch

    def try_patch(self, patch, seed=None):
        if len(tried) == fail_at:
            raise KeyboardInterrupt
        tried.append(Point(patch, seed))
        return real(self, patch, seed)

    monkeypatch.setattr(Job, "try_patch", try_patch)
    return tried


def test_rows_and_report(swept, settings, points):
    rows = rows_of(swept)
    assert [(row["patch"]["beta"], row["seed"]) for row in rows] == [(1, 0), (1, 3), (4, 0), (4, 3)]
    for row in rows:
        assert set(row) == {"patch", "seed", "keys", "measures", "seconds"} and row["seconds"] > 0
        assert (
            set(row["keys"]) == {*sweep.PARTS, "dtype", "rounding"}
            and row["measures"]["harmful"]["n"] == 2
        )
    assert {p.name for p in swept.iterdir()} == {
        "stages",
        files.LOCK,
        "sweep.jsonl",
        "sweep_settings.json",
        "environment.json",
        "metrics.jsonl",
        "tensorboard",
        *sweep_report.FILES,
    }
    content = json.loads((swept / "sweep.json").read_text())
    assert (
        content["varied"] == ["patch.beta"]
        and content["seeds"] == [0, 3]
        and len(content["trials"]) == 2
    )
    assert (
        content["backbone"]["measures"]
        == json.loads((swept / "stages/evaluate_backbone/manifest.json").read_text())["result"]
    )


def test_again_nothing_is_computed_and_the_report_comes_back(
    swept, settings, points, monkeypatch, capsys
):
    tried, before = count_trials(monkeypatch), (swept / "sweep.jsonl").read_bytes()
    report = (swept / "sweep.md").read_text()
    for name in sweep_report.FILES:
        (swept / name).unlink()
    sweep.sweep(settings, swept, points)
    assert (
        not tried
        and (swept / "sweep.jsonl").read_bytes() == before
        and (swept / "sweep.md").read_text() == report
    )
    out = capsys.readouterr().out
    assert (
        out.count("has a row") == 4
        and "running" not in out
        and "[4/4] beta 4, seed 3: harmful complied" in out
    )


def test_more_points_join_those_that_are_there(swept, settings, monkeypatch, tmp_path):
    work = tmp_path / "work"
    files.write_text(work / "sweep.jsonl", (swept / "sweep.jsonl").read_text())
    (work / "stages").symlink_to(swept / "stages")
    tried = count_trials(monkeypatch)
    sweep.sweep(settings, work, design(settings, [], ["patch.beta=1,2;patch.support=fill"]))
    assert [(point.patch.beta, point.patch.support, point.seed) for point in tried] == [
        (2, "sequential", 3),
        (4, "fill", 3),
    ]
    content = json.loads((work / "sweep.json").read_text())
    assert content["points"] == 6 and content["varied"] == ["patch.support", "patch.beta"]


def test_a_killed_sweep_goes_on(swept, settings, points, monkeypatch, tmp_path, capsys):
    work = tmp_path / "work"
    work.mkdir()
    (work / "stages").symlink_to(swept / "stages")
    count_trials(monkeypatch, fail_at=2)
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(settings, work, points)
    assert len(rows_of(work)) == 2 and not (work / "sweep.md").exists()
    (work / ".sweep.jsonl.123.partial").write_text('{"patch"')  # killed while it wrote
    (work / ".environment.json.123.partial").write_text('{"starts"')
    monkeypatch.undo()
    tried = count_trials(monkeypatch)
    sweep.sweep(settings, work, points)
    assert [point for point in tried] == points[2:] and not list(work.glob(".*.partial"))
    assert [row["measures"] for row in rows_of(work)] == [row["measures"] for row in rows_of(swept)]
    out = capsys.readouterr().out
    assert "4 points on the search split, 2 to compute" in out and " s left\n" in out


def test_rows_of_another_evaluation_are_kept_and_not_used(swept, settings, points, tmp_path):
    other = settings.override({"evaluate.max_new_tokens": 3})
    files.write_text(tmp_path / "work" / "sweep.jsonl", (swept / "sweep.jsonl").read_text())
    sweep.sweep(other, tmp_path / "work", points[:1])
    rows = rows_of(tmp_path / "work")
    assert rows[:4] == rows_of(swept) and len(rows) == 5 and rows[4]["keys"] != rows[0]["keys"]
    assert json.loads((tmp_path / "work" / "sweep.json").read_text())["points"] == 1


def test_a_last_line_that_breaks_off_is_left_out(swept, tmp_path, capsys):
    text = (swept / "sweep.jsonl").read_text()
    (tmp_path / "sweep.jsonl").write_text(text[:-40])
    assert sweep_rows.read_rows(tmp_path / "sweep.jsonl") == rows_of(swept)[:3]
    assert "line 4, the last one, breaks off and is left out" in capsys.readouterr().out


def test_a_damaged_line_is_named_before_anything_runs(swept, settings, points, tmp_path):
    lines = (swept / "sweep.jsonl").read_bytes().splitlines()
    lines[1] = b"\xff"
    (tmp_path / "sweep.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(
        ValueError,
        match=r"line 2 is damaged .* Delete that line, and its point alone is tried again",
    ):
        sweep.sweep(settings, tmp_path, points)
    assert not (tmp_path / "stages").exists()


def test_workdirs_of_others_are_refused(settings, points, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"not of a sweep \(mine.txt\)"):
        sweep.sweep(settings, tmp_path, points)
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a run"):
        sweep.plan(settings, tmp_path, points)


def test_the_plan_lists_the_points_and_starts_nothing(swept, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "_SweepJob", None)
    asked = design(settings, ["patch.beta=4;run.seed=3,0"], ["patch.retention=0.5"])
    lines = sweep.plan(settings, swept, asked)
    assert lines[:3] == [
        "1 retention 0.3, seed 3 (has a row)",
        "2 retention 0.3, seed 0 (has a row)",
        "3 retention 0.5, seed 3",
    ]
    assert lines[3].startswith("3 points, 1 without a row in") and "s each" in lines[3]
    assert sweep.plan(settings, tmp_path / "new", asked[:1])[0] == "1 the config's own settings"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "others, dtype", [([], "keep"), (["patch.beta=1"], "keep"), ([], "float16")]
)
def test_a_point_that_breaks_the_weights_is_named_and_stops_no_other(
    others, dtype, swept, settings, tmp_path, capsys
):
    settings = settings.override({"export.dtype": dtype})
    (tmp_path / "stages").symlink_to(swept / "stages")
    points = design(settings, ["patch.beta=1e38;patch.alpha=1e38;patch.retention=1", *others], [])
    with pytest.raises(
        ValueError,
        match=rf"1 of {len(points)} points gave no row \(retention 1, alpha 1e\+38, beta 1e\+38\)",
    ):
        sweep.sweep(settings, tmp_path, points)
    assert (
        f"[1/{len(points)}] retention 1, alpha 1e+38, beta 1e+38: no row: "
        in capsys.readouterr().out
    )
    assert (tmp_path / "sweep.md").exists() == bool(others) and not (
        others and len(rows_of(tmp_path)) != 1
    )


def test_a_point_that_changes_nothing_is_told_and_left_out(swept, settings, tmp_path, capsys):
    (tmp_path / "stages").symlink_to(swept / "stages")
    points = design(settings, ["patch.top_rate_se=0;patch.top_rate_osm=0", "patch.beta=1"], [])
    with pytest.raises(
        ValueError, match=r"1 of 2 points gave no row .* for the reasons said above"
    ):
        sweep.sweep(settings, tmp_path, points)
    assert "no row: No entry is kept" in capsys.readouterr().out and len(rows_of(tmp_path)) == 1


def test_what_any_point_would_meet_ends_the_sweep(swept, settings, points, tmp_path, monkeypatch):
    (tmp_path / "stages").symlink_to(swept / "stages")
    tried = []

    def apply(self, patch, title, seed=None, sensitivity=None):
        tried.append(patch)
        if len(tried) == 1:
            raise ValueError("derive_se/params is damaged")
        return {}, {}, {"weight": {"nonzero_se": 0, "nonzero_osm": 5}}, {}

    monkeypatch.setattr(Job, "_apply", apply)
    for message in ("^derive_se/params is damaged$", "^The SE patch is zero everywhere"):
        with pytest.raises(ValueError, match=message):
            sweep.sweep(settings, tmp_path, points)
    assert len(tried) == 2 and not (tmp_path / "sweep.jsonl").exists()


def test_all_processes_leave_out_what_has_no_row_in_one(
    swept, settings, points, tmp_path, monkeypatch
):
    (tmp_path / "stages").symlink_to(swept / "stages")
    found, told, tried = rows_of(swept)[0]["measures"], [], []

    def try_patch(self, patch, seed):
        tried.append(seed)
        if len(tried) == 2:
            raise NotFinite("overflow")
        return found

    def everyones(value):  # of two processes; the other one meets an overflow in the first point
        told.append(value)
        return [value, "overflow there" if len(told) == 1 else value]

    monkeypatch.setattr(Job, "try_patch", try_patch)
    monkeypatch.setattr(sweep.processes, "everyones", everyones)
    with pytest.raises(ValueError, match="2 of 4 points gave no row"):
        sweep.sweep(settings, tmp_path, points)
    assert told == [None, "overflow", None, None] and len(rows_of(tmp_path)) == 2


@pytest.fixture(scope="module")
def job(swept, settings):
    return sweep._SweepJob(settings.override({"evaluate.split": "search"}), swept)


def bits(flat):
    return {path: np.asarray(x).tobytes() for path, x in flat.items()}


def test_the_runs_own_seed_changes_nothing(swept, job, settings):
    own = next(
        row
        for row in rows_of(swept)
        if row["patch"]["beta"] == 4 and row["seed"] == settings.run.seed
    )
    assert job.try_patch(settings.patch) == own["measures"]


@pytest.mark.parametrize(
    "change",
    [{}, {"export.dtype": "bfloat16", "export.rounding": "stochastic"}, {"patch.support": "fill"}],
)
def test_a_seed_gives_what_a_job_of_that_seed_gives_on_the_same_scores(
    job, settings, swept, tmp_path, change
):
    """The other way: the patch stage of a job whose own seed it is, which is lent the derived
    models and scores."""
    seed = 11
    ours = sweep._SweepJob(job.settings.override(change), swept)
    ours.runner = job.runner
    theirs = Job(job.settings.override({"run.seed": seed, **change}), tmp_path / "theirs")
    theirs.runner = job.runner
    (tmp_path / "out").mkdir()
    theirs._patch(tmp_path / "out")
    merged = ours._apply(ours.settings.patch, "test", seed)[0]
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), merged
    )
    stored = unnest(load_tree(tmp_path / "out" / "merged", nest(abstract)))
    assert bits(merged) == bits(stored) != bits(ours._apply(ours.settings.patch, "test")[0])
    assert ours.try_patch(ours.settings.patch, seed) == theirs.try_patch(theirs.settings.patch)
