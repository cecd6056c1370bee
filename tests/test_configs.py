"""The configs that ship: each is valid, says how to run it, and its memory figure is that of the
model's table."""

import math
import pathlib
import re
import runpy

import pytest

from safepatch_jax.data.sets import SETS
from safepatch_jax.evaluation.judges.open import open_judge
from safepatch_jax.evaluation.suites import load_suite
from safepatch_jax.io.hub import split
from safepatch_jax.methods.registry import METHODS, parse_methods
from safepatch_jax.models.table import param_table
from safepatch_jax.planning.programs import architecture
from safepatch_jax.run.room import disk_bytes
from safepatch_jax.settings import Settings, load_config
from safepatch_jax.studies.compare.options import ComparisonOptions
from tests.evaluation.judges.cases import no_engine
from tests.evaluation.judges.test_classifiers import write_classifier
from tests.hub import files_of, use

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.py") if path.name != "common.py")
BACKBONES = [path for path in CONFIGS if load_config(path).model.architecture]


def manual_of(path):
    """Return a config's docstring with blanks for the ends of its lines."""
    return " ".join(runpy.run_path(str(path))["__doc__"].split())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_valid_and_says_how_to_run_it(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = load_config(path)
    manual = manual_of(path)
    assert f"--config=configs/{path.name}" in manual
    assert bool(settings.model.source) != (path.stem == "large")
    for part in ("Hardware:", "Time:"):
        assert part in manual, part


@pytest.mark.parametrize("path", BACKBONES, ids=lambda path: path.stem)
def test_memory_figure(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = load_config(path)
    monkeypatch.chdir("/")  # the architecture is found from anywhere
    table = param_table(architecture(settings))
    size = table.size
    manual = manual_of(path)
    assert f"{size / 1e9:.2f}e9 parameters" in manual
    if settings.derive.train == "scope":
        scope = sum(math.prod(row.shape) for row in table.scope(settings.patch.scope))
        trained = f"{scope / 1e9:.2f}e9 of the patch scope are float32 ({4 * scope / 1e9:.0f} GB)"
        assert trained in manual
        return
    stated = int(re.search(r"two moments\), (\d+) GB", manual).group(1))
    assert abs(stated - 16 * size / 1e9) < 1
    if path.stem.startswith("compare"):
        return  # many runs: docs/compare.md
    scratch = re.search(r"44 bytes for each, (\d+) GB, or 20, (\d+) GB", " ".join(manual.split()))
    for gigabytes, minutes in zip(scratch.groups(), (10.0, 0.0)):
        kept = settings.override({"run.checkpoint_minutes": minutes})
        assert abs(int(gigabytes) - disk_bytes(kept, architecture(settings)).most / 1e9) < 1


@pytest.mark.parametrize("path", BACKBONES, ids=lambda path: path.stem)
def test_the_model_is_one_of_the_hub_and_its_plan_needs_no_network(path, monkeypatch, tmp_path):
    use(monkeypatch, tmp_path, offline=True)
    settings = load_config(path)
    name, revision = split(settings.model.source)
    assert f"Model: {name} of the Hugging Face Hub" in manual_of(path)
    assert not revision and architecture(settings).num_layers > 20


@pytest.mark.parametrize("path", BACKBONES, ids=lambda path: path.stem)
def test_the_data_are_the_papers_and_can_be_fetched(path):
    sources = load_config(path).data
    for role, name in (("harmful", "advbench"), ("lookalike", "xstest"), ("ordinary", "alpaca")):
        assert getattr(sources, role) == f"set:{name}"
        assert SETS[name].splits[SETS[name].first_split(role)].file.sha256
    assert "Data: AdvBench, XSTest and Alpaca" in manual_of(path)


def test_a_model_of_ones_own_gets_what_the_papers_backbones_get():
    settings = load_config("large")
    theirs = load_config("llama2_7b_chat").override({"model.source": "", "model.architecture": ""})
    assert settings == theirs
    assert settings.export.rounding == "stochastic" and settings.model.compute_dtype == "bfloat16"
    defaults = Settings().derive
    assert settings.derive.se_learning_rate < defaults.se_learning_rate
    assert settings.derive.osm_learning_rate < defaults.osm_learning_rate


COMPARED = [path for path in CONFIGS if path.stem.startswith("compare_")]


@pytest.mark.parametrize("path", COMPARED, ids=lambda path: path.stem)
def test_a_comparison_has_methods_settings_and_measures(path):
    options, settings = ComparisonOptions.load(path), load_config(path)
    for name in parse_methods(options.methods):
        options.settings_of(METHODS[name], settings)
    assert options.settings.keys() <= METHODS.keys()
    assert {"harm", "refusal"} <= {measure.kind for measure in load_suite(options.suite)}


def test_the_papers_comparison_reads_it_literally_with_its_judge(hub, tmp_path):
    path = ROOT / "configs" / "compare_llama2_7b.py"
    options, settings = ComparisonOptions.load(path), load_config(path)
    assert (settings.derive.loss, settings.patch.importance) == ("sum", "weight")
    assert settings.derive.train == "all" and settings.data.train_limit > 0.6 * 520
    assert (options.suite, options.seeds) == ("paper", (0, 1, 2))
    # A stand-in for the six-action Longformer, of the same name.
    six = write_classifier(tmp_path / "six", [f"LABEL_{i}" for i in range(6)], [0.0] * 6)
    hub.put("LibrAI/longformer-action-ro", files_of(six))
    judge = open_judge(options.judge, no_engine)
    for kind in ("harm", "refusal"):
        assert judge.judge([], kind) == []  # it tells both


def test_every_backbone_has_its_architecture():
    used = {pathlib.Path(load_config(path).model.architecture).stem for path in BACKBONES}
    present = {path.stem for path in (ROOT / "configs" / "architectures").glob("*.json")}
    assert used == present and len(BACKBONES) == 13
