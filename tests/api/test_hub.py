"""Models of the Hugging Face Hub by name in the Python API."""

import pytest

import safepatch_jax as sp
from safepatch_jax.io import hub as names
from safepatch_jax.patch_file.create import create
from safepatch_jax.run.job import SETTINGS
from safepatch_jax.runtime import files
from safepatch_jax.testing import write_tiny_model
from tests.hub import files_of
from tests.patch_file.models import assert_same, patched_copy

NAME = "org/tiny"


@pytest.fixture
def base(tmp_path):
    return write_tiny_model(tmp_path / "base", dtype="bfloat16")


def test_a_workdir_stays_with_its_commit(hub, base, tmp_path):
    first = hub.put(NAME, files_of(base))
    own = {"cache_dir": tmp_path / "runs"}
    model = sp.load(NAME, **own)
    assert model.source == f"{NAME}@{first}" == model.settings.model.source
    assert model.source in repr(model) and "llama" in repr(model)
    files.write_json(model.workdir / "run" / SETTINGS, model.settings.to_dict())
    second = hub.put(NAME, files_of(base) | {"generation_config.json": b"{}"})
    names._obtained.cache_clear()
    assert sp.load(NAME, **own) == model  # the same folder and the same commit
    assert sp.load(NAME, tmp_path / "new", **own).source == f"{NAME}@{second}"
    with pytest.raises(ValueError, match="org/none"):
        sp.load("org/none", **own)


def test_a_patch_goes_onto_a_named_model(hub, base, tmp_path):
    model = patched_copy(base, tmp_path / "model")
    create(base, model, tmp_path / "x.patch", {})
    hub.put(NAME, files_of(base))
    patch = sp.read_patch(tmp_path / "x.patch")
    with pytest.raises(ValueError, match=f"{NAME} is a model of the Hub.*give out="):
        patch.apply(NAME)
    patch.apply(NAME, out=tmp_path / "out")
    assert_same(tmp_path / "out", model)
