"""What is sent to the Hugging Face Hub, and what is not."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from safepatch_jax.patch_file.arithmetic import scale
from safepatch_jax.patch_file.create import create
from safepatch_jax.run import manifests
from safepatch_jax.run.card_data import Base, front_matter, licence_of
from safepatch_jax.run.push import parcel_of_model, parcel_of_patch, push
from safepatch_jax.runtime import unfinished
from tests.calls import ROOT, call

BASE = "org/base@" + 40 * "a"


@pytest.fixture
def model(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / "README.md").write_text("# A card\n")
    for name in ("modeling.py", "pytorch_model.bin", "optimizer.pt", ".env"):
        (folder / name).write_text("secret")
    return folder


@pytest.fixture
def patch(tiny, model, tmp_path):
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if name.endswith("up_proj.weight"))
    weights[name] = weights[name] + np.float32(1)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    about = {"source": BASE, "settings": {"patch": {"alpha": 1.0, "beta": 1.0}}}
    return create(tiny, model, tmp_path / "a.safetensors", about).path


def test_a_model_is_sent_in_one_commit_and_no_more_than_it_needs(hub, model):
    address = push(parcel_of_model(model), "org/new", private=True)
    assert address.startswith(f"{hub.address}/org/new/commit/")
    (sent,) = hub.pushed
    assert {"config.json", "tokenizer.json", "model.safetensors", "README.md"} <= sent.keys()
    assert not {"modeling.py", "pytorch_model.bin", "optimizer.pt", ".env"} & sent.keys()
    assert sent["model.safetensors"] == (model / "model.safetensors").read_bytes()
    assert hub.created[0]["name"] == "new" and hub.created[0]["organization"] == "org"


def test_a_patch_goes_with_a_card_of_its_own(hub, patch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    push(parcel_of_patch(patch), "org/new")
    (sent,) = hub.pushed
    assert sent.keys() == {"patch.safetensors", "README.md"}
    card = huggingface_hub.ModelCard(sent["README.md"].decode())
    assert card.data.base_model == "org/base" and "safepatching" in card.data.tags
    assert "--model=org/base" in card.text


def test_what_is_made_of_a_patch_is_sent_as_the_patch_is(tiny, model, patch, tmp_path):
    scale(patch, tiny, 0.5, tmp_path / "half.safetensors")
    half = parcel_of_patch(tmp_path / "half.safetensors")
    assert "--model=org/base" in half.contents["README.md"]
    about = {"source": BASE, "settings": {"patch": {"alpha": 0.0, "beta": 1.0}}}
    alone = create(tiny, model, tmp_path / "osm.safetensors", about).path
    scale(alone, tiny, 0.99, tmp_path / "scaled.safetensors")
    for path in (alone, tmp_path / "scaled.safetensors"):
        with pytest.raises(ValueError, match="OSM patch alone, a jailbroken model"):
            parcel_of_patch(path)


@pytest.mark.parametrize("name", ["safepatch", "push"])
def test_no_launcher_waits_for_what_speaks_to_the_hub(name):
    heavy = "{'jax', 'huggingface_hub', 'yaml'}"
    script = f"import launch.{name}, sys; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


def test_the_dry_run_shows_files_and_card(model):
    done = call("launch.push", f"--model={model}", "--repo=org/new", "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in done.stdout and "| # A card" in done.stdout
    assert "nothing was sent to org/new" in done.stdout and "modeling.py" not in done.stdout


def test_what_is_half_written_or_derived_is_not_sent(model, tmp_path):
    manifest = {"stage": "derive_osm", "key": 64 * "a", "result": {}, "outputs": {}}
    manifests.write(model.parent, manifest | {"deleted": False})
    with pytest.raises(ValueError, match="of the stage derive_osm"):
        parcel_of_model(model)
    (model.parent / "manifest.json").unlink()
    (model / "merge.json").write_text(json.dumps({"settings": {"patch": {"alpha": 0}}}))
    with pytest.raises(ValueError, match="it is the OSM patch alone, a jailbroken model"):
        parcel_of_model(model)
    (model / "merge.json").unlink()
    unfinished.write(model, tmp_path / "a.safetensors", "apply")
    with pytest.raises(ValueError, match="neither the backbone nor the patched model"):
        parcel_of_model(model)
    unfinished.remove(model)
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.json").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match="a link that leaves its folder"):
        parcel_of_model(model)


def test_torch_weights_and_wrong_names_are_refused(model):
    (model / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="torch weights, which hold pickles"):
        parcel_of_model(model)
    with pytest.raises(ValueError, match="'new' is not org/name"):
        push(None, "new")


def kept(model, settings):
    """Lay a model out as a notebook keeps what it patched."""
    place = model.parent / "kept"
    place.mkdir()
    folder = shutil.move(model, place / "patched")
    record = {"stage": manifests.KEPT, "key": 64 * "0", "deleted": False, "result": {}}
    manifests.write(place, record | {"outputs": {}} | settings)
    return folder


def test_what_a_notebook_patched_is_sent(hub, model):
    folder = kept(model, {"settings": {"patch": {"alpha": 1.0, "beta": 2.0}}})
    push(parcel_of_model(folder), "org/new")
    assert "model.safetensors" in hub.pushed[0]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"settings": {"patch": {"alpha": 1.0, "beta": 0.0}}}, "patch.beta=0.*a broken model"),
        ({}, "earlier version.*Delete the patch"),
    ],
)
def test_what_a_notebook_patched_with_one_side_is_not_sent(model, settings, message):
    with pytest.raises(ValueError, match=message):
        parcel_of_model(kept(model, settings))


def test_no_right_to_write(hub, model):
    hub.status = 403
    with pytest.raises(ValueError, match="answers 403.*hf auth login") as error:
        push(parcel_of_model(model), "org/new")
    assert "\n" not in str(error.value)


def test_front_matter_is_what_the_hub_reads():
    huggingface_hub = pytest.importorskip("huggingface_hub")
    base = Base("org/base", {"license": "other", "license_name": "a: b"})
    index = [
        {
            "name": "base, patched",
            "results": [
                {
                    "task": {"type": "text-generation"},
                    "dataset": {"name": "harmful prompts (x)", "type": "x"},
                    "metrics": [{"type": "harm", "name": "share", "value": 0.25}],
                }
            ],
        }
    ]
    front = front_matter(base, "finetune", tags=["a"], datasets=[], **{"model-index": index})
    data = huggingface_hub.ModelCard(f"{front}\n# x\n").data
    assert (data.base_model, data.license, data.license_name) == ("org/base", "other", "a: b")
    assert data.to_dict()["base_model_relation"] == "finetune" and data.datasets is None
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value) == ("harm", 0.25)
    assert huggingface_hub.repocard_data.eval_results_to_model_index(
        data.model_name, data.eval_results
    )


@pytest.mark.parametrize(
    "text, licence",
    [
        ("---\nlicense: llama3.1\ntags: [x]\n---\n# x", {"license": "llama3.1"}),
        ("---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        ("---\nlicense: [a, b]\n---\n", {}),
        ("---\nlicense: !!python/object/apply:os.getcwd []\n---\n", {}),
        ("---\n[\n---\n", {}),
        ("no front matter", {}),
        ("---\nlicense: mit\n", {}),
    ],
)
def test_the_licence_of_a_base_is_read_from_its_card(tmp_path, text, licence):
    (tmp_path / "README.md").write_text(text, newline="")
    assert licence_of(tmp_path) == licence
