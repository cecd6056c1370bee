"""A command that is refused leaves nothing over which a corrected one would stumble."""

import json
import shutil

import pytest

from safepatch_jax.run.job import Job
from safepatch_jax.runtime import files
from safepatch_jax.studies.compare.options import ComparisonOptions
from safepatch_jax.studies.compare.study import compare
from safepatch_jax.studies.continual.links import parse_links
from safepatch_jax.studies.continual.study import run as continual
from safepatch_jax.studies.evaluate.options import EvaluationOptions
from safepatch_jax.studies.evaluate.study import RECORD, evaluate
from safepatch_jax.studies.sweep.points import design
from safepatch_jax.studies.sweep.study import sweep
from tests.evaluations import write_measures, write_suite


@pytest.fixture
def bad(tiny, tmp_path):
    """A model whose weights do not fit its config.json, which shows when they are read."""
    folder = shutil.copytree(tiny, tmp_path / "bad")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"intermediate_size": 48}))
    return folder


def suite(folder, count=1):
    return EvaluationOptions(suite=write_suite(folder / "s.json", write_measures(folder)[:count]))


COMMANDS = {
    "safepatch": lambda settings, out: Job(settings, out).run(),
    "sweep": lambda settings, out: sweep(settings, out, design(settings, ["patch.beta=1,2"], [])),
    "compare": lambda settings, out: compare(settings, out, ComparisonOptions(methods="ga")),
    "continual": lambda settings, out: continual(
        settings, out, parse_links(f"one={settings.data.harmful}")
    ),
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_workdir_of_a_refused_model_is_not_left(settings, bad, tmp_path, command):
    settings = settings.override(
        {"model.source": str(bad), "run.cache_dir": str(tmp_path / "cache")}
    )
    for made in (False, True):
        if made:
            (tmp_path / "out").mkdir()
        with pytest.raises(ValueError, match="the weights do not fit config.json|cannot begin"):
            command(settings, tmp_path / "out")
        assert (tmp_path / "out").exists() == made
        assert not made or not list((tmp_path / "out").iterdir())


def test_an_evaluation_of_a_mistyped_model_is_not_left(bad, tmp_path):
    options = suite(tmp_path)
    for folder in (tmp_path / "absent", bad):
        with pytest.raises(ValueError, match="no model folder|do not fit config.json"):
            evaluate(str(folder), tmp_path / "out", options)
        assert not (tmp_path / "out").exists()


def test_what_was_there_before_a_refused_evaluation_stays(tiny, bad, tmp_path):
    out = tmp_path / "out"
    evaluate(str(tiny), out, suite(tmp_path))
    before = files.folder_hashes(out)
    with pytest.raises(ValueError, match=r"is an evaluation with other models \(model\)"):
        evaluate(str(bad), out, suite(tmp_path))
    assert files.folder_hashes(out) == before
    for text in ("{", "[]", '{"models": 3}', "\x00"):
        (out / RECORD).write_text(text)
        with pytest.raises(ValueError, match="evaluation") as raised:
            evaluate(str(tiny), out, suite(tmp_path))
        assert len(str(raised.value)) < 600
        assert (out / RECORD).read_text() == text
