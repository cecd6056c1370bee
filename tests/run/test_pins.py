"""A run of a model of the Hugging Face Hub stays with the commit with which it was begun."""

import pytest

from safepatch_jax.evaluation.answers import fingerprint
from safepatch_jax.evaluation.judges.open import folder_of
from safepatch_jax.io import hub as names
from safepatch_jax.planning.programs import architecture
from safepatch_jax.run.convert import convert, inspect_model
from safepatch_jax.run.job import SETTINGS, Job
from safepatch_jax.run.pins import pinned
from safepatch_jax.run.place import Place
from safepatch_jax.runtime import files
from safepatch_jax.settings import Settings
from safepatch_jax.studies.evaluate.report import labels
from tests.hub import files_of
from tests.jobs import FAST, write_data

NAME = "org/tiny"


@pytest.fixture
def settings(tmp_path):
    own = {"model.source": NAME, "run.cache_dir": str(tmp_path / "runs")}
    return Settings().override(FAST | write_data(tmp_path) | own)


def test_a_workdir_keeps_its_commit(hub, tiny, settings, tmp_path, one_device, capsys):
    first = hub.put(NAME, files_of(tiny))
    work = tmp_path / "work"
    job = Job(settings, work)
    assert job.settings.model.source == job.state.source.origin == f"{NAME}@{first}"
    job.runner.finish(["import"])
    key = job.runner.key("import")
    work.mkdir()
    files.write_json(work / SETTINGS, job.settings.to_dict())
    second = hub.put(NAME, files_of(tiny) | {"generation_config.json": b"{}"})
    names._obtained.cache_clear()
    again = Job(settings, work)
    assert again.settings == job.settings and again.runner.status("import") == "done"
    assert f"commit {first}, with which this workdir was begun" in capsys.readouterr().out
    # More files in the snapshot, of another program, change nothing.
    (again.state.imported / "tf_model.h5").write_text("")
    assert Job(settings, work).runner.key("import") == key
    with pytest.raises(ValueError, match=f"model.source: .*{first}.* -> .*{second}"):
        Job(settings.override({"model.source": f"{NAME}@main"}), work)
    assert Job(settings, work, update=True).state.source.origin == f"{NAME}@{second}"


def test_paths_are_not_pinned(tiny, settings):
    for source in (str(tiny), f"hf:{tiny}", "smollm2"):
        own = settings.override({"model.source": source})
        assert pinned(own) == own


def test_studies_name_the_model_and_plans_need_no_weights(hub, tiny, settings):
    commit = hub.put(NAME, files_of(tiny))
    own = settings.override({"model.source": f"hf:{NAME}"})
    assert architecture(own).family == "llama"
    assert not [asked for asked in hub.asked if "safetensors" in asked]
    folders = {"model": str(tiny), "against": names.folder_of(NAME)}
    assert labels(folders)["against"] == f"{NAME}@{commit[:7]}"
    assert folder_of(f"llama_guard:{NAME}?x=1") == folders["against"]
    assert fingerprint(folders["against"])


def test_conversion_and_inspection(hub, tiny, tmp_path, one_device):
    commit = hub.put(NAME, files_of(tiny))
    assert "llama" in inspect_model(f"{NAME}@main", "block_linear")[0]
    assert not [asked for asked in hub.asked if "safetensors" in asked]
    target = tmp_path / "target"
    certificate = convert(f"hf:{NAME}", f"hf:{target}", certify="hashes")
    assert files.read_json(certificate)["source"] == f"{NAME}@{commit}"
    weights = (target / "model.safetensors").read_bytes()
    assert weights == (tiny / "model.safetensors").read_bytes()
    assert Place.local("models/new") == Place("hf", Place.local("models/new").path)
