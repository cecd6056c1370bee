"""What lies beside the weights is carried over or told; what is no model folder is named."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from safepatch_jax.io.companions import TEMPLATES, companion_names, copy_companions
from safepatch_jax.io.folder import Checkpoint
from safepatch_jax.io.safetensors_file import INDEX, SINGLE
from safepatch_jax.models.config import read_hf_config
from safepatch_jax.patch_file.apply import apply
from safepatch_jax.patch_file.create import create
from safepatch_jax.run.convert import convert, inspect_model
from safepatch_jax.testing import write_tiny_model

ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "org/base-7b"}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"


@pytest.fixture
def model(tmp_path):
    return write_tiny_model(tmp_path / "model")


def add(folder, name, text=""):
    path = folder / name
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(text)


def shards(folder):
    """Lay the weights into two files with an index, beside the single file."""
    tensors = load_file(folder / SINGLE)
    names, weight_map = ("a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors"), {}
    for i, name in enumerate(sorted(tensors)):
        weight_map[name] = names[i % 2]
    for file in names:
        part = {name: x for name, x in tensors.items() if weight_map[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    add(folder, INDEX, json.dumps({"weight_map": weight_map}))
    return names


@pytest.mark.parametrize(
    "names, words",
    [
        (["adapter_config.json"], ["LORA adapter (adapter_config.json) of org/base-7b", "not app"]),
        (["adapter_model.bin"], ["adapter_model.bin", "merge_and_unload"]),
        (["pytorch_model.bin"], ["not read: pytorch_model.bin (read: model.safetensors)"]),
        (["consolidated.00.pth", "original/x.pth"], ["consolidated.00.pth, original/"]),
        (["modeling_x.py", "z.py"], ["neither run nor copied: modeling_x.py, z.py"]),
        (["training_args.bin", "optimizer.pt", "README.md"], []),
    ],
)
def test_what_is_not_used_is_told(model, names, words):
    for name in names:
        add(model, name, json.dumps(ADAPTER) if name.endswith(".json") else "")
    notes = Checkpoint(model).notes
    assert len(notes) == bool(words)
    for part in words:
        assert part in notes[0], notes


def test_a_single_file_beside_an_index_is_the_one_that_is_read(model):
    names = shards(model)
    checkpoint = Checkpoint(model)
    assert checkpoint.layout == SINGLE
    assert checkpoint.notes == (f"weights that are not read: {', '.join(names)} (read: {SINGLE})",)
    (model / SINGLE).unlink()
    assert Checkpoint(model).notes == ()


def test_code_that_a_config_names(model):
    raw = json.loads((model / "config.json").read_text())
    raw["auto_map"] = {"AutoModelForCausalLM": "modeling_x.Model"}
    add(model, "config.json", json.dumps(raw))
    assert "what auto_map of config.json names" in Checkpoint(model).notes[0]


def test_notes_are_in_the_certificate_and_on_the_console_once(model, tmp_path, capsys):
    tensors = {f"module.{name}": x for name, x in load_file(model / SINGLE).items()}
    save_file(tensors, model / SINGLE, metadata={"format": "pt"})
    raw = json.loads((model / "config.json").read_text())
    add(model, "config.json", json.dumps(raw | {"auto_map": {"AutoModel": "modeling_x.Model"}}))
    add(model, "adapter_config.json", json.dumps(ADAPTER))
    add(model, f"{TEMPLATES}/tools.jinja", "{{ messages }}")
    path = convert(f"hf:{model}", f"hf:{tmp_path / 'out'}", certify="hashes")
    shown, content = capsys.readouterr().out, json.loads(path.read_text())
    assert len(content["notes"]) == 3
    for part in ("prefix 'module.'", "org/base-7b lies beside the weights", "auto_map"):
        assert shown.count(part) == 1 and sum(part in note for note in content["notes"]) == 1
    assert f"{TEMPLATES}/tools.jinja" in content["companions"]
    assert (tmp_path / "out" / TEMPLATES / "tools.jinja").read_text() == "{{ messages }}"
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    path = convert(f"hf:{model}", f"orbax:{tmp_path / 'tree'}")  # logits, but no torch
    content = json.loads(path.read_text())
    assert len(content["notes"]) == 3 and content["logits"]["torch"].startswith("not compared")
    assert sum("note: " in line for line in inspect_model(str(model), "all")) == 3


@pytest.mark.parametrize("place", ["folder", "file"])
def test_templates_that_lie_elsewhere_are_not_carried_over(model, tmp_path, place):
    add(tmp_path, "elsewhere/secret.jinja", "secret")
    if place == "folder":
        (model / TEMPLATES).symlink_to(tmp_path / "elsewhere")
    else:
        (model / TEMPLATES).mkdir()
        (model / TEMPLATES / "x.jinja").symlink_to(tmp_path / "elsewhere" / "secret.jinja")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="is a link that leaves its folder"):
        copy_companions(model, tmp_path / "out")


def test_templates_of_the_cache_are_carried_over(tmp_path):
    folder = write_tiny_model(tmp_path / "snapshots" / "abc")
    add(tmp_path, "blobs/0f", "{{ messages }}")
    (folder / TEMPLATES).mkdir()
    (folder / TEMPLATES / "x.jinja").symlink_to("../../../blobs/0f")
    (tmp_path / "out").mkdir()
    copy_companions(folder, tmp_path / "out")
    assert (tmp_path / "out" / TEMPLATES / "x.jinja").read_text() == "{{ messages }}"


def test_templates_are_bounded(model, tmp_path):
    add(model, f"{TEMPLATES}/x.jinja", "x" * 1_000_001)
    with pytest.raises(ValueError, match="more than 1,000,000 bytes"):
        companion_names(model)
    for i in range(101):
        add(model, f"{TEMPLATES}/{i}.jinja")
    with pytest.raises(ValueError, match="holds more than 100 additional chat templates"):
        companion_names(model)


def test_a_patch_in_place_needs_one_set_of_weights(model, tmp_path):
    patched = pathlib.Path(shutil.copytree(model, tmp_path / "patched"))
    tensors = load_file(model / SINGLE)
    save_file(
        tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1},
        patched / SINGLE,
        metadata={"format": "pt"},
    )
    create(model, patched, tmp_path / "x.safetensors")
    shards(model)
    with pytest.raises(ValueError, match="holds weights beside those that are read .*--out"):
        apply(tmp_path / "x.safetensors", model)
    apply(tmp_path / "x.safetensors", model, tmp_path / "out")
    assert np.array_equal(
        load_file(tmp_path / "out" / SINGLE)["model.norm.weight"], tensors["model.norm.weight"] + 1
    )


# Folders that are no models: the files in them, and what the error says.
KINDS = {
    "adapter": (["adapter_config.json"], ["LORA adapter", "org/base-7b", "merge_and_unload"]),
    "adapter, weights alone": (["adapter_model.safetensors"], ["adapter", "merge_and_unload"]),
    "ZeRO": (["global_step8/zero_pp_rank_0_mp_rank_00_optim_states.pt"], ["zero_to_fp32.py"]),
    "ZeRO, its folder": (["zero_pp_rank_0_mp_rank_00_model_states.pt"], ["zero_to_fp32.py"]),
    "FSDP": (["pytorch_model_fsdp_0/__0_0.distcp"], ["accelerate merge-weights"]),
    "FSDP, its folder": (["__0_0.distcp", ".metadata"], ["accelerate merge-weights"]),
    "Meta": (["consolidated.00.pth", "params.json"], ["original format of Meta or Mistral"]),
    "GGUF": (["a.gguf"], ["give the file, gguf:", "a.gguf"]),
    "orbax": (["model.json"], ["give orbax:"]),
    "cache": (["snapshots/a/config.json", "snapshots/b/config.json"], ["snapshots/b."]),
    "empty cache": (["snapshots/a/x"], ["download the model again"]),
    "all caches": (["models--org--x/refs/main"], ["models--org--x", "Give the snapshot"]),
    "one above": (["last/config.json"], ["but last in it has: give ", "/last."]),
    "nothing": (["README.md"], ["has no config.json, so it is not a model folder"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_is_no_model_is_named_with_the_way_out(tmp_path, kind):
    names, words = KINDS[kind]
    folder = tmp_path / "x"
    for name in names:
        add(folder, name, json.dumps(ADAPTER) if name.endswith("adapter_config.json") else "{}")
    if kind == "cache":
        add(folder, "refs/main", "b\n")
    with pytest.raises(ValueError) as raised:
        read_hf_config(folder)
    for part in words:
        assert part in str(raised.value), raised.value
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize("kind", ["adapter", "ZeRO", "FSDP", "Meta", "GGUF"])
def test_a_folder_with_a_config_and_no_weights_is_named_too(model, tmp_path, kind):
    (model / SINGLE).unlink()
    names, words = KINDS[kind]
    for name in names:
        add(model, name, json.dumps(ADAPTER))
    with pytest.raises(ValueError) as raised:
        convert(f"hf:{model}", f"hf:{tmp_path / 'out'}", certify="hashes")
    assert all(part in str(raised.value) for part in words)
    assert not (tmp_path / "out").exists()
    assert any(words[0] in line for line in inspect_model(str(model), "all"))


@pytest.mark.parametrize(
    "name, words",
    [
        (SINGLE, "is a file; give the folder of the model: .*model."),
        ("x.gguf", "is a GGUF file, not a folder: give gguf:"),
        ("absent", "No model folder '.*org/name of the Hugging Face Hub"),
    ],
)
def test_a_file_where_a_folder_is_needed(model, name, words):
    add(model, "x.gguf")
    with pytest.raises(ValueError, match=words):
        read_hf_config(model / name)


@pytest.mark.parametrize(
    "name", [SINGLE, INDEX, "pytorch_model.bin", "config.json", "generation_config.json"]
)
def test_git_lfs_pointers_are_named(model, name):
    from safepatch_jax.models.config import stop_ids

    if name in (INDEX, "pytorch_model.bin"):
        (model / SINGLE).unlink()
    add(model, name, POINTER)
    with pytest.raises(ValueError, match=f"{name} is a Git LFS pointer.*git lfs pull"):
        config = read_hf_config(model)
        Checkpoint(model)
        stop_ids(model, config)


@pytest.mark.parametrize("name", ["x" * 10**7, "../" + "y" * 10**7, 3, ["x"], None])
def test_an_index_with_bad_names_is_told_in_one_short_line(model, name):
    (model / SINGLE).unlink()
    add(model, INDEX, json.dumps({"weight_map": {f"{i}": name for i in range(3)}}))
    with pytest.raises(ValueError) as raised:
        Checkpoint(model)
    assert INDEX in str(raised.value) and len(str(raised.value)) < 900


def test_an_index_with_many_entries_is_refused_by_their_number(model):
    (model / SINGLE).unlink()
    names = {f"{i}": f"{i}.safetensors" for i in range(10_001)}
    add(model, INDEX, json.dumps({"weight_map": names}))
    with pytest.raises(ValueError, match="names more than 10,000 weight files"):
        Checkpoint(model)
