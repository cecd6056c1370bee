"""What is said before anything is trained: built-in data for a large model, and small updates in
bfloat16."""

import pytest

from safepatch_jax.planning.programs import architecture
from safepatch_jax.run import notes
from safepatch_jax.run.convert import convert
from safepatch_jax.run.job import Job
from safepatch_jax.settings import Settings, load_config
from safepatch_jax.studies.compare.options import ComparisonOptions
from safepatch_jax.studies.compare.study import compare
from safepatch_jax.studies.sweep.points import design
from safepatch_jax.studies.sweep.study import sweep
from tests.jobs import interrupted_at

pytestmark = pytest.mark.usefixtures("one_device")
LOST = "Warning: the result is stored as bfloat16, rounded to nearest"


def test_a_large_model_with_the_defaults_and_with_its_config():
    own = load_config("llama3_8b_one_h100")
    config = architecture(own)
    assert notes.model_notes(own, config) == []
    data, lost = notes.model_notes(Settings(), config)
    assert "data.harmful, data.lookalike, data.ordinary: 'builtin'" in data
    assert "8.0 billion parameters" in data
    assert "--data=harmful:set:advbench,lookalike:set:xstest,ordinary:set:alpaca" in data
    assert lost.startswith(LOST) and "Give --export.rounding=stochastic" in lost
    mine = {"data.harmful": "mine.csv", "data.ordinary": "mine.csv", "export.dtype": "float32"}
    (data,) = notes.model_notes(Settings().override(mine), config)
    assert "Warning: data.lookalike: " in data and "--data=lookalike:set:xstest (" in data


@pytest.fixture
def lossy(settings):
    """Settings with which most of a patch would be lost."""
    one = {"mesh.shape": "data:1", "align.enabled": False, "export.dtype": "bfloat16"}
    return settings.override(one)


@pytest.mark.parametrize("kind", ["hf", "orbax"])
def test_a_run_says_it_before_it_trains(kind, lossy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(notes, "LARGE", 1000)
    source = lossy.model.source
    if kind == "orbax":
        convert(f"hf:{source}", f"orbax:{tmp_path / 'model'}", certify="hashes")
        source = f"orbax:{tmp_path / 'model'}"
    own = lossy.override({"model.source": source, "data.lookalike": "builtin"})
    capsys.readouterr()
    with interrupted_at("derive_se: running"):
        Job(own, tmp_path / "work").run()
    out = capsys.readouterr().out
    assert out.count(LOST) == out.count("Warning: data.lookalike: 'builtin'") == 1
    with interrupted_at("derive_se: running"):
        Job(own.override({"export.rounding": "stochastic"}), tmp_path / "other").run()
    assert LOST not in capsys.readouterr().out


def test_a_sweep_and_a_comparison_say_it_too(lossy, tmp_path, capsys):
    with interrupted_at("derive_se: running"):
        sweep(lossy, tmp_path / "sweep", design(lossy, ["patch.beta=1,2"], []))
    assert capsys.readouterr().out.count(LOST) == 1
    aligned = lossy.override({"align.enabled": True})
    with interrupted_at("align: "):
        compare(aligned, tmp_path / "work", ComparisonOptions(methods="ties"))
    assert capsys.readouterr().out.count(LOST) == 1
