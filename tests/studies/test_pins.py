"""Studies of a model of the Hugging Face Hub stay with the commit with which they were begun."""

import json

import pytest

from safepatch_jax.io import hub as names
from safepatch_jax.studies.compare.options import ComparisonOptions
from safepatch_jax.studies.compare.study import compare
from safepatch_jax.studies.continual.links import parse_links
from safepatch_jax.studies.continual.study import run
from safepatch_jax.studies.durability.options import DurabilityOptions
from safepatch_jax.studies.durability.study import durability
from safepatch_jax.studies.sweep.slope_options import SlopeOptions
from safepatch_jax.studies.sweep.slopes import slopes
from safepatch_jax.testing import write_tiny_model
from tests.hub import files_of
from tests.jobs import stages_run

pytestmark = pytest.mark.usefixtures("one_device")
NAME = "org/tiny"


def compared(settings, workdir):
    rows = []
    for kind, role in (("harm", "harmful"), ("refusal", "lookalike")):
        source = settings.flat()[f"data.{role}"]
        rows.append({"name": kind, "kind": kind, "source": source, "split": "report", "max_new": 3})
    suite = workdir.with_name("suite.json")
    suite.write_text(json.dumps(rows))
    compare(settings, workdir, ComparisonOptions(methods="osm", suite=str(suite)))


def chained(settings, workdir):
    run(settings, workdir, parse_links(f"harmful={settings.data.harmful}"))


def treated(settings, workdir):
    options = DurabilityOptions(treatments=("bf16",), batch_size=4)
    model = workdir.with_name("patched")
    durability(settings, workdir, str(model), "", options)


def sloped(settings, workdir):
    slopes(settings.override({"evaluate.margin_limit": 2}), workdir, SlopeOptions(checks=0))


STUDIES = {"compare": compared, "continual": chained, "durability": treated, "slopes": sloped}


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_a_study_keeps_its_commit(hub, settings, tmp_path, capsys, study):
    write_tiny_model(tmp_path / "patched", seed=1, num_key_value_heads=4, intermediate_size=32)
    base = files_of(settings.model.source)
    first = hub.put(NAME, base)
    own = settings.override({"model.source": NAME, "run.cache_dir": str(tmp_path / "runs")})
    study(own, tmp_path / "work")
    capsys.readouterr()
    hub.put(NAME, base | {"generation_config.json": b'{"do_sample": true}'})
    names._obtained.cache_clear()
    study(own, tmp_path / "work")
    out = capsys.readouterr().out
    assert f"{NAME} at commit {first}, with which this workdir was begun" in out
    assert stages_run(out) == []
